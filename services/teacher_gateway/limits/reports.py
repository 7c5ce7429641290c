"""What an attempt and those who share its teacher tell each other, about once a second."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from services.teacher_gateway.limits.strain import NOTHING_SEEN, Seen


@dataclass(frozen=True)
class Report:
    """What an attempt tells: what it holds and wants, and what happened since its last report."""

    running: int  # calls now
    holds: int  # calls that there may be at once until the reply
    peak: int  # calls that there were at once since the last report
    wanted: int
    permits: tuple[int, ...] = ()  # the tokens of calls that could start now
    unused: int = 0  # tokens of earlier permits that were not used
    delay: float = 0.0  # seconds after which replies come, once their clock was read
    cool: float = 0.0  # seconds that the teacher asked to be left alone, from now
    heard: bool = False
    seen: Seen = NOTHING_SEEN


@dataclass(frozen=True)
class Leave:
    """A permit: one call may start in `after` seconds, with so many tokens."""

    after: float
    tokens: int


@dataclass(frozen=True)
class Grant:
    """What an attempt may do until its next report. All times in seconds from when the shared
    clock was read: between the two times of `read`, by time.monotonic()."""

    calls: int  # at once
    cool: float = 0.0
    limited: bool = False  # whether each call needs a permit
    permits: tuple[Leave, ...] = ()
    next_permit: float = 0.0  # when there may be one again
    suspect: bool = False  # the teacher was away when it was asked last
    read: tuple[float, float] | None = None  # None: between the report and the reply


class Shared(Protocol):
    """What those who ask one teacher share, by blocking calls."""

    def exchange(self, report: Report) -> Grant:
        """Tell what happened, hear what may be done, and renew the lease of the share."""

    def leave(self, report: Report) -> None:
        """Tell the last that happened, and give the share back."""
