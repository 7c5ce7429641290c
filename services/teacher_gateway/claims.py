"""Step 1 of a paid batch: who holds it, for what money, and what is left to ask.

One transaction: the lease by the database's clock, the fencing epoch, the attempt, and the worst
case of all that will be asked, reserved.
"""

from __future__ import annotations

import secrets
from dataclasses import dataclass, field

from sqlalchemy import select
from sqlalchemy.orm import Session

from services.teacher_gateway.asking import (
    Asked,
)
from services.teacher_gateway.batch_input import BatchInput
from services.teacher_gateway.cache import index
from services.teacher_gateway.cache.index import Kept
from services.teacher_gateway.context import Context
from services.teacher_gateway.database import now, transaction
from services.teacher_gateway.ledger import (
    available,
    lock,
    open_reservations,
    reserve,
)
from services.teacher_gateway.models import Batch, Charge, Item
from services.teacher_gateway.stop import TERMINAL
from services.teacher_gateway.timeouts import GatewayTimeouts

# Attempts that died while they held a batch, before it is given up.
MOST_CRASHES = 10
# However long nobody can answer: a batch closes by so many times its deadline.
LATEST = 2


@dataclass
class Claim:
    """A batch that this job holds, and what it decided to do with it."""

    pipeline_id: str
    tenant_id: str
    batch: int
    epoch: int
    attempt: int
    # Attempts before this one that ended without a word, lowest first.
    dead: tuple[int, ...]
    # Items without an outcome: how often each failed to be answered.
    pending: dict[str, int]
    stopping: bool
    overdue: bool
    # Attempts in a row that found the teacher away, and those whose worker died.
    away: int = 0
    crashes: int = 0
    # The digest of each item's question, and where those that were paid for before are answered.
    keys: dict[str, str] = field(default_factory=dict)
    cached: dict[str, Kept] = field(default_factory=dict)
    asks: list[Asked] = field(default_factory=list)
    # Nothing is reserved elsewhere and not even one item's worst case fits.
    exhausted: bool = False
    # Reservations elsewhere are open: wait for them.
    must_wait: bool = False


def claimable(row: Batch, clock: float) -> bool:
    if row.state == "closed" or row.lease_until > clock:
        return False
    overdue = row.close_by is not None and row.close_by <= clock and row.provider_batch is None
    return row.state == "due" or row.next_attempt_at <= clock or overdue


def claim_batch(
    context: Context,
    pipeline_id: str,
    batch: int,
    given: BatchInput | None,
    keys: dict[str, str] | None = None,
    *,
    plans: bool = True,
) -> Claim | None:
    """Step 1. None when another worker holds the batch, or its turn has not come.

    Without `plans` nothing is chosen and nothing is reserved yet.
    """
    times = context.times
    with transaction(context.engine) as session:
        pipeline = lock(session, pipeline_id)
        row = session.get(Batch, (pipeline_id, batch))
        clock = now(session)
        if pipeline is None or row is None or pipeline.state in TERMINAL:
            return None
        if not claimable(row, clock):
            return None
        if row.close_by is None and given is not None:
            deadline = given.resolved.spec.close_deadline_hours * 3600
            row.close_by, row.close_latest = clock + deadline, clock + LATEST * deadline
        if row.holder:
            # Nobody let go of it, and its lease ran out: that worker died.
            row.crashes += 1
            row.holder = ""
        pending = session.execute(
            select(Item.item_id, Item.attempts).where(
                Item.pipeline_id == pipeline_id, Item.batch == batch, Item.outcome == "pending"
            )
        ).all()
        settled = set(
            session.execute(
                select(Charge.attempt).where(
                    Charge.pipeline_id == pipeline_id,
                    Charge.batch == batch,
                    Charge.charge_id.startswith(f"answers:{batch}:"),
                )
            ).scalars()
        )
        claim = Claim(
            pipeline_id=pipeline_id,
            tenant_id=row.tenant_id,
            batch=batch,
            epoch=row.epoch + 1,
            attempt=row.attempt + 1,
            dead=tuple(a for a in range(1, row.attempt + 1) if a not in settled),
            pending={row.item_id: row.attempts for row in pending},
            stopping=bool(pipeline.stopping) or given is None,
            overdue=row.close_by is not None and row.close_by <= clock,
            away=row.away,
            crashes=row.crashes,
            keys=keys or {},
        )
        unanswered = {i: key for i, key in claim.keys.items() if i in claim.pending}
        claim.cached = index.find(session, claim.tenant_id, unanswered)
        if plans and not claim.dead:
            plan(session, claim, given)
            if claim.must_wait:
                row.state, row.lease_until = "waiting", 0.0
                row.next_attempt_at = clock + budget_wait(times, given)
                return None
            row.reserved_microusd = sum(asked.worst_microusd for asked in claim.asks)
        row.epoch, row.attempt = claim.epoch, claim.attempt
        row.holder = secrets.token_hex(8)
        row.state, row.next_attempt_at = "due", 0.0
        row.lease_until = clock + times.lease_ttl
    return claim


def budget_wait(times: GatewayTimeouts, given: BatchInput | None) -> float:
    """Seconds to wait for reservations elsewhere; what a provider works on stays reserved long."""
    slow = given is not None and given.teacher.batch_api
    return times.provider_poll if slow else times.budget_wait


def stand_still(row: Batch, seconds: float) -> None:
    """Leave time in which nobody could answer out of a batch's deadline, within its bound."""
    if row.close_by is not None and row.close_latest is not None:
        row.close_by = max(row.close_by, min(row.close_by + seconds, row.close_latest))


def plan(session: Session, claim: Claim, given: BatchInput | None) -> None:
    """Decide what to ask for and reserve its worst case: all, or what the budget still bears.

    What the cache has is not asked for.
    """
    if given is None or claim.stopping or claim.overdue or claim.crashes >= MOST_CRASHES:
        return
    unknown = claim.pending.keys() - claim.cached.keys()
    wanted = [asked for asked in given.asked if asked.item.item_id in unknown]
    if not wanted:
        return
    if reserve(session, claim.pipeline_id, sum(asked.worst_microusd for asked in wanted)):
        claim.asks = wanted
        return
    if open_reservations(session, claim.pipeline_id) > 0:
        claim.must_wait = True
        return
    left, total = available(session, claim.pipeline_id), 0
    for asked in wanted:
        if total + asked.worst_microusd > left:
            break
        total += asked.worst_microusd
        claim.asks.append(asked)
    claim.exhausted = not claim.asks
    if claim.asks and not reserve(session, claim.pipeline_id, total):
        raise AssertionError("the pipeline's row is locked: what was available still is")
