"""Means over positions, intervals over prompts."""

from __future__ import annotations

import math

import pytest

from services.evaluator.statistics import RowSums, figures, stop_figures


def _row(n: int, tokens: int, kl: float, prompt: str | None = None) -> RowSums:
    return RowSums(
        row_id=f"r{n}",
        prompt_id=prompt or f"p{n}",
        tokens=tokens,
        scored=tokens,
        ranked=tokens,
        nll=tokens * 0.5,
        top1=tokens // 2,
        kl_top20=tokens * kl,
        kl_full=2 * tokens * kl,
    )


def test_means_are_over_positions_not_rows() -> None:
    found = figures([_row(0, 1, 1.0), _row(1, 3, 0.0)])
    assert found.kl_top20 == pytest.approx(0.25)
    assert found.kl_full == pytest.approx(0.5)
    assert found.ppl == pytest.approx(math.exp(0.5))
    assert found.top1 == pytest.approx(0.25)
    assert (found.rows, found.tokens) == (2, 4)


def test_a_figure_that_one_row_lacks_is_not_made_of_the_others() -> None:
    lacking = _row(1, 3, 0.0).model_copy(update={"kl_full": None})
    assert figures([_row(0, 1, 1.0), lacking]).kl_full is None


def test_no_rows_give_no_figures() -> None:
    found = figures([])
    assert found.ppl is found.kl_top20 is found.top1 is None
    assert found.rows == 0


def test_a_loss_beyond_floats_stays_finite() -> None:
    row = _row(0, 1, 1.0).model_copy(update={"nll": 5000.0})
    assert math.isfinite(figures([row]).ppl or math.inf)


def test_intervals_hold_the_mean_and_repeat() -> None:
    rows = [_row(n, 5 + n % 3, 0.1 * n) for n in range(30)]
    found = figures(rows)
    low, high = found.intervals["kl_top20"]
    assert found.kl_top20 is not None
    assert low < found.kl_top20 < high
    # 30 values spread evenly over 0 to 2.9: standard error 0.158
    assert high - low == pytest.approx(4 * 0.158, rel=0.15)
    assert figures(rows) == found


def test_answers_to_one_prompt_are_drawn_together() -> None:
    """Ten copies of each prompt's answer say no more than one."""
    once = figures([_row(n, 5, 0.1 * n) for n in range(12)])
    copies = figures([_row(n, 5, 0.1 * (n % 12), f"p{n % 12}") for n in range(120)])
    one, ten = once.intervals["kl_top20"], copies.intervals["kl_top20"]
    assert ten[1] - ten[0] == pytest.approx(one[1] - one[0], rel=0.1)


def test_few_prompts_have_no_interval() -> None:
    assert figures([_row(n, 5, 0.1) for n in range(4)]).intervals == {}


def test_a_share_has_wilsons_interval() -> None:
    share, bounds = stop_figures([True] * 8 + [False] * 2)
    assert share == 0.8
    assert bounds == pytest.approx((0.490, 0.943), abs=0.001)
    assert stop_figures([]) == (None, None)
    none = stop_figures([False] * 12)[1]
    assert none is not None
    assert none[0] == 0.0
    assert stop_figures([True] * 5)[1] == pytest.approx((0.566, 1.0), abs=0.001)
