"""What this process may spend for one teacher: counted in memory, taken in tranches.

A call holds the most that it can cost, and gives it back when what it cost is known; that stays
unsettled until its record is in the store. What is free is what was taken, less both: later calls
use it, and what nobody used for a while goes back. Only the event loop touches an allowance; SQL is
asked in a thread, about one change at a time.
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

# What is taken at a time is what waiting calls need, or a reserve where that is more: so many calls
# at first, more while it does not last, and at most this part of the budget. Small, because what a
# process holds when it dies is listed as spent: the most of its calls in flight, what is not
# settled, and what is free.
_FIRST_CALLS = 16
_GROWTH = 4
_LASTS_SECONDS = 2.0
_BUDGET_SHARE = 50
# What nobody asked for in this time is given back, so that other processes can have it.
_IDLE_SECONDS = 5.0
_TRIES = 20


class OpenTranche:
    """The tranche that this process draws on. `drawn` is all that it took and did not give back;
    `taken` is what is left of that in SQL, where what is settled is gone. Of it calls in flight
    hold `in_calls`, and `unsettled` is spent but not in the ledger yet."""

    __slots__ = ("drawn", "in_calls", "taken", "tranche_id", "unsettled")

    def __init__(self) -> None:
        self.tranche_id = f"tr-{secrets.token_hex(8)}"
        self.drawn = 0
        self.taken = 0
        self.in_calls = 0
        self.unsettled = 0

    @property
    def free(self) -> int:
        return self.taken - self.in_calls - self.unsettled

    def settle_call(self, most: int, cost: int) -> None:
        """A call ended: what it cost stays to be settled."""
        self.in_calls -= most
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
        self.tranche = OpenTranche()
        self._engine = engine
        self._threads = threads
        self._clock = clock
        self._wish = 0
        self._scarce = False
        self._taken_at = float("-inf")
        self._used_at = clock()
        self._wanted = 0
        self._taking: asyncio.Task[tranches.Taken] | None = None
        # Held while SQL is asked about a tranche: what is drawn is known before and after.
        self._asking = asyncio.Lock()
        # Whether SQL may have more than is known here: an answer was lost.
        self._unclear = False

    def hold(self, most: int, budget: int) -> OpenTranche | None:
        """Set aside the most that a call can cost; None when more must be taken first."""
        tranche = self.tranche
        free = tranche.taken - tranche.in_calls - tranche.unsettled - most
        if free < 0:
            return None
        tranche.in_calls += most
        self._used_at = self._clock()
        if free * 2 < self._wish and self._taking is None and not self._scarce:
            self._take(most, budget)  # before it runs out, so that nobody waits
        return tranche

    async def hold_more(self, most: int, budget: int) -> OpenTranche:
        """The same, after taking more. Raises Refusal when the budget does not allow it."""
        if most > budget:
            raise self._refusal(tranches.Taken(0, scarce=True, reserved=0), most)
        self._wanted += most
        try:
            for _ in range(_TRIES):
                if tranche := self.hold(most, budget):
                    return tranche
                taking = self._taking or self._take(most, budget)
                try:
                    taken = await asyncio.shield(taking)
                except RetryableError as error:
                    raise unavailable("the database did not answer") from error
                if tranche := self.hold(most, budget):
                    return tranche
                if taken.scarce:
                    raise self._refusal(taken, most)
            raise unavailable("too many calls wait for money")
        finally:
            self._wanted -= most

    def shipped(self, tranche_id: str, cost: int, taken: int) -> None:
        """Records that cost so much are settled; `taken` of it came out of the tranche."""
        if self.tranche.tranche_id == tranche_id:
            self.tranche.unsettled -= cost
            self.tranche.taken -= min(taken, self.tranche.taken)

    def expired(self, tranche_id: str) -> None:
        """The clock listed this tranche; calls that it paid for are settled against the list."""
        if self.tranche.tranche_id == tranche_id:
            if self.tranche.taken:
                log.warning("a tranche expired while its process lives", tranche=tranche_id)
            self.tranche = OpenTranche()
            self._unclear = False

    def idle(self) -> bool:
        """Whether there is something that others could use, and nobody here does."""
        unused = self._clock() - self._used_at > _IDLE_SECONDS
        free = self.tranche.free > 0 and (unused or self._scarce)
        return self._taking is None and (free or self._unclear)

    async def give_back(self) -> None:
        """Return all that is free, and what came with an answer that was lost. Raises
        DatabaseUnavailable; repeated, it returns the same once."""
        async with self._asking:
            tranche = self.tranche
            if (free := tranche.free) > 0:
                # Nobody's from now on, whether or not the answer comes.
                tranche.taken -= free
                tranche.drawn -= free
                self._unclear = True
            if not self._unclear:
                return
            loop = asyncio.get_running_loop()
            open_still = await loop.run_in_executor(
                self._threads,
                lambda: tranches.give_back(
                    self._engine, self.account, tranche.tranche_id, drawn=tranche.drawn
                ),
            )
            self._unclear = False
            if not open_still or tranche.taken == 0:
                self.expired(tranche.tranche_id)  # the next one has another name

    def _take(self, most: int, budget: int) -> asyncio.Task[tranches.Taken]:
        """Start to take more; the only place where that is done."""
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
        # All that wait now are served by one transaction; those that come later, by the next.
        await asyncio.sleep(0)
        async with self._asking:
            tranche = self.tranche
            need = max(self._wanted - tranche.free, 0)
            drawn, wish = tranche.drawn, self._wish

            def ask() -> tranches.Taken:
                return tranches.take(
                    self._engine,
                    self.account,
                    tranche.tranche_id,
                    drawn=drawn,
                    need=need,
                    wish=wish,
                )

            try:
                taken = await asyncio.get_running_loop().run_in_executor(self._threads, ask)
            except tranches.TrancheExpired:
                self.expired(tranche.tranche_id)
                return tranches.Taken(0, scarce=False, reserved=0)
            except RetryableError:
                self._unclear = True
                raise
            tranche.drawn += taken.microusd
            tranche.taken += taken.microusd
            self._unclear = False
            self._scarce = taken.scarce
            return taken

    def _took(self, task: asyncio.Task[tranches.Taken]) -> None:
        self._taking = None
        if not task.cancelled() and (error := task.exception()):
            log.warning(
                "nothing was taken for live traffic", account=self.account.name, why=str(error)
            )

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
