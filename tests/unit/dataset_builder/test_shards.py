"""The file: its header, its bytes, and the readers of others."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from services.dataset_builder import reasons, shards
from services.dataset_builder.pipeline import rejection, run_steps
from stillhouse.chassis.errors import PermanentError
from stillhouse.contracts import signals
from stillhouse.contracts.artifacts import ObjectRef
from stillhouse.contracts.responses import ResponsesManifest
from stillhouse.contracts.shards import METADATA_KEY, SHARD_SCHEMA, ShardHeader
from stillhouse.contracts.signals import StoredTopK
from tests.support.answers import make_answer, make_body, make_items
from tests.support.shards import make_resolved_spec
from tests.support.steps import make_recipe

# Digests that change with every new field of the spec are no business of the golden header.
FIXED = {
    "dataset_id": "ds-golden",
    "spec_sha256": "1" * 64,
    "tokenizer_sha256": "2" * 64,
    "template_sha256": "3" * 64,
}
RESOLVED = make_resolved_spec().model_copy(update=FIXED)
REF = ObjectRef(key="manifest.json", size=3, sha256="a" * 64)
GOLDEN = Path(__file__).parent / "data" / "shard_header.json"


def build() -> tuple[ShardHeader, list[Any], bytes]:
    """A shard of four items: three rows, one of them text only, and a rejection."""
    items, recipe = make_items(RESOLVED, 2), make_recipe()
    answers = {i.item_id: make_answer(i, make_body(i.messages)) for i in items}
    answers[items[1].item_id] = make_answer(items[1], "{}")

    def bare(body: dict[str, Any]) -> None:
        del body["choices"][0]["logprobs"]

    answers[items[2].item_id] = make_answer(items[2], make_body(items[2].messages, change=bare))
    rows, rejections = run_steps(items, answers, [], recipe)
    manifest = ResponsesManifest(
        tenant_id=RESOLVED.tenant_id,
        pipeline_id=RESOLVED.pipeline_id,
        batch=2,
        split="train",
        attempt=1,
        teacher="billing",
        verdict_id="ve-test",
        prompts=REF,
        parts=[],
        answers=4,
        rejections=[],
    )
    header = shards.make_header(RESOLVED, manifest, REF, recipe.vocabulary, rows, rejections)
    return header, rows, shards.encode_shard(header, rows)


HEADER, ROWS, DATA = build()
TABLE = pq.read_table(pa.BufferReader(DATA))


def test_the_header_is_the_golden_one() -> None:
    # Readers of years hence find this: change it only by adding fields.
    assert json.loads(HEADER.model_dump_json()) == json.loads(GOLDEN.read_text())


def test_the_header_comes_back_from_the_file() -> None:
    assert shards.read_header(DATA) == HEADER
    assert METADATA_KEY in pq.read_schema(pa.BufferReader(DATA)).metadata


def test_the_file_has_the_columns_of_the_contract() -> None:
    assert TABLE.schema.remove_metadata() == SHARD_SCHEMA
    assert TABLE.num_rows == HEADER.rows == 3


def test_the_same_inputs_give_the_same_bytes() -> None:
    assert build()[2] == DATA


def test_other_rows_give_other_bytes() -> None:
    assert shards.encode_shard(HEADER, ROWS[:2]) != DATA


def test_supervised_positions_are_those_behind_the_prompt() -> None:
    for row in TABLE.to_pylist():
        assert len(row["input_ids"]) == row["prompt_tokens"] + row["supervised_tokens"]
    assert HEADER.supervised_tokens == sum(TABLE.column("supervised_tokens").to_pylist())


def test_a_stored_signal_comes_back_from_its_columns() -> None:
    for row, draft in zip(TABLE.to_pylist(), ROWS, strict=True):
        arrays = [row[f"signal_{name}"] for name in ("ids", "first", "rest", "tail")]
        if row["signal"] == "text":
            assert (arrays, row["signal_slots"]) == ([None] * 4, 0)
            assert row["signal_reason"] == reasons.NO_LOGPROBS
        else:
            stored = StoredTopK(row["signal_slots"], *arrays)
            assert stored == draft.stored
            assert signals.decode(stored).positions == row["supervised_tokens"]


def test_a_row_digest_covers_ids_text_and_signal() -> None:
    digests = TABLE.column("row_sha256").to_pylist()
    assert len(set(digests)) == 3
    signal = signals.decode(ROWS[0].stored)
    louder = signals.encode(
        signals.TopK(signal.ids, np.where(signal.logp < -3, -15.0, signal.logp), signal.tail)
    )
    changed = replace(ROWS[0], stored=louder)
    again = pq.read_table(pa.BufferReader(shards.encode_shard(HEADER, [changed])))
    assert again.column("row_sha256").to_pylist()[0] != digests[0]


def test_a_shard_without_rows_is_a_readable_file() -> None:
    items = make_items(RESOLVED, 2)
    lost = [rejection(item.item_id, reasons.BUILD_FAILED) for item in items]
    empty = HEADER.model_copy(update={"rows": 0, "rejections": lost})
    data = shards.encode_shard(empty, [])
    assert pq.read_table(pa.BufferReader(data)).num_rows == 0
    assert len(shards.read_header(data).rejections) == 4


@pytest.mark.parametrize("data", [b"", b"PAR1", DATA[:-10], DATA[: len(DATA) // 2]])
def test_a_damaged_file_is_refused_with_its_size(data: bytes) -> None:
    with pytest.raises(PermanentError, match=f"found {len(data)} bytes"):
        shards.read_header(data)


def test_a_parquet_file_of_others_is_refused() -> None:
    sink = pa.BufferOutputStream()
    pq.write_table(pa.table({"a": [1]}), sink)
    with pytest.raises(PermanentError, match="expected a shard with a header"):
        shards.read_header(bytes(sink.getvalue()))


def test_datasets_duckdb_and_polars_read_the_same_rows(tmp_path: Path) -> None:
    import datasets
    import duckdb
    import polars

    path = tmp_path / "shard-000002.parquet"
    path.write_bytes(DATA)
    ours = TABLE.to_pylist()
    theirs = datasets.Dataset.from_parquet(
        str(path), cache_dir=str(tmp_path / "cache"), keep_in_memory=True
    )
    assert theirs.to_list() == ours
    assert polars.read_parquet(path).to_dicts() == ours
    with duckdb.connect() as connection:
        found = connection.execute("SELECT * FROM read_parquet(?)", [str(path)])
        names = [column[0] for column in found.description or []]
        assert [dict(zip(names, row, strict=True)) for row in found.fetchall()] == ours
        (said,) = connection.execute(
            "SELECT decode(value) FROM parquet_kv_metadata(?) WHERE decode(key) = 'stillhouse'",
            [str(path)],
        ).fetchone() or ("",)
    assert ShardHeader.model_validate_json(said) == HEADER
