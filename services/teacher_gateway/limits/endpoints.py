"""The row of a teacher's endpoint, which all who ask the teacher share; see `shared`.

All times are the database's, so no process clock matters; and a database clock that goes back takes
the times along.
"""

from __future__ import annotations

from collections.abc import Sequence
from urllib.parse import urlsplit

from sqlalchemy import Engine, delete, select, update
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.orm import Session

from services.teacher_gateway.database import now, transaction
from services.teacher_gateway.ledger import changed
from services.teacher_gateway.limits import rates
from services.teacher_gateway.limits.rates import Rate
from services.teacher_gateway.models import TeacherEndpoint, TeacherShare
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


def asked_again_at(row: TeacherEndpoint) -> float:
    """When an attempt may begin: of circuit, pause and rates the last one ends."""
    rated = max(row.requests_at, row.tokens_at) - _EARLY_SECONDS
    return max(row.cool_until, row.open_until, rated)


def hold(session: Session, endpoint: str) -> tuple[TeacherEndpoint, float]:
    """An endpoint's row, held for this transaction, and the database's time after that."""
    row = session.get(TeacherEndpoint, endpoint, with_for_update=True)
    if row is None:
        dialect = postgresql if session.get_bind().dialect.name == "postgresql" else sqlite
        columns = TeacherEndpoint.__table__.columns
        new = {c.name: c.default.arg for c in columns if c.default is not None}
        statement = dialect.insert(TeacherEndpoint).values(endpoint=endpoint, **new)
        session.execute(statement.on_conflict_do_nothing())
        row = session.get(TeacherEndpoint, endpoint, with_for_update=True)
        assert row is not None, "endpoints are never deleted"
    clock = now(session)
    if clock < row.clock:
        _go_back(session, row, row.clock - clock)
    row.clock = clock
    return row, clock


def _go_back(session: Session, row: TeacherEndpoint, seconds: float) -> None:
    """Take all times along with a database clock that was set back."""
    times = ("requests_at", "tokens_at", "lowered_at", "raised_at", "cool_until", "open_until")
    for name in times:
        setattr(row, name, getattr(row, name) - seconds)
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
        row, clock = hold(session, endpoint)
        pause = row.cool_until - clock
        if pause <= 0:
            asking = living(session, endpoint, clock).values()
            rates.count(row, clock, strictest([teacher.limits, *asking]), tokens)
    return max(0.0, pause)


def strictest(named: Sequence[TeacherShare | Limits]) -> Rate:
    """The smallest limits of those who ask now, since each names what the endpoint bears."""
    requests = [n.requests_per_minute for n in named if n.requests_per_minute is not None]
    tokens = [n.tokens_per_minute for n in named if n.tokens_per_minute is not None]
    return Rate(min(requests, default=None), min(tokens, default=None))
