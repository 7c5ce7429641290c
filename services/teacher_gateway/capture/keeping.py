"""What goes on beside the calls: recorded traffic to the store, money to the ledger.

One task of the event loop brings records home, another one keeps the money, so that a store which
stalls lets no tranche expire; whatever waits for disk, store or database does so in a thread. A
duty that meets an error is done again at the next turn: meanwhile the spool and the tranches hold
what is not told yet.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import deque
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from sqlalchemy import Engine

from services.teacher_gateway.capture import tranches
from services.teacher_gateway.capture.allowance import Allowance
from services.teacher_gateway.capture.failures import SPOOL_FULL
from services.teacher_gateway.capture.record import Record
from services.teacher_gateway.capture.registrations import Served, account_of
from services.teacher_gateway.capture.ship import (
    SWEEP_SECONDS,
    Shipped,
    ship_abandoned,
    ship_segment,
)
from services.teacher_gateway.capture.spool import Spool
from services.teacher_gateway.counters import CAPTURE_FAILURES, CAPTURE_SPOOL_BYTES
from services.teacher_gateway.ledger import AccountId
from services.teacher_gateway.settings import TeacherGatewaySettings
from stillhouse.chassis.errors import RetryableError
from stillhouse.chassis.logs import logger
from stillhouse.chassis.storage import ObjectStore

log = logger(__name__)

# After an error the store is left alone so long.
_PAUSE_SECONDS = 5.0
# How long a stopping process tries to bring its records to the store; its spool keeps them.
_LAST_SECONDS = 2.0


class Keeping:
    """The records and the money of one process."""

    def __init__(
        self,
        engine: Engine,
        store: ObjectStore,
        settings: TeacherGatewaySettings,
        threads: ThreadPoolExecutor,
        *,
        segment_seconds: float,
        turn_seconds: float,
    ) -> None:
        self._engine = engine
        self._store = store
        self._folder = settings.captured_folder
        self._threads = threads
        self._turn_seconds = turn_seconds
        # One: segments are shipped in turn, and never hold up a call's read of the database.
        self._shipper = ThreadPoolExecutor(1, thread_name_prefix="capture-ship")
        self._loop = asyncio.get_running_loop()
        self._closed: deque[Path] = deque()
        self._allowances: dict[tuple[str, str], Allowance] = {}
        # Costs of records that were dropped: being summed up, and on their way to the ledger.
        self._unrecorded: dict[tuple[AccountId, str], tranches.Bill] = {}
        self._settling: deque[tuple[str, AccountId, tranches.Bill]] = deque()
        self._settlements = 0
        self._stopping = asyncio.Event()
        self._renewed_at = self._swept_at = self._paused_until = float("-inf")
        self._spool = Spool(
            self._folder,
            most_bytes=settings.capture_spool_bytes,
            closed=self._closed.append,
            lost=self._lost_in_thread,
            segment_seconds=segment_seconds,
        )
        self._tasks = {
            self._loop.create_task(self._turns(self._keep_money)),
            self._loop.create_task(self._turns(self._bring_home)),
        }

    def allowance(self, served: Served) -> Allowance:
        """The money of a teacher in this process."""
        key = (served.tenant_id, served.name)
        found = self._allowances.get(key)
        if found is None:
            found = Allowance(self._engine, account_of(*key), self._threads)
            self._allowances[key] = found
        return found

    def keep(self, record: Record) -> None:
        """Have a record written; never waits."""
        if not self._spool.add(record):
            self._drop(record, SPOOL_FULL)

    async def stop(self) -> None:
        """Bring home what there is; what cannot be brought waits in the spool."""
        self._stopping.set()
        await asyncio.wait(self._tasks, timeout=_LAST_SECONDS)
        for task in self._tasks:
            task.cancel()
        await self._in_thread(self._threads, self._spool.close)
        try:
            async with asyncio.timeout(_LAST_SECONDS):
                # Beside each other: a store that stalls keeps no money here.
                await asyncio.gather(self._bring_home(), self._keep_money(last=True))
        except TimeoutError:
            log.warning("recorded traffic waits in the spool", segments=len(self._closed))
        self._shipper.shutdown(wait=False, cancel_futures=True)
        self._spool.remove()

    async def _turns(self, turn: Callable[[], Awaitable[None]]) -> None:
        while not self._stopping.is_set():
            await turn()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._stopping.wait(), self._turn_seconds)

    async def _keep_money(self, *, last: bool = False) -> None:
        await self._duty("renew", self._renew)
        await self._duty("settle", self._settle_unrecorded)
        for allowance in list(self._allowances.values()):
            if last or allowance.idle():
                await self._duty("give_back", allowance.give_back)

    async def _bring_home(self) -> None:
        if time.monotonic() >= self._paused_until:
            await self._duty("ship", self._ship)
        CAPTURE_SPOOL_BYTES.set(self._spool.size)

    async def _duty(self, name: str, duty: Callable[[], Awaitable[None]]) -> None:
        try:
            await duty()
        except RetryableError as error:
            log.warning("a duty of the capture endpoint is put off", duty=name, why=str(error))
            self._pause(name)
        except Exception:
            log.exception("a duty of the capture endpoint failed", duty=name)
            self._pause(name)

    def _pause(self, name: str) -> None:
        if name == "ship":
            self._paused_until = time.monotonic() + _PAUSE_SECONDS

    # Records

    async def _ship(self) -> None:
        """Closed segments of this process, and from time to time those of dead ones."""
        for _ in range(len(self._closed)):
            path = self._closed.popleft()
            try:
                shipped: Shipped = await self._in_thread(
                    self._shipper, ship_segment, path, self._engine, self._store
                )
            except BaseException:
                # To the end: one that cannot be shipped does not hold up the others.
                self._closed.append(path)
                raise
            self._spool.shipped(shipped.records)
            for tranche_id, cost, taken in shipped.paid:
                self._paid(tranche_id, cost, taken)
        if time.monotonic() - self._swept_at >= SWEEP_SECONDS:
            self._swept_at = time.monotonic()
            await self._in_thread(
                self._shipper, ship_abandoned, self._folder, self._engine, self._store
            )

    def _paid(self, tranche_id: str, cost: int, taken: int) -> None:
        for allowance in self._allowances.values():
            allowance.shipped(tranche_id, cost, taken)

    def _lost_in_thread(self, records: list[Record], why: str) -> None:
        self._loop.call_soon_threadsafe(self._lost, records, why)

    def _lost(self, records: list[Record], why: str) -> None:
        self._spool.shipped(records)
        for record in records:
            self._drop(record, why)

    def _drop(self, record: Record, why: str) -> None:
        """Count a record that is not kept; what its call cost is settled all the same."""
        CAPTURE_FAILURES.labels(why).inc()
        if record.microusd:
            account = account_of(record.tenant_id, record.teacher)
            key = (account, record.tranche_id)
            bill = self._unrecorded.setdefault(key, tranches.Bill(record.tranche_id))
            bill.add("unused" if record.bill == "known" else "unknown", record.microusd)

    # Money

    async def _settle_unrecorded(self) -> None:
        for (account, tranche_id), bill in self._unrecorded.items():
            self._settlements += 1
            name = f"unrecorded:{tranche_id}:{self._settlements}"
            self._settling.append((name, account, bill))
        self._unrecorded.clear()
        for _ in range(len(self._settling)):
            charge_id, account, bill = self._settling[0]
            try:
                taken = await self._in_thread(
                    self._threads, tranches.settle_once, self._engine, account, bill, charge_id
                )
            except RetryableError:
                raise  # the database's: so it would be for the others
            except Exception:
                log.exception("a bill cannot be settled", charge=charge_id)
                self._settling.rotate(-1)
                continue
            self._settling.popleft()
            self._paid(bill.tranche_id, bill.microusd, taken)

    async def _renew(self) -> None:
        if time.monotonic() - self._renewed_at < tranches.TTL_SECONDS / 3:
            return
        held = {a.tranche.tranche_id: a for a in self._allowances.values() if a.tranche.taken > 0}
        gone = await self._in_thread(self._threads, tranches.renew, self._engine, list(held))
        self._renewed_at = time.monotonic()
        for tranche_id in gone:
            held[tranche_id].expired(tranche_id)

    async def _in_thread(
        self, threads: ThreadPoolExecutor, work: Callable[..., Any], *given: Any
    ) -> Any:
        return await self._loop.run_in_executor(threads, work, *given)
