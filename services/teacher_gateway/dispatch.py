"""Which batches may be asked now: in order, held-out ones first, a few at once.

Train batches wait for `heldout.sealed`, and with `start: after_student` for the student's step 0
as well, ten minutes at most. Over all pipelines only so many batches are open that a process of
the workers stays free for events.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass

from sqlalchemy import ColumnElement, and_, or_, select, update
from sqlalchemy.orm import Session

from services.teacher_gateway.database import now
from services.teacher_gateway.ledger import changed
from services.teacher_gateway.models import Batch, History, Pipeline
from services.teacher_gateway.stop import TERMINAL
from services.teacher_gateway.timeouts import GatewayTimeouts
from stillhouse.contracts.events import CheckpointSaved, HeldoutSealed


@dataclass(frozen=True)
class Due:
    """A batch whose job is to be put on the queue."""

    tenant_id: str
    pipeline_id: str
    batch: int
    epoch: int


def _dead(clock: float) -> ColumnElement[bool]:
    return and_(Batch.state == "due", Batch.lease_until <= clock, Batch.next_attempt_at <= clock)


def find_dead(session: Session) -> bool:
    """Whether there is anything to reap; asked first, since writing takes the one lock."""
    return (
        session.execute(select(Batch.batch).where(_dead(now(session))).limit(1)).first() is not None
    )


def reap(session: Session) -> int:
    """Make batches whose worker died, or whose job nobody took, due again.

    The reservation of a dead attempt stays until the next one settles it, and its holder until
    the next one counts the death.
    """
    return changed(
        session,
        update(Batch).where(_dead(now(session))).values(state="waiting", lease_until=0.0),
    )


def find_due(session: Session, times: GatewayTimeouts, *, window: int, at_once: int) -> list[Due]:
    """Choose batches to ask for, fairly between pipelines, `at_once` of all in flight."""
    clock = now(session)
    in_flight: dict[str, int] = {}
    for (pipeline_id,) in session.execute(select(Batch.pipeline_id).where(Batch.state == "due")):
        in_flight[pipeline_id] = in_flight.get(pipeline_id, 0) + 1
    free = at_once - sum(in_flight.values())
    if free <= 0:
        return []
    pipelines = session.execute(
        select(Pipeline).where(
            Pipeline.state == "running",
            or_(Pipeline.collect == "running", Pipeline.stopping != ""),
        )
    ).scalars()
    queues = {
        pipeline.pipeline_id: _ready(session, pipeline, times, window, clock)
        for pipeline in sorted(pipelines, key=lambda p: p.created_at)
    }
    chosen: list[Due] = []
    while len(chosen) < free:
        waiting = [name for name, queue in queues.items() if queue]
        if not waiting:
            break
        first = min(waiting, key=lambda name: in_flight.get(name, 0))
        chosen.append(queues[first].pop(0))
        in_flight[first] = in_flight.get(first, 0) + 1
    return chosen


def _ready(
    session: Session, pipeline: Pipeline, times: GatewayTimeouts, window: int, clock: float
) -> list[Due]:
    """The batches of one pipeline that may be asked now, lowest first."""
    open_ones = (
        select(Batch)
        .where(Batch.pipeline_id == pipeline.pipeline_id, Batch.state != "closed")
        .order_by(Batch.batch)
    )
    if pipeline.stopping:
        # Only what a dead attempt reserved is still to be settled.
        rows: Sequence[Batch] = (
            session.execute(open_ones.where(Batch.reserved_microusd > 0)).scalars().all()
        )
    else:
        if not train_may_start(session, pipeline, times, clock):
            open_ones = open_ones.where(Batch.batch < pipeline.heldout_batches)
        rows = session.execute(open_ones.limit(window)).scalars().all()
    return [
        Due(row.tenant_id, row.pipeline_id, row.batch, row.epoch)
        for row in rows
        if row.state == "waiting"
        and row.lease_until <= clock
        and (
            row.next_attempt_at <= clock
            or bool(pipeline.stopping)
            or (row.close_by is not None and row.close_by <= clock)
        )
    ]


def train_may_start(
    session: Session, pipeline: Pipeline, times: GatewayTimeouts, clock: float
) -> bool:
    """Whether train batches may be asked: the held-out rows are frozen, the student is ready."""
    sealed = session.execute(
        select(History.recorded_at).where(
            History.pipeline_id == pipeline.pipeline_id, History.type == HeldoutSealed.TYPE
        )
    ).first()
    if sealed is None:
        return False
    if json.loads(pipeline.spec).get("start", "at_once") != "after_student":
        return True
    if clock - sealed[0] >= times.student:
        return True
    ready = select(History.sequence).where(
        History.pipeline_id == pipeline.pipeline_id,
        History.type == CheckpointSaved.TYPE,
        History.pair == 0,
    )
    return session.execute(ready).first() is not None


def mark_enqueued(session: Session, due: Due, times: GatewayTimeouts) -> None:
    """Note that a batch's job is on the queue, unless a worker was faster."""
    changed(
        session,
        update(Batch)
        .where(
            and_(
                Batch.pipeline_id == due.pipeline_id,
                Batch.batch == due.batch,
                Batch.epoch == due.epoch,
                Batch.state == "waiting",
            )
        )
        .values(state="due", next_attempt_at=now(session) + times.enqueue_again),
    )


def find_unfinished(session: Session) -> list[Pipeline]:
    """Pipelines that a crash left between two transactions: stops, and last events."""
    stopping = and_(Pipeline.stopping != "", Pipeline.state.not_in(TERMINAL))
    open_batch = (
        select(Batch.batch)
        .where(Batch.pipeline_id == Pipeline.pipeline_id, Batch.state != "closed")
        .exists()
    )
    closed = and_(
        Pipeline.state == "running",
        Pipeline.stopping == "",
        Pipeline.responses_completed_at.is_(None),
        Pipeline.collect == "running",
        ~open_batch,
    )
    return list(session.execute(select(Pipeline).where(or_(stopping, closed))).scalars())
