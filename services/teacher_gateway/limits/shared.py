"""What a teacher's endpoint bears, kept in SQL for all replicas: shares, rates, pauses, circuit.

One row an endpoint and one for each attempt that asks it; each exchange is one short transaction
that holds the endpoint's row (`endpoints`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from sqlalchemy import ColumnElement, Engine, case, update
from sqlalchemy.orm import Session

from services.teacher_gateway.counters import CIRCUIT_OPENINGS, LOWERED
from services.teacher_gateway.database import transaction
from services.teacher_gateway.ledger import changed, lock_batches
from services.teacher_gateway.limits import rates
from services.teacher_gateway.limits.endpoints import (
    SHOWN_DIGITS,
    Held,
    Named,
    endpoint_of,
    hold,
    living,
    meters,
    tenant_at,
)
from services.teacher_gateway.limits.rates import AHEAD, MINUTE
from services.teacher_gateway.limits.reports import Grant, Leave, Report
from services.teacher_gateway.limits.shares import Wish, fair_shares
from services.teacher_gateway.limits.strain import adapt, calls_at_once
from services.teacher_gateway.models import Batch, Meter, TeacherEndpoint, TeacherShare
from services.teacher_gateway.teachers.outcomes import Retry
from services.teacher_gateway.timeouts import GatewayTimeouts
from stillhouse.chassis.logs import logger
from stillhouse.contracts.spec import Teacher

log = logger(__name__)

# Permits are given AHEAD of their time, so nothing is lost by asking no more often.
_POLL_SECONDS = 0.25


@dataclass(frozen=True)
class Holder:
    """An attempt at a batch, as the one who holds a share."""

    tenant_id: str
    pipeline_id: str
    batch: int
    epoch: int

    @property
    def name(self) -> str:
        return f"{self.pipeline_id}:{self.batch}"


class SharedLimits:
    """`reports.Shared` for one attempt, and the teacher's circuit."""

    def __init__(
        self, engine: Engine, times: GatewayTimeouts, teacher: Teacher, holder: Holder
    ) -> None:
        self._engine = engine
        self._times = times
        self._limits = teacher.limits
        self._teacher = teacher.name
        self._holder = holder
        self.endpoint = endpoint_of(teacher, holder.tenant_id)

    def exchange(self, report: Report) -> Grant:
        holder = self._holder
        with transaction(self._engine) as session:
            held = hold(session, self.endpoint)
            row, clock = held.row, held.clock
            found = living(session, self.endpoint, clock)
            mine = found.pop(holder.name, None)
            if mine is not None and mine.epoch > holder.epoch:
                return Grant(calls=0, read=held.read)  # a later attempt at this batch goes on
            fresh = mine is None or mine.epoch < holder.epoch
            mine = mine or TeacherShare(endpoint=self.endpoint, holder=holder.name)
            self._write_down(mine, report, clock)
            everyone = [*found.values(), mine]
            named = Named.by(everyone)
            metered = self._hear(session, held, named, everyone, report)
            limit = calls_at_once(row, named.most_of_all())
            wishes = [
                Wish(share.holder, share.tenant_id, share.pipeline_id, share.wanted, share.most)
                for share in everyone
            ]
            fair = fair_shares(limit, wishes, clock)
            ours = [share for share in found.values() if share.tenant_id == holder.tenant_id]
            left = min(
                limit - sum(share.calls for share in found.values()),
                named.most(holder.tenant_id) - sum(share.calls for share in ours),
            )
            if fresh:
                holds, calls = report.running, min(fair[mine.holder], max(left, 0))
            else:
                # It keeps what it holds until it says less, and gets what others have left.
                holds = report.holds
                calls = min(fair[mine.holder], max(left, holds))
            mine.calls = max(holds, calls)
            session.add(mine)
            all_ours = sum(fair[share.holder] for share in (mine, *ours))
            parts = (fair[mine.holder] / limit, fair[mine.holder] / max(all_ours, 1))
            return self._grant(held, metered, report, calls, parts)

    def leave(self, report: Report) -> None:
        with transaction(self._engine) as session:
            held = hold(session, self.endpoint)
            found = living(session, self.endpoint, held.clock)
            self._hear(session, held, Named.by(found.values()), list(found.values()), report)
            mine = found.get(self._holder.name)
            if mine is not None and mine.epoch == self._holder.epoch:
                session.delete(mine)

    def away(self, why: Retry) -> None:
        """Open the circuit: nobody asks for a while, longer each time in a row."""
        with transaction(self._engine) as session:
            held = hold(session, self.endpoint)
            row, clock = held.row, held.clock
            asked_for = why.after or 0.0
            opens = row.open_until <= clock
            pause = self._times.batch_pause(row.away, asked_for) if opens else asked_for
            if clock + pause > row.open_until:
                lock_batches(session, *self._open_batches)
                self._stand_still(session, row, clock, clock + pause)
                row.open_until = clock + pause
            if not opens:
                return  # of an attempt that was under way
            row.away += 1
        CIRCUIT_OPENINGS.inc()
        log.warning(
            "the teacher is away: nobody asks it for a while",
            teacher=self._teacher,
            endpoint=self.endpoint[:SHOWN_DIGITS],
            seconds=round(pause, 1),
            times=row.away,
            reason=why.reason,
            why=why.detail,
        )

    @property
    def _open_batches(self) -> tuple[ColumnElement[bool], ...]:
        return Batch.endpoint == self.endpoint, Batch.state != "closed"

    def _write_down(self, mine: TeacherShare, report: Report, clock: float) -> None:
        holder, limits = self._holder, self._limits
        mine.epoch = holder.epoch
        mine.tenant_id, mine.pipeline_id = holder.tenant_id, holder.pipeline_id
        mine.wanted = min(report.wanted, limits.concurrency)
        mine.running = report.peak
        mine.most = limits.concurrency
        mine.requests_per_minute = limits.requests_per_minute
        mine.tokens_per_minute = limits.tokens_per_minute
        mine.until = clock + self._times.lease_ttl

    def _hear(
        self,
        session: Session,
        held: Held,
        named: Named,
        everyone: Sequence[TeacherShare],
        report: Report,
    ) -> list[Meter]:
        """Take note of what calls came to; return the meters on which they count."""
        row, clock = held.row, held.clock
        tenant_id = self._holder.tenant_id
        metered = meters(session, held, tenant_id, named)
        for meter in metered:
            rates.correct(meter, clock, report.unused)
        most = named.most_of_all() or self._limits.concurrency
        used = sum(share.running for share in everyone)
        usual = tenant_at(session, self.endpoint, tenant_id)
        strain = adapt(row, usual, clock, most, report.seen, used)
        if strain is not None:
            LOWERED.labels(strain).inc()
            log.info(
                "the teacher is strained: fewer calls at once",
                teacher=self._teacher,
                endpoint=self.endpoint[:SHOWN_DIGITS],
                calls=calls_at_once(row, most),
                reason=strain,
            )
        pauses = report.cool > 0 and clock + report.cool > row.cool_until
        back = report.heard and row.away > 0
        if pauses or back:
            lock_batches(session, *self._open_batches)
        if pauses:
            self._stand_still(session, row, clock, clock + report.cool)
            row.cool_until = clock + report.cool
        if back:
            self._open_to_all(session, row, clock)
        return metered

    def _grant(
        self,
        held: Held,
        metered: Sequence[Meter],
        report: Report,
        calls: int,
        parts: Sequence[float],
    ) -> Grant:
        row, clock = held.row, held.clock
        permits, after = [], 0.0
        cool = max(0.0, row.cool_until - clock)
        if report.permits and not cool:
            # What comes in a second, in the same parts as the calls at once.
            mosts = [
                max(1, math.ceil(meter.requests_per_minute / MINUTE * AHEAD * part))
                for meter, part in zip(metered, parts, strict=True)
                if meter.requests_per_minute is not None
            ]
            most = min([len(report.permits), *mosts])
            # A reply that takes long brings permits for later: those for this moment would be void.
            delay = min(report.delay, self._times.lease_ttl / 2)
            permits = rates.take(metered, clock, report.permits, most, delay=delay)
            if not permits:
                soonest = max(rates.next_call(meter) for meter in metered)
                after = max(_POLL_SECONDS, soonest - AHEAD - clock - delay)
        return Grant(
            calls=calls,
            cool=cool,
            limited=any(
                meter.requests_per_minute is not None or meter.tokens_per_minute is not None
                for meter in metered
            ),
            permits=tuple(Leave(permit.at - clock, permit.tokens) for permit in permits),
            next_permit=after,
            suspect=row.away > 0,
            read=held.read,
        )

    def _open_to_all(self, session: Session, row: TeacherEndpoint, clock: float) -> None:
        """Close the circuit: batches that wait for the teacher are due."""
        row.away, row.open_until = 0, 0.0
        changed(
            session,
            update(Batch)
            .where(
                Batch.endpoint == self.endpoint,
                Batch.state == "waiting",
                Batch.away > 0,
                Batch.next_attempt_at > clock,
            )
            .values(next_attempt_at=clock),
        )
        log.info(
            "the teacher is back",
            teacher=self._teacher,
            endpoint=self.endpoint[:SHOWN_DIGITS],
        )

    def _stand_still(
        self, session: Session, row: TeacherEndpoint, clock: float, until: float
    ) -> None:
        """Leave the time in which nobody asks out of the batches' deadlines, within their bound.
        The batch of this attempt does so by itself."""
        seconds = until - max(clock, row.cool_until, row.open_until)
        if seconds <= 0:
            return
        holder = self._holder
        mine = (Batch.pipeline_id == holder.pipeline_id) & (Batch.batch == holder.batch)
        later = Batch.close_by + seconds
        changed(
            session,
            update(Batch)
            .where(
                Batch.endpoint == self.endpoint,
                Batch.state != "closed",
                Batch.close_by < Batch.close_latest,
                ~mine,
            )
            .values(close_by=case((later > Batch.close_latest, Batch.close_latest), else_=later)),
        )
