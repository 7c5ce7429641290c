"""Rows and header to the bytes of a Parquet file, and back to its header.

The bytes depend on rows, header and the version of pyarrow alone: building a batch again gives
the same object, so a writer that comes second finds its own bytes in the store.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from services.dataset_builder.pipeline import STEP_NAMES
from services.dataset_builder.records import Draft
from services.dataset_builder.signals import slots, support
from services.dataset_builder.vocabulary import Vocabulary
from stillhouse.chassis.errors import PermanentError
from stillhouse.contracts import shards as contract
from stillhouse.contracts.artifacts import ObjectRef
from stillhouse.contracts.canonical import canonical_json, digest_of, sha256_hex
from stillhouse.contracts.events import ShardWritten
from stillhouse.contracts.responses import Rejection, ResponsesManifest
from stillhouse.contracts.shards import METADATA_KEY, SHARD_SCHEMA, ShardEntry, ShardHeader
from stillhouse.contracts.spec import ResolvedSpec

# Columns of few values; ids and signals differ in every row, and a dictionary would only add to
# them.
_DICTIONARY = ["teacher", "finish_reason", "signal", "signal_reason"]


def make_header(
    spec: ResolvedSpec,
    manifest: ResponsesManifest,
    responses: ObjectRef,
    vocabulary: Vocabulary,
    rows: Sequence[Draft],
    rejections: list[Rejection],
) -> ShardHeader:
    signal = spec.signal_of(manifest.batch)
    assert signal.kind != "auto", "acceptance settled what each teacher gives"
    return ShardHeader(
        tenant_id=spec.tenant_id,
        pipeline_id=spec.pipeline_id,
        dataset_id=spec.dataset_id,
        batch=manifest.batch,
        split=spec.batches.split_of(manifest.batch),
        spec_sha256=spec.spec_sha256,
        responses_sha256=responses.sha256,
        teacher=manifest.teacher,
        verdict_id=manifest.verdict_id,
        tokenizer_sha256=spec.tokenizer_sha256,
        template_sha256=spec.template_sha256,
        signal=signal.kind,
        slots=slots(signal),
        support=support(signal),
        vocabulary=vocabulary.size,
        steps=STEP_NAMES,
        rows=len(rows),
        supervised_tokens=sum(len(row.answer_ids) for row in rows),
        rejections=rejections,
        counts=dict(sorted(Counter(rejection.reason for rejection in rejections).items())),
    )


def encode_shard(header: ShardHeader, rows: Sequence[Draft]) -> bytes:
    """Write rows and header as one Parquet file (zstd); an empty shard is a file without rows."""
    schema = SHARD_SCHEMA.with_metadata(
        {METADATA_KEY: canonical_json(header.model_dump(mode="json"))}
    )
    table = pa.Table.from_pylist([_row(header.teacher, row) for row in rows], schema=schema)
    sink = pa.BufferOutputStream()
    pq.write_table(
        table,
        sink,
        compression="zstd",
        use_dictionary=_DICTIONARY,
        write_statistics=False,
        store_schema=True,
    )
    return bytes(sink.getvalue())


def read_header(data: bytes) -> ShardHeader:
    """Read the header out of a shard's bytes. Raises PermanentError where there is none."""
    try:
        return contract.read_header(data)
    except ValueError as error:
        raise PermanentError(str(error), reason="shard_unreadable") from error


def read_column(data: bytes, name: str) -> list[Any]:
    return list(pq.read_table(pa.BufferReader(data), columns=[name]).column(name).to_pylist())


def shard_event(header: ShardHeader, ref: ObjectRef) -> ShardWritten:
    """The event of a shard: the same one each time that it is published."""
    return ShardWritten(
        dataset_id=header.dataset_id,
        batch=header.batch,
        split=header.split,
        shard=ref,
        rows=header.rows,
        rejected=len(header.rejections),
        supervised_tokens=header.supervised_tokens,
    )


def shard_entry(header: ShardHeader, ref: ObjectRef) -> ShardEntry:
    return ShardEntry(
        batch=header.batch,
        split=header.split,
        shard=ref,
        rows=header.rows,
        supervised_tokens=header.supervised_tokens,
        rejected=len(header.rejections),
    )


def _row(teacher: str, draft: Draft) -> dict[str, Any]:
    stored = None if draft.signal == "text" else draft.stored
    arrays = {
        "signal_ids": stored.ids if stored else None,
        "signal_first": stored.first if stored else None,
        "signal_rest": stored.rest if stored else None,
        "signal_tail": stored.tail if stored else None,
    }
    row: dict[str, Any] = {
        "row_id": draft.item.item_id,
        "prompt_id": draft.item.prompt_id,
        "sample": draft.item.sample,
        "teacher": teacher,
        "messages": canonical_json([m.as_sent() for m in draft.item.messages]).decode(),
        "answer": draft.text,
        "reasoning": draft.reasoning or None,
        "tools": canonical_json(draft.item.tools).decode() if draft.item.tools else None,
        "finish_reason": draft.finish_reason,
        "input_ids": draft.input_ids,
        "prompt_tokens": len(draft.prompt_ids),
        "supervised_tokens": len(draft.answer_ids),
        "signal": draft.signal,
        "signal_reason": draft.signal_reason,
        "signal_slots": stored.slots if stored else 0,
    }
    digests = {name: None if v is None else sha256_hex(v) for name, v in arrays.items()}
    digest = digest_of({**row, **digests})
    return {**row, **arrays, "row_sha256": digest}
