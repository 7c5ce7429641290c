"""Checks that run now, on threads beside those that serve everybody.

Reading a spec's prompts takes seconds, and asking its teachers takes minutes where they are slow.
So a few ask teachers at once in one process, one of each tenant; another is told so instead of
waiting.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from anyio import CapacityLimiter, to_thread

from services.teacher_gateway.problems import ProblemError

T = TypeVar("T")

MOST = 4
_RETRY_SECONDS = 30


class RunningChecks:
    """The checks of a process. Used in its event loop alone."""

    def __init__(self) -> None:
        self._tenants: set[str] = set()
        self._asking = CapacityLimiter(MOST)
        self._reading = CapacityLimiter(MOST)

    async def read(self, check: Callable[[], T]) -> T:
        """Run a check that asks no teacher, once it is its turn."""
        return await to_thread.run_sync(check, limiter=self._reading)

    async def ask(self, tenant_id: str, check: Callable[[], T]) -> T:
        """Run a check that asks teachers. Raises ProblemError (429) where it has no turn now."""
        if tenant_id in self._tenants:
            raise _no_turn("a check of this tenant is asking teachers already")
        if len(self._tenants) >= MOST:
            raise _no_turn(f"{MOST} checks of other tenants are asking teachers already")
        self._tenants.add(tenant_id)
        try:
            return await to_thread.run_sync(check, limiter=self._asking)
        finally:
            self._tenants.discard(tenant_id)


def _no_turn(why: str) -> ProblemError:
    return ProblemError(
        429,
        "too-many-checks",
        f"{why}, which takes minutes where they are slow: try again once it has ended, or check "
        "without `probe`",
        headers={"Retry-After": str(_RETRY_SECONDS)},
    )
