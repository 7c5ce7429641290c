"""One attempt's callers, writer and beat, without a network, a store or a database."""

from __future__ import annotations

import asyncio
import dataclasses
import random
import time
from typing import Any

import pytest

from services.teacher_gateway.asking import Ask, Asked, Attempt, Result
from services.teacher_gateway.holding import Fenced
from services.teacher_gateway.parts import PART_ANSWERS, decode_part
from services.teacher_gateway.teachers.outcomes import (
    Answered,
    Call,
    Outcome,
    Reject,
    Retry,
    Usage,
)
from services.teacher_gateway.timeouts import EMBEDDED
from stillhouse.chassis.errors import StoreUnavailable
from stillhouse.chassis.storage import AlreadyExists
from stillhouse.contracts.artifacts import ObjectRef
from stillhouse.contracts.canonical import sha256_hex
from stillhouse.contracts.chat import Message
from stillhouse.contracts.responses import Item
from stillhouse.contracts.spec import Price

TIMES = dataclasses.replace(
    EMBEDDED, call=0.2, attempt=1.5, lease_ttl=1.0, beat=0.1, tries=3, try_backoff=0.01
)


class Books:
    """Keeps what an attempt writes down."""

    def __init__(self) -> None:
        self.parts: list[list[str]] = []
        self.lost_calls: list[str] = []
        self.refused: list[str] = []
        self.renewals = 0
        self.down = False
        self.money = True
        self.going = True
        self.on_store: Any = None

    def renew(self) -> bool:
        self.renewals += 1
        if isinstance(self.going, Exception):
            raise self.going
        return self.going

    def lost(self, asked: Asked, call: int, detail: str, *, again: bool) -> bool:
        self.lost_calls.append(asked.item.item_id)
        return self.money

    def rejected(self, asked: Asked, call: int, outcome: Reject) -> None:
        self.refused.append(outcome.reason)

    def store(self, number: int, data: bytes) -> ObjectRef:
        if self.on_store:
            self.on_store()
        if self.down:
            raise StoreUnavailable("down")
        assert number == len(self.parts) + 1
        self.parts.append([answer.item_id for answer in decode_part(data, "k")])
        return ObjectRef(key=f"k-{number}", size=len(data), sha256=sha256_hex(data))


class Teacher:
    """Answers as told: outcomes by item, in order, the last one for ever."""

    def __init__(self, **outcomes: list[Outcome]) -> None:
        self.outcomes = outcomes
        self.calls: list[str] = []
        self.latency = 0.0

    async def __call__(self, call: Call, *, deadline: float) -> Outcome:
        self.calls.append(call.seed_of)
        await asyncio.sleep(self.latency)
        planned = self.outcomes.get(call.seed_of.replace("-", "_"), [])
        if not planned:
            return Answered("{}", Usage(1, 1))
        return planned.pop(0) if len(planned) > 1 else planned[0]


def items(count: int) -> list[Asked]:
    return [
        Asked(
            Item(
                item_id=f"i-{n}",
                prompt_id=f"p-{n}",
                sample=0,
                messages=[Message(role="user", content="x")],
                prompt_sha256="0" * 64,
            ),
            10,
        )
        for n in range(count)
    ]


def attempt(books: Books, ask: Ask, concurrency: int = 4, **times: Any) -> Attempt:
    return Attempt(
        ask,
        books,
        price=Price(input=1, output=1),
        times=dataclasses.replace(TIMES, **times),
        concurrency=concurrency,
        call_seconds=TIMES.call,
        started=time.monotonic(),
        rng=random.Random(1),
    )


def run(books: Books, ask: Ask, count: int, **more: Any) -> Result:
    async def main() -> Result:
        return await asyncio.wait_for(attempt(books, ask, **more).run(items(count)), 10)

    return asyncio.run(main())


def test_parts_hold_sixteen_answers_in_sequence() -> None:
    books = Books()
    result = run(books, Teacher(), 40)
    assert [len(part) for part in books.parts] == [16, 16, 8]
    assert sorted(name for part in books.parts for name in part) == sorted(
        f"i-{n}" for n in range(40)
    )
    assert [part.ref.key for part in result.parts] == ["k-1", "k-2", "k-3"]


def test_no_more_answers_than_a_crash_may_lose_are_ever_unstored() -> None:
    books, ask = Books(), Teacher()
    worst = 0

    def look() -> None:
        nonlocal worst
        time.sleep(0.05)
        worst = max(worst, len(ask.calls) - sum(len(part) for part in books.parts))

    books.on_store = look
    run(books, ask, 120, concurrency=4)
    assert PART_ANSWERS <= worst <= 4 + PART_ANSWERS


