"""What the builder counts. Only the job that wrote a shard counts it, so repeats count nothing."""

from __future__ import annotations

from collections.abc import Sequence

from prometheus_client import Counter, Histogram

from services.dataset_builder import reasons
from services.dataset_builder.records import Draft
from stillhouse.contracts.shards import ShardHeader

ROWS = Counter("stillhouse_dataset_builder_rows_total", "Rows written, by split", ["split"])
TOKENS = Counter(
    "stillhouse_dataset_builder_supervised_tokens_total",
    "Supervised tokens of the rows written, by split",
    ["split"],
)
ANSWERS = Counter(
    "stillhouse_dataset_builder_answers_total",
    "Answers that became rows, by how they ended (stop, length)",
    ["finish_reason"],
)
REJECTIONS = Counter(
    "stillhouse_dataset_builder_rejections_total",
    "Items rejected by the builder's steps, by reason",
    ["reason"],
)
TEXT_ROWS = Counter(
    "stillhouse_dataset_builder_text_rows_total",
    "Rows without the signal that the spec asks for, by reason",
    ["reason"],
)
SHARDS = Counter("stillhouse_dataset_builder_shards_total", "Shards written, by split", ["split"])
SHARD_BYTES = Counter("stillhouse_dataset_builder_shard_bytes_total", "Bytes of shards written")
BUILD_SECONDS = Histogram(
    "stillhouse_dataset_builder_build_seconds",
    "From the start of a job to its shard in the store",
    buckets=(0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300),
)
SHARD_LAG = Histogram(
    "stillhouse_dataset_builder_shard_lag_seconds",
    "From the event that a batch closed to its shard in the store",
    buckets=(0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300, 1800),
)
ATTEMPTS_FAILED = Counter(
    "stillhouse_dataset_builder_attempts_failed_total",
    "Attempts to build a shard that failed, by how (error, died)",
    ["how"],
)
SEALED = Counter(
    "stillhouse_dataset_builder_sealed_total",
    "Manifests sealed, by kind (heldout, dataset)",
    ["kind"],
)


def count_shard(header: ShardHeader, rows: Sequence[Draft], size: int, seconds: float) -> None:
    """Count a shard that this job wrote."""
    ROWS.labels(header.split).inc(len(rows))
    TOKENS.labels(header.split).inc(header.supervised_tokens)
    for row in rows:
        ANSWERS.labels(row.finish_reason).inc()
        if row.signal_reason is not None:
            TEXT_ROWS.labels(row.signal_reason).inc()
    for rejection in header.rejections:
        if rejection.stage == "build":
            assert rejection.reason in reasons.REJECTIONS
            REJECTIONS.labels(rejection.reason).inc()
    SHARDS.labels(header.split).inc()
    SHARD_BYTES.inc(size)
    BUILD_SECONDS.observe(seconds)
