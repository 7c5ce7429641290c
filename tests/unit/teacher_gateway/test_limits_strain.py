"""How many calls at once a teacher gets, on a clock of the test's own."""

from __future__ import annotations

import pytest

from services.teacher_gateway.limits.strain import (
    FAR_ABOVE,
    INTERVAL,
    NOTHING_SEEN,
    PATIENCE,
    SAMPLE,
    Seen,
    Strain,
    calls_at_once,
    proves,
)
from services.teacher_gateway.limits.strain import adapt as adapt_to
from services.teacher_gateway.models import TeacherEndpoint, TeacherTenant
from services.teacher_gateway.teachers.outcomes import Retry

MOST = 64
REFUSED = Seen(ended=1, rate_limited=1, failed=1, youngest_strained=0.1)
WELL = Seen(ended=20)


def endpoint() -> TeacherEndpoint:
    return TeacherEndpoint(endpoint="e", lowered_at=0.0, raised_at=0.0, ended=0, failed=0)


def tenant() -> TeacherTenant:
    return TeacherTenant(endpoint="e", tenant_id="t")


def adapt(
    row: TeacherEndpoint,
    clock: float,
    most: int,
    seen: Seen,
    used: int,
    usual: TeacherTenant | None = None,
) -> Strain | None:
    return adapt_to(row, usual or tenant(), clock, most, seen, used)


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
        (Seen(ended=SAMPLE, failed=2, youngest_strained=0.1), "failing"),
        (Seen(ended=20, pace=1.1 * FAR_ABOVE, oldest_paced=0.1), "slow"),
        (Seen(ended=10, failed=1, youngest_strained=0.1), None),  # one item, and not the teacher
        (Seen(ended=SAMPLE - 1, failed=9, youngest_strained=0.1), None),  # too few to tell
        (Seen(ended=20, pace=0.9 * FAR_ABOVE, oldest_paced=0.1), None),
        (NOTHING_SEEN, None),
    ],
)
def test_each_sign_of_strain_cuts_once(seen: Seen, why: str | None) -> None:
    row, usual = endpoint(), tenant()
    adapt(row, 1000.0, MOST, Seen(ended=20, pace=1.0, oldest_paced=1.0), MOST, usual)
    assert adapt(row, 1010.0, MOST, seen, MOST, usual) == why
    assert calls_at_once(row, MOST) == (MOST if why is None else 44)


def test_a_cut_comes_once_an_interval_and_only_for_calls_after_the_last_one() -> None:
    row = endpoint()
    assert adapt(row, 1000.0, MOST, REFUSED, MOST) == "rate_limited"
    assert adapt(row, 1000.0 + INTERVAL / 2, MOST, REFUSED, MOST) is None
    # Ten seconds later a call fails that began before the cut.
    old = Seen(ended=SAMPLE, failed=SAMPLE, youngest_strained=10.5)
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
    row, usual = endpoint(), tenant()
    for second in range(20):
        adapt(row, 1000.0 + second, MOST, Seen(ended=20, pace=1.0), MOST, usual)
    for second in range(20):
        adapt(row, 1020.0 + second, MOST, Seen(ended=20, pace=0.1), MOST, usual)
    assert usual.pace == pytest.approx(0.1, rel=0.05)
    for second in range(400):
        seen = Seen(ended=20, pace=0.5, oldest_paced=0.1)
        adapt(row, 1040.0 + second, MOST, seen, MOST, usual)
    # It was strain at first, and is how it is now.
    assert usual.pace == pytest.approx(0.5, rel=0.05)
    assert calls_at_once(row, MOST) == MOST


def test_few_calls_a_report_come_together_to_a_sample() -> None:
    row = endpoint()
    failed = Seen(ended=1, failed=1, youngest_strained=0.1)
    for second in range(SAMPLE - 1):
        assert adapt(row, 1000.0 + second, MOST, failed, MOST) is None
    assert adapt(row, 1000.0 + SAMPLE, MOST, failed, MOST) == "failing"
    # And the next cut needs another one.
    assert adapt(row, 1100.0, MOST, failed, MOST) is None


def test_a_tenant_whose_answers_always_take_long_is_no_strain() -> None:
    row, quick, other = endpoint(), tenant(), tenant()
    for second in range(9):
        fast = Seen(ended=20, pace=1.0, oldest_paced=0.1)
        slow = Seen(ended=20, pace=10 * FAR_ABOVE, oldest_paced=0.1)
        adapt(row, 1000.0 + second, MOST, fast, MOST, quick)
        assert adapt(row, 1000.5 + second, MOST, slow, MOST, other) is None
    assert calls_at_once(row, MOST) == MOST


def test_only_who_had_patience_tells_others_that_the_teacher_is_away() -> None:
    late = Retry("teacher_timeout", "no answer", lost=True, away=True, waited=PATIENCE - 1)
    assert not proves(late)
    assert proves(late, patience=PATIENCE - 1)
    assert proves(Retry("teacher_error", "status 503", away=True))
    assert not proves(Retry("teacher_error", "status 401"))
