"""The gateway's jobs by name, each a thin way into the domain."""

from __future__ import annotations

from services.teacher_gateway import accept, closing, collect, probe, record, stop
from services.teacher_gateway.context import Context
from stillhouse.chassis.jobs import Job, JobFunction


def accept_pipeline(job: Job, context: Context) -> None:
    """Resolve a posted pipeline, or fail it with a reason."""
    accept.accept_pipeline(context, job.pipeline_id)


def probe_teacher(job: Job, context: Context) -> None:
    """Ask the teacher one thing before all others."""
    probe.probe_teacher(context, job.pipeline_id)


def collect_batch(job: Job, context: Context) -> None:
    """Do one attempt at a batch."""
    collect.collect_batch(context, job.pipeline_id, int(job.args["batch"]))


def settle_pipeline(job: Job, context: Context) -> None:
    """Finish what a crash left between two transactions: the last event, or the stop."""
    stop.finish_stopping(context.engine, context.store, job.pipeline_id)
    closing.complete_responses(context, job.pipeline_id)


def record_event(job: Job, context: Context) -> None:
    """Record an event of another service."""
    assert job.caused_by is not None, "handlers give the event along"
    record.record_event(context, job.caused_by)


JOBS: dict[str, JobFunction] = {
    function.__name__: function
    for function in (
        accept_pipeline,
        probe_teacher,
        collect_batch,
        settle_pipeline,
        record_event,
    )
}
