"""Closed batches of real-looking answers in code, for whoever reads what the gateway writes.

    items = make_items(resolved, batch=2, count=8)
    body = make_body(items[0].messages)                   # what an honest teacher sends
    stored = close_batch(store, resolved, 2, items)       # prompts, parts, manifest; the event
    completed = close_responses(store, resolved)          # responses.json; the event

The answers are those of the billing teacher's `Language`, so they depend on the arguments alone.
"""

from __future__ import annotations

import gzip
import io
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from stillhouse.chassis.storage import ObjectStore
from stillhouse.contracts import artifacts
from stillhouse.contracts.canonical import canonical_json, sha256_hex
from stillhouse.contracts.chat import ChatTokenizer, Message
from stillhouse.contracts.envelope import Envelope, seal
from stillhouse.contracts.events import ResponseBatchStored, ResponsesCompleted
from stillhouse.contracts.responses import (
    PROMPT_SCHEMA,
    Answer,
    Item,
    Rejection,
    ResponsesClosed,
    ResponsesManifest,
    item_id,
    prompt_id,
)
from stillhouse.contracts.spec import ResolvedSpec, normalised_text
from tests.support.teacher import Language
from tests.support.tiny_tokenizer import tiny_chat_tokenizer


def make_item(resolved: ResolvedSpec, text: str, sample: int = 0) -> Item:
    sha256 = sha256_hex(normalised_text(text).encode())
    prompt = prompt_id(resolved.pipeline_id, sha256)
    return Item(
        item_id=item_id(prompt, sample),
        prompt_id=prompt,
        sample=sample,
        messages=[Message(role="user", content=text)],
        prompt_sha256=sha256,
    )


def make_items(resolved: ResolvedSpec, batch: int, count: int = 4) -> list[Item]:
    return [make_item(resolved, f"[{batch}/{n}] Say something short.") for n in range(count)]


def make_body(
    messages: Sequence[Message],
    *,
    k: int = 8,
    max_tokens: int = 24,
    chat: ChatTokenizer | None = None,
    change: Callable[[dict[str, Any]], object] = lambda body: None,
) -> str:
    """The JSON of an honest answer; `change` may edit it before it is written."""
    spoken = Language(chat or tiny_chat_tokenizer()).answer(
        messages, max_tokens=max_tokens, top_logprobs=k
    )
    body: dict[str, Any] = {
        "object": "chat.completion",
        "choices": [
            {
                "index": 0,
                "message": {"role": "assistant", "content": spoken.text},
                "finish_reason": spoken.finish_reason,
                "logprobs": {"content": spoken.positions},
            }
        ],
        "usage": {
            "prompt_tokens": spoken.prompt_tokens,
            "completion_tokens": spoken.completion_tokens,
        },
    }
    change(body)
    return json.dumps(body)


def make_answer(item: Item, body: str) -> Answer:
    return Answer(
        item_id=item.item_id,
        body=body,
        prompt_tokens=1,
        completion_tokens=1,
        cost_microusd=1,
        received_at="2000-01-01T00:00:00Z",
    )


def close_batch(
    store: ObjectStore,
    resolved: ResolvedSpec,
    batch: int,
    items: Sequence[Item] | None = None,
    *,
    bodies: Mapping[str, str] | None = None,
    rejections: Sequence[Rejection] = (),
    attempt: int = 1,
) -> Envelope:
    """Write a batch as the gateway does and return `response_batch.stored`.

    Items get honest answers unless `bodies` (by item id) says otherwise or they are rejected.
    """
    items = make_items(resolved, batch) if items is None else items
    rejected = {rejection.item_id for rejection in rejections}
    bodies = {i.item_id: make_body(i.messages) for i in items} | dict(bodies or {})
    answers = [make_answer(i, bodies[i.item_id]) for i in items if i.item_id not in rejected]
    tenant, pipeline = resolved.tenant_id, resolved.pipeline_id
    prompts = store.put_new(artifacts.prompts_key(tenant, pipeline, batch), prompts_bytes(items))
    # Two parts, as after a crash.
    halves = [answers[: len(answers) // 2], answers[len(answers) // 2 :]]
    parts = [
        store.put_new(
            artifacts.part_key(tenant, pipeline, batch, attempt, number), part_bytes(half)
        )
        for number, half in enumerate(halves, 1)
    ]
    manifest = ResponsesManifest(
        tenant_id=tenant,
        pipeline_id=pipeline,
        batch=batch,
        split=resolved.batches.split_of(batch),
        attempt=attempt,
        teacher=resolved.batch_teachers[batch],
        verdict_id=resolved.verdicts[0].id,
        prompts=prompts,
        parts=parts,
        answers=len(answers),
        rejections=list(rejections),
    )
    key = artifacts.responses_manifest_key(tenant, pipeline, batch, attempt)
    event = ResponseBatchStored(
        batch=batch,
        manifest=store.put_new_model(key, manifest),
        answers=len(answers),
        rejected=len(rejections),
    )
    return seal(event, tenant_id=tenant, pipeline_id=pipeline)


def close_responses(
    store: ObjectStore, resolved: ResolvedSpec, batches: int | None = None
) -> Envelope:
    """Write responses.json and return `responses.completed`."""
    closed = ResponsesClosed(
        tenant_id=resolved.tenant_id,
        pipeline_id=resolved.pipeline_id,
        batches=batches or resolved.batches.total,
        answers=0,
        rejected=0,
        completed_at="2000-01-01T00:00:00Z",
    )
    key = artifacts.responses_key(resolved.tenant_id, resolved.pipeline_id)
    ref = store.put_new_model(key, closed)
    event = ResponsesCompleted(responses=ref, batches=closed.batches)
    return seal(event, tenant_id=resolved.tenant_id, pipeline_id=resolved.pipeline_id)


def prompts_bytes(items: Sequence[Item], tokens: Callable[[Item], int] | None = None) -> bytes:
    """`prompts/batch-N.parquet`; without `tokens` each prompt has none, which no builder minds."""
    entries = [
        {
            "prompt_tokens": tokens(item) if tokens else 0,
            **item.model_dump(exclude={"messages", "tools"}),
            "messages": canonical_json([m.as_sent() for m in item.messages]).decode(),
            "tools": item.tools and canonical_json(item.tools).decode(),
        }
        for item in items
    ]
    sink = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(entries, schema=PROMPT_SCHEMA), sink)
    return sink.getvalue()


def part_bytes(answers: Sequence[Answer]) -> bytes:
    lines = [canonical_json(answer.model_dump(mode="json")) + b"\n" for answer in answers]
    return gzip.compress(b"".join(lines), mtime=0)
