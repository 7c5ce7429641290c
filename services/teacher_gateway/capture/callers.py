"""Who asks, without a read of the database for each call.

Verified keys are remembered under a keyed digest of the header, never the header itself. The
digest's key is this process's own, so nobody can choose what a lookup compares. The database is
asked again about the key's public prefix: one that was revoked is refused within
`memory.HELD_SECONDS`.
"""

from __future__ import annotations

import hashlib
import secrets
from concurrent.futures import Executor

from pydantic import SecretStr
from sqlalchemy import Engine

from services.teacher_gateway.capture.memory import Memory
from services.teacher_gateway.keys import Caller, authenticate, still_valid


class Callers:
    """The callers of one process."""

    def __init__(self, engine: Engine, pepper: SecretStr, threads: Executor) -> None:
        self._engine = engine
        self._pepper = pepper
        self._digest_key = secrets.token_bytes(32)
        self._memory: Memory[bytes, Caller] = Memory(self._again, threads)

    def known(self, authorization: bytes) -> Caller | None:
        """The caller of an `Authorization` header that was verified a moment ago."""
        return self._memory.known(self._digest(authorization))

    async def find(self, authorization: bytes) -> Caller:
        """Verify a header. Raises KeyRefused or DatabaseUnavailable."""
        header = authorization.decode("latin-1")
        return await self._memory.find(
            self._digest(authorization), lambda: authenticate(self._engine, self._pepper, header)
        )

    def _digest(self, authorization: bytes) -> bytes:
        return hashlib.blake2b(authorization, key=self._digest_key, digest_size=32).digest()

    def _again(self, _: bytes, caller: Caller) -> Caller:
        return still_valid(self._engine, caller)
