"""All of the gateway's times in one table for each profile, checked at start-up.

    call < attempt < lease < job < visibility / 3 <= consumer

A call is started only while it can end inside its attempt; an attempt ends inside its lease; the
job ends before Celery kills it; and the broker takes a message back only after all of that. The
deadline of a whole batch (`close_deadline_hours`) is a row's, not a process's, and so outside.
"""

from __future__ import annotations

import math
import random
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

from stillhouse.chassis import jobs
from stillhouse.chassis.errors import PermanentError

# More would be a number beyond all caps.
_MOST_DOUBLINGS = 20


@dataclass(frozen=True)
class GatewayTimeouts:
    """Seconds, but for the counts (`tries`, `attempts`, `probe_attempts`, `redrive_tries`)."""

    # One call of a teacher at most; the spec's `limits.timeout_seconds` may be shorter.
    call: float
    # One attempt at a batch: no call is started that could not end inside.
    attempt: float
    # The longest that an attempt may hold its batch; renewals stop there.
    lease: float
    job: float
    visibility: float
    consumer: float
    # The lease is renewed every `beat`; a dead worker's batch is free after `lease_ttl`.
    lease_ttl: float
    beat: float
    # Calls for one item in one attempt, and attempts in which an item may fail.
    tries: int
    attempts: int
    try_backoff: float
    batch_backoff: float
    batch_backoff_cap: float
    # How long a batch waits for other reservations of its pipeline to be settled.
    budget_wait: float
    # A job that nobody took is put on the queue again.
    enqueue_again: float
    # Seconds between two ticks of the clock, and while batches are in flight.
    tick: float
    tick_flying: float
    clock_ttl: float
    probe_attempts: int
    probe_backoff: float
    # A step that did not move for this long gets its input again; so often before it has failed.
    redrive: float
    redrive_tries: int
    # A provider's batch is looked at after this time, later when a tenth of its age went by, and at
    # the latest after the cap. One that was cancelled may end in so long, then it is given up.
    provider_poll: float
    provider_poll_cap: float
    provider_cancel: float
    # One whose creation nobody confirmed is looked for so long before there is another.
    provider_absent: float
    # How long train batches wait for the student with `start: after_student`.
    student: float = 600

    def check(self) -> None:
        """Refuse a table whose times contradict each other."""
        order = (self.call, self.attempt, self.lease, self.job, self.visibility / 3)
        rising = all(a < b for a, b in pairwise(order))
        if not rising or self.visibility / 3 > self.consumer:
            raise PermanentError(
                "expected call < attempt < lease < job < visibility / 3 <= consumer timeout, "
                f"found {self}",
                reason="settings",
            )
        if not self.beat * 2 < self.lease_ttl < self.lease:
            raise PermanentError(
                f"expected 2 x beat < lease_ttl < lease, found {self}", reason="settings"
            )

    def batch_pause(self, in_a_row: int, asked_for: float = 0.0) -> float:
        """Seconds until a batch, or an endpoint, is tried again that failed so often before; what
        the other side `asked_for` at least."""
        return max(backoff(self.batch_backoff, in_a_row, cap=self.batch_backoff_cap), asked_for)

    @property
    def for_jobs(self) -> jobs.Timeouts:
        return jobs.Timeouts(job=self.job, visibility=self.visibility, consumer=self.consumer)


def backoff(
    first: float,
    in_a_row: int,
    *,
    cap: float = math.inf,
    jitter: float = 0.2,
    rng: random.Random | None = None,
) -> float:
    """A pause that doubles with each failure in a row up to a cap, so that what is down is not
    asked in vain, and differs a little, so that not all ask at once again."""
    pause = min(first * 2.0 ** min(in_a_row, _MOST_DOUBLINGS), cap)
    chance = rng or random
    return pause * chance.uniform(1 - jitter, 1 + jitter)


EMBEDDED = GatewayTimeouts(
    call=60,
    attempt=100,
    lease=110,
    job=120,
    visibility=400,
    consumer=1800,
    lease_ttl=12,
    beat=3,
    tries=3,
    attempts=6,
    try_backoff=0.5,
    batch_backoff=2,
    batch_backoff_cap=60,
    budget_wait=1,
    enqueue_again=20,
    tick=0.5,
    tick_flying=0.1,
    clock_ttl=5,
    probe_attempts=6,
    probe_backoff=1,
    redrive=15,
    redrive_tries=6,
    provider_poll=10,
    provider_poll_cap=120,
    provider_cancel=900,
    provider_absent=60,
)
DEPLOYED = GatewayTimeouts(
    call=600,
    attempt=1200,
    lease=1260,
    job=1320,
    visibility=4500,
    consumer=1800,
    lease_ttl=60,
    beat=10,
    tries=4,
    attempts=16,
    try_backoff=1,
    batch_backoff=10,
    batch_backoff_cap=1800,
    budget_wait=10,
    enqueue_again=120,
    tick=1,
    tick_flying=0.25,
    clock_ttl=15,
    probe_attempts=10,
    probe_backoff=2,
    redrive=300,
    redrive_tries=6,
    provider_poll=60,
    provider_poll_cap=900,
    provider_cancel=900,
    provider_absent=600,
)


def table(profile: Literal["embedded", "deployed"]) -> GatewayTimeouts:
    """Return the checked table of a profile."""
    chosen = EMBEDDED if profile == "embedded" else DEPLOYED
    chosen.check()
    return chosen
