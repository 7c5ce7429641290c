"""Permits for calls and tokens: their bound for any order of asking, at any time."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.teacher_gateway.limits.rates import (
    AHEAD,
    KEPT_SECONDS,
    LATE,
    MINUTE,
    Rate,
    correct,
    count,
    ease,
    next_call,
    set_limits,
    take,
)
from services.teacher_gateway.models import TeacherEndpoint

START = 1.7e9
# Floats of today's seconds are exact to less than that.
EXACT = 1e-4


def endpoint(requests: int | None = None, tokens: int | None = None) -> TeacherEndpoint:
    row = TeacherEndpoint(endpoint="e", requests_at=0.0, tokens_at=0.0, tokens_unused=0)
    set_limits(row, Rate(requests, tokens))
    return row


steps = st.lists(
    st.tuples(st.floats(0, 90), st.integers(1, 40), st.integers(1, 40)), min_size=1, max_size=60
)


@given(per_minute=st.integers(1, 3000), asked=steps)
def test_no_minute_has_more_calls_than_the_limit(
    per_minute: int, asked: list[tuple[float, int, int]]
) -> None:
    row, clock = endpoint(requests=per_minute), START
    times: list[float] = []
    for pause, wanted, most in asked:
        clock += pause
        permits = take([row], clock, [1] * wanted, most)
        assert len(permits) <= most
        assert all(clock <= permit.at <= clock + AHEAD for permit in permits)
        times += [permit.at for permit in permits]
    # A permit may be used until LATE after its time: even so no minute has more.
    for first, beyond in zip(times, times[per_minute:], strict=False):
        assert beyond - first >= MINUTE + LATE - EXACT


def test_who_asks_often_gets_all_that_the_limit_allows() -> None:
    row, got = endpoint(requests=600), 0
    for tick in range(4 * 122):  # two minutes of LATE more
        got += len(take([row], START + tick / 4, [1] * 64, 64))
    assert 1200 <= got <= 1200 + 600 * AHEAD / 60 + 1


@given(
    per_minute=st.integers(60, 100_000),
    calls=st.lists(
        st.tuples(st.floats(0, 20), st.integers(1, 2000), st.floats(0, 1.5), st.integers(0, 5)),
        min_size=1,
        max_size=80,
    ),
)
def test_tokens_never_run_ahead_of_the_limit(
    per_minute: int, calls: list[tuple[float, int, float, int]]
) -> None:
    row, clock = endpoint(tokens=per_minute), START
    counted: list[int] = []  # what each call is known to have used, or its worst case
    open_calls: list[tuple[int, int, int]] = []  # number, unused, calls until it ends
    started: float | None = None
    for pause, worst, used, lasts in calls:
        clock += pause
        for number, unused, left in [call for call in open_calls if call[2] == 0]:
            correct(row, clock, unused)
            counted[number] -= unused
            open_calls.remove((number, unused, left))
        open_calls = [(number, unused, left - 1) for number, unused, left in open_calls]
        for permit in take([row], clock, [worst], 1):
            started = permit.at if started is None else started
            allowed = (permit.at - started) * per_minute / (MINUTE + LATE)
            assert sum(counted) <= allowed + EXACT * per_minute
            counted.append(worst)
            open_calls.append((len(counted) - 1, worst - round(worst * used), lasts))


def test_unused_tokens_bring_the_next_call_sooner_and_pay_for_later_ones() -> None:
    row = endpoint(tokens=6100)  # 100 a second
    assert [permit.at for permit in take([row], START, [1000, 1000], 2)] == [START]
    assert take([row], START + 5, [1000], 1) == []
    correct(row, START + 4, 900)  # it waited for ten seconds, and need not any more
    assert row.tokens_at == pytest.approx(START + 4)
    assert row.tokens_unused == pytest.approx(300, abs=1)
    (second,) = take([row], START + 6, [1000], 1)
    assert second.at == START + 6
    assert row.tokens_at == pytest.approx(START + 13, abs=0.1)  # 300 of its 1000 were paid
    correct(row, START + 7, -100)  # more than its worst case
    assert row.tokens_at == pytest.approx(START + 14, abs=0.1)


def test_unused_tokens_are_kept_to_a_measure_and_not_over_a_pause() -> None:
    row = endpoint(tokens=6100)
    take([row], START, [1000], 1)
    for second in range(20, 25):
        correct(row, START + second, 900)
    assert row.tokens_unused == int(6100 * KEPT_SECONDS / MINUTE)
    (late,) = take([row], START + 200, [1000], 1)
    assert late.at == START + 200
    assert row.tokens_unused == 0
    assert row.tokens_at == pytest.approx(START + 210)


def test_both_limits_hold_together() -> None:
    row = endpoint(requests=61, tokens=6100)
    times: list[float] = []
    for second in range(30):
        times += [permit.at for permit in take([row], START + second, [50] * 9, 9)]
    assert all(b - a == pytest.approx(1) for a, b in pairwise(times))
    times = []
    for second in range(30, 60):
        times += [permit.at for permit in take([row], START + second, [200] * 9, 9)]
    assert all(b - a == pytest.approx(2) for a, b in pairwise(times[1:]))


def test_a_call_waits_for_its_tenant_s_meter_and_for_the_one_of_all() -> None:
    everyone, own, other = endpoint(requests=122), endpoint(requests=61), endpoint(requests=122)
    assert [permit.at for permit in take([everyone, own], START, [1] * 9, 9)] == [START, START + 1]
    # Twice as many in all: the other tenant has its turns between.
    permits = take([everyone, other], START, [1] * 9, 9)
    assert all(permit.at >= START + 1.5 - EXACT for permit in permits)
    assert next_call(own) == pytest.approx(START + 2)


def test_a_smaller_limit_of_another_leaves_no_wait_behind() -> None:
    row = endpoint(requests=1, tokens=61)
    for _ in range(3):
        count(row, START, 61)
    assert next_call(row) == START + 183
    ease(row, START, Rate(61, None))
    assert next_call(row) == pytest.approx(START + 3)
    assert row.tokens_at == START
    # Nor does a larger one.
    ease(row, START, Rate(1, 61))
    assert next_call(row) == pytest.approx(START + 3)


def test_a_reply_that_takes_long_brings_permits_for_later() -> None:
    row = endpoint(requests=122)
    permits = take([row], START, [1] * 9, 9, delay=3.0)
    assert [permit.at for permit in permits] == [START + 3, START + 3.5, START + 4]
