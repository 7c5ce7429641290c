"""The row of a teacher's endpoint, which all who ask the teacher share; see `shared`.

All times are the database's, so no process clock matters; and a database clock that goes back takes
the times along.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from urllib.parse import urlsplit

from sqlalchemy import Engine, delete, select, update
from sqlalchemy.orm import Session

from services.teacher_gateway.database import insert_new, now, transaction
from services.teacher_gateway.ledger import changed
from services.teacher_gateway.limits import rates
from services.teacher_gateway.limits.rates import Rate
from services.teacher_gateway.models import Meter, TeacherEndpoint, TeacherShare, TeacherTenant
from stillhouse.contracts.canonical import canonical_json, sha256_hex
from stillhouse.contracts.spec import Limits, Teacher

# An attempt may begin so long before its first call may.
_EARLY_SECONDS = 2.0
# How much of a digest names an endpoint to people, in logs and metrics.
SHOWN_DIGITS = 12


def endpoint_of(teacher: Teacher, tenant_id: str) -> str:
    """Name what a provider counts by, as a digest; empty for a teacher that nobody calls.

    It counts an account's calls of a model: the same URL, model and key are one endpoint, whoever
    asks. Without a key nothing tells whose endpoint it is, and what one tenant writes about it
    must not slow another one down: each counts for itself.
    """
    if teacher.url is None:
        return ""
    url = urlsplit(teacher.url)
    port = url.port or {"https": 443}.get(url.scheme, 80)
    where = [url.scheme, url.hostname, port, url.path.rstrip("/"), url.query]
    whose = {"key": teacher.api_key.env} if teacher.api_key else {"tenant": tenant_id}
    counted = {"where": where, "model": teacher.model, "batches": teacher.batch_api, **whose}
    return sha256_hex(canonical_json(counted))


def asked_again_at(row: TeacherEndpoint, own: TeacherTenant | None) -> float:
    """When an attempt of a tenant may begin: of circuit, pause and its own rates the last one ends.
    What others take of the endpoint's rates only makes it slower."""
    rated = 0.0 if own is None else max(own.requests_at, own.tokens_at) - _EARLY_SECONDS
    return max(row.cool_until, row.open_until, rated)


@dataclass(frozen=True)
class Held:
    """An endpoint's row, held for this transaction, and the database's time after that; it was
    read between the two times of `read`, by time.monotonic()."""

    row: TeacherEndpoint
    clock: float
    read: tuple[float, float]


def hold(session: Session, endpoint: str) -> Held:
    row = session.get(TeacherEndpoint, endpoint, with_for_update=True)
    if row is None:
        insert_new(session, TeacherEndpoint, [{"endpoint": endpoint}])
        row = session.get(TeacherEndpoint, endpoint, with_for_update=True)
        assert row is not None, "endpoints are never deleted"
    before = time.monotonic()
    clock = now(session)
    read = before, time.monotonic()
    if clock < row.clock:
        _go_back(session, row, row.clock - clock)
    row.clock = clock
    return Held(row, clock, read)


def tenant_at(session: Session, endpoint: str, tenant_id: str) -> TeacherTenant:
    """What a tenant takes of an endpoint whose row is held."""
    own = session.get(TeacherTenant, (endpoint, tenant_id))
    if own is None:
        own = TeacherTenant(endpoint=endpoint, tenant_id=tenant_id)
        session.add(own)
        session.flush()  # its columns have their defaults
    return own


def _go_back(session: Session, row: TeacherEndpoint, seconds: float) -> None:
    """Take all times along with a database clock that was set back."""
    times = ("requests_at", "tokens_at", "lowered_at", "raised_at", "cool_until", "open_until")
    for name in times:
        setattr(row, name, getattr(row, name) - seconds)
    changed(
        session,
        update(TeacherTenant)
        .where(TeacherTenant.endpoint == row.endpoint)
        .values(
            requests_at=TeacherTenant.requests_at - seconds,
            tokens_at=TeacherTenant.tokens_at - seconds,
        ),
    )
    changed(
        session,
        update(TeacherShare)
        .where(TeacherShare.endpoint == row.endpoint)
        .values(until=TeacherShare.until - seconds),
    )


