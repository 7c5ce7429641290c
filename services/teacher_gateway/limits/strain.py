"""How many calls at once a teacher bears: more while it is well, a good part less when strained.

The spec's `limits.concurrency` holds until the first strain: a 429, failures in more than one call
of ten, or answers far slower than usual for their tenant. The last two need a SAMPLE: one call that
fails or is slow says nothing about the others, and one that was given up before PATIENCE says more
about its deadline than about the teacher. Each strain cuts what holds to LOWER of it, once an
INTERVAL at most and only for calls that began after the last cut: those before it prove nothing
about it. From then on, while all of it is used, a thirty-second part of the spec's comes back each
INTERVAL.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from services.teacher_gateway.models import TeacherEndpoint, TeacherTenant
from services.teacher_gateway.teachers.outcomes import Retry

INTERVAL = 2.0
LOWER = 0.7
# Calls that ended, or answers, whose failures or mean pace say something.
SAMPLE = 10
# Whoever waits as long for an answer may hold its absence against the teacher.
PATIENCE = 60.0
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

    `pace` is the median of their seconds a token. `youngest_strained` is how long ago the last of
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


def proves(outcome: Retry, patience: float = PATIENCE) -> bool:
    """Whether it tells all who ask the teacher that it is strained or away."""
    return outcome.away and (outcome.waited is None or outcome.waited >= patience)


def adapt(
    row: TeacherEndpoint, usual: TeacherTenant, clock: float, most: int, seen: Seen, used: int
) -> Strain | None:
    """Raise or lower what an endpoint gets, given what was seen by a tenant and how many calls
    there were at once; return why it was lowered."""
    limit = calls_at_once(row, most)
    strain, age = _strain(row, usual, seen)
    _learn_pace(usual, seen)
    if strain is not None:
        if clock - row.lowered_at < INTERVAL or clock - age <= row.lowered_at:
            return None
        row.lowered_at = clock
        row.concurrency = max(1.0, limit * LOWER)
        row.ended = row.failed = 0  # what was seen before it is answered by this
        return strain
    if row.concurrency is None or clock - max(row.raised_at, row.lowered_at) < INTERVAL:
        return None
    if used >= _USED_PART * limit:
        row.raised_at = clock
        row.concurrency = max(row.concurrency, 1.0) + max(1.0, most / _STEPS)
        if row.concurrency >= most:
            row.concurrency = None
    return None


def _strain(row: TeacherEndpoint, usual: TeacherTenant, seen: Seen) -> tuple[Strain | None, float]:
    row.ended += seen.ended
    row.failed += seen.failed
    failing = row.failed > FAILED_PART * row.ended
    if row.ended >= SAMPLE:
        row.ended = row.failed = 0
    else:
        failing = False
    if seen.rate_limited:
        return "rate_limited", seen.youngest_strained
    if failing:
        return "failing", seen.youngest_strained
    if seen.pace is not None and usual.pace is not None and seen.pace > FAR_ABOVE * usual.pace:
        return "slow", seen.oldest_paced
    return None, 0.0


def _learn_pace(usual: TeacherTenant, seen: Seen) -> None:
    if seen.pace is None:
        return
    if usual.pace is None:
        usual.pace = seen.pace
    else:
        usual.pace += (_BETTER if seen.pace < usual.pace else _WORSE) * (seen.pace - usual.pace)
