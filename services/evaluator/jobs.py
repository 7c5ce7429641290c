"""The evaluator's jobs: each calls the domain and passes on what follows.

The domain computes with torch, so it is imported by the context, in the pool's child, and never
by the worker's main process.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from services.evaluator import metrics
from stillhouse.chassis.jobs import Job, JobFunction
from stillhouse.contracts.envelope import Envelope
from stillhouse.contracts.events import StageProgressed

if TYPE_CHECKING:
    from services.evaluator.evaluation import Evaluation, Next

PROGRESS_SECONDS = 5.0


@dataclass
class EvaluatorContext:
    """What jobs need in the pool's child. `publish` takes envelopes, `enqueue` a job."""

    evaluation: Evaluation
    publish: Callable[..., None]
    enqueue: Callable[[Job], None]
    progressed_at: dict[str, float] = field(default_factory=dict)

    def may_progress(self, pipeline: str) -> bool:
        """Whether `stage.progressed` of a pipeline is due: at most every five seconds."""
        now = time.monotonic()
        if now - self.progressed_at.get(pipeline, -PROGRESS_SECONDS) < PROGRESS_SECONDS:
            return False
        self.progressed_at = {
            name: at for name, at in self.progressed_at.items() if now - at < PROGRESS_SECONDS
        } | {pipeline: now}
        return True


def evaluate_training(job: Job, context: EvaluatorContext) -> None:
    _pass_on(job, context, context.evaluation.evaluate_training(job.tenant_id, job.pipeline_id))


def evaluate_checkpoint(job: Job, context: EvaluatorContext) -> None:
    following = context.evaluation.evaluate_checkpoint(
        job.tenant_id, job.pipeline_id, int(job.args["step"])
    )
    _pass_on(job, context, following)


def evaluate_part(job: Job, context: EvaluatorContext) -> None:
    started = time.monotonic()

    def fetching(done: int, total: int) -> None:
        """Say that something moves: the reference may be many gigabytes."""
        if total and context.may_progress(job.pipeline_id):
            figures = {"fetched_bytes": float(done), "weights_bytes": float(total)}
            context.publish(job.seal(StageProgressed(stage="evaluate", figures=figures)))

    following = context.evaluation.evaluate_part(
        job.tenant_id, job.pipeline_id, int(job.args["step"]), int(job.args["part"]), fetching
    )
    if following.rows:
        metrics.ROWS.inc(following.rows)
        metrics.PART_SECONDS.observe(time.monotonic() - started)
    _pass_on(job, context, following)


def evaluate_student(job: Job, context: EvaluatorContext) -> None:
    _pass_on(job, context, context.evaluation.evaluate_student(job.tenant_id, job.pipeline_id))


def _pass_on(job: Job, context: EvaluatorContext, following: Next) -> None:
    """Publish first: a job that comes again finds its output and publishes it again."""
    if following.written:
        metrics.EVALUATIONS.labels(following.written).inc()
        metrics.LAST_SUCCESS.set_to_current_time()
    envelopes: list[Envelope] = []
    for event in following.events:
        if isinstance(event, StageProgressed) and not context.may_progress(job.pipeline_id):
            continue
        envelopes.append(job.seal(event))
    if envelopes:
        context.publish(*envelopes)
    for name, args in following.jobs:
        context.enqueue(job.model_copy(update={"name": name, "args": args}))


JOBS: Mapping[str, JobFunction] = {
    function.__name__: function
    for function in (evaluate_training, evaluate_checkpoint, evaluate_part, evaluate_student)
}
