"""Ask a teacher for many items at once, and store what it says while it is still speaking.

One attempt at a batch: some callers share the items, one writer stores the answers in parts, one
beat renews the lease. Everything on a clock of this process: a call starts only while it can end
within the attempt, and nothing is asked once the lease is not surely held. Each call waits for its
turn, which all who ask this teacher share (`limits.turns`).
"""

from __future__ import annotations

import asyncio
import random
import time
from collections import deque
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Protocol

from services.teacher_gateway import reasons
from services.teacher_gateway.counters import CALL_SECONDS, CALLS, TOKENS
from services.teacher_gateway.holding import Fenced, Lease
from services.teacher_gateway.ledger import cost_microusd
from services.teacher_gateway.limits.strain import proves
from services.teacher_gateway.limits.turns import Turns
from services.teacher_gateway.parts import (
    PART_ANSWERS,
    PART_SECONDS,
    Part,
    answers_in,
    encode_part,
)
from services.teacher_gateway.teachers.outcomes import Answered, Call, Outcome, Reject, Retry
from services.teacher_gateway.timeouts import GatewayTimeouts, backoff
from stillhouse.chassis.crash import crash_point
from stillhouse.chassis.errors import StoreUnavailable
from stillhouse.chassis.logs import logger
from stillhouse.chassis.storage import AlreadyExists
from stillhouse.contracts.artifacts import ObjectRef
from stillhouse.contracts.responses import Answer, Item
from stillhouse.contracts.spec import Price

log = logger(__name__)

# Answers that exist nowhere but here, beside those still being spoken: a crash loses no more.
UNSTORED_ANSWERS = PART_ANSWERS
_QUESTION_SECONDS = 30.0
# One that nobody answers for so long, or for half of the longest call, is nobody's own impatience.
_QUESTION_PROVES = 10.0
_QUESTION_LEAST_SECONDS = 1.0


@dataclass(frozen=True)
class Asked:
    """An item to ask for, and the most that one call for it can cost."""

    item: Item
    worst_microusd: int
    worst_tokens: int = 0  # of prompt and answer


@dataclass(frozen=True)
class GivenUp:
    """An item without an answer in this attempt, and what its last call came to; `proves`: to all
    who ask this teacher."""

    item_id: str
    reason: str
    detail: str
    after: float | None = None
    away: bool = False
    proves: bool = False


class Books(Protocol):
    """What an attempt writes down while it goes on: the ledger and the store, by blocking calls.

    All raise Fenced once the batch is another's.
    """

    def renew(self) -> bool:
        """Renew the lease; False when the pipeline stops."""

    def lost(self, asked: Asked, call: int, detail: str, *, again: bool) -> bool:
        """List a call whose bill is unknown; reserve for another one; False when none fits."""

    def rejected(self, asked: Asked, call: int, outcome: Reject) -> None:
        """Record that an item is rejected, and what it cost."""

    def store(self, number: int, data: bytes) -> ObjectRef:
        """Store a part. Raises AlreadyExists when the series was ended."""


class Ask(Protocol):
    async def __call__(self, call: Call, *, deadline: float) -> Outcome: ...


class NoTurn(Exception):
    """The teacher's limits leave no turn for a call in time."""


class Question(Protocol):
    """Something that any teacher can answer, to tell one that is away from items that it cannot
    answer."""

    async def __call__(self, *, deadline: float) -> Retry | None:
        """Why nobody answers now; None when somebody is there, or when it must not be asked.

        Raises NoTurn when it could not be asked by its deadline.
        """


@dataclass
class Result:
    """What an attempt came to."""

    parts: list[Part] = field(default_factory=list)
    given_up: list[GivenUp] = field(default_factory=list)
    rejected: set[str] = field(default_factory=set)
    stopping: bool = False
    # Whether the teacher said anything about any item; an answer is not stored at once.
    heard: bool = False
    # Why nobody was there to answer, where that is why items have no answer; and whether nobody
    # is there for others either, who may have more patience.
    away: Retry | None = None
    away_to_all: bool = False

    @property
    def answers(self) -> list[Answer]:
        return answers_in(self.parts)

    @property
    def silent(self) -> bool:
        """Whether all that was asked met as good as nobody."""
        return not self.heard and bool(self.given_up) and all(gone.away for gone in self.given_up)