def test_a_store_that_comes_back_costs_nothing() -> None:
    books, ask = Books(), Teacher()
    calls = 0

    def fail_once() -> None:
        nonlocal calls
        calls += 1
        books.down = calls == 1

    books.on_store = fail_once
    result = run(books, ask, 10, attempt=5)
    assert len(result.answers) == 10
    assert len(ask.calls) == 10


def test_a_store_that_stays_away_ends_the_attempt() -> None:
    books = Books()
    books.down = True
    with pytest.raises(StoreUnavailable):
        run(books, Teacher(), 30, attempt=0.5)


def test_a_late_writer_stops_at_once() -> None:
    books, ask = Books(), Teacher()

    def ended() -> None:
        raise AlreadyExists("k")

    books.on_store = ended
    with pytest.raises(Fenced):
        run(books, ask, 100, concurrency=2)
    assert len(ask.calls) <= 2 + PART_ANSWERS


def test_an_attempt_that_lost_its_lease_stops_asking() -> None:
    books, ask = Books(), Teacher()
    ask.latency = 0.05
    task = attempt(books, ask, concurrency=1)

    async def main() -> None:
        running = asyncio.create_task(task.run(items(50)))
        await asyncio.sleep(0.12)
        books.going = Fenced("taken")  # type: ignore[assignment]
        await asyncio.wait_for(running, 5)

    with pytest.raises(Fenced):
        asyncio.run(main())
    assert len(ask.calls) < 10


def test_a_stopping_pipeline_is_asked_nothing_more_and_keeps_what_it_has() -> None:
    books, ask = Books(), Teacher()
    ask.latency = 0.05
    task = attempt(books, ask, concurrency=2)

    async def main() -> Result:
        running = asyncio.create_task(task.run(items(50)))
        await asyncio.sleep(0.15)
        books.going = False
        return await asyncio.wait_for(running, 5)

    result = asyncio.run(main())
    assert result.stopping
    assert len(result.answers) == len(ask.calls) < 20


def test_nothing_is_asked_that_could_not_end_in_time() -> None:
    books, ask = Books(), Teacher()
    ask.latency = 0.1
    result = run(books, ask, 50, concurrency=1, attempt=1.0)
    assert 0 < len(result.answers) < 12
    assert result.given_up == []  # not tried is not failed


def test_a_lost_call_is_listed_and_asked_again_while_there_is_money() -> None:
    lost: list[Outcome] = [Retry("teacher_timeout", "late", lost=True)]
    books, ask = Books(), Teacher(i_0=[*lost, Answered("{}", Usage(1, 1))])
    result = run(books, ask, 1)
    assert (books.lost_calls, len(result.answers)) == (["i-0"], 1)
    books, ask = Books(), Teacher(i_0=lost)
    books.money = False
    result = run(books, ask, 1)
    assert ask.calls == ["i-0"]
    assert [gone.reason for gone in result.given_up] == ["teacher_timeout"]


def test_an_answer_that_costs_more_than_was_asked_for_is_refused() -> None:
    books = Books()
    result = run(books, Teacher(i_0=[Answered("{}", Usage(1, 1000))]), 1)
    assert result.answers == []
    assert books.refused == ["teacher_invalid"]


def test_a_wait_beyond_the_attempt_is_not_slept() -> None:
    books = Books()
    started = time.monotonic()
    result = run(books, Teacher(i_0=[Retry("teacher_rate_limited", "slow", after=60.0)]), 1)
    assert time.monotonic() - started < 1
    assert [(gone.reason, gone.after) for gone in result.given_up] == [
        ("teacher_rate_limited", 60.0)
    ]


AWAY = Retry("teacher_error", "status 503", away=True)


def test_a_pause_that_one_caller_was_asked_for_holds_up_all() -> None:
    asked_for = Retry("teacher_rate_limited", "slow down", after=0.3)
    ask = Teacher(i_0=[asked_for, Answered("{}", Usage(1, 1))])
    ask.latency = 0.05
    began: list[float] = []

    async def noting(call: Call, *, deadline: float) -> Outcome:
        began.append(time.monotonic())
        return await ask(call, deadline=deadline)

    assert len(run(Books(), noting, 10, concurrency=2, attempt=5).answers) == 10
    # Beside the two that were under way.
    assert began[2] - began[0] >= 0.3


def test_an_item_that_nobody_answers_is_asked_so_often_and_given_up() -> None:
    ask = Teacher(i_0=[Retry("teacher_error", "status 500")])
    result = run(Books(), ask, 1, attempt=5)
    assert ask.calls == ["i-0"] * TIMES.tries
    assert [gone.reason for gone in result.given_up] == ["teacher_error"]


