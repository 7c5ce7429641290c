"""Calls and tokens in a minute: the generic cell rate algorithm, one time a limit.

A call may start once that time has come, and moves it on by what the call takes of a minute. Calls
are spaced evenly, without bursts, so no 60 seconds have more than `requests_per_minute` of them.
Tokens are taken by a call's worst case; what it did not use pays for later calls.

A permit is given at most AHEAD of its time and void LATE after it, so that a worker takes a few at
once without spoiling the bound: a minute is counted as LATE longer than it is.

A call counts on two meters: its tenant's own, and the endpoint's, which all who ask it share.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from services.teacher_gateway.models import Meter

MINUTE = 60.0
AHEAD = 1.0
LATE = 1.0
# Unused tokens are kept for so long a time's worth, and not beyond a pause of a minute.
KEPT_SECONDS = 10.0


@dataclass(frozen=True)
class Rate:
    """The limits that hold now; None for no limit."""

    requests_per_minute: int | None = None
    tokens_per_minute: int | None = None


@dataclass(frozen=True)
class Permit:
    """One call may start at `at`, by the database's clock, with so many tokens at most."""

    at: float
    tokens: int


def seconds_of(amount: float, per_minute: int) -> float:
    """How long an amount lasts at a rate."""
    return amount * (MINUTE + LATE) / per_minute


def set_limits(row: Meter, rate: Rate) -> None:
    """Let these limits hold from now on."""
    row.requests_per_minute = rate.requests_per_minute
    row.tokens_per_minute = rate.tokens_per_minute


def ease(row: Meter, clock: float, rate: Rate) -> None:
    """Let limits hold, and where they allow more than those before wait less by as much: whoever
    named the smaller one makes nobody else wait."""
    left = max(0.0, row.requests_at - clock)
    row.requests_at -= left * (1 - _part(row.requests_per_minute, rate.requests_per_minute))
    left = max(0.0, row.tokens_at - clock)
    row.tokens_at -= left * (1 - _part(row.tokens_per_minute, rate.tokens_per_minute))
    set_limits(row, rate)


def _part(before: int | None, now: int | None) -> float:
    """Of the time that is left to wait, the part that still is under other limits."""
    if before is None or now == before:
        return 1.0
    return 0.0 if now is None else min(1.0, before / now)


def take(
    rows: Sequence[Meter], clock: float, tokens: Sequence[int], most: int, *, delay: float = 0.0
) -> list[Permit]:
    """Give permits for calls of so many tokens, in their order, that all meters allow: those whose
    time comes within AHEAD, `most` at most, none sooner than in `delay`."""
    permits: list[Permit] = []
    soonest = clock + delay
    for wanted in tokens[:most]:
        at = max(soonest, *(next_call(row) for row in rows))
        if at > soonest + AHEAD:
            break
        for row in rows:
            _use(row, at, wanted)
        permits.append(Permit(at, wanted))
    return permits


def _use(row: Meter, at: float, tokens: int) -> None:
    if row.requests_per_minute is not None:
        row.requests_at = at + seconds_of(1, row.requests_per_minute)
    if row.tokens_per_minute is not None:
        if at - row.tokens_at > MINUTE:
            row.tokens_unused = 0
        paid = min(row.tokens_unused, tokens)
        row.tokens_unused -= paid
        row.tokens_at = max(row.tokens_at, at)
        row.tokens_at += seconds_of(tokens - paid, row.tokens_per_minute)


def count(row: Meter, clock: float, tokens: int) -> None:
    """Count a call that is made now, whatever the limits say: later ones wait the longer."""
    if row.requests_per_minute is not None:
        row.requests_at = max(row.requests_at, clock) + seconds_of(1, row.requests_per_minute)
    _count_tokens(row, clock, tokens)


def _count_tokens(row: Meter, clock: float, tokens: int) -> None:
    if row.tokens_per_minute is not None:
        row.tokens_at = max(row.tokens_at, clock) + seconds_of(tokens, row.tokens_per_minute)


def next_call(row: Meter) -> float:
    """When the next call may start."""
    requests_at = 0.0 if row.requests_per_minute is None else row.requests_at
    return max(requests_at, 0.0 if row.tokens_per_minute is None else row.tokens_at)


def correct(row: Meter, clock: float, unused: int) -> None:
    """Note how many tokens less (or more: below zero) calls used than they had taken: the next
    call comes sooner by them, and what is left pays for later ones."""
    rate = row.tokens_per_minute
    if rate is None:
        return
    if unused < 0:
        _count_tokens(row, clock, -unused)
        return
    sooner = min(seconds_of(unused, rate), max(0.0, row.tokens_at - clock))
    row.tokens_at -= sooner
    kept = row.tokens_unused + unused
    kept -= math.ceil(sooner * rate / (MINUTE + LATE))
    most = int(rate * KEPT_SECONDS / MINUTE)
    row.tokens_unused = min(max(kept, 0), most)
