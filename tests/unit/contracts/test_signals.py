"""What storing a signal may cost: at most 0.01 nats, however sure the teacher is."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stillhouse.contracts import signals
from stillhouse.contracts.signals import TopK

MOST_NATS = 0.01


def masses(signal: TopK, row: int = 0) -> npt.NDArray[np.float64]:
    """Probabilities of a position's outcomes and its tail, aligned by slot."""
    return np.exp(np.append(signal.logp[row], signal.tail[row]))


def divergence(before: TopK, after: TopK, row: int = 0) -> float:
    """KL(before || after) in nats over the outcomes and the tail."""
    p, q = masses(before, row), masses(after, row)
    p = p / p.sum()
    kept = p > 0
    return float((p[kept] * (np.log(p[kept]) - np.log(q[kept]))).sum())


def round_trip(signal: TopK) -> TopK:
    return signals.decode(signals.encode(signal))


def geometric(first: float, k: int, share: float) -> dict[int, float]:
    """`k` outcomes: the first with that probability, the others halving `share` of the rest."""
    outcomes = {7: math.log(first)}
    left = (1 - first) * share
    for i in range(1, k):
        left /= 2
        outcomes[1000 + i] = math.log(left)
    return outcomes


@pytest.mark.parametrize("k", [1, 2, 21, 33])
@pytest.mark.parametrize("share", [1e-6, 0.5, 0.999])
@pytest.mark.parametrize(
    "first",
    [0.05, 0.3, 0.5, 0.9, 0.969, 0.97, 0.99, 0.999, 1 - 1e-4, 1 - 1e-5, 1 - 1e-6, 1 - 1e-7],
)
def test_storing_costs_at_most_a_hundredth_of_a_nat(first: float, share: float, k: int) -> None:
    before = signals.from_outcomes([geometric(first, k, share)], k)
    assert divergence(before, round_trip(before)) <= MOST_NATS


@pytest.mark.parametrize("doubt", [1e-3, 1e-5, 1e-7])
def test_what_is_left_beside_a_sure_token_is_kept(doubt: float) -> None:
    # Plain steps of 1/16 nat would round such a token to certainty.
    before = signals.from_outcomes([geometric(1 - doubt, 5, 0.5)], 5)
    after = round_trip(before)
    left = -np.expm1(after.logp[0, 0])
    assert left == pytest.approx(doubt, rel=0.02)


logits = st.lists(
    st.floats(-30, 30, allow_nan=False), min_size=2, max_size=80, unique_by=lambda x: round(x, 3)
)


@settings(deadline=None)
@given(logits=logits, k=st.integers(1, 64))
def test_any_distribution_survives_storage(logits: list[float], k: int) -> None:
    values = np.array(logits)
    logp = values - values.max() - np.log(np.exp(values - values.max()).sum())
    order = np.argsort(-logp)[:k]
    before = signals.from_outcomes([{int(i): float(logp[i]) for i in order}], k)
    after = round_trip(before)
    # Twice 64 outcomes of 1/32 nat at most; what lies below the scale carries no mass.
    assert divergence(before, after) <= MOST_NATS
    assert masses(after).sum() == pytest.approx(1, abs=1e-9)
    present = np.isfinite(before.logp[0])
    assert (np.isfinite(after.logp[0]) == present).all()
    assert (np.exp(after.logp[0][present]) > 0).all()
    assert list(after.ids[0]) == list(before.ids[0])


@settings(deadline=None)
@given(
    rows=st.lists(
        st.dictionaries(st.integers(0, 200_000), st.floats(-14, -3), min_size=1, max_size=6),
        min_size=1,
        max_size=5,
    )
)
def test_positions_keep_their_outcomes_and_their_order(rows: list[dict[int, float]]) -> None:
    signal = signals.from_outcomes(rows, 6)
    stored = signals.encode(signal)
    after = signals.decode(stored)
    assert (after.positions, after.slots) == (len(rows), 6)
    for t, outcomes in enumerate(rows):
        present = np.isfinite(after.logp[t])
        assert set(after.ids[t][present]) == set(outcomes)
        assert (np.diff(signal.logp[t][present]) <= 0).all()


def test_outcomes_of_equal_weight_are_in_the_order_of_their_ids() -> None:
    one = signals.from_outcomes([{9: -2.0, 3: -2.0, 5: -2.0}], 3)
    two = signals.from_outcomes([{5: -2.0, 3: -2.0, 9: -2.0}], 3)
    assert list(one.ids[0]) == [3, 5, 9]
    assert signals.encode(one) == signals.encode(two)


@pytest.mark.parametrize("sentinel", [-9999.0, -math.inf, -900.0])
def test_what_the_server_did_not_compute_belongs_to_the_tail(sentinel: float) -> None:
    with_it = signals.from_outcomes([{1: math.log(0.5), 2: sentinel}], 3)
    without = signals.from_outcomes([{1: math.log(0.5)}], 3)
    assert signals.encode(with_it) == signals.encode(without)
    assert math.exp(with_it.tail[0]) == pytest.approx(0.5)


def test_a_position_of_sentinels_alone_is_refused() -> None:
    with pytest.raises(ValueError, match="expected 1 to 3 outcomes, found 0"):
        signals.from_outcomes([{1: -9999.0}], 3)


def test_more_outcomes_than_slots_are_refused() -> None:
    with pytest.raises(ValueError, match="expected 1 to 1 outcomes, found 2"):
        signals.from_outcomes([{1: -1.0, 2: -2.0}], 1)


