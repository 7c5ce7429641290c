"""Liveness that tests progress: a beat from the loop that does the work, not a live process."""

from __future__ import annotations

import time


class Heartbeat:
    """Healthy while someone beat within `stale_after` seconds."""

    def __init__(self, stale_after: float) -> None:
        self._stale_after = stale_after
        self._last = time.monotonic()

    def beat(self) -> None:
        self._last = time.monotonic()

    def healthy(self) -> bool:
        return time.monotonic() - self._last < self._stale_after
