"""A lease in one object of the store, moved by compare-and-swap, with what it guards inside.

Taking over, each heartbeat and each change of the guarded state are `If-Match` on the same
object, so taking over is fencing: whoever lost the lease cannot write any more. The age of a
lease is the store's own clock (`Date` minus `Last-Modified` of one GET). Measured limits and the
reasons for the margins stand in `docs/adr/0005-leases-in-the-object-store.md`.
"""

from __future__ import annotations

import secrets
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from pydantic import BaseModel

from stillhouse.chassis.errors import StillhouseError, StoreUnavailable
from stillhouse.chassis.logs import logger
from stillhouse.chassis.storage import Conflict, ObjectStore, Stored
from stillhouse.contracts.canonical import canonical_json

log = logger(__name__)

# A state model has the fields `epoch`, `holder`, `beat` and `write_id`.
State = TypeVar("State", bound=BaseModel)


@dataclass(frozen=True)
class LeaseTimes:
    """Seconds. A holder stops `stop_before` ahead of the end of its time to live, counted from
    before it sent its last renewal; a contender takes over `grace` after it."""

    ttl: float = 20
    beat: float = 5
    stop_before: float = 5
    grace: float = 2


class LeaseLost(StillhouseError):
    """Someone else holds the lease, or it could not be renewed in time: stop at once."""


class Lease(Generic[State]):
    """A held lease. Use `acquire`; a context manager that beats on a thread of its own.

    `update` changes the guarded state; `state` is what was last written. All writes go through
    one lock, because heartbeat and update share one ETag. The store should be one made with
    short time-outs (connect 2 s, read 3 s), so that a hanging call cannot eat the time to live.
    """

    def __init__(
        self,
        store: ObjectStore,
        key: str,
        state: State,
        etag: str,
        renewed_at: float,
        times: LeaseTimes,
    ) -> None:
        self._store = store
        self._key = key
        self._state = state
        self._etag = etag
        self._renewed_at = renewed_at
        self._times = times
        self._lock = threading.Lock()
        self._ended = threading.Event()
        self._lost = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="lease", daemon=True)

    @property
    def state(self) -> State:
        return self._state

    def held(self) -> bool:
        """Whether the holder may still compute and write."""
        alive = time.monotonic() < self._renewed_at + self._times.ttl - self._times.stop_before
        return alive and not self._lost.is_set()

    def check(self) -> None:
        """Raise LeaseLost unless the lease is held. Call it before and after costly work."""
        if not self.held():
            raise LeaseLost(f"the lease {self._key} is lost; another holder goes on")

    def update(self, **changes: Any) -> State:
        """Write changed fields of the state. Raises LeaseLost when fenced off, and
        StoreUnavailable when the store did not answer (the lease may still be held)."""
        with self._lock:
            self.check()
            return self._write(changes)

    def release(self) -> None:
        """Give the lease back, so that the next holder need not wait. Never raises LeaseLost."""
        self._stop_beating()
        with self._lock:
            if self.held():
                try:
                    self._write({"holder": ""})
                except (LeaseLost, StoreUnavailable) as error:
                    log.warning("lease not released; it will expire", key=self._key, why=str(error))
            self._lost.set()

    def __enter__(self) -> Lease[State]:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.release()

    def _stop_beating(self) -> None:
        self._ended.set()
        if self._thread.is_alive() and self._thread is not threading.current_thread():
            self._thread.join()

    def _write(self, changes: dict[str, Any]) -> State:
        sent_at = time.monotonic()
        fields = {**changes, "write_id": secrets.token_hex(8)}
        fields["beat"] = self._state.beat + 1  # type: ignore[attr-defined]
        state = self._state.model_copy(update=fields)
        data = _encode(state)
        try:
            etag = self._store.swap(self._key, data, self._etag)
        except (Conflict, StoreUnavailable) as error:
            # A lost reply makes our own success look like a loss: the write_id tells.
            stored = self._store.read(self._key)
            if stored is None or stored.data != data:
                if stored is None or not self._adopt(stored):
                    self._lost.set()
                    raise LeaseLost(f"the lease {self._key} was taken over") from error
                raise StoreUnavailable(f"{self._key} was not written: {error}") from error
            etag = stored.etag
        self._state, self._etag, self._renewed_at = state, etag, sent_at
        return state

    def _adopt(self, stored: Stored) -> bool:
        """Whether the stored state is ours: the last written one, or an earlier write of this
        holder that the store took after it had seemed to fail; then go on from that one."""
        if stored.etag == self._etag:
            return True
        found: Any = type(self._state).model_validate_json(stored.data)
        mine: Any = self._state
        if (found.epoch, found.holder) != (mine.epoch, mine.holder):
            return False
        self._state, self._etag = found, stored.etag
        return True

    def _beat(self) -> None:
        while not self._ended.wait(self._times.beat):
            with self._lock:
                if self._lost.is_set():
                    return
                try:
                    self._write({})
                except LeaseLost:
                    return
                except StoreUnavailable as error:
                    log.warning("heartbeat failed", key=self._key, why=str(error))


def acquire(
    store: ObjectStore,
    key: str,
    holder: str,
    *,
    model: type[State],
    initial: Callable[[], State],
    times: LeaseTimes | None = None,
    may_take: Callable[[State], bool] = lambda state: True,
) -> Lease[State] | None:
    """Take a lease that is free, released or expired; None when it is held or `may_take` says no.

    `initial` makes the state where no object is yet. The epoch grows by one with each
    acquisition, so it fences everything written under it.
    """
    times = times or LeaseTimes()
    stored = store.read(key)
    if stored is None:
        state, etag = initial(), None
    else:
        state, etag = model.model_validate_json(stored.data), stored.etag
        if not may_take(state) or not _free(state, stored, times):
            return None
        state = state.model_copy(
            update={"epoch": state.epoch + 1}  # type: ignore[attr-defined]
        )
    state = state.model_copy(update={"holder": holder, "beat": 0, "write_id": secrets.token_hex(8)})
    data = _encode(state)
    sent_at = time.monotonic()
    try:
        etag = store.swap(key, data, etag)
    except (Conflict, StoreUnavailable):
        again = store.read(key)
        if again is None or again.data != data:
            return None
        etag = again.etag
    return Lease(store, key, state, etag, sent_at, times)


def _free(state: Any, stored: Stored, times: LeaseTimes) -> bool:
    return not state.holder or stored.age_seconds >= times.ttl + times.grace


def _encode(state: BaseModel) -> bytes:
    return canonical_json(state.model_dump(mode="json"))
