"""One read-only checker of what must hold after any fault: it reads data, never counters.

Items come from the prompts in the store, rows from the shards object by object, money from the
teacher's own invoices.
"""

from __future__ import annotations

import gzip
import json
from collections import Counter
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from stillhouse.chassis.storage import ObjectStore
from stillhouse.contracts import artifacts
from stillhouse.contracts.canonical import digest_of, sha256_hex
from stillhouse.contracts.responses import Answer, ResponsesManifest
from stillhouse.contracts.shards import METADATA_KEY, Dataset, ShardHeader
from stillhouse.contracts.spec import ResolvedSpec
from stillhouse.contracts.trainings import CheckpointManifest, Cursor, TrainingState
from tests.support.teacher import Invoice

SETTLED = ("answers", "probe")


@dataclass(frozen=True)
class Left:
    """What a pipeline left in the store."""

    resolved: ResolvedSpec
    dataset: Dataset
    items: list[str]
    rows: list[dict[str, Any]]
    rejected: list[str]
    manifests: list[ResponsesManifest]
    answers: list[Answer]


def read_all(store: ObjectStore, tenant: str, pipeline: str, events: list[dict[str, Any]]) -> Left:
    """Read spec, prompts, answers and shards as the manifests name them."""
    found = store.find_model(artifacts.spec_key(tenant, pipeline), ResolvedSpec)
    assert found is not None
    resolved = found[0]
    sealed = store.find_model(artifacts.dataset_key(tenant, resolved.dataset_id), Dataset)
    assert sealed is not None, "the dataset is not sealed"
    items, manifests, answers = [], [], []
    for batch in range(resolved.batches.total):
        prompts = store.read(artifacts.prompts_key(tenant, pipeline, batch))
        assert prompts is not None
        items += pq.read_table(pa.BufferReader(prompts.data)).column("item_id").to_pylist()
    for event in events:
        if event["type"] != "response_batch.stored":
            continue
        ref = artifacts.ObjectRef.model_validate(event["payload"]["manifest"])
        manifest = store.get_model(ref, ResponsesManifest)
        manifests.append(manifest)
        for part in manifest.parts:
            lines = gzip.decompress(store.get(part)).splitlines()
            answers += [Answer.model_validate_json(line) for line in lines]
    rows, rejected = [], []
    for entry in sealed[0].shards:
        table = pq.read_table(pa.BufferReader(store.get(entry.shard)))
        rows += table.to_pylist()
        header = ShardHeader.model_validate_json(table.schema.metadata[METADATA_KEY])
        rejected += [rejection.item_id for rejection in header.rejections]
    return Left(resolved, sealed[0], items, rows, rejected, manifests, answers)


def check_items(left: Left) -> None:
    """Each item is one row or one recorded rejection, none twice."""
    ends = Counter([row["row_id"] for row in left.rows]) + Counter(left.rejected)
    assert set(ends) == set(left.items), "an item has neither row nor rejection, or is unknown"
    twice = {item: count for item, count in ends.items() if count != 1}
    assert not twice, f"items that ended more than once: {twice}"
    batches = [manifest.batch for manifest in left.manifests]
    assert sorted(batches) == list(range(left.resolved.batches.total))


def check_content(left: Left, invoices: list[Invoice]) -> None:
    """Each row's text is what the teacher logged for the very call that was stored."""
    by_request = {invoice.request_id: invoice for invoice in invoices}
    stored = {answer.item_id: json.loads(answer.body) for answer in left.answers}
    for row in left.rows:
        invoice = by_request[stored[row["row_id"]]["id"]]
        assert invoice.answer_sha256 == sha256_hex(row["answer"].encode())


def check_money(left: Left, charges: dict[str, Any], invoices: list[Invoice]) -> None:
    """Settled equals the invoice for stored answers; what is listed covers the rest."""
    by_request = {invoice.request_id: invoice for invoice in invoices}
    ids = [json.loads(answer.body)["id"] for answer in left.answers]
    assert len(ids) == len(set(ids)), "one answer is stored twice"
    assert len({answer.item_id for answer in left.answers}) == len(ids), "an item was paid twice"
    # What the cache gave was paid for by another pipeline.
    paid = [(a, by_request[i]) for a, i in zip(left.answers, ids, strict=True) if not a.cached]
    for answer, invoice in paid:
        assert answer.cost_microusd == invoice.microusd, answer.item_id
    assert {answer.cost_microusd for answer in left.answers if answer.cached} <= {0}
    for_stored = sum(invoice.microusd for _, invoice in paid)
    totals = charges["totals_microusd"]
    assert totals["answers"] == for_stored
    assert sum(totals.values()) >= sum(invoice.microusd for invoice in invoices)
    cost = charges["cost"]
    assert cost["reserved_microusd"] == 0
    assert cost["spent_microusd"] == sum(totals.values()) <= cost["budget_microusd"]


def check_training(store: ObjectStore, left: Left) -> CheckpointManifest:
    """The ledger is an exact partition of the train rows in each pass; return the last manifest."""
    resolved = left.resolved
    key = artifacts.training_state_key(resolved.tenant_id, resolved.training_id)
    state = store.find_model(key, TrainingState)
    assert state is not None
    assert state[0].done
    last = state[0].published[-1]
    manifest = store.get_model(last.manifest, CheckpointManifest)
    for ref in manifest.files.values():
        store.get(ref)  # checks its digest
    cursor = store.get_model(manifest.files["cursor.json"], Cursor)
    assert [entry.step for entry in cursor.ledger] == list(range(1, manifest.step + 1))
    train = {entry.batch for entry in left.dataset.shards if entry.split == "train"}
    tokens = {row["row_id"]: row["supervised_tokens"] for row in left.rows}
    streamed = [entry for entry in cursor.ledger if entry.kind == "stream"]
    rows = sum(e.rows for e in left.dataset.shards if e.batch in train)
    assert sum(entry.rows for entry in streamed) == rows
    assert sum(entry.tokens for entry in streamed) == sum(
        e.supervised_tokens for e in left.dataset.shards if e.batch in train
    )
    assert sum(entry.tokens for entry in cursor.ledger) == manifest.tokens
    assert len(tokens) == len(left.rows)
    steps = [published.step for published in state[0].published]
    assert steps == sorted(set(steps))
    return manifest


def ledger_digest(store: ObjectStore, manifest: CheckpointManifest) -> str:
    """What two trainings over the same rows in the same steps have in common."""
    cursor = store.get_model(manifest.files["cursor.json"], Cursor)
    return digest_of([entry.model_dump(mode="json") for entry in cursor.ledger])