def test_probabilities_that_sum_to_more_than_one_are_refused() -> None:
    with pytest.raises(ValueError, match=r"position 1: probabilities sum to 1\.2"):
        signals.from_outcomes([{1: -1.0}, {1: math.log(0.7), 2: math.log(0.5)}], 2)


def test_rounding_of_the_server_is_not_an_error() -> None:
    signal = signals.from_outcomes([{1: math.log(0.7), 2: math.log(0.3004)}], 2)
    assert signal.tail[0] == signals.FLOOR
    assert masses(round_trip(signal)).sum() == pytest.approx(1)


def test_the_tail_comes_from_unquantised_values() -> None:
    outcomes = geometric(0.9, 20, 0.9)
    signal = signals.from_outcomes([outcomes], 21)
    left = 1 - sum(math.exp(lp) for lp in outcomes.values())
    assert math.exp(signal.tail[0]) == pytest.approx(left, rel=1e-9)
    assert math.exp(round_trip(signal).tail[0]) == pytest.approx(left, rel=0.05)


def test_with_one_outcome_the_tail_is_all_the_rest() -> None:
    signal = signals.from_outcomes([{5: math.log(0.25)}], 1)
    stored = signals.encode(signal)
    assert stored.rest == b""
    after = signals.decode(stored)
    assert math.exp(after.tail[0]) == pytest.approx(0.75, rel=1e-3)
    assert math.exp(after.logp[0, 0]) == pytest.approx(0.25, rel=2e-3)


def test_all_outcomes_of_a_small_vocabulary_leave_no_tail() -> None:
    signal = signals.from_outcomes([{i: math.log(0.25) for i in range(4)}], 4)
    after = round_trip(signal)
    assert math.exp(after.tail[0]) < 1e-6
    assert np.exp(after.logp[0]) == pytest.approx([0.25] * 4, rel=0.05)


def test_an_outcome_that_was_certain_stays_so() -> None:
    signal = signals.from_outcomes([{2: 0.0}], 21, one_hot=frozenset({0}))
    after = round_trip(signal)
    assert after.ids[0, 0] == 2
    assert math.exp(after.logp[0, 0]) == pytest.approx(1, abs=1e-9)
    assert math.exp(after.tail[0]) < 1e-9


def test_large_vocabularies_take_four_bytes_an_id_and_small_ones_two() -> None:
    small = signals.encode(signals.from_outcomes([{65_535: -1.0}], 2))
    large = signals.encode(signals.from_outcomes([{65_536: -1.0}], 2))
    assert (len(small.ids), len(large.ids)) == (4, 8)
    assert signals.decode(large).ids[0, 0] == 65_536


def test_a_position_takes_about_75_bytes_at_twenty_and_one_outcomes() -> None:
    stored = signals.encode(signals.from_outcomes([geometric(0.5, 21, 0.9)] * 10, 21))
    size = sum(map(len, (stored.ids, stored.first, stored.rest, stored.tail)))
    assert size / 10 <= 75


@pytest.mark.parametrize("part", ["ids", "first", "rest", "tail"])
def test_a_signal_that_lost_bytes_is_refused(part: str) -> None:
    stored = signals.encode(signals.from_outcomes([geometric(0.5, 3, 0.5)] * 2, 3))
    broken = replace(stored, **{part: getattr(stored, part)[:-2]})
    with pytest.raises(ValueError, match="does not fit itself"):
        signals.decode(broken)


# Counts of drawn ids

POSITIONS = st.lists(
    st.dictionaries(
        st.integers(0, 2**17), st.integers(1, signals.MAX_DRAWS), min_size=1, max_size=60
    ),
    min_size=1,
    max_size=8,
)


@settings(max_examples=100, deadline=None)
@given(POSITIONS)
def test_counts_come_back_as_their_shares_and_nothing_else(positions: list[dict[int, int]]) -> None:
    stored = signals.encode_counts(positions)
    assert stored.drawn
    found = signals.decode(stored)
    assert found.positions == len(positions)
    for t, drawn in enumerate(positions):
        present = np.isfinite(found.logp[t])
        shares = dict(
            zip(found.ids[t][present].tolist(), np.exp(found.logp[t][present]), strict=True)
        )
        total = sum(drawn.values())
        assert shares == pytest.approx({i: count / total for i, count in drawn.items()})
        assert list(found.logp[t]) == sorted(found.logp[t], reverse=True)
    assert (found.tail == signals.FLOOR).all()


@pytest.mark.parametrize("drawn", [{}, {3: 0}, {3: -1}, {3: 256}, {3: 50, 4: 0}])
def test_counts_that_are_none_are_refused(drawn: dict[int, int]) -> None:
    with pytest.raises(ValueError, match="position 1: expected counts of 1 to 255"):
        signals.encode_counts([{1: 1}, drawn])


def test_counts_that_do_not_fit_themselves_are_refused() -> None:
    stored = signals.encode_counts([{1: 30, 2: 20}, {1: 50}])
    for wrong in (
        replace(stored, rest=stored.rest[:-1]),
        replace(stored, ids=stored.ids[:-1]),
        replace(stored, slots=0),
        replace(stored, rest=bytes(len(stored.rest))),
    ):
        with pytest.raises(ValueError, match="fit"):
            signals.decode(wrong)
    assert not signals.encode(signals.from_outcomes([{1: -0.5}], 2)).drawn
