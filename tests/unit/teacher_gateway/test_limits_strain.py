"""How many calls at once a teacher gets, on a clock of the test's own."""

from __future__ import annotations

import pytest

from services.teacher_gateway.limits.strain import (
    FAR_ABOVE,
    INTERVAL,
    NOTHING_SEEN,
    Seen,
    adapt,
    calls_at_once,
)
from services.teacher_gateway.models import TeacherEndpoint

MOST = 64
REFUSED = Seen(ended=1, rate_limited=1, failed=1, youngest_strained=0.1)
WELL = Seen(ended=20)


def endpoint() -> TeacherEndpoint:
    return TeacherEndpoint(endpoint="e", lowered_at=0.0, raised_at=0.0)


def test_the_spec_holds_until_the_first_strain() -> None:
    row = endpoint()
    for second in range(100):
        assert adapt(row, 1000.0 + second, MOST, WELL, MOST) is None
    assert calls_at_once(row, MOST) == MOST
    assert row.concurrency is None


@pytest.mark.parametrize(
    ("seen", "why"),
    [
        (REFUSED, "rate_limited"),
        (Seen(ended=9, failed=1, youngest_strained=0.1), "failing"),
        (Seen(ended=20, pace=1.1 * FAR_ABOVE, oldest_paced=0.1), "slow"),
        (Seen(ended=10, failed=1, youngest_strained=0.1), None),  # one item, and not the teacher
        (Seen(ended=20, pace=0.9 * FAR_ABOVE, oldest_paced=0.1), None),
        (NOTHING_SEEN, None),
    ],
)
def test_each_sign_of_strain_cuts_once(seen: Seen, why: str | None) -> None:
    row = endpoint()
    adapt(row, 1000.0, MOST, Seen(ended=20, pace=1.0, oldest_paced=1.0), MOST)
    assert adapt(row, 1010.0, MOST, seen, MOST) == why
    assert calls_at_once(row, MOST) == (MOST if why is None else 44)


def test_a_cut_comes_once_an_interval_and_only_for_calls_after_the_last_one() -> None:
    row = endpoint()
    assert adapt(row, 1000.0, MOST, REFUSED, MOST) == "rate_limited"
    assert adapt(row, 1000.0 + INTERVAL / 2, MOST, REFUSED, MOST) is None
    # Ten seconds later a call fails that began before the cut.
    old = Seen(ended=1, failed=1, youngest_strained=10.5)
    assert adapt(row, 1010.0, MOST, old, MOST) is None
    assert calls_at_once(row, MOST) == 44
    assert adapt(row, 1010.0, MOST, REFUSED, MOST) == "rate_limited"
    assert calls_at_once(row, MOST) == 30


def test_it_never_falls_below_one_call() -> None:
    row = endpoint()
    for number in range(50):
        adapt(row, 1000.0 + number * 3, MOST, REFUSED, MOST)
    assert calls_at_once(row, MOST) == 1


def test_while_all_is_used_it_grows_by_equal_steps_to_the_spec_and_no_further() -> None:
    row = endpoint()
    for number in range(8):
        adapt(row, 1000.0 + number * 3, MOST, REFUSED, MOST)
    clock, seen = 1030.0, []
    while row.concurrency is not None:
        assert clock < 1300
        before = calls_at_once(row, MOST)
        adapt(row, clock, MOST, WELL, before)
        assert adapt(row, clock + INTERVAL / 2, MOST, WELL, before) is None  # once an interval
        seen.append(calls_at_once(row, MOST) - before)
        clock += INTERVAL
    assert set(seen[:-1]) == {MOST // 32}
    assert calls_at_once(row, MOST) == MOST


def test_what_nobody_uses_does_not_grow() -> None:
    row = endpoint()
    adapt(row, 1000.0, MOST, REFUSED, MOST)
    for second in range(60):
        adapt(row, 1010.0 + second, MOST, WELL, 10)
    assert calls_at_once(row, MOST) == 44


def test_what_is_usual_follows_a_teacher_that_became_faster_or_slower() -> None:
    row = endpoint()
    for second in range(20):
        adapt(row, 1000.0 + second, MOST, Seen(ended=20, pace=1.0), MOST)
    for second in range(20):
        adapt(row, 1020.0 + second, MOST, Seen(ended=20, pace=0.1), MOST)
    assert row.pace == pytest.approx(0.1, rel=0.05)
    for second in range(400):
        adapt(row, 1040.0 + second, MOST, Seen(ended=20, pace=0.5, oldest_paced=0.1), MOST)
    # It was strain at first, and is how it is now.
    assert row.pace == pytest.approx(0.5, rel=0.05)
    assert calls_at_once(row, MOST) == MOST
