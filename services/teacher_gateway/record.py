"""What the other services' events do to a pipeline's row: history first, effect in the same
transaction, each event once, in any order.

The state machine only moves forward: terminal states absorb, and a late or repeated event finds
its effect already there.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from sqlalchemy import func, select, update
from sqlalchemy.orm import Session

from services.teacher_gateway.batch_input import read_spec
from services.teacher_gateway.context import Context
from services.teacher_gateway.database import now, reading, transaction
from services.teacher_gateway.ledger import changed, lock
from services.teacher_gateway.models import History, Item, Pipeline
from services.teacher_gateway.outbox import emit
from services.teacher_gateway.outbox import record as append
from services.teacher_gateway.redrive import MOVED
from services.teacher_gateway.release import write_release
from services.teacher_gateway.stop import (
    ENDED_STAGES,
    TERMINAL,
    finish_stopping,
    mark_stopping,
)
from stillhouse.chassis.errors import PermanentError, RetryableError
from stillhouse.chassis.logs import logger
from stillhouse.chassis.storage import ObjectStore
from stillhouse.contracts.artifacts import ObjectRef
from stillhouse.contracts.envelope import Envelope
from stillhouse.contracts.events import (
    CheckpointEvaluated,
    CheckpointSaved,
    DatasetSealed,
    Event,
    HeldoutSealed,
    ShardWritten,
    Stage,
    StageFailed,
    StageProgressed,
    StudentEvaluated,
    StudentReleased,
    StudentWithheld,
    TrainingCompleted,
)
from stillhouse.contracts.shards import ShardHeader, read_header
from stillhouse.contracts.trainings import Release

log = logger(__name__)


@dataclass(frozen=True)
class Fetched:
    """What an event's effect needs from the store, read before the transaction."""

    header: ShardHeader | None = None
    release: tuple[Release, ObjectRef] | None = None


def record_event(context: Context, envelope: Envelope) -> None:
    """Record an event of another service and do what it means; nothing when it is known."""
    event = envelope.event()
    pipeline_id = envelope.pipeline_id
    with reading(context.engine) as session:
        pipeline = session.get(Pipeline, pipeline_id)
        if pipeline is None or pipeline.tenant_id != envelope.tenant_id:
            log.warning("an event of an unknown pipeline", type=envelope.type)
            return
        known = select(History.sequence).where(
            History.pipeline_id == pipeline_id, History.event_id == envelope.event_id
        )
        if session.execute(known).first() is not None:
            return
        ends = pipeline.state in TERMINAL or bool(pipeline.stopping)
        if isinstance(event, StudentEvaluated) and not ends and pipeline.build != "done":
            # Before the decision is written. Once done, a stage stays done.
            raise RetryableError(
                "a student came before all shards of its dataset were recorded: re-drive brings "
                "the shards, then the student again"
            )
    fetched = Fetched() if ends else _fetch(context.store, envelope, event)
    with transaction(context.engine) as session:
        held = lock(session, pipeline_id)
        assert held is not None, "pipelines are never deleted"
        if not append(session, held, envelope):
            return
        if held.state not in TERMINAL and not held.stopping:
            _EFFECTS[type(event)](session, held, envelope, event, fetched)
        stopping = bool(held.stopping) and held.state not in TERMINAL
    if stopping:
        finish_stopping(context.engine, context.store, pipeline_id)


def _fetch(store: ObjectStore, envelope: Envelope, event: Event) -> Fetched:
    if isinstance(event, ShardWritten):
        return Fetched(header=_header(store, event.shard))
    if isinstance(event, StudentEvaluated):
        resolved = read_spec(store, envelope.tenant_id, envelope.pipeline_id)
        return Fetched(release=write_release(store, resolved, envelope, event))
    return Fetched()


def _header(store: ObjectStore, shard: ObjectRef) -> ShardHeader:
    """Read what became of every item of a batch from a shard's metadata."""
    data = store.get(shard)
    try:
        return read_header(data)
    except ValueError as error:
        raise PermanentError(f"{shard.key}: {error}", reason="bad_shard") from error


# Effects: each runs in the transaction that recorded its event, on a locked pipeline.


def _advance(pipeline: Pipeline, stage: Stage, to: str) -> None:
    if getattr(pipeline, stage) not in ENDED_STAGES:
        setattr(pipeline, stage, to)


def _shard_written(
    session: Session, pipeline: Pipeline, _: Envelope, event: ShardWritten, fetched: Fetched
) -> None:
    header = fetched.header
    if header is None or event.dataset_id != pipeline.dataset_id:
        log.warning("a shard of another dataset", dataset=event.dataset_id)
        return
    for rejection in header.rejections:
        if rejection.stage == "build":
            _end(session, pipeline, Item.item_id == rejection.item_id, "rejected", rejection)
    of_batch = Item.batch == event.batch
    _end(session, pipeline, of_batch, "row", None)
    counted = select(func.count()).where(
        Item.pipeline_id == pipeline.pipeline_id, of_batch, Item.outcome == "row"
    )
    rows = int(session.execute(counted).scalar_one())
    if rows != event.rows:
        raise PermanentError(
            f"batch {event.batch}: the shard has {event.rows} rows, and {rows} answered items "
            "were not rejected: expected each item to be one row or one rejection",
            reason="items_do_not_add_up",
        )
    pipeline.rows += event.rows
    _advance(pipeline, "build", "done" if _built(session, pipeline) else "running")


