"""Settings of the trainer: where things are, and what the machine has. How a student learns is no
setting: it stands in the pipeline's spec."""

from __future__ import annotations

from dataclasses import replace
from typing import ClassVar, Literal

from pydantic import Field

from services.trainer.timeouts import TIMES, TrainerTimes
from stillhouse.chassis.leases import LeaseTimes
from stillhouse.chassis.settings import ReferenceSettings


class TrainerSettings(ReferenceSettings):
    """What one trainer process needs."""

    PREFIX: ClassVar[str] = "TRAINER_"

    device: Literal["cpu", "cuda", "auto"] = Field(
        "auto", description="where the student is trained; `auto` takes a GPU that is there"
    )
    dtype: Literal["float32", "bfloat16", "auto"] = Field(
        "auto",
        description="what the layers compute in; weights, optimiser and output layer stay float32. "
        "Stored in the plan of a training; `auto`: bfloat16 on a GPU, and on a CPU where a probe "
        "finds a step clearly faster with it",
    )
    threads: int = Field(1, ge=1, le=1024, description="CPU threads of torch; fixed, for the bits")
    micro_batch_tokens: int | None = Field(
        None,
        ge=1,
        description="tokens that go through the student at once; stored in the plan of a training "
        "before step 0; none: 1024 on a CPU, less where memory is short; on a GPU found by trying",
    )
    segment_seconds: float | None = Field(
        None, gt=0, description="training between two looks at queue and stop; none: the profile's"
    )
    wait_seconds: float | None = Field(
        None, ge=0, description="patience for the next shard; none: the profile's"
    )
    lease_ttl_seconds: float | None = Field(
        None, gt=0, description="time to live of a lease; none: the profile's"
    )
    lease_beat_seconds: float | None = Field(
        None, gt=0, description="pause between heartbeats; none: the profile's"
    )
    lease_stop_before_seconds: float | None = Field(
        None, gt=0, description="a holder stops this long before its lease ends"
    )
    lease_grace_seconds: float | None = Field(
        None, ge=0, description="a lease is taken over this long after its end"
    )
    save_after_seconds: float = Field(
        60, ge=0, description="least age of the last checkpoint before another one for resume"
    )
    save_share: float = Field(
        20, ge=0, description="the same as a multiple of what the last save took"
    )
    progress_seconds: float = Field(5, ge=0, description="pause between `stage.progressed`")

    @property
    def times(self) -> TrainerTimes:
        """The profile's times with what the operator set."""
        table = TIMES[self.profile]
        lease = LeaseTimes(
            ttl=_or(self.lease_ttl_seconds, table.lease.ttl),
            beat=_or(self.lease_beat_seconds, table.lease.beat),
            stop_before=_or(self.lease_stop_before_seconds, table.lease.stop_before),
            grace=_or(self.lease_grace_seconds, table.lease.grace),
        )
        return replace(
            table,
            segment=_or(self.segment_seconds, table.segment),
            wait=_or(self.wait_seconds, table.wait),
            lease=lease,
        )


def _or(value: float | None, default: float) -> float:
    return default if value is None else value
