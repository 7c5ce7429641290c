"""What an attempt at a batch writes down while it goes on, each in one short transaction.

Every write is fenced by the attempt's epoch: once another worker holds the batch, nothing of this
one counts any more, but what it stored in time.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence

from sqlalchemy import bindparam, select, update
from sqlalchemy.orm import Session

from services.teacher_gateway.asking import (
    UNSTORED_ANSWERS,
    Asked,
    GivenUp,
    Result,
)
from services.teacher_gateway.batch_input import BatchInput
from services.teacher_gateway.cache import index
from services.teacher_gateway.claims import Claim, plan
from services.teacher_gateway.context import Context
from services.teacher_gateway.counters import ADOPTED
from services.teacher_gateway.database import now, transaction
from services.teacher_gateway.holding import Fenced
from services.teacher_gateway.ledger import (
    Kind,
    Line,
    changed,
    cost_microusd,
    lock,
    settle,
)
from services.teacher_gateway.models import Batch, Charge, Item, Pipeline
from services.teacher_gateway.parts import Part, Series, answers_in
from services.teacher_gateway.teachers.outcomes import Reject
from stillhouse.contracts.artifacts import (
    ObjectRef,
    part_key,
)
from stillhouse.contracts.responses import (
    Answer,
    Rejection,
)


class Books:
    """What an attempt writes down, each in one short transaction under its epoch."""

    def __init__(
        self, context: Context, claim: Claim, given: BatchInput | None, started: float
    ) -> None:
        self._context = context
        self._claim = claim
        self._given = given
        self._holds_until = started + context.times.lease
        self.started = started  # by time.monotonic()
        # What the cache gave, stored before anything is asked; None while that is not known.
        self.cached: list[Part] | None = []
        # What is known of this attempt if it cannot go on: whether a call for an item left, and
        # what came.
        self.asked = False
        self.result: Result | None = None

    @property
    def parts(self) -> list[Part]:
        """What this attempt stored, in sequence."""
        return [*(self.cached or ()), *(self.result.parts if self.result else ())]

    def fenced(self, session: Session) -> Batch:
        """The batch's row, held for this transaction, if it is still this attempt's."""
        claim = self._claim
        lock(session, claim.pipeline_id)
        row = session.execute(
            select(Batch)
            .where(Batch.pipeline_id == claim.pipeline_id, Batch.batch == claim.batch)
            .with_for_update()
            .execution_options(populate_existing=True)
        ).scalar_one()
        if row.epoch != claim.epoch or row.state == "closed":
            raise Fenced(f"batch {claim.batch}: expected epoch {claim.epoch}, found {row.epoch}")
        return row

    def renew(self) -> bool:
        claim, times = self._claim, self._context.times
        left = min(times.lease_ttl, self._holds_until - time.monotonic())
        with transaction(self._context.engine) as session:
            renewed = changed(
                session,
                update(Batch)
                .where(
                    Batch.pipeline_id == claim.pipeline_id,
                    Batch.batch == claim.batch,
                    Batch.epoch == claim.epoch,
                    Batch.state != "closed",
                )
                .values(lease_until=now(session) + left),
            )
            if not renewed:
                raise Fenced(f"batch {claim.batch} is held by a later attempt")
            stopping = select(Pipeline.stopping).where(Pipeline.pipeline_id == claim.pipeline_id)
            return not session.execute(stopping).scalar_one()

    def lost(self, asked: Asked, call: int, detail: str, *, again: bool) -> bool:
        claim, worst = self._claim, asked.worst_microusd
        line = self._line(f"lost:{self._of(asked, call)}", "unknown", worst, detail)
        with transaction(self._context.engine) as session:
            row = self.fenced(session)
            if again and settle(session, claim.pipeline_id, [line], release=worst, reserve=worst):
                return True
            settle(session, claim.pipeline_id, [line], release=worst)
            row.reserved_microusd -= worst
            return False

    def rejected(self, asked: Asked, call: int, outcome: Reject) -> None:
        claim, worst = self._claim, asked.worst_microusd
        lines: list[Line] = []
        if outcome.lost:
            charge_id = f"lost:{self._of(asked, call)}"
            lines.append(self._line(charge_id, "unknown", worst, outcome.detail))
        elif outcome.usage is not None and self._given is not None:
            cost = cost_microusd(
                self._given.teacher.usd_per_million,
                outcome.usage.prompt_tokens,
                outcome.usage.completion_tokens,
            )
            charge_id = f"unused:{self._of(asked, call)}"
            detail = f"{outcome.reason}: {outcome.detail}"
            lines.append(self._line(charge_id, "unused", min(cost, worst), detail))
        with transaction(self._context.engine) as session:
            row = self.fenced(session)
            settle(session, claim.pipeline_id, lines, release=worst)
            row.reserved_microusd -= worst
            reject(session, claim, [rejection_of(asked.item.item_id, outcome)])

    def store(self, number: int, data: bytes) -> ObjectRef:
        """Store a part; what the cache gave comes before it."""
        return self.store_at(number + len(self.cached or ()), data)

    def store_at(self, number: int, data: bytes) -> ObjectRef:
        claim = self._claim
        key = part_key(claim.tenant_id, claim.pipeline_id, claim.batch, claim.attempt, number)
        return self._context.store.put_new(key, data)

    def adopt(self, series: Sequence[Series], given: BatchInput | None) -> None:
        """Step 2: settle what dead attempts stored, list what they may have lost, and reserve
        for what is still to be asked."""
        claim = self._claim
        if not claim.dead:
            return
        with transaction(self._context.engine) as session:
            row = self.fenced(session)
            lines = self.adopt_stored(session, series)
            spent = sum(line.microusd for line in lines)
            lines.append(self._crash_line(row.reserved_microusd - spent))
            if not settle(session, claim.pipeline_id, lines, release=row.reserved_microusd):
                raise AssertionError("what is released pays for what is booked")
            row.reserved_microusd = 0
            plan(session, claim, given)
            row.reserved_microusd = sum(asked.worst_microusd for asked in claim.asks)

    def adopt_stored(self, session: Session, series: Sequence[Series]) -> list[Line]:
        """Record what dead attempts stored; the lines that settle it."""
        claim = self._claim
        lines: list[Line] = []
        for found in (s for s in series if s.attempt in claim.dead):
            fresh = [
                Part(part.ref, tuple(a for a in part.answers if a.item_id in claim.pending))
                for part in found.parts
            ]
            lines.append(answers_line(claim.batch, found.attempt, answers_in(fresh)))
            record_answers(session, claim, fresh)
            ADOPTED.inc(lines[-1].answers)
        return lines

    def _crash_line(self, reserved: int) -> Line:
        """The most that the attempt that died can have been billed for answers that it lost.

        It held `concurrency` calls and the answers of one part at most. Only the first of several
        dead attempts can have asked: each settles the ones before it, and then asks.
        """
        claim, dead = self._claim, self._claim.dead[0]
        most = reserved
        if self._given is not None:
            unstored = self._given.teacher.limits.concurrency + UNSTORED_ANSWERS
            worst = sorted(
                (
                    asked.worst_microusd
                    for asked in self._given.asked
                    if asked.item.item_id in claim.pending
                ),
                reverse=True,
            )
            most = min(reserved, sum(worst[:unstored]))
        return Line(
            charge_id=f"crash:{claim.batch}:{dead}",
            kind="unknown",
            microusd=most,
            batch=claim.batch,
            attempt=dead,
            detail="an attempt broke off: calls whose answers were lost, at their worst case",
        )

    def let_go(self, session: Session) -> Batch:
        """Settle what is known of an attempt that cannot go on, and free its batch.

        What it may have been asking stays reserved, until the next attempt has read its parts; and
        so does what a provider works on.
        """
        claim = self._claim
        row = self.fenced(session)
        row.holder, row.lease_until = "", 0.0
        if (self.asked and self.result is None) or row.provider_batch is not None:
            return row
        line = answers_line(claim.batch, claim.attempt, answers_in(self.parts))
        if session.get(Charge, (claim.pipeline_id, line.charge_id)) is not None:
            return row
        # The reservation is a dead attempt's as long as that one is not settled.
        settled = [f"answers:{claim.batch}:{dead}" for dead in claim.dead]
        found = [session.get(Charge, (claim.pipeline_id, charge_id)) for charge_id in settled]
        mine = all(charge is not None for charge in found)
        release = row.reserved_microusd if mine else 0
        # Where a part of the cache may lie in the store, the next attempt reads and settles it.
        lines = [] if self.cached is None else [line]
        if not settle(session, claim.pipeline_id, lines, release=release):
            raise AssertionError("what is released pays for what is booked")
        row.reserved_microusd -= release
        if lines:
            record_answers(session, claim, self.parts)
        return row

    def _line(self, charge_id: str, kind: Kind, microusd: int, detail: str) -> Line:
        claim = self._claim
        return Line(charge_id, kind, microusd, claim.batch, claim.attempt, 0, detail)

    def _of(self, asked: Asked, call: int) -> str:
        return f"{self._claim.batch}:{self._claim.attempt}:{call}:{asked.item.item_id}"


def answers_line(batch: int, attempt: int, answers: Iterable[Answer]) -> Line:
    """The invoice line of what one attempt stored; booked for each attempt, even for nothing."""
    found = list(answers)
    return Line(
        charge_id=f"answers:{batch}:{attempt}",
        kind="answers",
        microusd=sum(answer.cost_microusd for answer in found),
        batch=batch,
        attempt=attempt,
        answers=len(found),
        cached=sum(answer.cached for answer in found),
    )


def record_answers(session: Session, claim: Claim, parts: Sequence[Part]) -> None:
    """Note which items are answered, what that took, and where the cache finds it."""
    answers = answers_in(parts)
    if answers:
        # One statement for all: of the time that a batch takes, this was a tenth.
        session.connection().execute(
            update(Item)
            .where(
                Item.pipeline_id == claim.pipeline_id,
                Item.item_id == bindparam("answered"),
                Item.outcome == "pending",
            )
            .values(outcome="answered", cost_microusd=bindparam("cost")),
            [{"answered": a.item_id, "cost": a.cost_microusd} for a in answers],
        )
    for answer in answers:
        claim.pending.pop(answer.item_id, None)
    index.remember(session, claim.tenant_id, claim.keys, parts)
    paid = [answer for answer in answers if not answer.cached]
    if paid:
        changed(
            session,
            update(Pipeline)
            .where(Pipeline.pipeline_id == claim.pipeline_id)
            .values(
                prompt_tokens=Pipeline.prompt_tokens + sum(a.prompt_tokens for a in paid),
                completion_tokens=Pipeline.completion_tokens
                + sum(a.completion_tokens for a in paid),
            ),
        )


def rejection_of(item_id: str, why: GivenUp | Reject) -> Rejection:
    """What is told of an item that has no answer."""
    return Rejection(item_id=item_id, stage="collect", reason=why.reason, detail=why.detail[:500])


def reject(session: Session, claim: Claim, rejections: Sequence[Rejection]) -> None:
    for rejection in rejections:
        changed(
            session,
            update(Item)
            .where(
                Item.pipeline_id == claim.pipeline_id,
                Item.item_id == rejection.item_id,
                Item.outcome == "pending",
            )
            .values(
                outcome="rejected",
                stage=rejection.stage,
                reason=rejection.reason,
                detail=rejection.detail,
                attempts=Item.attempts + 1,
            ),
        )
