"""API keys: shown once, stored as a keyed hash, found by a public prefix.

    sth_<12 hex digits: the prefix>_<64 hex digits: the secret, 256 bits>

A leaked database tells no key (HMAC-SHA256 with a pepper that lies elsewhere), and revoking one
holds from the next request on, since every request looks it up; for live traffic, within seconds
(`capture.callers`).
"""

from __future__ import annotations

import hashlib
import hmac
import re
import secrets
from dataclasses import dataclass

from pydantic import SecretStr
from sqlalchemy import Engine, select

from services.teacher_gateway.database import Session, now, reading, transaction
from services.teacher_gateway.models import ApiKey, Audit, Tenant
from stillhouse.chassis.errors import PermanentError
from stillhouse.contracts.artifacts import ID_PATTERN

_KEY = re.compile(r"^sth_([0-9a-f]{12})_([0-9a-f]{64})$")
_ABSENT = "0" * 64


@dataclass(frozen=True)
class Caller:
    """Who asks: the tenant that a key belongs to."""

    tenant_id: str
    prefix: str


class KeyRefused(Exception):
    """No key, or one that is unknown, expired or revoked; which of these is not told."""


def create_key(
    engine: Engine, pepper: SecretStr, tenant_id: str, *, days: float | None = None
) -> str:
    """Make a key for a tenant, who is made too if new; return it, for the only time."""
    if not re.fullmatch(ID_PATTERN, tenant_id):
        raise PermanentError(
            f"expected a tenant's name of small letters, digits and hyphens, found {tenant_id!r}",
            reason="tenant_name",
        )
    prefix, secret = secrets.token_hex(6), secrets.token_hex(32)
    with transaction(engine) as session:
        at = now(session)
        if session.get(Tenant, tenant_id) is None:
            session.add(Tenant(tenant_id=tenant_id, created_at=at))
            session.flush()
        session.add(
            ApiKey(
                prefix=prefix,
                tenant_id=tenant_id,
                secret_hmac=_hash(pepper, prefix, secret),
                created_at=at,
                expires_at=None if days is None else at + days * 86_400,
                revoked_at=None,
            )
        )
        _audit(session, at, tenant_id, "key.created", prefix)
    return f"sth_{prefix}_{secret}"


def revoke_key(engine: Engine, prefix: str) -> bool:
    """Refuse a key from now on; False when there is none with this prefix."""
    with transaction(engine) as session:
        key = session.get(ApiKey, prefix)
        if key is None:
            return False
        if key.revoked_at is None:
            key.revoked_at = now(session)
            _audit(session, key.revoked_at, key.tenant_id, "key.revoked", prefix)
    return True


def list_keys(engine: Engine) -> list[ApiKey]:
    """Every key without its secret, oldest first."""
    with reading(engine) as session:
        return list(session.scalars(select(ApiKey).order_by(ApiKey.created_at, ApiKey.prefix)))


def authenticate(engine: Engine, pepper: SecretStr, authorization: str | None) -> Caller:
    """Find the caller of an `Authorization: Bearer ...` header. Raises KeyRefused."""
    scheme, _, value = (authorization or "").partition(" ")
    match = _KEY.fullmatch(value.strip()) if scheme.lower() == "bearer" else None
    if match is None:
        raise KeyRefused
    prefix, secret = match.groups()
    key = _in_force(engine, prefix)
    # Compared also where there is no such key, so that time does not tell which prefixes exist.
    expected = key.secret_hmac if key else _ABSENT
    right = hmac.compare_digest(expected, _hash(pepper, prefix, secret))
    if key is None or not right:
        raise KeyRefused
    return Caller(tenant_id=key.tenant_id, prefix=prefix)


def still_valid(engine: Engine, caller: Caller) -> Caller:
    """Look again for the key of a caller whose secret was verified. Raises KeyRefused."""
    key = _in_force(engine, caller.prefix)
    if key is None or key.tenant_id != caller.tenant_id:
        raise KeyRefused
    return caller


def _in_force(engine: Engine, prefix: str) -> ApiKey | None:
    """The key of a prefix, unless it is revoked or expired."""
    with reading(engine) as session:
        key = session.get(ApiKey, prefix)
        at = now(session)
    if key is None or key.revoked_at is not None:
        return None
    return None if key.expires_at is not None and key.expires_at <= at else key


def _hash(pepper: SecretStr, prefix: str, secret: str) -> str:
    message = f"{prefix}:{secret}".encode()
    return hmac.new(pepper.get_secret_value().encode(), message, hashlib.sha256).hexdigest()


def _audit(session: Session, at: float, tenant_id: str, action: str, prefix: str) -> None:
    session.add(Audit(at=at, tenant_id=tenant_id, actor="operator", action=action, target=prefix))
