"""Calls and tokens in a minute: the generic cell rate algorithm, one time a limit.

A call may start once that time has come, and moves it on by what the call takes of a minute. Calls
are spaced evenly, without bursts, so no 60 seconds have more than `requests_per_minute` of them.
Tokens are taken by a call's worst case; what it did not use pays for later calls.

A permit is given at most AHEAD of its time and void LATE after it, so that a worker takes a few at
once without spoiling the bound: a minute is counted as LATE longer than it is.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from services.teacher_gateway.models import TeacherEndpoint

MINUTE = 60.0
AHEAD = 1.0
LATE = 1.0
# Unused tokens are kept for so long a time's worth, and not beyond a pause of a minute.
KEPT_SECONDS = 10.0


@dataclass(frozen=True)
class Rate:
    """The limits that hold for an endpoint now; None for no limit."""

    requests_per_minute: int | None = None
    tokens_per_minute: int | None = None

    @property
    def limited(self) -> bool:
        return self.requests_per_minute is not None or self.tokens_per_minute is not None


@dataclass(frozen=True)
class Permit:
    """One call may start at `at`, by the database's clock, with so many tokens at most."""

    at: float
    tokens: int


def seconds_of(amount: float, per_minute: int) -> float:
    """How long an amount lasts at a rate."""
    return amount * (MINUTE + LATE) / per_minute


def take(
    row: TeacherEndpoint, clock: float, rate: Rate, tokens: Sequence[int], most: int
) -> list[Permit]:
    """Give permits for calls of so many tokens, in their order: those whose time comes within
    AHEAD, `most` at most."""
    permits: list[Permit] = []
    for wanted in tokens[:most]:
        at = max(clock, next_call(row, rate))
        if at > clock + AHEAD:
            break
        if rate.requests_per_minute is not None:
            row.requests_at = at + seconds_of(1, rate.requests_per_minute)
        if rate.tokens_per_minute is not None:
            if at - row.tokens_at > MINUTE:
                row.tokens_unused = 0
            paid = min(row.tokens_unused, wanted)
            row.tokens_unused -= paid
            row.tokens_at = max(row.tokens_at, at)
            row.tokens_at += seconds_of(wanted - paid, rate.tokens_per_minute)
        permits.append(Permit(at, wanted))
    return permits


def count(row: TeacherEndpoint, clock: float, rate: Rate, tokens: int) -> None:
    """Count a call that is made now, whatever the limits say: later ones wait the longer."""
    if rate.requests_per_minute is not None:
        row.requests_at = max(row.requests_at, clock) + seconds_of(1, rate.requests_per_minute)
    if rate.tokens_per_minute is not None:
        row.tokens_at = max(row.tokens_at, clock) + seconds_of(tokens, rate.tokens_per_minute)


def next_call(row: TeacherEndpoint, rate: Rate) -> float:
    """When the next call may start."""
    times = [0.0]
    if rate.requests_per_minute is not None:
        times.append(row.requests_at)
    if rate.tokens_per_minute is not None:
        times.append(row.tokens_at)
    return max(times)


def correct(row: TeacherEndpoint, clock: float, rate: Rate, unused: int) -> None:
    """Note how many tokens less (or more: below zero) calls used than they had taken: the next
    call comes sooner by them, and what is left pays for later ones."""
    if rate.tokens_per_minute is None:
        return
    if unused < 0:
        count(row, clock, Rate(tokens_per_minute=rate.tokens_per_minute), -unused)
        return
    sooner = min(seconds_of(unused, rate.tokens_per_minute), max(0.0, row.tokens_at - clock))
    row.tokens_at -= sooner
    kept = row.tokens_unused + unused
    kept -= math.ceil(sooner * rate.tokens_per_minute / (MINUTE + LATE))
    most = int(rate.tokens_per_minute * KEPT_SECONDS / MINUTE)
    row.tokens_unused = min(max(kept, 0), most)
