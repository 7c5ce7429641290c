"""How long things may take in the trainer: one table a profile, checked at start-up.

Embedded, everything lies on one machine and people watch: short. Deployed, a store may be far away
and a short lease would be lost for nothing.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from stillhouse.chassis.errors import PermanentError
from stillhouse.chassis.leases import LeaseTimes


@dataclass(frozen=True)
class TrainerTimes:
    """Seconds. `poll`: pause between two pulls of an idle trainer, drawn from this range;
    `wait`: patience for the next shard before the training is saved and released; `segment`:
    training between two looks at queue and stop; `retry`: pause after an error of the world."""

    poll: tuple[float, float]
    wait: float
    segment: float
    retry: float
    lease: LeaseTimes = field(default_factory=LeaseTimes)

    def check(self) -> None:
        lease = self.lease
        if not 0 < 2 * lease.beat < lease.ttl - lease.stop_before < lease.ttl:
            raise PermanentError(
                "expected 2 x beat < ttl - stop_before < ttl, so that one lost heartbeat does not "
                f"lose a lease; found {lease}",
                reason="settings",
            )
        if not 0 < self.segment <= 60:
            raise PermanentError(
                f"expected a segment of at most 60 s, found {self.segment}: a stopped pipeline "
                "would train on",
                reason="settings",
            )


TIMES: dict[str, TrainerTimes] = {
    "embedded": TrainerTimes(
        poll=(0.3, 0.5),
        wait=2,
        segment=20,
        retry=1,
        lease=LeaseTimes(ttl=12, beat=3, stop_before=3, grace=2),
    ),
    "deployed": TrainerTimes(poll=(1, 2), wait=15, segment=60, retry=5),
}
