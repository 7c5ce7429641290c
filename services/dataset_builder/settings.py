"""What the builder's worker is told by its environment; documented in docs/operations.md."""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field

from stillhouse.chassis.jobs import Timeouts
from stillhouse.chassis.settings import ServiceSettings

# A batch whose worker died is built again when its job's time is over, so embedded is short. A row
# of 512 tokens takes about 60 ms at k = 20, so the largest batch that a spec may ask for
# (spec.MAX_BATCH_TOKENS) about 24 s.
TIMEOUTS: dict[str, Timeouts] = {
    "embedded": Timeouts(job=40, visibility=130),
    "deployed": Timeouts(job=300, visibility=1000),
}


class DatasetBuilderSettings(ServiceSettings):
    PREFIX: ClassVar[str] = "DATASET_BUILDER_"

    worker_processes: int = Field(1, ge=1, le=64, description="jobs at once in one worker")

    @property
    def timeouts(self) -> Timeouts:
        return TIMEOUTS[self.profile]
