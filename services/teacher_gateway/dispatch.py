"""Which batches may be asked now: in order, held-out ones first, a few at once.

Train batches wait for `heldout.sealed`, and with `start: after_student` for the student's step 0
as well, ten minutes at most. Over all pipelines only so many batches are open that a process of
the workers stays free for events.

Tenants take turns, in them pipelines, in those teachers: whoever has the fewest batches in flight
is first, and of those whoever waits the longest since its last one was sent. A teacher that is
away, or asked for a pause, is asked nothing; after that one batch goes first. One that hangs keeps
no place that another teacher needs: where several have open batches, none has all places.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from sqlalchemy import ColumnElement, and_, or_, select, update
from sqlalchemy.orm import Session

from services.teacher_gateway.database import now
from services.teacher_gateway.ledger import changed, lock_batches
from services.teacher_gateway.limits.endpoints import asked_again_at
from services.teacher_gateway.limits.strain import calls_at_once
from services.teacher_gateway.models import (
    Batch,
    History,
    Pipeline,
    TeacherEndpoint,
    TeacherTenant,
    Tenant,
)
from services.teacher_gateway.stop import TERMINAL
from services.teacher_gateway.timeouts import GatewayTimeouts
from stillhouse.contracts.events import CheckpointSaved, HeldoutSealed
from stillhouse.contracts.spec import Limits


@dataclass(frozen=True)
class Due:
    """A batch whose job is to be put on the queue."""

    tenant_id: str
    pipeline_id: str
    batch: int
    epoch: int
    endpoint: str = ""
    # Whether items are asked for, and it is not only closed or looked at; calls at once that its
    # spec allows.
    asks: bool = True
    calls: int = 1


def _dead(clock: float) -> ColumnElement[bool]:
    return and_(Batch.state == "due", Batch.lease_until <= clock, Batch.next_attempt_at <= clock)


def find_dead(session: Session) -> bool:
    """Whether there is anything to reap; asked first, since writing takes the one lock."""
    return (
        session.execute(select(Batch.batch).where(_dead(now(session))).limit(1)).first() is not None
    )


def find_flying(session: Session) -> bool:
    """Whether any batch is on the queue or with a worker."""
    flying = select(Batch.batch).where(Batch.state == "due").limit(1)
    return session.execute(flying).first() is not None


def reap(session: Session) -> int:
    """Make batches whose worker died, or whose job nobody took, due again.

    The reservation of a dead attempt stays until the next one settles it, and its holder until
    the next one counts the death.
    """
    dead = _dead(now(session))
    lock_batches(session, dead)
    return changed(session, update(Batch).where(dead).values(state="waiting", lease_until=0.0))


def find_due(session: Session, times: GatewayTimeouts, *, window: int, at_once: int) -> list[Due]:
    """Choose batches to ask for, fairly, `at_once` of all in flight."""
    clock = now(session)
    flying = Counter[tuple[str, ...]]()
    columns = (Batch.tenant_id, Batch.pipeline_id, Batch.endpoint)
    for tenant, pipeline_id, endpoint in session.execute(
        select(*columns).where(Batch.state == "due")
    ):
        flying.update(_parts_of(tenant, pipeline_id, endpoint))
    free = at_once - flying[()]
    if free <= 0:
        return []
    places = _places(session, at_once)
    found = session.execute(
        select(Pipeline, Tenant.sent_at)
        .join(Tenant, Tenant.tenant_id == Pipeline.tenant_id)
        .where(
            Pipeline.state == "running",
            or_(Pipeline.collect == "running", Pipeline.stopping != ""),
        )
        .order_by(Pipeline.created_at, Pipeline.pipeline_id)
    ).all()
    queues: dict[tuple[str, str, bool], list[Due]] = {}
    # When each tenant and each pipeline was served last; of those never served the oldest is first.
    served: dict[str, float] = {}
    for pipeline, tenant_sent_at in found:
        served[pipeline.tenant_id] = tenant_sent_at
        served[pipeline.pipeline_id] = pipeline.sent_at
        closed = places.closed_to(pipeline.tenant_id, clock)
        for due in _ready(session, pipeline, times, window, clock, closed):
            queues.setdefault((due.pipeline_id, due.endpoint, due.asks), []).append(due)
    order = {pipeline.pipeline_id: age for age, (pipeline, _) in enumerate(found)}
    chosen: list[Due] = []
    while len(chosen) < free:
        first = [queue[0] for queue in queues.values() if queue]
        may_go = [due for due in first if not due.asks or places.free_for(due, flying)]
        if not may_go:
            break
        best = min(
            may_go,
            key=lambda due: (
                flying["tenant", due.tenant_id],
                served[due.tenant_id],
                flying["pipeline", due.pipeline_id],
                served[due.pipeline_id],
                order[due.pipeline_id],
                flying["in", due.pipeline_id, due.endpoint],
                due.batch,
            ),
        )
        queues[best.pipeline_id, best.endpoint, best.asks].pop(0)
        chosen.append(best)
        flying.update(_parts_of(best.tenant_id, best.pipeline_id, best.endpoint))
        served[best.tenant_id] = served[best.pipeline_id] = clock + len(chosen)
    return chosen


@dataclass(frozen=True)
class _Places:
    """How many batches of each endpoint may be in flight, and when a tenant may ask it."""

    rows: dict[str, TeacherEndpoint]
    tenants: dict[tuple[str, str], TeacherTenant]
    most: int

    def free_for(self, due: Due, flying: Counter[tuple[str, ...]]) -> bool:
        # More would only wait for a call.
        if flying["its", due.tenant_id, due.endpoint] >= due.calls:
            return False
        return flying["at", due.endpoint] < self._of(due.endpoint)

    def _of(self, endpoint: str) -> int:
        row = self.rows.get(endpoint)
        if row is None:
            return self.most
        if row.away:
            return 1  # whether the teacher is back
        return min(self.most, calls_at_once(row, self.most))

    def closed_to(self, tenant_id: str, clock: float) -> set[str]:
        """The endpoints that a tenant may not ask now."""
        return {
            name
            for name, row in self.rows.items()
            if asked_again_at(row, self.tenants.get((name, tenant_id))) > clock
        }


def _places(session: Session, at_once: int) -> _Places:
    still_open = (
        select(Batch.endpoint)
        .join(Pipeline, Pipeline.pipeline_id == Batch.pipeline_id)
        .where(Batch.state != "closed", Pipeline.state == "running", Pipeline.stopping == "")
        .distinct()
    )
    names = list(session.execute(still_open).scalars())
    rows = session.execute(
        select(TeacherEndpoint).where(TeacherEndpoint.endpoint.in_(names))
    ).scalars()
    tenants = session.execute(
        select(TeacherTenant).where(TeacherTenant.endpoint.in_(names))
    ).scalars()
    return _Places(
        {row.endpoint: row for row in rows},
        {(row.endpoint, row.tenant_id): row for row in tenants},
        max(1, at_once - 1) if len(names) > 1 else at_once,
    )


def _parts_of(tenant: str, pipeline_id: str, endpoint: str) -> list[tuple[str, ...]]:
    """Whose places a batch takes."""
    return [
        (),
        ("tenant", tenant),
        ("pipeline", pipeline_id),
        ("in", pipeline_id, endpoint),
        ("its", tenant, endpoint),
        ("at", endpoint),
    ]


def _ready(
    session: Session,
    pipeline: Pipeline,
    times: GatewayTimeouts,
    window: int,
    clock: float,
    closed: set[str],
) -> list[Due]:
    """The batches of one pipeline that may be asked now, lowest first: of its `window` lowest open
    ones; of the endpoints that are `closed` only those whose deadline came."""
    spec = json.loads(pipeline.spec)
    calls = {
        teacher["name"]: teacher.get("limits", {}).get("concurrency", Limits().concurrency)
        for teacher in spec["teachers"]
    }
    open_ones = (
        select(Batch)
        .where(Batch.pipeline_id == pipeline.pipeline_id, Batch.state != "closed")
        .order_by(Batch.batch)
    )
    if pipeline.stopping:
        # Only what a dead attempt reserved is still to be settled, and what a provider works on.
        left = or_(Batch.reserved_microusd > 0, Batch.provider_batch.is_not(None))
        rows: Sequence[Batch] = session.execute(open_ones.where(left)).scalars().all()
    else:
        after_student = spec.get("start") == "after_student"
        if not _train_may_start(session, pipeline, times, clock, after_student=after_student):
            open_ones = open_ones.where(Batch.batch < pipeline.heldout_batches)
        # What a provider works on keeps no worker, and so takes no place in the window; looking at
        # it asks the teacher nothing.
        at_provider = open_ones.where(
            Batch.provider_batch.is_not(None), Batch.next_attempt_at <= clock
        )
        here = open_ones.where(Batch.provider_batch.is_(None))
        found = [
            row
            for query in (at_provider, here)
            for row in session.execute(query.limit(window)).scalars()
        ]
        rows = sorted(found, key=lambda row: row.batch)
    return [
        Due(
            row.tenant_id,
            row.pipeline_id,
            row.batch,
            row.epoch,
            row.endpoint,
            asks=not (pipeline.stopping or row.provider_batch is not None or _overdue(row, clock)),
            calls=calls[row.teacher],
        )
        for row in rows
        if row.state == "waiting"
        and row.lease_until <= clock
        and (
            row.endpoint not in closed
            or row.provider_batch is not None
            or bool(pipeline.stopping)
            or _overdue(row, clock)
        )
        and (
            row.next_attempt_at <= clock
            or (row.provider_batch is None and bool(pipeline.stopping))
            or (row.provider_batch is None and _overdue(row, clock))
        )
    ]


def _overdue(row: Batch, clock: float) -> bool:
    return row.close_by is not None and row.close_by <= clock


def _train_may_start(
    session: Session,
    pipeline: Pipeline,
    times: GatewayTimeouts,
    clock: float,
    *,
    after_student: bool,
) -> bool:
    """Whether train batches may be asked: the held-out rows are frozen, the student is ready."""
    sealed = session.execute(
        select(History.recorded_at).where(
            History.pipeline_id == pipeline.pipeline_id, History.type == HeldoutSealed.TYPE
        )
    ).first()
    if sealed is None:
        return False
    if not after_student:
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
    """Note whose turn it was, and that the job is on the queue, unless a worker was faster."""
    clock = now(session)
    for row, its in (
        (Pipeline, Pipeline.pipeline_id == due.pipeline_id),
        (Tenant, Tenant.tenant_id == due.tenant_id),
    ):
        changed(session, update(row).where(its).values(sent_at=clock))
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
        .values(state="due", next_attempt_at=clock + times.enqueue_again),
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
