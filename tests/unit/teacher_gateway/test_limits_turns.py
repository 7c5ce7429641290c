"""One attempt's turns, beside others who are played by the test."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable

import pytest

from services.teacher_gateway import reasons
from services.teacher_gateway.limits.reports import Grant, Leave, Report
from services.teacher_gateway.limits.strain import SAMPLE
from services.teacher_gateway.limits.turns import Turn, Turns
from services.teacher_gateway.teachers.outcomes import Answered, Reject, Retry, Usage
from stillhouse.chassis.errors import RetryableError

# Renewals every 0.1 s at the latest.
TTL = 0.4
LATE = 60.0
# Longer than any test.
AGES = 600.0


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


def test_what_an_attempt_cannot_use_any_more_is_given_back_at_once() -> None:
    async def test() -> None:
        others = Others(Grant(calls=5))
        async with Turns(5, shared=others, ttl=AGES) as turns:
            held = [await taken(turns) for _ in range(5)]
            for _ in range(3):
                turns.leave(held.pop(), ANSWERED)
                turns.want_less()  # no item is left for it
            await until(lambda: others.reports[-1].holds == 2)
            assert others.reports[-1].wanted == 2

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
        async with Turns(9, shared=others, ttl=TTL) as turns:
            callers = [asyncio.create_task(taken(turns, 5)) for _ in range(3)]
            # The hot path asks nobody: who waits is asked for together.
            await until(lambda: any(r.permits == (5, 5, 5) for r in others.reports))
            began = time.monotonic()
            others.permits = [Leave(0.0, 5), Leave(0.3, 5)]
            await callers[0]
            await callers[1]
            assert time.monotonic() - began >= 0.3
            assert not callers[2].done()
            others.permits = [Leave(0.0, 5)]
            await callers[2]

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
        async with Turns(9, shared=others, ttl=AGES) as turns:
            refused = Retry(reasons.TEACHER_RATE_LIMITED, "429", after=AGES, away=True)
            turns.leave(await taken(turns), refused)
            assert await turns.enter(1, soon()) is None
            await until(lambda: any(report.cool for report in others.reports))
            told = next(report for report in others.reports if report.cool)
            assert 0 < told.cool <= AGES
            assert told.seen.rate_limited == 1

    run(test)


def test_after_a_pause_calls_go_on() -> None:
    async def test() -> None:
        async with Turns(9, shared=Others(Grant(calls=9)), ttl=AGES) as turns:
            refused = Retry(reasons.TEACHER_RATE_LIMITED, "429", after=0.3, away=True)
            held = await taken(turns)
            began = time.monotonic()
            turns.leave(held, refused)
            await taken(turns)
            assert time.monotonic() - began >= 0.3

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
        async with Turns(9, shared=others, ttl=AGES) as turns:
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
        began = time.monotonic()
        async with Turns(20, shared=others, ttl=AGES) as turns:
            held = [await taken(turns) for _ in range(SAMPLE + 2)]
            await asyncio.sleep(0.05)
            for turn in held[:SAMPLE]:
                turns.leave(turn, Answered("{}", Usage(1, 18)))  # and 32 around
            turns.leave(held[-2], Retry("teacher_error", "status 500", away=True))
            # Whoever has so little patience knows nothing about the teacher.
            hasty = Retry("teacher_timeout", "late", lost=True, away=True, waited=0.05)
            turns.leave(held[-1], hasty)
            await until(lambda: any(report.seen.ended for report in others.reports))
            told = next(report for report in others.reports if report.seen.ended)
        lasted = time.monotonic() - began
        seen = told.seen
        assert (seen.ended, seen.failed, seen.rate_limited) == (SAMPLE + 2, 1, 0)
        assert seen.pace is not None
        assert 0.05 / 50 <= seen.pace < lasted / 50
        assert 0.05 <= seen.oldest_paced < lasted
        assert 0.05 <= seen.youngest_strained < lasted
        assert max(report.peak for report in others.reports) == SAMPLE + 2

    run(test)


def test_one_slow_answer_of_many_is_not_the_pace() -> None:
    async def test() -> None:
        others = Others(Grant(calls=20))
        async with Turns(20, shared=others, ttl=AGES) as turns:
            held = [await taken(turns) for _ in range(SAMPLE)]
            long_ago = Turn(0, held[0].began - AGES)
            for turn in (*held[1:], long_ago):
                turns.leave(turn, ANSWERED)
        told = [report.seen.pace for report in (*others.reports, *others.left)]
        (pace,) = (pace for pace in told if pace is not None)
        assert pace < 20 / 36

    run(test)


def test_replies_that_always_take_longer_than_a_permit_lasts_void_not_all_of_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("services.teacher_gateway.limits.turns.LATE", 0.4)

    class Slow(Others):
        """A database that takes its time before and after its clock is read."""

        def exchange(self, report: Report) -> Grant:
            time.sleep(0.6)
            grant, read = super().exchange(report), time.monotonic()
            time.sleep(0.6)
            permits = tuple(Leave(report.delay, tokens) for tokens in report.permits)
            return Grant(**{**vars(grant), "permits": permits, "read": (read, read)})

    async def test() -> None:
        others = Slow(Grant(calls=9, limited=True))
        async with Turns(9, shared=others, ttl=AGES) as turns:
            await taken(turns, 5)
            assert others.reports[-1].delay >= 0.6

    run(test)


def test_who_has_no_share_asks_for_it_sooner_than_it_renews_one() -> None:
    async def test() -> None:
        others = Others(Grant(calls=0))
        async with Turns(9, shared=others, ttl=AGES) as turns:
            waiting = asyncio.create_task(taken(turns))
            await until(lambda: turns._next_talk == 0.25)
            told = len(others.reports)
            await until(lambda: len(others.reports) >= told + 2)
            assert turns._next_talk == 0.25
            others.grant = Grant(calls=9)
            await waiting
            await until(lambda: turns._next_talk == 1.0)

    run(test)
