"""Figures from a handful of answers: their intervals are as wide as so few deserve."""

from __future__ import annotations

import pytest

from services.teacher_gateway.preflight.estimates import (
    at_least,
    longest,
    mean,
    scaled,
    share,
    total,
)


@pytest.mark.parametrize(
    ("count", "of", "low", "high"),
    [(0, 8, 0.0, 0.324), (8, 8, 0.676, 1.0), (5, 10, 0.237, 0.763), (1, 2, 0.095, 0.905)],
)
def test_a_share_has_wilsons_interval(count: int, of: int, low: float, high: float) -> None:
    found = share(count, of)
    assert found is not None
    assert found.value == count / of
    assert found.low == pytest.approx(low, abs=1e-3)
    assert found.high == pytest.approx(high, abs=1e-3)


def test_a_mean_has_students_interval_within_what_can_be() -> None:
    found = mean([10, 12, 14, 16, 18, 20, 22, 24])
    assert found is not None
    # 17 +- 2.365 x 4.899 / sqrt(8)
    assert (found.value, found.n) == (17, 8)
    assert found.low == pytest.approx(12.904, abs=1e-3)
    assert found.high == pytest.approx(21.096, abs=1e-3)
    few = mean([1, 100], most=128)
    assert few is not None
    assert (few.low, few.high) == (0, 128)


def test_of_one_answer_there_is_no_interval_and_of_none_no_figure() -> None:
    one = mean([7])
    assert one is not None
    assert (one.value, one.low, one.high, one.n) == (7, None, None, 1)
    twice = scaled(one, 2, 1)
    assert twice is not None
    assert (twice.value, twice.low) == (15, None)
    assert mean([]) is None
    assert share(0, 0) is None
    assert scaled(None, 2) is None


def test_sums_are_of_independent_figures_and_want_all_of_them() -> None:
    one = mean([1, 3])
    assert one is not None
    assert one.low is not None
    both = total([one, one])
    assert both is not None
    assert both.low is not None
    assert both.value == 4
    assert both.value - both.low == pytest.approx(2**0.5 * (one.value - one.low))
    assert total([one, None]) is None
    assert total([]) is None
    assert longest([one, scaled(one, 3)]) == scaled(one, 3)
    assert longest([one, None]) is None
    floor = at_least(one, 5)
    assert floor is not None
    assert floor.value == 5
