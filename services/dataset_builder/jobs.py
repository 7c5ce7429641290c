"""The builder's jobs: look at stored state, call the domain, publish what is now true."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol, TypeVar

from services.dataset_builder import metrics, seal, shards
from services.dataset_builder.build import BuiltShard, build_shard
from services.dataset_builder.inputs import Inputs
from stillhouse.chassis.errors import PermanentError
from stillhouse.chassis.jobs import Job, JobFunction
from stillhouse.chassis.logs import logger
from stillhouse.chassis.storage import ObjectStore
from stillhouse.contracts import artifacts
from stillhouse.contracts.envelope import Envelope
from stillhouse.contracts.events import (
    Event,
    ResponseBatchStored,
    ResponsesCompleted,
    StageProgressed,
)
from stillhouse.contracts.spec import ResolvedSpec

log = logger(__name__)

PROGRESS_SECONDS = 5.0

E = TypeVar("E", bound=Event)


class Publishes(Protocol):
    def publish(self, *envelopes: Envelope) -> None: ...


@dataclass
class BuilderContext:
    """What the jobs of one process share."""

    store: ObjectStore
    publisher: Publishes
    job_seconds: float
    # `stage.progressed` of a pipeline at most so often: by as much more as there are processes.
    progress_seconds: float = PROGRESS_SECONDS
    inputs: Inputs = field(init=False)
    progressed: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.inputs = Inputs(self.store)


def run_build_shard(job: Job, context: BuilderContext) -> None:
    """Make the shard of a batch, tell it, and seal what it completes."""
    event = _cause(job, ResponseBatchStored)
    if _stopped(job, context):
        return
    spec = context.inputs.spec(job.tenant_id, job.pipeline_id)
    built = build_shard(
        context.store,
        context.inputs,
        spec,
        event.batch,
        event.manifest,
        job_seconds=context.job_seconds,
    )
    if built is None:
        return
    _publish(job, context, shards.shard_event(built.header, built.ref), *_progress(context, built))
    if built.fresh:
        _observe_lag(job)
        log.info(
            "shard written",
            batch=event.batch,
            split=built.header.split,
            rows=built.header.rows,
            rejected=len(built.header.rejections),
            seconds=round(built.seconds, 3),
        )
    _seal_what_is_complete(job, context, spec, event.batch)


def run_seal_dataset(job: Job, context: BuilderContext) -> None:
    """Seal the dataset if all its shards exist; otherwise whoever writes the last one does."""
    _cause(job, ResponsesCompleted)
    if _stopped(job, context):
        return
    spec = context.inputs.spec(job.tenant_id, job.pipeline_id)
    event = seal.dataset_event(context.store, spec)
    if event is None:
        log.info("not sealed: shards are still to come")
        return
    _publish(job, context, event)


def _seal_what_is_complete(
    job: Job, context: BuilderContext, spec: ResolvedSpec, batch: int
) -> None:
    if batch < spec.batches.heldout:
        heldout = seal.heldout_event(context.store, spec)
        if heldout is not None:
            _publish(job, context, heldout)
    if context.store.exists(artifacts.responses_key(spec.tenant_id, spec.pipeline_id)):
        dataset = seal.dataset_event(context.store, spec)
        if dataset is not None:
            _publish(job, context, dataset)


def _publish(job: Job, context: BuilderContext, *events: Event) -> None:
    context.publisher.publish(*[job.seal(event) for event in events])


def _progress(context: BuilderContext, built: BuiltShard) -> list[Event]:
    now, pipeline = time.monotonic(), built.header.pipeline_id
    last = context.progressed.get(pipeline)
    if not built.fresh or (last is not None and now - last < context.progress_seconds):
        return []
    # Pipelines that no longer move need not be remembered.
    for name, at in list(context.progressed.items()):
        if now - at > context.progress_seconds:
            del context.progressed[name]
    context.progressed[pipeline] = now
    figures = {
        "batch": float(built.header.batch),
        "rows": float(built.header.rows),
        "rejected": float(len(built.header.rejections)),
        "supervised_tokens": float(built.header.supervised_tokens),
        "seconds": round(built.seconds, 3),
    }
    return [StageProgressed(stage="build", figures=figures)]


def _observe_lag(job: Job) -> None:
    assert job.caused_by is not None
    metrics.SHARD_LAG.observe(max(0.0, time.time() - job.caused_by.occurred_at.timestamp()))


def _stopped(job: Job, context: BuilderContext) -> bool:
    if not context.store.exists(artifacts.stopped_key(job.tenant_id, job.pipeline_id)):
        return False
    log.info("the pipeline is stopped; nothing is done for it")
    return True


def _cause(job: Job, kind: type[E]) -> E:
    """The event that asked for a job."""
    event = job.caused_by.event() if job.caused_by else None
    if not isinstance(event, kind):
        raise PermanentError(
            f"expected {job.name} to be caused by {kind.TYPE}, found "
            f"{event.TYPE if event else 'no event'}",
            reason="wrong_cause",
        )
    return event


JOBS: Mapping[str, JobFunction] = {
    "build_shard": run_build_shard,
    "seal_dataset": run_seal_dataset,
}
