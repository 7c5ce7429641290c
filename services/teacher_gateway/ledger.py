"""Money, in integer micro-dollars: reserved before a call, settled after it, never overspent.

`spent + reserved <= budget` holds at every instant, because each change is one UPDATE that
carries the condition. A charge is unique by what it pays for, so nothing is paid for twice. Money
lies in purses: a pipeline has one, and a tenant's account is one (`accounts`).
Settled charges (`answers`, `probe`) are the teacher's invoice for stored answers; `unused` and
`unknown` list what was, or may have been, billed for answers that nobody has.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, Literal, cast, overload

from sqlalchemy import ColumnElement, CursorResult, Executable, func, select, update
from sqlalchemy.orm import Session

from services.teacher_gateway.database import now
from services.teacher_gateway.models import Account, AccountCharge, Batch, Charge, Pipeline
from stillhouse.contracts.spec import Price

Kind = Literal["answers", "probe", "unused", "unknown"]


@dataclass(frozen=True)
class AccountId:
    """A tenant's account by its name."""

    tenant_id: str
    name: str


# A pipeline by its id, or an account.
Purse = str | AccountId


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
    cached: int = 0


@dataclass(frozen=True)
class Rates:
    """A price in whole numbers: a token costs `input / unit` or `output / unit` micro-USD."""

    input: int
    output: int
    unit: int

    @classmethod
    def of(cls, price: Price) -> Rates:
        # USD for a million tokens is micro-USD for one.
        rates = (Fraction(str(price.input)), Fraction(str(price.output)))
        unit = math.lcm(*(rate.denominator for rate in rates))
        return cls(int(rates[0] * unit), int(rates[1] * unit), unit)

    def cost(self, prompt_tokens: int, completion_tokens: int) -> int:
        """The cost of one call in micro-USD, rounded up."""
        return -(-(self.input * prompt_tokens + self.output * completion_tokens) // self.unit)


def cost_microusd(price: Price, prompt_tokens: int, completion_tokens: int) -> int:
    """Return the cost of one call, rounded up."""
    return Rates.of(price).cost(prompt_tokens, completion_tokens)


def changed(session: Session, statement: Executable) -> int:
    """Run an UPDATE or DELETE past the ORM; return how many rows it met."""
    result = session.execute(statement, execution_options={"synchronize_session": False})
    return cast("CursorResult[Any]", result).rowcount


@overload
def lock(session: Session, purse: str) -> Pipeline | None: ...
@overload
def lock(session: Session, purse: AccountId) -> Account | None: ...
@overload
def lock(session: Session, purse: Purse) -> Pipeline | Account | None: ...
def lock(session: Session, purse: Purse) -> Pipeline | Account | None:
    """Read a purse's row and hold it to the end of the transaction.

    Whoever changes several rows of a pipeline takes this lock first, so none waits in a circle.
    """
    found: Any = session.execute(
        select(_table(purse))
        .where(*_is(purse))
        .with_for_update()
        .execution_options(populate_existing=True)
    ).scalar_one_or_none()
    return cast("Pipeline | Account | None", found)


def lock_batches(session: Session, *which: ColumnElement[bool]) -> None:
    """Hold many batches' rows to the end of the transaction, in the order of their keys: two that
    change many of them do not wait for each other in a circle."""
    rows = (
        select(Batch.batch)
        .where(*which)
        .order_by(Batch.pipeline_id, Batch.batch)
        .with_for_update()
        .subquery()
    )
    session.execute(select(func.count()).select_from(rows))


def reserve(session: Session, purse: Purse, microusd: int) -> bool:
    """Set money aside for calls; False when the budget does not allow it."""
    return _move(session, purse, spend=0, reserve=microusd)


def settle(
    session: Session,
    purse: Purse,
    lines: Sequence[Line],
    *,
    release: int,
    reserve: int = 0,
) -> bool:
    """Book charges, give a reservation back and make a new one: all of it, or nothing (False).

    It never fails while the charges cost no more than what is released and nothing is reserved
    anew. A line that is booked already is left out.
    """
    locked = lock(session, purse)
    if locked is None:
        raise LookupError(f"no purse {purse}")
    fresh = [line for line in lines if charge_of(session, purse, line.charge_id) is None]
    spend = sum(line.microusd for line in fresh)
    if not _move(session, purse, spend=spend, reserve=reserve - release):
        return False
    booked_at = now(session)
    session.add_all(_charge(purse, locked.tenant_id, line, booked_at) for line in fresh)
    session.flush()
    return True


def correct(
    session: Session, purse: Purse, charge_id: str, kind: Kind, microusd: int, detail: str
) -> None:
    """Replace a pessimistic charge by what is known now, which never costs more."""
    charge = charge_of(session, purse, charge_id)
    if charge is None or charge.microusd < microusd:
        raise AssertionError(f"charge {charge_id} cannot become {microusd} micro-USD: {charge}")
    moved = _move(session, purse, spend=microusd - charge.microusd, reserve=0)
    assert moved, "less money always fits"
    charge.kind, charge.microusd, charge.detail = kind, microusd, detail[:500]
    session.flush()


def charge_of(session: Session, purse: Purse, charge_id: str) -> Charge | AccountCharge | None:
    """The charge of this name, where it is booked."""
    if isinstance(purse, AccountId):
        return session.get(AccountCharge, (purse.tenant_id, purse.name, charge_id))
    return session.get(Charge, (purse, charge_id))


def open_reservations(session: Session, purse: Purse) -> int:
    """Micro-dollars that are set aside now."""
    column = select(_table(purse).reserved_microusd).where(*_is(purse))
    return int(session.execute(column).scalar_one())


def available(session: Session, purse: Purse) -> int:
    """Micro-dollars that could be reserved now."""
    row = _table(purse)
    left = row.budget_microusd - row.spent_microusd - row.reserved_microusd
    return int(session.execute(select(left).where(*_is(purse))).scalar_one())


def _move(session: Session, purse: Purse, *, spend: int, reserve: int) -> bool:
    row = _table(purse)
    after_spent = row.spent_microusd + spend
    after_reserved = row.reserved_microusd + reserve
    # What only gives money back must pass, even where a budget was lowered below what is spent.
    fits = after_spent + after_reserved <= row.budget_microusd
    statement = update(row).where(*_is(purse), after_reserved >= 0, after_spent >= 0)
    if spend + reserve > 0:
        statement = statement.where(fits)
    moved = changed(
        session, statement.values(spent_microusd=after_spent, reserved_microusd=after_reserved)
    )
    if not moved and spend + reserve <= 0:
        raise AssertionError(
            f"the ledger of {purse} does not hold what is given back: "
            f"spend {spend}, reserve {reserve}"
        )
    key = (purse.tenant_id, purse.name) if isinstance(purse, AccountId) else (purse,)
    held = session.identity_map.get((row, key, None))
    if held is not None:
        session.expire(held, ["spent_microusd", "reserved_microusd"])
    return moved == 1


def _table(purse: Purse) -> type[Pipeline] | type[Account]:
    return Account if isinstance(purse, AccountId) else Pipeline


def _is(purse: Purse) -> tuple[ColumnElement[bool], ...]:
    if isinstance(purse, AccountId):
        return Account.tenant_id == purse.tenant_id, Account.name == purse.name
    return (Pipeline.pipeline_id == purse,)


def _charge(purse: Purse, tenant_id: str, line: Line, at: float) -> Charge | AccountCharge:
    common: dict[str, Any] = {
        "charge_id": line.charge_id,
        "tenant_id": tenant_id,
        "kind": line.kind,
        "answers": line.answers,
        "microusd": line.microusd,
        "detail": line.detail[:500],
        "booked_at": at,
    }
    if isinstance(purse, AccountId):
        return AccountCharge(account=purse.name, **common)
    return Charge(
        pipeline_id=purse,
        batch=line.batch,
        attempt=line.attempt,
        cached=line.cached,
        **common,
    )
