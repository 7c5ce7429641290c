"""How many calls at once a teacher bears: more while it is well, a good part less when strained.

The spec's `limits.concurrency` holds until the first strain: a 429, failures in more than one call
of ten, or answers far slower than usual. Each cuts what holds to LOWER of it, once an INTERVAL at
most and only for calls that began after the last cut: those before it prove nothing about it. From
then on, while all of it is used, a thirty-second part of the spec's comes back each INTERVAL.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from services.teacher_gateway.models import TeacherEndpoint

INTERVAL = 2.0
LOWER = 0.7
FAILED_PART = 0.1
FAR_ABOVE = 4.0
_STEPS = 32
_USED_PART = 0.8
# What is usual follows the pace that is seen: fast where that is better, slowly where it is worse.
_BETTER, _WORSE = 0.3, 0.02
# Reading the prompt and the way there count as so many tokens of the answer.
TOKENS_AROUND = 32

Strain = Literal["rate_limited", "failing", "slow"]


@dataclass(frozen=True)
class Seen:
    """What calls of one attempt came to since its last report.

    `pace` is the mean of their seconds a token. `youngest_strained` is how long ago the last of
    the calls that failed began, `oldest_paced` how long ago the first of those measured did.
    """

    ended: int = 0
    rate_limited: int = 0
    failed: int = 0
    youngest_strained: float = 0.0
    pace: float | None = None
    oldest_paced: float = 0.0


NOTHING_SEEN = Seen()


def calls_at_once(row: TeacherEndpoint, most: int) -> int:
    """How many calls at once an endpoint gets now, of the spec's `most`."""
    return most if row.concurrency is None else max(1, min(most, int(row.concurrency)))


def adapt(row: TeacherEndpoint, clock: float, most: int, seen: Seen, used: int) -> Strain | None:
    """Raise or lower what an endpoint gets, given what was seen and how many calls it had at
    once; return why it was lowered."""
    limit = calls_at_once(row, most)
    strain, age = _strain(row, seen)
    _learn_pace(row, seen)
    if strain is not None:
        if clock - row.lowered_at < INTERVAL or clock - age <= row.lowered_at:
            return None
        row.lowered_at = clock
        row.concurrency = max(1.0, limit * LOWER)
        return strain
    if row.concurrency is None or clock - max(row.raised_at, row.lowered_at) < INTERVAL:
        return None
    if used >= _USED_PART * limit:
        row.raised_at = clock
        row.concurrency = max(row.concurrency, 1.0) + max(1.0, most / _STEPS)
        if row.concurrency >= most:
            row.concurrency = None
    return None


def _strain(row: TeacherEndpoint, seen: Seen) -> tuple[Strain | None, float]:
    if seen.rate_limited:
        return "rate_limited", seen.youngest_strained
    if seen.failed > FAILED_PART * seen.ended:
        return "failing", seen.youngest_strained
    if seen.pace is not None and row.pace is not None and seen.pace > FAR_ABOVE * row.pace:
        return "slow", seen.oldest_paced
    return None, 0.0


def _learn_pace(row: TeacherEndpoint, seen: Seen) -> None:
    if seen.pace is None:
        return
    if row.pace is None:
        row.pace = seen.pace
    else:
        row.pace += (_BETTER if seen.pace < row.pace else _WORSE) * (seen.pace - row.pace)