def _end(
    session: Session, pipeline: Pipeline, which: Any, outcome: str, rejection: Any | None
) -> None:
    """Give answered items their one outcome."""
    values = {"outcome": outcome}
    if rejection is not None:
        values |= {
            "stage": rejection.stage,
            "reason": rejection.reason,
            "detail": rejection.detail,
        }
    changed(
        session,
        update(Item)
        .where(Item.pipeline_id == pipeline.pipeline_id, Item.outcome == "answered", which)
        .values(**values),
    )


def _heldout_sealed(
    _: Session, pipeline: Pipeline, __: Envelope, event: HeldoutSealed, ___: Fetched
) -> None:
    if event.dataset_id == pipeline.dataset_id:
        _advance(pipeline, "build", "running")


def _dataset_sealed(
    session: Session, pipeline: Pipeline, _: Envelope, event: DatasetSealed, __: Fetched
) -> None:
    if event.dataset_id == pipeline.dataset_id:
        _advance(pipeline, "build", "done" if _built(session, pipeline) else "running")


def _built(session: Session, pipeline: Pipeline) -> bool:
    """Whether the dataset is sealed and every item has its row or its rejection: a lost
    `shard.written` keeps the stage open, so that re-drive brings it again."""
    sealed = select(History.sequence).where(
        History.pipeline_id == pipeline.pipeline_id, History.type == DatasetSealed.TYPE
    )
    if session.execute(sealed).first() is None:
        return False
    unended = select(Item.item_id).where(
        Item.pipeline_id == pipeline.pipeline_id, Item.outcome.in_(("pending", "answered"))
    )
    return session.execute(unended.limit(1)).first() is None


def _trained(
    pipeline: Pipeline, envelope: Envelope, step: float, tokens: float, gpu_seconds: float
) -> None:
    pipeline.gpu_seconds = max(pipeline.gpu_seconds, gpu_seconds)
    pipeline.trained_tokens = max(pipeline.trained_tokens, int(tokens))
    if step >= 1 and pipeline.first_training_step_at is None:
        pipeline.first_training_step_at = envelope.occurred_at.timestamp()
    _advance(pipeline, "train", "running")


def _checkpoint_saved(
    _: Session, pipeline: Pipeline, envelope: Envelope, event: CheckpointSaved, __: Fetched
) -> None:
    if event.training_id == pipeline.training_id:
        _trained(pipeline, envelope, event.step, event.tokens, event.gpu_seconds)


def _training_completed(
    _: Session, pipeline: Pipeline, envelope: Envelope, event: TrainingCompleted, __: Fetched
) -> None:
    if event.training_id == pipeline.training_id:
        _trained(pipeline, envelope, event.step, event.tokens, event.gpu_seconds)
        _advance(pipeline, "train", "done")


def _checkpoint_evaluated(
    _: Session, pipeline: Pipeline, __: Envelope, ___: CheckpointEvaluated, ____: Fetched
) -> None:
    _advance(pipeline, "evaluate", "running")


def _student_evaluated(
    session: Session,
    pipeline: Pipeline,
    envelope: Envelope,
    _: StudentEvaluated,
    fetched: Fetched,
) -> None:
    assert fetched.release is not None, "the decision was written before this transaction"
    release, ref = fetched.release
    _advance(pipeline, "evaluate", "done")
    _advance(pipeline, "release", "done")
    kind = StudentReleased if release.outcome == "released" else StudentWithheld
    emit(session, pipeline, kind(student_id=release.student_id, release=ref), envelope)
    pipeline.state = release.outcome
    pipeline.reason = "; ".join(release.reasons)
    pipeline.ended_at = now(session)


def _stage_progressed(
    session: Session,
    pipeline: Pipeline,
    envelope: Envelope,
    event: StageProgressed,
    _: Fetched,
) -> None:
    figures = json.loads(pipeline.figures)
    figures[event.stage] = event.figures
    figures.setdefault(MOVED, {})[event.stage] = now(session)
    pipeline.figures = json.dumps(figures, sort_keys=True)
    if event.stage == "train":
        seen = event.figures
        _trained(
            pipeline,
            envelope,
            seen.get("step", 0),
            seen.get("tokens", 0),
            seen.get("gpu_seconds", 0),
        )
    elif event.stage != "collect":
        _advance(pipeline, event.stage, "running")


def _stage_failed(
    session: Session, pipeline: Pipeline, _: Envelope, event: StageFailed, __: Fetched
) -> None:
    if not event.fatal:
        log.warning("a stage met an error", stage=event.stage, reason=event.reason)
        return
    if getattr(pipeline, event.stage) not in ENDED_STAGES:
        setattr(pipeline, event.stage, "failed")
    mark_stopping(session, pipeline, "failed", f"{event.stage}: {event.reason}: {event.detail}")


_EFFECTS: dict[type[Event], Callable[..., None]] = {
    ShardWritten: _shard_written,
    HeldoutSealed: _heldout_sealed,
    DatasetSealed: _dataset_sealed,
    CheckpointSaved: _checkpoint_saved,
    TrainingCompleted: _training_completed,
    CheckpointEvaluated: _checkpoint_evaluated,
    StudentEvaluated: _student_evaluated,
    StageProgressed: _stage_progressed,
    StageFailed: _stage_failed,
}
