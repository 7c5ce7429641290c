"""The dataset's format: columns and header of a shard, `heldout.json` and `dataset.json`.

A shard is one Parquet file, wholly of one split. `datasets`, DuckDB and polars read it; its
header (JSON under the key `stillhouse` of the file's metadata) says what it was made from.
"""

from __future__ import annotations

from typing import Literal

import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import Field

from stillhouse.contracts.artifacts import Id, ObjectRef, Sha256
from stillhouse.contracts.events import Split
from stillhouse.contracts.responses import Record, Rejection

METADATA_KEY = b"stillhouse"

# input_ids = rendered prompt ids + answer ids (+ the end-of-turn id where the answer stopped).
# Positions prompt_tokens .. len(input_ids) - 1 are supervised: position t is predicted from the
# ids before it. The signal has one entry for each supervised position; its bytes are those of
# `signals.StoredTopK` and null where the row is `text` only. `reasoning` is what the teacher
# thought apart from its answer; nothing is trained on it.
SHARD_SCHEMA = pa.schema(
    [
        ("row_id", pa.string()),
        ("prompt_id", pa.string()),
        ("sample", pa.int32()),
        ("teacher", pa.string()),
        ("messages", pa.string()),
        ("answer", pa.string()),
        ("reasoning", pa.string()),
        ("tools", pa.string()),
        ("finish_reason", pa.string()),
        ("input_ids", pa.list_(pa.int32())),
        ("prompt_tokens", pa.int32()),
        ("supervised_tokens", pa.int32()),
        ("signal", pa.string()),
        ("signal_reason", pa.string()),
        ("signal_slots", pa.int32()),
        ("signal_ids", pa.binary()),
        ("signal_first", pa.binary()),
        ("signal_rest", pa.binary()),
        ("signal_tail", pa.binary()),
        ("row_sha256", pa.string()),
    ]
)


class ShardHeader(Record):
    """What a shard was made from, and what became of every item of its batch."""

    tenant_id: Id
    pipeline_id: Id
    dataset_id: Id
    batch: int
    split: Split
    spec_sha256: Sha256
    responses_sha256: Sha256 | None = Field(description="digest of the responses' manifest")
    teacher: Id
    verdict_id: Id
    tokenizer_sha256: Sha256
    template_sha256: Sha256
    signal: Literal["text", "topk", "counts"]
    slots: int
    support: str = Field(description="which outcomes are kept, in words")
    vocabulary: int
    steps: list[str] = Field(description="names of the builder's steps, in order")
    rows: int
    supervised_tokens: int
    rejections: list[Rejection]
    counts: dict[str, int] = Field(description="rejections by reason")


def read_header(data: bytes) -> ShardHeader:
    """Read the header out of a shard's bytes. Raises ValueError where there is none."""
    try:
        metadata = pq.read_schema(pa.BufferReader(data)).metadata or {}
        return ShardHeader.model_validate_json(metadata[METADATA_KEY])
    except (pa.ArrowException, KeyError, ValueError) as error:
        raise ValueError(
            f"expected a shard with a header, found {len(data)} bytes without: {error}"
        ) from error


class ShardEntry(Record):
    batch: int
    split: Split
    shard: ObjectRef
    rows: int
    supervised_tokens: int
    rejected: int


class Heldout(Record):
    """`heldout.json`: the frozen validation and test rows. Never written again."""

    tenant_id: Id
    pipeline_id: Id
    dataset_id: Id
    shards: list[ShardEntry]
    prompt_sha256: list[str] = Field(description="normalised held-out prompts, sorted")
    answer_sha256: list[str] = Field(description="normalised held-out answers, sorted")


class Dataset(Record):
    """`dataset.json`: all shards in the order of their numbers. Never written again."""

    tenant_id: Id
    pipeline_id: Id
    dataset_id: Id
    spec_sha256: Sha256
    heldout: ObjectRef
    shards: list[ShardEntry]
    rows: dict[Split, int]
    rejections: dict[str, int]
    deleted_rows: list[str] = Field(
        default_factory=list, description="row ids that passes over the sealed set leave out"
    )
