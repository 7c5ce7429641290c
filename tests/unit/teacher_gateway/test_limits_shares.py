"""Calls at once, divided among those who ask one teacher."""

from __future__ import annotations

from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from services.teacher_gateway.limits.shares import TURN_SECONDS, Wish, divide, fair_shares

wanted = st.dictionaries(st.sampled_from("abcdefgh"), st.integers(0, 20), max_size=8)


@given(total=st.integers(0, 100), wanted=wanted, turn=st.integers(0, 1000))
def test_all_is_given_and_nobody_gets_more_than_another_who_wants_as_much(
    total: int, wanted: dict[str, int], turn: int
) -> None:
    given_ = divide(total, wanted, turn)
    assert sum(given_.values()) == min(total, sum(wanted.values()))
    assert all(0 <= given_[name] <= wanted[name] for name in wanted)
    # Whoever has less than it wants has no less than anybody else, but for one.
    for name in wanted:
        if given_[name] < wanted[name]:
            assert all(given_[other] <= given_[name] + 1 for other in wanted)


def test_tenants_get_equal_parts_then_pipelines_then_attempts() -> None:
    wishes = [Wish(f"big:{n}", "big", f"p{n % 2}", 20) for n in range(6)]
    wishes += [Wish("small:0", "small", "q", 20)]
    shares = fair_shares(24, wishes, 0.0)
    assert shares["small:0"] == 12
    assert {shares[wish.holder] for wish in wishes if wish.tenant_id == "big"} == {2}
    # What a small one does not want is the others'.
    shares = fair_shares(24, [*wishes[:-1], Wish("small:0", "small", "q", 3)], 0.0)
    assert shares["small:0"] == 3
    assert sum(shares.values()) == 24


def test_one_call_at_once_goes_round_among_all() -> None:
    wishes = [
        Wish(f"{tenant}{pipeline}{batch}", tenant, f"{tenant}{pipeline}", 5)
        for tenant in "ab"
        for pipeline in "xy"
        for batch in "12"
    ]
    turns = Counter[str]()
    for turn in range(16):
        shares = fair_shares(1, wishes, turn * TURN_SECONDS)
        turns.update(name for name, calls in shares.items() if calls)
    assert set(turns.values()) == {2}
    assert len(turns) == 8


def test_within_a_turn_nothing_moves() -> None:
    wishes = [Wish(name, name, name, 5) for name in "abc"]
    at = 17 * TURN_SECONDS
    assert fair_shares(4, wishes, at) == fair_shares(4, wishes, at + TURN_SECONDS - 0.1)
    assert fair_shares(4, wishes, at) != fair_shares(4, wishes, at + TURN_SECONDS)
