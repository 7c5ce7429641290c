"""How a pipeline stops: cancelled by its user, or failed by an error that nobody gets over.

The decision is one transaction (`mark_stopping`); the first one stands. Everything after it can
be repeated (`finish_stopping`): the object that tells every job, the event, and the terminal
state, which waits until no money is reserved and no worker holds a batch.
"""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Literal

from sqlalchemy import Engine, or_, select, update
from sqlalchemy.orm import Session

from services.teacher_gateway.database import now, reading, transaction
from services.teacher_gateway.ledger import changed, lock, lock_batches
from services.teacher_gateway.models import Batch, Item, Pipeline
from services.teacher_gateway.outbox import emit
from services.teacher_gateway.reasons import PIPELINE_STOPPED
from stillhouse.chassis.errors import StoreUnavailable
from stillhouse.chassis.logs import logger
from stillhouse.chassis.storage import AlreadyExists, ObjectStore
from stillhouse.contracts.artifacts import ObjectRef, stopped_key
from stillhouse.contracts.events import STAGES, PipelineStopped, Stage, StageFailed
from stillhouse.contracts.responses import Stopped

log = logger(__name__)

Outcome = Literal["cancelled", "failed"]
TERMINAL = frozenset({"released", "withheld", "failed", "cancelled"})
ENDED_STAGES = frozenset({"done", "failed", "cancelled"})


def mark_stopping(session: Session, pipeline: Pipeline, outcome: Outcome, reason: str) -> bool:
    """Decide that a pipeline stops, and why; False when it has ended or stops already."""
    if pipeline.state in TERMINAL or pipeline.stopping:
        return False
    pipeline.stopping = outcome
    pipeline.reason = reason
    for stage in STAGES:
        if getattr(pipeline, stage) not in ENDED_STAGES:
            setattr(pipeline, stage, outcome)
    # What lies at a provider is cancelled there at once.
    there = (Batch.pipeline_id == pipeline.pipeline_id, Batch.provider_batch.is_not(None))
    lock_batches(session, *there)
    changed(session, update(Batch).where(*there).values(next_attempt_at=0.0))
    session.flush()
    return True


def fail_pipeline(
    session: Session, pipeline: Pipeline, stage: Stage, reason: str, detail: str
) -> None:
    """Fail a pipeline by the gateway's own judgement: the event and the decision in one."""
    if pipeline.state in TERMINAL or pipeline.stopping:
        return
    setattr(pipeline, stage, "failed")
    emit(session, pipeline, StageFailed(stage=stage, reason=reason, detail=detail, fatal=True))
    mark_stopping(session, pipeline, "failed", f"{stage}: {reason}: {detail}")


def cancel_pipeline(engine: Engine, store: ObjectStore, pipeline_id: str, reason: str) -> str:
    """Cancel a pipeline; return its state, which is `cancelled` once nothing is reserved.

    Idempotent. Raises LookupError for an unknown pipeline. With the store down the decision
    stands, and the clock does the rest.
    """
    with transaction(engine) as session:
        pipeline = lock(session, pipeline_id)
        if pipeline is None:
            raise LookupError(f"no pipeline {pipeline_id}")
        mark_stopping(session, pipeline, "cancelled", reason)
    try:
        finish_stopping(engine, store, pipeline_id)
    except StoreUnavailable as error:
        log.warning("cancelled; the clock tells the other services", why=str(error))
    with reading(engine) as session:
        return session.execute(
            select(Pipeline.state).where(Pipeline.pipeline_id == pipeline_id)
        ).scalar_one()


def finish_stopping(engine: Engine, store: ObjectStore, pipeline_id: str) -> bool:
    """Do what is left of stopping; True once the state is terminal."""
    with reading(engine) as session:
        pipeline = session.get(Pipeline, pipeline_id)
        if pipeline is None or pipeline.state in TERMINAL or not pipeline.stopping:
            return pipeline is not None and pipeline.state in TERMINAL
    stopped, ref = _write_stopped(store, pipeline)
    with transaction(engine) as session:
        held = lock(session, pipeline_id)
        assert held is not None, "pipelines are never deleted"
        if held.state in TERMINAL:
            return True
        emit(session, held, PipelineStopped(stopped=ref, outcome=stopped.outcome))
        clock = now(session)
        idle = (
            Batch.pipeline_id == pipeline_id,
            Batch.state != "closed",
            Batch.lease_until <= clock,
            Batch.reserved_microusd == 0,
            Batch.provider_batch.is_(None),
        )
        lock_batches(session, *idle)
        changed(session, update(Batch).where(*idle).values(state="closed", closed_at=clock))
        open_batch = select(Batch.batch).where(
            Batch.pipeline_id == pipeline_id,
            or_(Batch.state != "closed", Batch.reserved_microusd > 0),
        )
        if held.reserved_microusd > 0 or session.execute(open_batch.limit(1)).first():
            return False
        # `answered`: paid for, and no shard with them was recorded, nor will one be.
        for outcome, stage in (("pending", "collect"), ("answered", "build")):
            changed(
                session,
                update(Item)
                .where(Item.pipeline_id == pipeline_id, Item.outcome == outcome)
                .values(outcome="rejected", stage=stage, reason=PIPELINE_STOPPED),
            )
        held.state = held.stopping
        held.ended_at = clock
    return True


def _write_stopped(store: ObjectStore, pipeline: Pipeline) -> tuple[Stopped, ObjectRef]:
    key = stopped_key(pipeline.tenant_id, pipeline.pipeline_id)
    if found := store.find_model(key, Stopped):
        return found
    outcome: Outcome = "cancelled" if pipeline.stopping == "cancelled" else "failed"
    stopped = Stopped(
        tenant_id=pipeline.tenant_id,
        pipeline_id=pipeline.pipeline_id,
        outcome=outcome,
        reason=outcome,
        detail=pipeline.reason,
        stopped_at=datetime.now(UTC).isoformat(),
    )
    try:
        return stopped, store.put_new_model(key, stopped)
    except AlreadyExists:
        found = store.find_model(key, Stopped)
        assert found is not None, "it was there a moment ago and is never removed"
        return found
