"""Memory for calls in flight has an end, and a long answer never takes what beginners need."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from services.teacher_gateway.capture.room import ANSWER_BYTES, Room, Share


def test_calls_are_refused_when_there_is_no_room_for_one_more() -> None:
    room = Room(10 * ANSWER_BYTES)
    shares = [room.enter(ANSWER_BYTES) for _ in range(6)]
    assert [share is not None for share in shares] == [True] * 5 + [False]
    assert shares[0] is not None
    shares[0].leave()
    assert room.enter(ANSWER_BYTES) is not None


def test_answers_grow_in_what_is_left_but_for_a_quarter_of_all() -> None:
    room = Room(16 * ANSWER_BYTES)
    long = room.enter(0)
    assert long is not None
    grown = ANSWER_BYTES
    while long.grow(grown + 1000):
        grown = long.answer_bytes
    assert 8 * ANSWER_BYTES < grown <= 12 * ANSWER_BYTES
    beginners = [room.enter(0) for _ in range(4)]
    assert None not in beginners, "they have room, whatever long answers hold"
    long.shrink()
    assert long.answer_bytes == ANSWER_BYTES
    assert room.used == 5 * ANSWER_BYTES


@given(st.lists(st.tuples(st.integers(0, 4), st.integers(0, 1 << 20)), max_size=60))
def test_what_is_used_is_what_calls_have_and_never_more_than_there_is(
    steps: list[tuple[int, int]],
) -> None:
    room = Room(1 << 20)
    shares: list[Share] = []
    for step, size in steps:
        if step == 0 and (share := room.enter(size)):
            shares.append(share)
        elif step == 1 and shares and size > shares[-1].answer_bytes:
            assert shares[-1].grow(size) == (shares[-1].answer_bytes >= size)
        elif step == 2 and shares:
            shares[0].shrink()
        elif step == 3 and shares:
            share = shares.pop()
            share.leave()
            share.leave()
        assert len(shares) * ANSWER_BYTES <= room.used <= 1 << 20
    for share in shares:
        share.leave()
    assert room.used == 0
