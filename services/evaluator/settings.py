"""Settings and time-outs of the evaluator."""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field

from stillhouse.chassis.jobs import Timeouts
from stillhouse.chassis.settings import ReferenceSettings


class EvaluatorSettings(ReferenceSettings):
    PREFIX: ClassVar[str] = "EVALUATOR_"

    device: str = Field("cpu", description="torch device of the models: cpu, cuda, cuda:1")
    threads: int = Field(1, ge=1, le=256, description="threads of torch")
    rows_per_part: int = Field(
        16, ge=1, le=1024, description="held-out rows in one job and one part of a report"
    )
    generate_tokens: int = Field(
        64, ge=1, le=8192, description="longest answer that is sampled; the spec may say less"
    )
    stop_rate_prompts: int = Field(
        8, ge=0, le=4096, description="test prompts answered to see whether answers end"
    )
    generate_batch: int = Field(32, ge=1, le=1024, description="answers sampled at once")
    chunk_positions: int = Field(
        64, ge=1, le=8192, description="positions whose full vocabulary is held at once"
    )
    reference_cache_mib: int = Field(
        256, ge=0, description="memory for the reference's hidden states between jobs"
    )
    metrics_pipelines: int = Field(
        200, ge=0, le=10_000, description="most pipelines whose figures are exported"
    )
    metrics_refresh_seconds: float = Field(
        15, ge=1, description="least time between two looks for new reports"
    )


# A job is one part (16 rows) or the writing of one student folder.
TIMEOUTS = {
    "embedded": Timeouts(job=180, visibility=600),
    "deployed": Timeouts(job=1500, visibility=5000),
}
