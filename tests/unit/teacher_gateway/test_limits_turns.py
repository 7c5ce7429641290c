"""One attempt's turns, beside others who are played by the test."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable

import pytest

from services.teacher_gateway import reasons
from services.teacher_gateway.limits.reports import Grant, Leave, Report
from services.teacher_gateway.limits.turns import Turn, Turns
from services.teacher_gateway.teachers.outcomes import Answered, Reject, Retry, Usage
from stillhouse.chassis.errors import RetryableError

# Renewals every 0.1 s.
TTL = 0.4
LATE = 60.0


@pytest.fixture(autouse=True)
def _patience(monkeypatch: pytest.MonkeyPatch) -> None:
    """Permits are void late enough for a loaded machine."""
    monkeypatch.setattr("services.teacher_gateway.limits.turns.LATE", LATE)


class Others:
    """The shared limits, as the test sets them; keeps what it was told."""

    def __init__(self, grant: Grant) -> None:
        self.grant = grant
        self.reports: list[Report] = []
        self.left: list[Report] = []
        self.down = False
        self.permits: list[Leave] = []

    def exchange(self, report: Report) -> Grant:
        if self.down:
            raise RetryableError("down")
        self.reports.append(report)
        given = tuple(self.permits[: len(report.permits)])
        del self.permits[: len(given)]
        return Grant(**{**vars(self.grant), "permits": given})

    def leave(self, report: Report) -> None:
        self.left.append(report)


def run(test: Callable[[], Awaitable[None]]) -> None:
    async def main() -> None:
        await asyncio.wait_for(test(), 20)

    asyncio.run(main())


def soon(seconds: float = 15) -> float:
    return time.monotonic() + seconds


async def until(look: Callable[[], object]) -> None:
    while not look():  # noqa: ASYNC110 what is looked at changes on a thread
        await asyncio.sleep(0.01)


async def taken(turns: Turns, tokens: int = 1) -> Turn:
    turn = await turns.enter(tokens, soon())
    assert turn is not None
    return turn


ANSWERED = Answered("{}", Usage(3, 4))


def test_alone_there_are_as_many_calls_at_once_as_the_spec_says() -> None:
    async def test() -> None:
        turns = Turns(2)
        first = [await taken(turns), await taken(turns)]
        assert await turns.enter(1, time.monotonic() + 0.05) is None
        third = asyncio.create_task(taken(turns))
        turns.leave(first[0], ANSWERED)
        await third

    run(test)


def test_a_share_shrinks_by_its_own_word() -> None:
    async def test() -> None:
        others = Others(Grant(calls=3))
        async with Turns(5, shared=others, ttl=TTL) as turns:
            held = [await taken(turns) for _ in range(3)]
            others.grant = Grant(calls=1)
            await until(lambda: len(others.reports) >= 4)
            # It was told, and says so only when its calls have ended.
            assert {report.holds for report in others.reports[1:]} == {3}
            waiting = asyncio.create_task(taken(turns))
            turns.leave(held.pop(), ANSWERED)
            turns.leave(held.pop(), ANSWERED)
            await until(lambda: others.reports[-1].holds == 1)
            assert not waiting.done()
            turns.leave(held.pop(), ANSWERED)
            turns.leave(await waiting, ANSWERED)
        assert len(others.left) == 1

    run(test)


def test_a_lease_that_was_not_renewed_stops_new_calls_and_a_renewal_starts_them() -> None:
    async def test() -> None:
        others = Others(Grant(calls=3))
        async with Turns(5, shared=others, ttl=TTL) as turns:
            turns.leave(await taken(turns), ANSWERED)
            others.down = True
            await asyncio.sleep(TTL)  # a lease ends by time alone
            assert await turns.enter(1, time.monotonic() + 0.2) is None
            waiting = asyncio.create_task(taken(turns))
            others.down = False
            turns.leave(await waiting, None)
            # What was not heard was told again.
            await until(lambda: any(report.heard for report in others.reports))
            assert sum(report.seen.ended for report in others.reports) == 1

    run(test)


def test_what_broke_the_talk_with_others_is_told_to_who_waits() -> None:
    class Broken(Others):
        def exchange(self, report: Report) -> Grant:
            if self.reports:
                raise ZeroDivisionError
            return super().exchange(report)

    async def test() -> None:
        async with Turns(5, shared=Broken(Grant(calls=0)), ttl=TTL) as turns:
            with pytest.raises(ZeroDivisionError):
                await turns.enter(1, soon())

    run(test)


def test_a_permit_is_used_at_its_time_and_no_other() -> None:
    async def test() -> None:
        others = Others(Grant(calls=9, limited=True, next_permit=0.05))
        others.permits = [Leave(0.0, 5), Leave(0.3, 5)]
        async with Turns(9, shared=others, ttl=TTL) as turns:
            began = time.monotonic()
            callers = [asyncio.create_task(taken(turns, 5)) for _ in range(3)]
            await callers[0]
            await callers[1]
            assert time.monotonic() - began >= 0.3
            assert not callers[2].done()
            others.permits = [Leave(0.0, 5)]
            await callers[2]
            # The hot path asks nobody: each was asked for once, by all who waited.
            assert next(r.permits for r in others.reports if r.permits) == (5, 5, 5)

    run(test)


def test_a_permit_that_comes_too_late_or_is_too_small_goes_back() -> None:
    async def test() -> None:
        others = Others(Grant(calls=1, limited=True, next_permit=0.02))
        others.permits = [Leave(-LATE - 1, 5)]
        async with Turns(9, shared=others, ttl=TTL) as turns:
            waiting = asyncio.create_task(taken(turns, 5))
            await until(lambda: any(report.unused == 5 for report in others.reports))
            assert not waiting.done()
            others.permits = [Leave(0, 4)]
            await until(lambda: any(report.unused == 4 for report in others.reports))
            others.permits = [Leave(0, 6)]
            turn = await waiting
            turns.leave(turn, None)  # not used after all
            await until(lambda: any(report.unused == 6 for report in others.reports))

    run(test)


@pytest.mark.parametrize(
    ("outcome", "unused"),
    [
        (ANSWERED, 100 - 7),
        (Reject("refused_by_teacher", "no", Usage(3, 4)), 100 - 7),
        (Reject("refused_by_teacher", "no"), 100),
        (Reject("teacher_invalid", "no usage", lost=True), 0),
        (Retry("teacher_error", "no connection", away=True), 100),
        (Retry("teacher_timeout", "late", lost=True, away=True), 0),
        (Answered("{}", Usage(100, 50)), -50),
    ],
)
def test_tokens_that_a_call_did_not_use_are_given_back(
    outcome: Answered | Reject | Retry, unused: int
) -> None:
    async def test() -> None:
        others = Others(Grant(calls=9, limited=True))
        others.permits = [Leave(0, 100)]
        async with Turns(9, shared=others, ttl=TTL) as turns:
            turns.leave(await taken(turns, 100), outcome)
        told = [*others.reports, *others.left]
        assert sum(report.unused for report in told) == unused
        assert any(report.heard for report in told) == isinstance(outcome, Answered | Reject)

    run(test)


def test_a_pause_that_the_teacher_asks_for_is_kept_and_told_at_once() -> None:
    async def test() -> None:
        others = Others(Grant(calls=9))
        async with Turns(9, shared=others, ttl=40) as turns:  # no renewal within the test
            refused = Retry(reasons.TEACHER_RATE_LIMITED, "429", after=0.6, away=True)
            began = time.monotonic()
            turns.leave(await taken(turns), refused)
            assert await turns.enter(1, time.monotonic() + 0.3) is None
            await until(lambda: len(others.reports) == 2)
            assert 0 < others.reports[1].cool <= 0.6
            assert others.reports[1].seen.rate_limited == 1
            await taken(turns)
            assert time.monotonic() - began >= 0.6

    run(test)


def test_nobody_waits_for_a_pause_that_lasts_too_long() -> None:
    async def test() -> None:
        turns = Turns(1)
        turns.pause(3600)
        # Were it to wait, the test would time out.
        assert await turns.enter(1, soon(1800)) is None

    run(test)


def test_a_pause_that_others_were_asked_for_holds_here_too() -> None:
    async def test() -> None:
        others = Others(Grant(calls=9, cool=0.5))
        began = time.monotonic()
        async with Turns(9, shared=others, ttl=40) as turns:
            others.grant = Grant(calls=9)
            await taken(turns)
            assert time.monotonic() - began >= 0.5

    run(test)


def test_a_stop_wakes_all_who_wait() -> None:
    async def test() -> None:
        turns = Turns(1)
        await taken(turns)
        waiting = [asyncio.create_task(turns.enter(1, soon(60))) for _ in range(3)]
        await asyncio.sleep(0)
        turns.stop()
        assert await asyncio.gather(*waiting) == [None, None, None]

    run(test)


def test_pace_and_strain_are_told_with_the_age_of_their_calls() -> None:
    async def test() -> None:
        others = Others(Grant(calls=20))
        async with Turns(20, shared=others, ttl=40) as turns:
            held = [await taken(turns) for _ in range(9)]
            await asyncio.sleep(0.05)
            for turn in held[:8]:
                turns.leave(turn, Answered("{}", Usage(1, 18)))  # and 32 around
            turns.leave(held[8], Retry("teacher_error", "status 500", away=True))
            await until(lambda: len(others.reports) == 2)
        seen = others.reports[1].seen
        assert (seen.ended, seen.failed, seen.rate_limited) == (9, 1, 0)
        assert seen.pace is not None
        assert 0.05 / 50 <= seen.pace < 5 / 50
        assert 0.05 <= seen.oldest_paced < 5
        assert 0.05 <= seen.youngest_strained < 5
        assert others.reports[1].peak == 9

    run(test)