def living(session: Session, endpoint: str, clock: float) -> dict[str, TeacherShare]:
    """The shares whose holders live, by name; those of dead ones are gone."""
    here = TeacherShare.endpoint == endpoint
    changed(session, delete(TeacherShare).where(here, TeacherShare.until <= clock))
    rows = session.execute(
        select(TeacherShare).where(here).execution_options(populate_existing=True)
    ).scalars()
    return {share.holder: share for share in rows}


def count_call(engine: Engine, teacher: Teacher, tenant_id: str, tokens: int) -> float:
    """Count a single call that does not wait for its turn, such as a probe: others wait for it.

    Return for how many seconds the teacher is to be left alone; then it is not counted, and must
    not be made.
    """
    endpoint = endpoint_of(teacher, tenant_id)
    if not endpoint:
        return 0.0
    with transaction(engine) as session:
        held = hold(session, endpoint)
        pause = held.row.cool_until - held.clock
        if pause <= 0:
            named = Named.by(living(session, endpoint, held.clock).values())
            named.add(tenant_id, teacher.limits)
            for meter in meters(session, held, tenant_id, named):
                rates.count(meter, held.clock, tokens)
    return max(0.0, pause)


class Named:
    """The limits that those who ask an endpoint now name, by their tenants.

    What a spec says bounds its own tenant alone, by the smallest that it names; all together may
    do what the one may that is allowed the most.
    """

    def __init__(self) -> None:
        self._tenants: dict[str, list[TeacherShare | Limits]] = {}

    @classmethod
    def by(cls, shares: Iterable[TeacherShare]) -> Named:
        named = cls()
        for share in shares:
            named.add(share.tenant_id, share)
        return named

    def add(self, tenant_id: str, limits: TeacherShare | Limits) -> None:
        self._tenants.setdefault(tenant_id, []).append(limits)

    def most(self, tenant_id: str) -> int:
        """Calls at once of a tenant; there is one limit at least."""
        return min(_calls(limits) for limits in self._tenants[tenant_id])

    def most_of_all(self) -> int:
        """Calls at once of all together; 0 where nobody asks."""
        return max((self.most(tenant) for tenant in self._tenants), default=0)

    def rate(self, tenant_id: str) -> Rate:
        named = self._tenants.get(tenant_id, [])
        requests = [n.requests_per_minute for n in named if n.requests_per_minute is not None]
        tokens = [n.tokens_per_minute for n in named if n.tokens_per_minute is not None]
        return Rate(min(requests, default=None), min(tokens, default=None))

    def rate_of_all(self) -> Rate:
        rates_named = [self.rate(tenant) for tenant in self._tenants]
        requests = [rate.requests_per_minute for rate in rates_named]
        tokens = [rate.tokens_per_minute for rate in rates_named]
        return Rate(_largest(requests), _largest(tokens))


def meters(session: Session, held: Held, tenant_id: str, named: Named) -> list[Meter]:
    """The meters on which a tenant's call counts, with the limits that hold now."""
    own = tenant_at(session, held.row.endpoint, tenant_id)
    rates.set_limits(own, named.rate(tenant_id))
    rates.ease(held.row, held.clock, named.rate_of_all())
    return [held.row, own]


def _calls(limits: TeacherShare | Limits) -> int:
    return limits.most if isinstance(limits, TeacherShare) else limits.concurrency


def _largest(limits: Sequence[int | None]) -> int | None:
    """None, which is no limit, is above all others."""
    known = [limit for limit in limits if limit is not None]
    return max(known, default=None) if len(known) == len(limits) else None
