"""What the hot path needs of the database, remembered for a few seconds.

An entry is used as it is while it is fresh. Then it is read anew in the background, once, and used
meanwhile; what could not be read anew for `HELD_SECONDS` is not used any more. So a change, such
as the revocation of a key, holds after that time at the latest, and no call waits for a read but
the first one.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from concurrent.futures import Executor
from dataclasses import dataclass
from typing import Generic, TypeVar

from stillhouse.chassis.errors import RetryableError
from stillhouse.chassis.logs import logger

log = logger(__name__)

FRESH_SECONDS = 2.0
HELD_SECONDS = 5.0
_MOST_ENTRIES = 10_000

K = TypeVar("K")
V = TypeVar("V")


@dataclass(slots=True)
class _Entry(Generic[V]):
    value: V
    at: float
    reading: bool = False


class Memory(Generic[K, V]):
    """Values by key. `again` reads a value anew in a thread; whatever it raises but a
    RetryableError means that there is no such value any more."""

    def __init__(
        self,
        again: Callable[[K, V], V],
        threads: Executor,
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._again = again
        self._threads = threads
        self._clock = clock
        self._entries: dict[K, _Entry[V]] = {}
        self._finding: dict[K, asyncio.Future[V]] = {}
        self._background: set[asyncio.Task[None]] = set()

    def known(self, key: K) -> V | None:
        """The value, if it is remembered."""
        entry = self._entries.get(key)
        if entry is None:
            return None
        age = self._clock() - entry.at
        if age < FRESH_SECONDS:
            return entry.value
        if age >= HELD_SECONDS:
            return None
        if not entry.reading:
            entry.reading = True
            task = asyncio.get_running_loop().create_task(self._refresh(key, entry))
            self._background.add(task)
            task.add_done_callback(self._background.discard)
        return entry.value

    async def find(self, key: K, read: Callable[[], V]) -> V:
        """Read a value in a thread and remember it; calls at once for one key read once."""
        waiting = self._finding.get(key)
        if waiting is None:
            loop = asyncio.get_running_loop()
            waiting = loop.run_in_executor(self._threads, read)
            self._finding[key] = waiting
            started = self._clock()

            def done(future: asyncio.Future[V]) -> None:
                if self._finding.get(key) is future:
                    del self._finding[key]
                    if not future.cancelled() and future.exception() is None:
                        self._remember(key, future.result(), started)

            waiting.add_done_callback(done)
        return await asyncio.shield(waiting)

    def forget(self, key: K) -> None:
        """Read a value anew at its next use: it was changed just now."""
        self._entries.pop(key, None)
        self._finding.pop(key, None)

    def _remember(self, key: K, value: V, at: float) -> None:
        if len(self._entries) >= _MOST_ENTRIES:
            self._entries.clear()
        self._entries[key] = _Entry(value, at)

    async def _refresh(self, key: K, entry: _Entry[V]) -> None:
        started = self._clock()
        loop = asyncio.get_running_loop()
        try:
            value = await loop.run_in_executor(self._threads, self._again, key, entry.value)
        except RetryableError as error:
            log.warning("not read anew", why=str(error))
            entry.reading = False
        except Exception:
            # Gone, or not usable any more: the next use reads it and says why.
            if self._entries.get(key) is entry:
                del self._entries[key]
        else:
            if self._entries.get(key) is entry:  # else it was forgotten meanwhile
                self._remember(key, value, started)
