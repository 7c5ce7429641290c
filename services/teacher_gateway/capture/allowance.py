"""What this process may spend for one teacher: counted in memory, taken in tranches.

A call holds the most that it can cost, and gives it back when what it cost is known; that stays
unsettled until its record is in the store. What is free is what was taken, less both. Only the
event loop touches an allowance; SQL is asked in a thread, by one caller at a time.
"""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import Callable
from concurrent.futures import Executor

from sqlalchemy import Engine

from services.teacher_gateway.capture import tranches
from services.teacher_gateway.capture.refusal import Refusal, unavailable
from services.teacher_gateway.ledger import AccountId
from stillhouse.chassis.errors import RetryableError
from stillhouse.chassis.logs import logger

log = logger(__name__)

# A tranche is so many calls at first, grows while it does not last, and is at most this part of
# the budget: small, because a process that dies costs what is left of it.
_FIRST_CALLS = 16
_GROWTH = 4
_LASTS_SECONDS = 2.0
_BUDGET_SHARE = 50
# What nobody asked for in this time is given back, so that other processes can have it.
_IDLE_SECONDS = 5.0
_TRIES = 20


class Held:
    """A part of the allowance under one tranche: in SQL `taken`, of which calls in flight hold
    `held`, and `unsettled` is spent but not in the ledger yet."""

    __slots__ = ("held", "taken", "tranche_id", "unsettled")

    def __init__(self) -> None:
        self.tranche_id = f"tr-{secrets.token_hex(8)}"
        self.taken = 0
        self.held = 0
        self.unsettled = 0

    @property
    def free(self) -> int:
        return self.taken - self.held - self.unsettled

    def settle_call(self, most: int, cost: int) -> None:
        """A call ended: what it cost stays to be settled."""
        self.held -= most
        self.unsettled += cost


class Allowance:
    """One teacher's money in this process."""

    def __init__(
        self,
        engine: Engine,
        account: AccountId,
        threads: Executor,
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.account = account
        self.held = Held()
        self._engine = engine
        self._threads = threads
        self._clock = clock
        self._wish = 0
        self._scarce = False
        self._taken_at = float("-inf")
        self._used_at = clock()
        self._wanted = 0
        self._taking: asyncio.Task[tranches.Taken] | None = None

    def hold(self, most: int, budget: int) -> Held | None:
        """Set aside the most that a call can cost; None when more must be taken first."""
        held = self.held
        free = held.taken - held.held - held.unsettled - most
        if free < 0:
            return None
        held.held += most
        self._used_at = self._clock()
        if free * 2 < self._wish and self._taking is None and not self._scarce:
            self._take(most, budget)  # before it runs out, so that nobody waits
        return held

    async def hold_more(self, most: int, budget: int) -> Held:
        """The same, after taking another tranche. Raises Refusal when the budget does not allow
        it."""
        if most > budget:
            raise self._refusal(tranches.Taken(0, scarce=True, reserved=0), most)
        self._wanted += most
        try:
            for _ in range(_TRIES):
                if held := self.hold(most, budget):
                    return held
                taking = self._taking or self._take(most, budget)
                try:
                    taken = await asyncio.shield(taking)
                except RetryableError as error:
                    raise unavailable("the database did not answer") from error
                if held := self.hold(most, budget):
                    return held
                if taken.scarce:
                    raise self._refusal(taken, most)
            raise unavailable("too many calls wait for money")
        finally:
            self._wanted -= most

    def shipped(self, tranche_id: str, cost: int, taken: int) -> None:
        """Records that cost so much are settled; `taken` of it came out of the tranche."""
        if self.held.tranche_id == tranche_id:
            self.held.unsettled -= cost
            self.held.taken -= taken

    def expired(self, tranche_id: str) -> None:
        """The clock listed this tranche; calls that it paid for are settled against the list."""
        if self.held.tranche_id == tranche_id:
            log.warning("a tranche expired while its process lives", tranche=tranche_id)
            self.held = Held()

    def idle(self) -> bool:
        """Whether there is something that others could use, and nobody here does."""
        unused = self._clock() - self._used_at > _IDLE_SECONDS
        return self.held.free > 0 and self._taking is None and (unused or self._scarce)

    async def give_back(self) -> None:
        """Return all that is free. Raises DatabaseUnavailable."""
        held, microusd = self.held, self.held.free
        if microusd <= 0:
            return
        held.taken -= microusd
        loop = asyncio.get_running_loop()
        try:
            open_still = await loop.run_in_executor(
                self._threads,
                tranches.give_back,
                self._engine,
                self.account,
                held.tranche_id,
                microusd,
            )
        except BaseException:
            held.taken += microusd
            raise
        if not open_still:
            self.expired(held.tranche_id)

    def _take(self, most: int, budget: int) -> asyncio.Task[tranches.Taken]:
        """Start to take another tranche; the only place where that is done."""
        lasted = self._clock() - self._taken_at > _LASTS_SECONDS
        first = most * _FIRST_CALLS
        self._wish = max(self._wish // _GROWTH if lasted else self._wish * _GROWTH, first)
        self._wish = max(min(self._wish, budget // _BUDGET_SHARE), 1)
        self._taken_at = self._clock()
        task = asyncio.get_running_loop().create_task(self._taken())
        self._taking = task
        task.add_done_callback(self._took)
        return task

    async def _taken(self) -> tranches.Taken:
        held = self.held
        # All that wait now are served by one transaction; those that come later, by the next.
        await asyncio.sleep(0)
        loop = asyncio.get_running_loop()

        def ask() -> tranches.Taken:
            return tranches.take(
                self._engine, self.account, held.tranche_id, need=need, wish=self._wish
            )

        need = max(self._wanted - held.free, 0)
        try:
            taken = await loop.run_in_executor(self._threads, ask)
        except tranches.TrancheExpired:
            self.expired(held.tranche_id)
            return tranches.Taken(0, scarce=False, reserved=0)
        held.taken += taken.microusd
        self._scarce = taken.scarce
        return taken

    def _took(self, task: asyncio.Task[tranches.Taken]) -> None:
        self._taking = None
        if not task.cancelled() and (error := task.exception()):
            log.warning("no tranche was taken", account=self.account.name, why=str(error))

    def _refusal(self, taken: tranches.Taken, most: int) -> Refusal:
        name = self.account.name.removeprefix("teacher-")
        worst = f"this call may cost {most / 1e6:g} USD at the most"
        if taken.reserved + taken.microusd > 0:
            return Refusal(
                429,
                "budget_reserved",
                f"what is left of the budget of {name!r} is held for calls in flight, and {worst}: "
                "try again in a second, lower `max_tokens`, or raise `budget_usd`",
                retry_after=1,
            )
        return Refusal(
            402,
            "budget_exhausted",
            f"the budget of {name!r} has no room for it, and {worst}: raise `budget_usd` with "
            "`stillhouse teachers add FILE`, or lower `max_tokens`",
        )
