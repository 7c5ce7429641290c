"""What a teacher's endpoint bears, kept in SQL for all replicas: shares, rates, pauses, circuit.

One row an endpoint and one for each attempt that asks it; each exchange is one short transaction
that holds the endpoint's row (`endpoints`).
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass

from sqlalchemy import Engine, case, update
from sqlalchemy.orm import Session

from services.teacher_gateway.counters import CIRCUIT_OPENINGS, LOWERED
from services.teacher_gateway.database import transaction
from services.teacher_gateway.ledger import changed
from services.teacher_gateway.limits import rates
from services.teacher_gateway.limits.endpoints import (
    SHOWN_DIGITS,
    endpoint_of,
    hold,
    living,
    strictest,
)
from services.teacher_gateway.limits.rates import AHEAD, MINUTE
from services.teacher_gateway.limits.reports import Grant, Leave, Report
from services.teacher_gateway.limits.shares import Wish, fair_shares
from services.teacher_gateway.limits.strain import adapt, calls_at_once
from services.teacher_gateway.models import Batch, TeacherEndpoint, TeacherShare
from services.teacher_gateway.teachers.outcomes import Retry
from services.teacher_gateway.timeouts import GatewayTimeouts
from stillhouse.chassis.logs import logger
from stillhouse.contracts.spec import Teacher

log = logger(__name__)

# Permits are given AHEAD of their time, so nothing is lost by asking no more often.
_POLL_SECONDS = 0.25
# The pause of an open circuit grows to 2 ** this times the first one, or the cap.
_MOST_DOUBLINGS = 20


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
        with transaction(self._engine) as session:
            row, clock = hold(session, self.endpoint)
            found = living(session, self.endpoint, clock)
            mine = found.pop(self._holder.name, None)
            if mine is not None and mine.epoch > self._holder.epoch:
                return Grant(calls=0)  # a later attempt at this batch goes on
            fresh = mine is None or mine.epoch < self._holder.epoch
            mine = mine or TeacherShare(endpoint=self.endpoint, holder=self._holder.name)
            self._write_down(mine, report, clock)
            session.add(mine)
            everyone = [*found.values(), mine]
            self._hear(session, row, clock, everyone, report)
            most = min(share.most for share in everyone)
            limit = calls_at_once(row, most)
            wishes = [
                Wish(share.holder, share.tenant_id, share.pipeline_id, share.wanted)
                for share in everyone
            ]
            fair = fair_shares(limit, wishes, clock)[mine.holder]
            left = max(0, limit - sum(share.calls for share in found.values()))
            if fresh:
                held, calls = report.running, min(fair, left)
            else:
                # It keeps what it holds until it says less, and gets what others have left.
                held = report.holds
                calls = min(fair, max(left, held))
            mine.calls = max(held, calls)
            return self._grant(row, clock, everyone, report, calls, fair / limit)

    def leave(self, report: Report) -> None:
        with transaction(self._engine) as session:
            row, clock = hold(session, self.endpoint)
            found = living(session, self.endpoint, clock)
            self._hear(session, row, clock, list(found.values()), report)
            mine = found.get(self._holder.name)
            if mine is not None and mine.epoch == self._holder.epoch:
                session.delete(mine)

    def away(self, why: Retry) -> None:
        """Open the circuit: nobody asks for a while, longer each time in a row."""
        times = self._times
        with transaction(self._engine) as session:
            row, clock = hold(session, self.endpoint)
            asked_for = why.after or 0.0
            if row.open_until > clock:
                self._close_to_all(session, row, clock, clock + asked_for)
                return
            doublings = min(row.away, _MOST_DOUBLINGS)
            pause = min(times.batch_backoff * 2.0**doublings, times.batch_backoff_cap)
            pause = max(pause * random.uniform(0.8, 1.2), asked_for)  # noqa: S311 no secret
            row.away += 1
            self._close_to_all(session, row, clock, clock + pause)
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
        row: TeacherEndpoint,
        clock: float,
        everyone: Sequence[TeacherShare],
        report: Report,
    ) -> None:
        """Take note of what calls came to."""
        rates.correct(row, clock, strictest(everyone), report.unused)
        most = min((share.most for share in everyone), default=self._limits.concurrency)
        used = sum(share.running for share in everyone)
        strain = adapt(row, clock, most, report.seen, used)
        if strain is not None:
            LOWERED.labels(strain).inc()
            log.info(
                "the teacher is strained: fewer calls at once",
                teacher=self._teacher,
                endpoint=self.endpoint[:SHOWN_DIGITS],
                calls=calls_at_once(row, most),
                reason=strain,
            )
        if report.cool > 0 and clock + report.cool > row.cool_until:
            self._stand_still(session, row, clock, clock + report.cool)
            row.cool_until = clock + report.cool
        if report.heard and row.away:
            self._open_to_all(session, row, clock)

    def _grant(
        self,
        row: TeacherEndpoint,
        clock: float,
        everyone: Sequence[TeacherShare],
        report: Report,
        calls: int,
        part: float,
    ) -> Grant:
        rate, permits, after = strictest(everyone), [], 0.0
        cool = max(0.0, row.cool_until - clock)
        if report.permits and not cool:
            most = len(report.permits)
            if rate.requests_per_minute is not None:
                # What comes in a second, in the same parts as the calls at once.
                most = max(1, math.ceil(rate.requests_per_minute / MINUTE * AHEAD * part))
            permits = rates.take(row, clock, rate, report.permits, most)
            if not permits:
                after = max(_POLL_SECONDS, rates.next_call(row, rate) - AHEAD - clock)
        return Grant(
            calls=calls,
            cool=cool,
            limited=rate.limited,
            permits=tuple(Leave(permit.at - clock, permit.tokens) for permit in permits),
            next_permit=after,
            suspect=row.away > 0,
        )

    def _close_to_all(
        self, session: Session, row: TeacherEndpoint, clock: float, until: float
    ) -> None:
        if until > row.open_until:
            self._stand_still(session, row, clock, until)
            row.open_until = until

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
