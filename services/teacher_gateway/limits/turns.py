"""One attempt's turns at its teacher: a call starts when its share, its rate and its pause allow.

What is shared with others (`shared`) is asked for about once a second, and never for each
call: a share of the calls at once, and permits for as many calls as may start within a second; at
first, and whenever its share changed, more often, so that shares settle soon. In between an attempt
keeps to what it was told. Its share shrinks by its own word alone: it is told
to make fewer calls, and only once it says that it does may others make more.

All here is by this process's monotonic clock; what others gave is in seconds from their reply.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from contextlib import suppress
from dataclasses import dataclass, field
from statistics import median
from types import TracebackType
from typing import Self

from services.teacher_gateway import reasons
from services.teacher_gateway.counters import COOL_DOWNS, TURN_WAITS
from services.teacher_gateway.limits.rates import LATE
from services.teacher_gateway.limits.reports import Grant, Report, Shared
from services.teacher_gateway.limits.strain import SAMPLE, TOKENS_AROUND, Seen, proves
from services.teacher_gateway.teachers.outcomes import Answered, Outcome, Reject, Retry
from stillhouse.chassis.errors import RetryableError
from stillhouse.chassis.logs import logger

log = logger(__name__)

# Soon after news, and not at once for each: calls that fail do so together.
_TOGETHER_SECONDS = 0.05
# How often others are asked while shares move, and at the least while there is none.
_MOVING_SECONDS = 0.05
_WITHOUT_SECONDS = 0.25


@dataclass
class _Permit:
    starts: float
    ends: float
    tokens: int

    def fits(self, tokens: int, now: float) -> bool:
        return tokens <= self.tokens and max(now, self.starts) <= self.ends


@dataclass(eq=False)
class _Waiting:
    tokens: int


@dataclass(frozen=True)
class Turn:
    """One call that may be made now; give it back with `Turns.leave`."""

    taken: int  # tokens, where they are counted
    began: float


@dataclass
class _News:
    """What the next report will tell."""

    unused: int = 0
    heard: bool = False
    ended: int = 0
    rate_limited: int = 0
    failed: int = 0
    youngest_strained: float = float("-inf")
    cool_until: float = 0.0
    paces: list[float] = field(default_factory=list)
    oldest_paced: float = float("inf")


class Turns:
    """Who may call next; an async context that holds the attempt's share.

    Without `shared` nobody else asks this teacher: `most` calls at once, whatever their rate.
    """

    def __init__(
        self, most: int, *, wanted: int | None = None, shared: Shared | None = None, ttl: float = 60
    ) -> None:
        """`ttl`: seconds after its last report that a share is another's; it is renewed in good
        time."""
        self.wanted = most if wanted is None else wanted  # calls at once that could be made
        self.suspect = False
        self._shared = shared
        self._ttl = ttl
        self._every = min(1.0, ttl / 4)
        self._next_talk = min(_MOVING_SECONDS, self._every)  # seconds from the last one
        self._delay = 0.0  # after which replies come, once the others' clock was read
        self._calls = 0 if shared else most
        self._held_until = float("-inf") if shared else float("inf")
        self._cool_until = 0.0
        self._limited = False
        self._permits: deque[_Permit] = deque()
        self._next_permit = 0.0
        self._running = self._peak = 0
        self._order = asyncio.Lock()  # first come, first served
        self._waiting: deque[_Waiting] = deque()
        self._changed = asyncio.Event()
        self._talking = asyncio.Lock()
        self._news = _News()
        self._told = asyncio.Event()
        self._stopped = self._ended = False
        self._talk: asyncio.Task[None] | None = None
        self._exchanging: asyncio.Future[Grant] | None = None

    async def __aenter__(self) -> Self:
        if self._shared:
            await self._exchange()
            self._talk = asyncio.create_task(self._keep_talking(), name="turns")
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._shared is None or self._talk is None:
            return
        self._ended = True
        self._told.set()
        # An exchange that came after would take the share anew.
        rest = [task for task in (self._talk, self._exchanging) if task is not None]
        await asyncio.gather(*rest, return_exceptions=True)
        while self._permits:
            self._news.unused += self._permits.popleft().tokens
        try:
            await asyncio.to_thread(self._shared.leave, self._report())
        except RetryableError as problem:
            log.warning("a share of a teacher is left to its lease", why=str(problem))

    @property
    def cooling(self) -> float:
        """Seconds for which nobody may call; 0 for none."""
        return max(0.0, self._cool_until - time.monotonic())

    def pause(self, seconds: float) -> None:
        """Let this attempt call nobody for a while."""
        self._cool_until = max(self._cool_until, time.monotonic() + seconds)
        self._changed.set()

    def want_less(self) -> None:
        """There is one call at once less to make; what is held beyond is told, for others."""
        self.wanted -= 1
        if self._shared and self.wanted < self._calls:
            self._told.set()

    def stop(self) -> None:
        """Give nobody a turn any more."""
        self._stopped = True
        self._changed.set()

    async def enter(self, tokens: int, until: float) -> Turn | None:
        """Wait for a turn for a call of so many tokens at the worst; None when none comes by
        `until`, by time.monotonic(). Raises what ended the talk with others."""
        waiting = _Waiting(tokens)
        self._waiting.append(waiting)
        try:
            async with self._order:
                while not self._stopped:
                    self._changed.clear()
                    if self._talk is not None and self._talk.done():
                        self._talk.result()
                    obstacle = await self._obstacle(tokens)
                    now = time.monotonic()
                    if now > until:
                        return None
                    if obstacle is None:
                        return self._start()
                    why, seconds, sure = obstacle
                    if sure and now + seconds > until:
                        return None
                    await self._wait(min(seconds, until - now))
                    TURN_WAITS.labels(why).inc(time.monotonic() - now)
                return None
        finally:
            self._waiting.remove(waiting)

    def leave(self, turn: Turn, outcome: Outcome | None) -> None:
        """Give a turn back, with what its call came to; None when there was none."""
        self._running -= 1
        self._changed.set()
        news, now = self._news, time.monotonic()
        if outcome is None:
            news.unused += turn.taken
            return
        news.ended += 1
        if turn.taken:
            news.unused += _unused(turn.taken, outcome)
        if isinstance(outcome, Answered | Reject):
            news.heard = True
            if self.suspect:
                self._told.set()
        if isinstance(outcome, Answered):
            tokens = outcome.usage.completion_tokens + TOKENS_AROUND
            news.paces.append((now - turn.began) / tokens)
            news.oldest_paced = min(news.oldest_paced, turn.began)
        if isinstance(outcome, Retry) and outcome.away:
            if proves(outcome):
                news.failed += 1
                news.youngest_strained = max(news.youngest_strained, turn.began)
                self._told.set()
            if outcome.reason == reasons.TEACHER_RATE_LIMITED:
                news.rate_limited += 1
            if outcome.after:
                COOL_DOWNS.inc()
                self.pause(outcome.after)
                news.cool_until = max(news.cool_until, now + outcome.after)

    def _start(self) -> Turn:
        taken = self._permits.popleft().tokens if self._limited else 0
        self._running += 1
        self._peak = max(self._peak, self._running)
        return Turn(taken, time.monotonic())

    async def _obstacle(self, tokens: int) -> tuple[str, float, bool] | None:
        """Why no call may start now, for how long at least, and whether that is sure."""
        now = time.monotonic()
        if self._cool_until > now:
            return "cool_down", self._cool_until - now, True
        if self._running >= self._calls or now > self._held_until:
            return "share", self._every, False
        if not self._limited:
            return None
        while self._permits and not self._permits[0].fits(tokens, now):
            self._news.unused += self._permits.popleft().tokens
        if self._permits:
            starts = self._permits[0].starts
            return None if starts <= now else ("rate", starts - now, True)
        if self._next_permit > now:
            return "rate", self._next_permit - now, True
        await self._try_exchange()
        return "rate", 0.0, False

    async def _wait(self, seconds: float) -> None:
        if seconds > 0:
            try:
                await asyncio.wait_for(self._changed.wait(), seconds)
            except TimeoutError:
                return

    async def _keep_talking(self) -> None:
        try:
            while True:
                with suppress(TimeoutError):
                    await asyncio.wait_for(self._told.wait(), self._next_talk)
                    await asyncio.sleep(_TOGETHER_SECONDS)
                if self._ended:
                    return
                self._told.clear()
                await self._try_exchange()
        finally:
            self._changed.set()

    async def _try_exchange(self) -> None:
        try:
            await self._exchange()
        except RetryableError as error:
            log.warning("the limits of a teacher could not be told", why=str(error))
            self._next_permit = time.monotonic() + self._every

    async def _exchange(self) -> None:
        assert self._shared is not None, "only shared limits are told"
        async with self._talking:
            report, sent = self._report(), time.monotonic()
            told, self._news, self._peak = self._news, _News(), self._running
            if len(told.paces) < SAMPLE:
                self._news.paces, told.paces = told.paces, []
                self._news.oldest_paced = told.oldest_paced
            try:
                running = asyncio.to_thread(self._shared.exchange, report)
                self._exchanging = asyncio.ensure_future(running)
                grant = await asyncio.shield(self._exchanging)
            except RetryableError:
                self._untell(told, report.peak)
                raise
            self._apply(grant, sent)

    def _report(self) -> Report:
        now, news = time.monotonic(), self._news
        # One at least: the question whether anybody is there comes after the items.
        wanted = max(self.wanted, self._running, 1)
        self._calls = min(self._calls, wanted)
        permits: tuple[int, ...] = ()
        free = self._calls - self._running
        if self._limited and not self._permits and self._cool_until <= now:
            permits = tuple(waiting.tokens for waiting in self._waiting)[: max(free, 0)]
        paced = len(news.paces) >= SAMPLE
        return Report(
            running=self._running,
            holds=max(self._running, self._calls),
            peak=max(self._peak, self._running),
            wanted=wanted,
            permits=permits,
            unused=news.unused,
            delay=self._delay,
            cool=max(0.0, news.cool_until - now),
            heard=news.heard,
            seen=Seen(
                ended=news.ended,
                rate_limited=news.rate_limited,
                failed=news.failed,
                youngest_strained=now - news.youngest_strained if news.failed else 0.0,
                pace=median(news.paces) if paced else None,
                oldest_paced=now - news.oldest_paced if paced else 0.0,
            ),
        )

    def _untell(self, told: _News, peak: int) -> None:
        """Take back what nobody heard."""
        news = self._news
        news.unused += told.unused
        news.heard |= told.heard
        news.ended += told.ended
        news.rate_limited += told.rate_limited
        news.failed += told.failed
        news.youngest_strained = max(news.youngest_strained, told.youngest_strained)
        news.cool_until = max(news.cool_until, told.cool_until)
        news.paces += told.paces
        news.oldest_paced = min(news.oldest_paced, told.oldest_paced)
        self._peak = max(self._peak, peak)

    def _apply(self, grant: Grant, sent: float) -> None:
        """Do as told. The others' clock was read between two times of this one: all holds from the
        later one on, and is void by the earlier one. That they are near each other, and that what
        comes late is asked for later, keeps slow replies from voiding all permits."""
        now = time.monotonic()
        earliest, latest = grant.read or (sent, now)
        self._delay = max(now - latest, self._delay / 2)
        moved = grant.calls != self._calls
        self._calls = grant.calls
        self._held_until = earliest + self._ttl - self._every
        longest = self._every if self._calls else min(_WITHOUT_SECONDS, self._every)
        self._next_talk = min(_MOVING_SECONDS if moved else 2 * self._next_talk, longest)
        if grant.cool > 0:
            self._cool_until = max(self._cool_until, latest + grant.cool)
        self._limited, self.suspect = grant.limited, grant.suspect
        self._permits.extend(
            _Permit(latest + given.after, earliest + given.after + LATE, given.tokens)
            for given in grant.permits
        )
        self._next_permit = now + grant.next_permit
        self._changed.set()


def _unused(taken: int, outcome: Outcome) -> int:
    """The tokens that a call took and did not use; less than 0 where it used more."""
    usage = outcome.usage if isinstance(outcome, Answered | Reject) else None
    if usage is not None:
        return taken - usage.prompt_tokens - usage.completion_tokens
    lost = isinstance(outcome, Answered) or outcome.lost
    return 0 if lost else taken
