"""Memory for the calls of one process: their bodies, and their answers as far as they have come.

A call takes room for its body and a small answer when it begins, or is refused. A longer answer
takes more while it comes, but never the last quarter: that stays free for calls that begin, so
that one teacher's endless answers keep nobody else out.
"""

from __future__ import annotations

# Nearly all answers are smaller, so nearly no call asks twice.
ANSWER_BYTES = 1 << 16
# What a piece of an answer takes beside its bytes, so that many small ones are counted too.
PIECE_BYTES = 64


class Room:
    """The room of all calls; what is free is counted, not allocated."""

    def __init__(self, most_bytes: int) -> None:
        self.most_bytes = most_bytes
        self.used = 0
        self._most_grown = most_bytes - most_bytes // 4

    def enter(self, body_bytes: int) -> Share | None:
        """Room for a call and a small answer; None when there is none."""
        size = body_bytes + ANSWER_BYTES
        if self.used + size > self.most_bytes:
            return None
        self.used += size
        return Share(self, size)

    def take(self, size: int) -> bool:
        """More of it, for an answer that grows."""
        if self.used + size > self._most_grown:
            return False
        self.used += size
        return True


class Share:
    """What one call has of it. `answer_bytes` may be held of its answer."""

    __slots__ = ("_room", "_size", "answer_bytes")

    def __init__(self, room: Room, size: int) -> None:
        self._room = room
        self._size = size
        self.answer_bytes = ANSWER_BYTES

    def grow(self, answer_bytes: int) -> bool:
        """Have room for an answer of so many bytes, and twice as many where that is to be had."""
        for wanted in (2 * answer_bytes, answer_bytes):
            more = wanted - self.answer_bytes
            if self._room.take(more):
                self._size += more
                self.answer_bytes = wanted
                return True
        return False

    def shrink(self) -> None:
        """Give back what the answer took, when nothing of it is held any more."""
        more = self.answer_bytes - ANSWER_BYTES
        self._room.used -= more
        self._size -= more
        self.answer_bytes = ANSWER_BYTES

    def leave(self) -> None:
        """Give all of it back; a second time changes nothing."""
        self._room.used -= self._size
        self._size = 0
