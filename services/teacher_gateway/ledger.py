"""Money, in integer micro-dollars: reserved before a call, settled after it, never overspent.

`spent + reserved <= budget` holds at every instant, because each change is one UPDATE that
carries the condition. A charge is unique by what it pays for, so nothing is paid for twice.
Settled charges (`answers`, `probe`) are the teacher's invoice for stored answers; `unused` and
`unknown` list what was, or may have been, billed for answers that nobody has.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, Literal, cast

from sqlalchemy import CursorResult, Executable, select, update
from sqlalchemy.orm import Session

from services.teacher_gateway.database import now
from services.teacher_gateway.models import Charge, Pipeline
from stillhouse.contracts.spec import Price

Kind = Literal["answers", "probe", "unused", "unknown"]


@dataclass(frozen=True)
class Line:
    """One charge to book. `charge_id` names what it pays for."""

    charge_id: str
    kind: Kind
    microusd: int
    batch: int | None = None
    attempt: int | None = None
    answers: int = 0
    detail: str = ""


def cost_microusd(price: Price, prompt_tokens: int, completion_tokens: int) -> int:
    """Return the cost of one call, rounded up. USD for a million tokens is micro-USD for one."""
    exact = Fraction(str(price.input)) * prompt_tokens
    exact += Fraction(str(price.output)) * completion_tokens
    return math.ceil(exact)


def changed(session: Session, statement: Executable) -> int:
    """Run an UPDATE or DELETE past the ORM; return how many rows it met."""
    result = session.execute(statement, execution_options={"synchronize_session": False})
    return cast("CursorResult[Any]", result).rowcount


def lock(session: Session, pipeline_id: str) -> Pipeline | None:
    """Read a pipeline's row and hold it to the end of the transaction.

    Whoever changes several rows of a pipeline takes this lock first, so none waits in a circle.
    """
    return session.execute(
        select(Pipeline)
        .where(Pipeline.pipeline_id == pipeline_id)
        .with_for_update()
        .execution_options(populate_existing=True)
    ).scalar_one_or_none()


def reserve(session: Session, pipeline_id: str, microusd: int) -> bool:
    """Set money aside for calls; False when the budget does not allow it."""
    return _move(session, pipeline_id, spend=0, reserve=microusd)


def settle(
    session: Session,
    pipeline_id: str,
    lines: Sequence[Line],
    *,
    release: int,
    reserve: int = 0,
) -> bool:
    """Book charges, give a reservation back and make a new one: all of it, or nothing (False).

    It never fails while the charges cost no more than what is released and nothing is reserved
    anew. A line that is booked already is left out.
    """
    locked = lock(session, pipeline_id)
    if locked is None:
        raise LookupError(f"no pipeline {pipeline_id}")
    fresh = [line for line in lines if session.get(Charge, (pipeline_id, line.charge_id)) is None]
    spend = sum(line.microusd for line in fresh)
    if not _move(session, pipeline_id, spend=spend, reserve=reserve - release):
        return False
    booked_at = now(session)
    session.add_all(
        Charge(
            pipeline_id=pipeline_id,
            charge_id=line.charge_id,
            tenant_id=locked.tenant_id,
            kind=line.kind,
            batch=line.batch,
            attempt=line.attempt,
            answers=line.answers,
            microusd=line.microusd,
            detail=line.detail[:500],
            booked_at=booked_at,
        )
        for line in fresh
    )
    session.flush()
    return True


def correct(
    session: Session, pipeline_id: str, charge_id: str, kind: Kind, microusd: int, detail: str
) -> None:
    """Replace a pessimistic charge by what is known now, which never costs more."""
    charge = session.get(Charge, (pipeline_id, charge_id))
    if charge is None or charge.microusd < microusd:
        raise AssertionError(f"charge {charge_id} cannot become {microusd} micro-USD: {charge}")
    moved = _move(session, pipeline_id, spend=microusd - charge.microusd, reserve=0)
    assert moved, "less money always fits"
    charge.kind, charge.microusd, charge.detail = kind, microusd, detail[:500]
    session.flush()


def open_reservations(session: Session, pipeline_id: str) -> int:
    """Micro-dollars that are set aside now."""
    column = select(Pipeline.reserved_microusd).where(Pipeline.pipeline_id == pipeline_id)
    return int(session.execute(column).scalar_one())


def available(session: Session, pipeline_id: str) -> int:
    """Micro-dollars that could be reserved now."""
    left = Pipeline.budget_microusd - Pipeline.spent_microusd - Pipeline.reserved_microusd
    return int(
        session.execute(select(left).where(Pipeline.pipeline_id == pipeline_id)).scalar_one()
    )


def _move(session: Session, pipeline_id: str, *, spend: int, reserve: int) -> bool:
    after_spent = Pipeline.spent_microusd + spend
    after_reserved = Pipeline.reserved_microusd + reserve
    # What only gives money back must pass, even where a budget was lowered below what is spent.
    fits = after_spent + after_reserved <= Pipeline.budget_microusd
    statement = update(Pipeline).where(
        Pipeline.pipeline_id == pipeline_id, after_reserved >= 0, after_spent >= 0
    )
    if spend + reserve > 0:
        statement = statement.where(fits)
    moved = changed(
        session, statement.values(spent_microusd=after_spent, reserved_microusd=after_reserved)
    )
    if not moved and spend + reserve <= 0:
        raise AssertionError(
            f"the ledger of {pipeline_id} does not hold what is given back: "
            f"spend {spend}, reserve {reserve}"
        )
    held = session.identity_map.get((Pipeline, (pipeline_id,), None))
    if held is not None:
        session.expire(held, ["spent_microusd", "reserved_microusd"])
    return moved == 1
