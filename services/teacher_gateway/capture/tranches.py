"""Tranches in SQL: what a process of the API holds of a teacher's account.

A process takes money in one transaction and serves many calls from it. It renews its tranche; when
it died, the clock lists what was left of it as an `unknown` charge, since calls may have been on
their way. What its records say later, when its spool was found, replaces that part of the charge.
So `spent + reserved <= budget` holds at every instant and each call is counted once.

The account's row is always locked before the tranche's.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from sqlalchemy import Engine, select, update

from services.teacher_gateway.database import Session, now, reading, transaction
from services.teacher_gateway.ledger import (
    AccountId,
    Kind,
    Line,
    changed,
    charge_of,
    correct,
    lock,
    reserve,
    settle,
)
from services.teacher_gateway.models import Tranche
from stillhouse.chassis.logs import logger

log = logger(__name__)

# Renewed at a third of it; a dead process's tranche is listed after it.
TTL_SECONDS = 30.0
# More than is needed now is taken only while the account holds so many times as much.
_ROOM = 4
_EXPIRED_AT_ONCE = 100
_KINDS: tuple[Kind, ...] = ("answers", "unused", "unknown")


class TrancheExpired(Exception):
    """The clock took this process for dead: take a tranche of another name."""


@dataclass(frozen=True)
class Taken:
    """What was taken. `scarce`: less than was wished for. `reserved`: what others hold, or calls
    in flight; some of it may come back."""

    microusd: int
    scarce: bool
    reserved: int


@dataclass
class Bill:
    """What records of one tranche cost: for each kind of charge how many, and micro-dollars."""

    tranche_id: str
    parts: dict[Kind, tuple[int, int]] = field(default_factory=dict)

    def add(self, kind: Kind, microusd: int) -> None:
        count, sum_so_far = self.parts.get(kind, (0, 0))
        self.parts[kind] = (count + 1, sum_so_far + microusd)

    @property
    def microusd(self) -> int:
        return sum(microusd for _, microusd in self.parts.values())


def take(
    engine: Engine, account: AccountId, tranche_id: str, *, drawn: int, need: int, wish: int
) -> Taken:
    """Reserve `wish`, or what is needed, or what is left. Raises TrancheExpired.

    `drawn` is what the process knows that it has. More than that is there where the answer to a
    change before was lost: that is what it gets then, and nothing is reserved twice.
    """
    with transaction(engine) as session:
        held = lock(session, account)
        if held is None:
            raise LookupError(f"no account {account}")
        tranche = _locked(session, tranche_id)
        if (tranche is None and drawn) or (tranche is not None and tranche.state != "open"):
            raise TrancheExpired(tranche_id)
        reserved = held.reserved_microusd
        if tranche is not None and tranche.drawn > drawn:
            return Taken(tranche.drawn - drawn, scarce=False, reserved=reserved)
        left = held.budget_microusd - held.spent_microusd - reserved
        plenty = max(need, wish * _ROOM) <= left
        grant = max(need, wish) if plenty else max(min(need, left), 0)
        if grant == 0:
            return Taken(0, scarce=True, reserved=reserved)
        if not reserve(session, account, grant):
            raise AssertionError(f"{left} micro-USD are left in {account}, not {grant}")
        if tranche is None:
            tranche = Tranche(
                tranche_id=tranche_id,
                tenant_id=account.tenant_id,
                account=account.name,
                state="open",
                microusd=0,
                drawn=0,
                expires_at=0.0,
            )
            session.add(tranche)
        tranche.microusd += grant
        tranche.drawn += grant
        tranche.expires_at = now(session) + TTL_SECONDS
        return Taken(grant, scarce=not plenty, reserved=reserved)


def renew(engine: Engine, tranche_ids: Iterable[str]) -> set[str]:
    """Keep tranches for another while; return those that are expired."""
    wanted = set(tranche_ids)
    if not wanted:
        return set()
    with transaction(engine) as session:
        changed(
            session,
            update(Tranche)
            .where(Tranche.tranche_id.in_(wanted), Tranche.state == "open")
            .values(expires_at=now(session) + TTL_SECONDS),
        )
        kept = session.scalars(
            select(Tranche.tranche_id).where(
                Tranche.tranche_id.in_(wanted), Tranche.state == "open"
            )
        )
        return wanted - set(kept)


def give_back(engine: Engine, account: AccountId, tranche_id: str, *, drawn: int) -> bool:
    """Return all that a process has beyond `drawn`, however often; False when the tranche is
    expired, so that it is listed already, or gone."""
    with transaction(engine) as session:
        lock(session, account)
        tranche = _locked(session, tranche_id)
        if tranche is None:
            return drawn == 0
        if tranche.state != "open":
            return False
        microusd = min(tranche.drawn - drawn, tranche.microusd)
        if microusd > 0:
            settle(session, account, [], release=microusd)
            tranche.microusd -= microusd
            tranche.drawn = drawn
        if tranche.microusd == 0:
            session.delete(tranche)
        return True


def settle_bill(session: Session, account: AccountId, bill: Bill, charge_id: str) -> int:
    """Book what records cost, inside of the transaction that makes them known; return what was
    taken out of the tranche.

    A teacher that bills more than the most that it was asked for is paid out of the budget as long
    as that has any left; the rest is told in the charge's detail, since it is not ours to spend.
    """
    held = lock(session, account)
    if held is None:
        raise LookupError(f"no account {account}")
    left = held.budget_microusd - held.spent_microusd - held.reserved_microusd
    tranche = _locked(session, bill.tranche_id)
    taken = 0 if tranche is None else min(bill.microusd, tranche.microusd)
    paid = min(bill.microusd, taken + max(left, 0))
    if tranche is not None:
        tranche.microusd -= taken
        if tranche.state != "open":
            # Listed as a charge: that shrinks by what is known now, and both are spent money.
            listed = charge_of(session, account, _charge_of(tranche.tranche_id))
            assert listed is not None, "an expired tranche is listed"
            correct(session, account, listed.charge_id, "unknown", tranche.microusd, listed.detail)
            _book(session, account, bill, charge_id, paid=paid, release=0)
            return 0
    _book(session, account, bill, charge_id, paid=paid, release=taken)
    return taken


def settle_once(engine: Engine, account: AccountId, bill: Bill, charge_id: str) -> int:
    """The same by itself, for records that are in no index; repeating it changes nothing."""
    with transaction(engine) as session:
        lock(session, account)
        if any(charge_of(session, account, f"{charge_id}:{kind}") for kind in bill.parts):
            return bill.microusd
        return settle_bill(session, account, bill, charge_id)


def expire(engine: Engine) -> int:
    """List what dead processes held as `unknown` charges; return how many."""
    with reading(engine) as session:
        due = _due(session)
    for tranche_id, tenant_id, name in due:
        account = AccountId(tenant_id, name)
        with transaction(engine) as session:
            lock(session, account)
            tranche = _locked(session, tranche_id)
            if tranche is None or tranche.state != "open" or tranche.expires_at > now(session):
                continue
            if tranche.microusd == 0:
                session.delete(tranche)
                continue
            line = Line(
                _charge_of(tranche_id),
                "unknown",
                tranche.microusd,
                detail="a process of the API ended without settling: the most that its calls may "
                "have cost; what its records say replaces it",
            )
            settle(session, account, [line], release=tranche.microusd)
            tranche.state = "expired"
            log.warning(
                "a tranche was listed", tranche=tranche_id, microusd=tranche.microusd, account=name
            )
    return len(due)


def _due(session: Session) -> list[tuple[str, str, str]]:
    found = session.execute(
        select(Tranche.tranche_id, Tranche.tenant_id, Tranche.account)
        .where(Tranche.state == "open", Tranche.expires_at <= now(session))
        .limit(_EXPIRED_AT_ONCE)
    )
    return [(row[0], row[1], row[2]) for row in found]


def _book(
    session: Session, account: AccountId, bill: Bill, charge_id: str, *, paid: int, release: int
) -> None:
    """Book at most `paid` of a bill, what is known of it first."""
    over = bill.microusd - paid
    detail = f"the teacher billed {over} micro-USD more than the budget held" if over else ""
    lines = []
    left = paid
    for kind in _KINDS:
        count, microusd = bill.parts.get(kind, (0, 0))
        if count:
            part = min(microusd, left)
            left -= part
            lines.append(Line(f"{charge_id}:{kind}", kind, part, answers=count, detail=detail))
    if not settle(session, account, lines, release=release):
        raise AssertionError(f"{paid} micro-USD do not fit {account}")


def _charge_of(tranche_id: str) -> str:
    return f"tranche:{tranche_id}"


def _locked(session: Session, tranche_id: str) -> Tranche | None:
    return session.execute(
        select(Tranche)
        .where(Tranche.tranche_id == tranche_id)
        .with_for_update()
        .execution_options(populate_existing=True)
    ).scalar_one_or_none()
