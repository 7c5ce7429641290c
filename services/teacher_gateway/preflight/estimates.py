"""Figures from a handful of answers, each with an interval that tells how little that is."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import fmean, stdev

from services.teacher_gateway.preflight.views import Estimate

# Student's t for 95 % by degrees of freedom; a handful of answers needs no more, and the last one
# is only too careful for larger numbers.
_T = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)
_Z = 1.959963984540054


def share(count: int, of: int) -> Estimate | None:
    """A share with Wilson's interval."""
    if not of:
        return None
    found = count / of
    middle = (found + _Z * _Z / (2 * of)) / (1 + _Z * _Z / of)
    half = math.sqrt(found * (1 - found) / of + _Z * _Z / (4 * of * of)) * _Z / (1 + _Z * _Z / of)
    # Exact at the ends, where rounding leaves 1e-17.
    low = 0.0 if count == 0 else middle - half
    high = 1.0 if count == of else middle + half
    return Estimate(value=found, low=low, high=high, n=of)


def mean(values: Sequence[float], *, least: float = 0.0, most: float = math.inf) -> Estimate | None:
    """A mean with Student's interval, within what can be; of one value there is no interval."""
    if not values:
        return None
    n, found = len(values), fmean(values)
    if n == 1:
        return Estimate(value=found, low=None, high=None, n=1)
    half = _T[min(n - 1, len(_T)) - 1] * stdev(values) / math.sqrt(n)
    return Estimate(value=found, low=max(found - half, least), high=min(found + half, most), n=n)


def scaled(estimate: Estimate | None, factor: float, plus: float = 0.0) -> Estimate | None:
    """The estimate of `factor` times what was estimated, `plus` what is known."""
    if estimate is None:
        return None
    low, high = estimate.low, estimate.high
    return Estimate(
        value=plus + factor * estimate.value,
        low=None if low is None else plus + factor * low,
        high=None if high is None else plus + factor * high,
        n=estimate.n,
    )


def at_least(estimate: Estimate | None, least: float) -> Estimate | None:
    """The estimate of what also takes `least`, whatever else is estimated."""
    if estimate is None:
        return None
    low, high = estimate.low, estimate.high
    return Estimate(
        value=max(estimate.value, least),
        low=None if low is None else max(low, least),
        high=None if high is None else max(high, least),
        n=estimate.n,
    )


def total(estimates: Sequence[Estimate | None]) -> Estimate | None:
    """The sum of independent figures; none where one of them is missing."""
    known = [estimate for estimate in estimates if estimate is not None]
    if not known or len(known) < len(estimates):
        return None
    value, n = sum(e.value for e in known), sum(e.n for e in known)
    below = [(e.value - e.low) ** 2 for e in known if e.low is not None]
    above = [(e.high - e.value) ** 2 for e in known if e.high is not None]
    whole = len(below) == len(known)
    return Estimate(
        value=value,
        low=value - math.sqrt(sum(below)) if whole else None,
        high=value + math.sqrt(sum(above)) if whole else None,
        n=n,
    )


def longest(estimates: Sequence[Estimate | None]) -> Estimate | None:
    """Of figures that pass at the same time, the largest; none where one is missing."""
    known = [estimate for estimate in estimates if estimate is not None]
    if not known or len(known) < len(estimates):
        return None
    return max(known, key=lambda estimate: estimate.value)