def test_waits_between_tries_grow_and_no_two_are_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    """Callers who failed together must not come back together."""
    waits: list[float] = []

    async def note(_: Attempt, seconds: float) -> None:
        waits.append(seconds)

    monkeypatch.setattr(Attempt, "_pause", note)
    ask = Teacher(**{f"i_{n}": [AWAY, AWAY, Answered("{}", Usage(1, 1))] for n in range(8)})
    assert len(run(Books(), ask, 8, attempt=5, concurrency=1).answers) == 8
    assert len(ask.calls) == 24
    first, second = waits[::2], waits[1::2]
    assert len(set(waits)) == 16
    for factor, found in ((1, first), (2, second)):
        assert all(0.5 <= wait / TIMES.try_backoff / factor <= 1.5 for wait in found)
    assert sum(second) > 1.3 * sum(first)


def ask_with_question(
    ask: Teacher, answer: Retry | None, *, suspect: bool = False, count: int = 3, **times: Any
) -> tuple[Result, int]:
    """Run an attempt with a question that has this answer; return how often it was asked too."""
    asked, patient = 0, {"attempt": 30, "lease_ttl": 60}

    async def question(*, deadline: float) -> Retry | None:
        nonlocal asked
        asked += 1
        assert 0 < deadline <= TIMES.call
        return answer

    async def main() -> Result:
        made = Attempt(
            ask,
            Books(),
            price=Price(input=1, output=1),
            times=dataclasses.replace(TIMES, **(patient | times)),
            concurrency=4,
            call_seconds=TIMES.call,
            started=time.monotonic(),
            rng=random.Random(1),
            question=question,
            suspect=suspect,
        )
        return await asyncio.wait_for(made.run(items(count)), 10)

    return asyncio.run(main()), asked


def test_only_silence_raises_the_question_whether_the_teacher_is_away() -> None:
    silent = {f"i_{n}": [AWAY] for n in range(3)}
    refused = Retry("teacher_error", "status 401")
    for outcomes, answer, questions, away in (
        ({}, AWAY, 0, None),
        (silent, AWAY, 1, AWAY),
        (silent, None, 1, None),
        ({**silent, "i_0": [refused]}, AWAY, 0, None),
        ({**silent, "i_0": [Reject("refused_by_teacher", "no")]}, AWAY, 0, None),
        ({"i_0": [AWAY]}, AWAY, 0, None),  # the others are answered
    ):
        result, asked = ask_with_question(Teacher(**outcomes), answer)
        assert (asked, result.away) == (questions, away)


def test_without_a_connection_no_question_is_needed() -> None:
    gone = Retry("teacher_unreachable", "no connection", away=True)
    result, asked = ask_with_question(Teacher(i_0=[gone]), None, count=1)
    assert (asked, result.away) == (0, gone)


def test_after_an_attempt_without_a_teacher_the_question_goes_first() -> None:
    ask = Teacher()
    result, asked = ask_with_question(ask, AWAY, suspect=True)
    assert (asked, result.away, ask.calls, result.given_up) == (1, AWAY, [], [])
    result, asked = ask_with_question(ask, None, suspect=True)
    assert (asked, result.away, len(result.answers)) == (1, None, 3)


def test_only_what_the_teacher_did_or_a_long_silence_makes_it_away_to_all() -> None:
    hasty = Retry("teacher_timeout", "late", lost=True, away=True, waited=0.05)
    asked_long = dataclasses.replace(hasty, waited=TIMES.call / 2)
    no_connection = Retry("teacher_unreachable", "late", away=True, waited=0.05)
    late: dict[str, Any] = {"attempt": 0.99}  # no time is left for the question
    for outcome, answer, times, questions, to_all in (
        (hasty, hasty, {}, 1, False),
        (hasty, asked_long, {}, 1, True),
        (hasty, AWAY, {}, 1, True),
        (no_connection, hasty, {}, 1, False),
        (dataclasses.replace(no_connection, waited=None), hasty, {}, 0, True),
        (hasty, AWAY, late, 0, False),
        (AWAY, AWAY, late, 0, True),
    ):
        result, asked = ask_with_question(Teacher(i_0=[outcome]), answer, count=1, **times)
        assert result.away is not None
        assert (asked, result.away_to_all) == (questions, to_all)


def test_where_no_time_is_left_to_ask_the_next_attempt_does() -> None:
    for suspect, away in ((False, AWAY), (True, None)):
        result, asked = ask_with_question(
            Teacher(i_0=[AWAY]), None, suspect=suspect, count=1, attempt=0.99
        )
        assert (asked, result.away) == (int(suspect), away)