class Attempt:
    """One attempt at a batch. `run` returns when every item has an end or time is up.

    It raises Fenced when the batch was taken over, and StoreUnavailable (or the database's error)
    when what was answered could not be kept: the next attempt lists what may have been billed.
    """

    def __init__(
        self,
        ask: Ask,
        books: Books,
        *,
        price: Price,
        times: GatewayTimeouts,
        concurrency: int,
        call_seconds: float,
        started: float,
        rng: random.Random | None = None,
        question: Question | None = None,
        suspect: bool = False,
        turns: Turns | None = None,
    ) -> None:
        """`suspect`: the teacher was away when it was asked last, so the question goes first.
        Without `turns` nobody else asks this teacher."""
        self._ask = ask
        self._turns = turns or Turns(concurrency)
        self._books = books
        self._price = price
        self._times = times
        self._concurrency = concurrency
        self._call_seconds = min(call_seconds, times.call)
        self._started = started  # by time.monotonic(), before the lease was taken
        self._ends = started + times.attempt
        self._lease = Lease(times, books.renew, started)
        self._rng = rng or random.Random()  # noqa: S311 jitter is no secret
        self._result = Result()
        self._queue: asyncio.Queue[Answer | None] = asyncio.Queue()
        self._halted = asyncio.Event()
        self._slots = asyncio.Semaphore(concurrency + UNSTORED_ANSWERS)
        self._question = question
        self._suspect = suspect and question is not None
        self._callers: list[asyncio.Task[None]] = []

    async def run(self, items: list[Asked]) -> Result:
        """Ask for the items; see the class."""
        if not await self._lease.renew():
            self._stop()
            return self._result
        beat = asyncio.create_task(self._lease.keep(self._stop), name="beat")
        writer = asyncio.create_task(self._write(), name="writer")
        everyone = asyncio.create_task(self._ask_all(items), name="everyone")
        try:
            while not everyone.done():
                await asyncio.wait((everyone, writer, beat), return_when=asyncio.FIRST_COMPLETED)
                for task in (writer, beat):
                    if task.done():
                        task.result()  # an error of either ends the attempt
            await everyone
            await self._queue.put(None)
            await writer
        finally:
            tasks = (beat, writer, everyone, *self._callers)
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
        return self._result

    async def _ask_all(self, items: list[Asked]) -> None:
        """Ask for the items. Where nobody answers, find out whether that is the teacher."""
        if self._suspect and await self._nobody_is_there():
            return
        waiting = deque(items)
        self._turns.wanted = min(self._concurrency, len(items))
        self._callers = [
            asyncio.create_task(self._call(waiting), name="caller")
            for _ in range(self._turns.wanted)
        ]
        await asyncio.gather(*self._callers)
        found = self._result
        if self._question is None or not found.silent or self._halted.is_set():
            return
        last = found.given_up[-1]
        away = Retry(last.reason, last.detail, last.after, away=True)
        proofs = [gone.reason for gone in found.given_up if gone.proves]
        if reasons.TEACHER_UNREACHABLE in proofs:
            self._is_away(away, to_all=True)
        elif self._time_to_ask() >= _QUESTION_LEAST_SECONDS:
            await self._nobody_is_there()
        elif not self._suspect or self._turns.cooling:
            # No time to ask, or it asked for none: the next attempt begins with the question.
            self._is_away(away, to_all=bool(proofs))

    def _is_away(self, why: Retry, *, to_all: bool) -> None:
        self._result.away, self._result.away_to_all = why, to_all

    def _time_to_ask(self) -> float:
        """Seconds that are left for the question, after the pause that the teacher asked for."""
        return self._ends - time.monotonic() - self._turns.cooling

    async def _nobody_is_there(self) -> bool:
        assert self._question is not None, "checked by the callers"
        cooling, left = self._turns.cooling, self._time_to_ask()
        if cooling and left < _QUESTION_LEAST_SECONDS:
            detail = f"it asked for a pause, of which {cooling:.0f} s are left"
            paused = Retry(reasons.TEACHER_RATE_LIMITED, detail, cooling, away=True)
            self._is_away(paused, to_all=True)
            return True
        await self._pause(cooling)
        try:
            # Not the spec's deadline: whoever sets a short one learns whether anybody is there.
            seconds = min(self._times.call, _QUESTION_SECONDS, left)
            away = await self._question(deadline=seconds)
        except NoTurn:
            return False  # then there is none for items either, and others ask it
        if away is None:
            return False
        self._is_away(away, to_all=proves(away, min(_QUESTION_PROVES, self._times.call / 2)))
        return True

    def _may_call(self) -> bool:
        """Whether a whole call still fits into the attempt, under a lease that is surely held."""
        fits = time.monotonic() + self._call_seconds <= self._ends
        return self._lease.sure and fits and not self._halted.is_set()

    async def _call(self, waiting: deque[Asked]) -> None:
        while waiting and self._may_call():
            await self._one(waiting.popleft())
        self._turns.want_less()

    async def _one(self, asked: Asked) -> None:
        """Ask for one item until it is answered, rejected, or given up for now."""
        item, last = asked.item, None
        for call in range(1, self._times.tries + 1):
            await self._slots.acquire()
            held = True
            try:
                outcome = await self._in_turn(asked)
                if outcome is None:
                    break
                if isinstance(outcome, Answered) and (over := self._over(asked, outcome)):
                    outcome = over
                if isinstance(outcome, Answered | Reject):
                    self._result.heard = True
                if isinstance(outcome, Answered):
                    held = False  # the writer gives the slot back once the answer is stored
                    await self._queue.put(self._answer(item, outcome))
                    return
                if isinstance(outcome, Reject):
                    await asyncio.to_thread(self._books.rejected, asked, call, outcome)
                    self._result.rejected.add(item.item_id)
                    return
                last = outcome
                more = call < self._times.tries
                if outcome.lost and not await asyncio.to_thread(
                    self._books.lost, asked, call, outcome.detail, again=more
                ):
                    break
            finally:
                if held:
                    self._slots.release()
            if not more:
                break
            wait = backoff(self._times.try_backoff, call - 1, jitter=0.5, rng=self._rng)
            wait = max(wait, outcome.after or 0.0)
            if time.monotonic() + wait + self._call_seconds > self._ends:
                break  # a longer wait is the batch's `next_attempt_at`, never a sleep
            if outcome.reason == reasons.TEACHER_RATE_LIMITED:
                self._turns.pause(wait)
            await self._pause(wait)
        if last is not None:
            self._result.given_up.append(
                GivenUp(item.item_id, last.reason, last.detail, last.after, last.away, proves(last))
            )

    async def _in_turn(self, asked: Asked) -> Outcome | None:
        """Make a call when it may be made; None when that is not within the attempt."""
        turn = await self._turns.enter(asked.worst_tokens, self._ends - self._call_seconds)
        if turn is None:
            return None
        outcome = None
        try:
            if self._may_call():
                outcome = await self._timed(asked.item)
            return outcome
        finally:
            self._turns.leave(turn, outcome)

    async def _timed(self, item: Item) -> Outcome:
        started = time.monotonic()
        call = Call(item.messages, item.item_id, tools=item.tools, given=item.answer)
        outcome = await self._ask(call, deadline=self._call_seconds)
        CALL_SECONDS.observe(time.monotonic() - started)
        CALLS.labels("answered" if isinstance(outcome, Answered) else outcome.reason).inc()
        if isinstance(outcome, Answered):
            TOKENS.labels("prompt").inc(outcome.usage.prompt_tokens)
            TOKENS.labels("completion").inc(outcome.usage.completion_tokens)
        crash_point("answer_received")
        return outcome

    def _over(self, asked: Asked, outcome: Answered) -> Reject | None:
        """An answer that costs more than was asked for is refused, and its worst case listed."""
        usage = outcome.usage
        cost = cost_microusd(self._price, usage.prompt_tokens, usage.completion_tokens)
        if cost <= asked.worst_microusd:
            return None
        return Reject(
            reasons.TEACHER_INVALID,
            f"the usage ({usage.prompt_tokens} prompt and {usage.completion_tokens} completion "
            "tokens) is more than was asked for",
            lost=True,
        )

    def _answer(self, item: Item, outcome: Answered) -> Answer:
        usage = outcome.usage
        return Answer(
            item_id=item.item_id,
            body=outcome.body,
            prompt_tokens=usage.prompt_tokens,
            completion_tokens=usage.completion_tokens,
            cost_microusd=cost_microusd(self._price, usage.prompt_tokens, usage.completion_tokens),
            received_at=datetime.now(UTC).isoformat(),
        )

    async def _pause(self, seconds: float) -> None:
        """Sleep, but not past a halt."""
        if seconds > 0 and not self._halted.is_set():
            try:
                await asyncio.wait_for(self._halted.wait(), seconds)
            except TimeoutError:
                return

    async def _write(self) -> None:
        """The one writer: parts in sequence, each of 16 answers or what came in 5 seconds."""
        ended = False
        while not ended:
            first = await self._queue.get()
            if first is None:
                return
            batch, until = [first], time.monotonic() + PART_SECONDS
            while len(batch) < PART_ANSWERS and not ended:
                try:
                    left = max(until - time.monotonic(), 0.0)
                    more = await asyncio.wait_for(self._queue.get(), left)
                except TimeoutError:
                    break
                if more is None:
                    ended = True
                else:
                    batch.append(more)
            await self._store(batch)
            for _ in batch:
                self._slots.release()

    async def _store(self, batch: list[Answer]) -> None:
        crash_point("part_ready")
        number, data = len(self._result.parts) + 1, encode_part(batch)
        while True:
            try:
                ref = await asyncio.to_thread(self._books.store, number, data)
                break
            except AlreadyExists as error:
                raise Fenced("the series of parts was ended by a later attempt") from error
            except StoreUnavailable as error:
                # New calls wait meanwhile: their answers could not be kept.
                if time.monotonic() > self._ends:
                    raise
                log.warning("a part was not stored yet", why=str(error))
                await asyncio.sleep(1)
        self._result.parts.append(Part(ref, tuple(batch)))
        crash_point("part_stored")

    def _stop(self) -> None:
        self._result.stopping = True
        self._halted.set()
        self._turns.stop()
