"""Valid specs, shards and students in code, for whoever reads what the builder writes.

    resolved = make_resolved_spec(student="file:/tmp/student", train=3)
    store_spec(store, resolved)                      # spec.json and tokenizer.json
    entry = make_shard(store, resolved, batch=2, rows=make_rows(resolved, 2, 8))
    heldout = make_heldout(store, resolved)          # shards of all held-out batches, frozen
    dataset = make_dataset(store, resolved, entries) # dataset.json over all train entries
    tiny_student(tmp_path / "student")               # a from_pretrained folder

Everything depends on its arguments alone, so two calls write the same bytes. The rows follow
`Language`, the Markov chain that the billing teacher speaks, so a tiny student can learn them.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from stillhouse.chassis.storage import ObjectStore
from stillhouse.contracts import artifacts, signals
from stillhouse.contracts.canonical import canonical_json, digest_of, sha256_hex
from stillhouse.contracts.chat import ChatTokenizer, Message
from stillhouse.contracts.envelope import Envelope, seal
from stillhouse.contracts.events import (
    DatasetSealed,
    HeldoutSealed,
    PipelineAccepted,
    ShardWritten,
)
from stillhouse.contracts.responses import PROMPT_SCHEMA, Stopped, item_id, prompt_id
from stillhouse.contracts.shards import (
    METADATA_KEY,
    SHARD_SCHEMA,
    Dataset,
    Heldout,
    ShardEntry,
    ShardHeader,
)
from stillhouse.contracts.spec import (
    Batches,
    ResolvedSpec,
    Spec,
    Verdict,
    normalised_text,
    spec_digest,
)
from stillhouse.embedded.parts import Store
from tests.support.teacher import Language
from tests.support.tiny_tokenizer import VOCABULARY, tiny_chat_tokenizer, write_folder

NOBODY = "0" * 64


def store_of(store: Store, **options: Any) -> ObjectStore:
    """The chassis's store over an embedded part."""
    return ObjectStore(
        bucket=store.bucket,
        endpoint_url=store.endpoint_url,
        access_key=store.access_key,
        secret_key=store.secret_key,
        **options,
    )


def make_resolved_spec(
    *,
    student: str = "file:/students/tiny",
    layers: int | None = None,
    tenant: str = "default",
    pipeline: str = "pl-test",
    validation: int = 1,
    test: int = 1,
    train: int = 3,
    k: int = 8,
    every_steps: int = 4,
    training: dict[str, Any] | None = None,
    chat: ChatTokenizer | None = None,
    reference: str | None = None,
    **fields: Any,
) -> ResolvedSpec:
    """A resolved spec of one teacher. `layers` prunes the student from the weights `student`;
    `training` and `fields` are merged into the posted spec."""
    chat = chat or tiny_chat_tokenizer()
    weights: dict[str, Any] = (
        {"from": student} if layers is None else {"of": student, "layers": layers}
    )
    posted = {
        "version": 1,
        "name": "tiny",
        "teachers": [
            {
                "name": "billing",
                "url": "http://127.0.0.1:9/v1",
                "model": "billing-teacher",
                "terms": "own-weights",
                "usd_per_million": {"input": 1, "output": 2},
                "reference": reference,
            }
        ],
        "prompts": {"from": "file:/prompts.jsonl", "heldout": 0.2, "batch": 8},
        "signal": {"kind": "topk", "k": k, "max_tokens": 64},
        "student": {**weights, "terms": "own-weights"},
        "training": {
            "loss": "forward_kl",
            "learning_rate": 1e-2,
            "warmup_steps": 2,
            "tokens_per_step": 60,
            "decay": 0.25,
            "seed": 7,
            **(training or {}),
        },
        "budget": {"teacher_usd": 1},
        "evaluation": {"every_steps": every_steps, "controls": ["untrained"], "samples": 2},
        **fields,
    }
    spec = Spec.model_validate(posted)
    digest = spec_digest(spec)
    dataset = artifacts.dataset_id(pipeline, digest)
    main = artifacts.training_id(dataset, digest)
    tokenizer = canonical_json(chat.model_dump(mode="json"))
    verdict = Verdict(
        id="ve-test",
        subject="teacher:billing",
        terms="own-weights",
        outcome="allow",
        reason="our own",
        source="tests",
        catalogue_sha256=NOBODY,
    )
    batches = Batches(validation=validation, test=test, train=train)
    return ResolvedSpec(
        tenant_id=tenant,
        pipeline_id=pipeline,
        spec=spec,
        spec_sha256=digest,
        dataset_id=dataset,
        training_id=main,
        student_id=artifacts.student_id(main),
        tokenizer=artifacts.ObjectRef(
            key=artifacts.tokenizer_key(tenant, pipeline),
            size=len(tokenizer),
            sha256=sha256_hex(tokenizer),
        ),
        tokenizer_sha256=chat.tokenizer_sha256,
        template_sha256=chat.template_sha256,
        signals={teacher.name: spec.signal for teacher in spec.teachers},
        batch_teachers=[spec.teachers[0].name] * batches.total,
        reference=reference,
        verdicts=[verdict],
        batches=batches,
        items=8 * batches.total,
        rejected=0,
    )


def store_spec(
    store: ObjectStore, resolved: ResolvedSpec, chat: ChatTokenizer | None = None
) -> Envelope:
    """Write spec.json and the tokenizer; return the event `pipeline.accepted`."""
    chat = chat or tiny_chat_tokenizer()
    store.put_new_model(resolved.tokenizer.key, chat)
    key = artifacts.spec_key(resolved.tenant_id, resolved.pipeline_id)
    ref = store.put_new_model(key, resolved)
    event = PipelineAccepted(
        spec=ref, dataset_id=resolved.dataset_id, training_id=resolved.training_id
    )
    return seal(event, tenant_id=resolved.tenant_id, pipeline_id=resolved.pipeline_id)


def prompt_text(batch: int, number: int) -> str:
    return f"[{batch}/{number}] Say something short."


def store_prompts(store: ObjectStore, resolved: ResolvedSpec, batch: int, count: int = 8) -> None:
    """Write prompts/batch-N.parquet with the prompts that `make_rows` answers."""
    entries = []
    for number in range(count):
        message, sha256, prompt = _prompt(resolved, batch, number)
        entries.append(
            {
                "item_id": item_id(prompt, 0),
                "prompt_id": prompt,
                "sample": 0,
                "messages": canonical_json([message.as_sent()]).decode(),
                "tools": None,
                "answer": None,
                "prompt_sha256": sha256,
                "prompt_tokens": len(message.content or ""),
            }
        )
    data = _parquet(pa.Table.from_pylist(entries, schema=PROMPT_SCHEMA))
    store.put_new(artifacts.prompts_key(resolved.tenant_id, resolved.pipeline_id, batch), data)


def _prompt(resolved: ResolvedSpec, batch: int, number: int) -> tuple[Message, str, str]:
    message = Message(role="user", content=prompt_text(batch, number))
    sha256 = sha256_hex(normalised_text(message.text).encode())
    return message, sha256, prompt_id(resolved.pipeline_id, sha256)


def make_rows(
    resolved: ResolvedSpec,
    batch: int,
    count: int = 8,
    *,
    max_tokens: int = 24,
    text_only: Sequence[int] = (),
    chat: ChatTokenizer | None = None,
) -> list[dict[str, Any]]:
    """Rows as the builder makes them, one a prompt; rows numbered in `text_only` have no signal."""
    chat = chat or tiny_chat_tokenizer()
    language, k = Language(chat), resolved.spec.signal.k
    rows = []
    for number in range(count):
        message, _, prompt = _prompt(resolved, batch, number)
        spoken = language.answer([message], max_tokens=max_tokens, top_logprobs=k, seed=batch)
        prompt_ids = chat.encode_prompt([message])
        stopped = spoken.finish_reason == "stop"
        row: dict[str, Any] = {
            "row_id": item_id(prompt, 0),
            "prompt_id": prompt,
            "sample": 0,
            "teacher": resolved.batch_teachers[batch],
            "messages": canonical_json([message.as_sent()]).decode(),
            "answer": chat.decode(spoken.ids[:-1] if stopped else spoken.ids),
            "finish_reason": spoken.finish_reason,
            "input_ids": [*prompt_ids, *spoken.ids],
            "prompt_tokens": len(prompt_ids),
            "supervised_tokens": len(spoken.ids),
            "signal": "topk",
        }
        if number in text_only:
            row |= {"signal": "text", "signal_reason": "unmapped_token"}
        else:
            outcomes = [
                {o["id"]: o["logprob"] for o in (*position["top_logprobs"], position)}
                for position in spoken.positions
            ]
            row |= _signal_columns(signals.encode(signals.from_outcomes(outcomes, k + 1)))
        rows.append(row | {"row_sha256": digest_of([row["row_id"], row["input_ids"]])})
    return rows


def _signal_columns(stored: signals.StoredTopK) -> dict[str, Any]:
    return {
        "signal_slots": stored.slots,
        "signal_ids": stored.ids,
        "signal_first": stored.first,
        "signal_rest": stored.rest,
        "signal_tail": stored.tail,
    }


def stored_signal(row: dict[str, Any]) -> signals.StoredTopK:
    """The stored signal of a row of a shard."""
    return signals.StoredTopK(
        slots=row["signal_slots"],
        ids=row["signal_ids"],
        first=row["signal_first"],
        rest=row["signal_rest"],
        tail=row["signal_tail"],
    )


def shard_bytes(
    resolved: ResolvedSpec, batch: int, rows: Sequence[dict[str, Any]], **header: Any
) -> bytes:
    """The bytes of a shard; `header` replaces fields of its header."""
    said = ShardHeader(
        **{
            "tenant_id": resolved.tenant_id,
            "pipeline_id": resolved.pipeline_id,
            "dataset_id": resolved.dataset_id,
            "batch": batch,
            "split": resolved.batches.split_of(batch),
            "spec_sha256": resolved.spec_sha256,
            "responses_sha256": None,
            "teacher": resolved.batch_teachers[batch],
            "verdict_id": resolved.verdicts[0].id,
            "tokenizer_sha256": resolved.tokenizer_sha256,
            "template_sha256": resolved.template_sha256,
            "signal": "topk",
            "slots": resolved.spec.signal.k + 1,
            "support": "the k likeliest and the sampled token",
            "vocabulary": VOCABULARY,
            "steps": ["validate", "render", "align"],
            "rows": len(rows),
            "supervised_tokens": sum(row["supervised_tokens"] for row in rows),
            "rejections": [],
            "counts": {},
            **header,
        }
    )
    table = pa.Table.from_pylist(list(rows), schema=SHARD_SCHEMA)
    metadata = {METADATA_KEY: canonical_json(said.model_dump(mode="json"))}
    return _parquet(table.replace_schema_metadata(metadata))


def make_shard(
    store: ObjectStore,
    resolved: ResolvedSpec,
    batch: int,
    rows: Sequence[dict[str, Any]] | None = None,
) -> ShardEntry:
    """Write the shard of a batch (eight rows unless given) and return its entry."""
    rows = make_rows(resolved, batch) if rows is None else rows
    key = artifacts.shard_key(resolved.tenant_id, resolved.dataset_id, batch)
    ref = store.put_new(key, shard_bytes(resolved, batch, rows))
    return ShardEntry(
        batch=batch,
        split=resolved.batches.split_of(batch),
        shard=ref,
        rows=len(rows),
        supervised_tokens=sum(row["supervised_tokens"] for row in rows),
        rejected=0,
    )


def make_train_shards(store: ObjectStore, resolved: ResolvedSpec) -> list[ShardEntry]:
    batches = resolved.batches
    return [make_shard(store, resolved, batch) for batch in range(batches.heldout, batches.total)]


def make_heldout(
    store: ObjectStore, resolved: ResolvedSpec, rows: int = 8
) -> tuple[Heldout, artifacts.ObjectRef]:
    """Write the shards of all held-out batches and heldout.json."""
    made = {b: make_rows(resolved, b, rows) for b in range(resolved.batches.heldout)}
    heldout = Heldout(
        tenant_id=resolved.tenant_id,
        pipeline_id=resolved.pipeline_id,
        dataset_id=resolved.dataset_id,
        shards=[make_shard(store, resolved, b, rows) for b, rows in made.items()],
        prompt_sha256=sorted(
            _prompt(resolved, b, number)[1]
            for b, rows in made.items()
            for number in range(len(rows))
        ),
        answer_sha256=sorted(
            sha256_hex(normalised_text(row["answer"]).encode())
            for rows in made.values()
            for row in rows
        ),
    )
    key = artifacts.heldout_key(resolved.tenant_id, resolved.dataset_id)
    return heldout, store.put_new_model(key, heldout)


def make_dataset(
    store: ObjectStore,
    resolved: ResolvedSpec,
    train: Sequence[ShardEntry],
    *,
    heldout: tuple[Heldout, artifacts.ObjectRef] | None = None,
    deleted_rows: Sequence[str] = (),
) -> tuple[Dataset, artifacts.ObjectRef]:
    """Write dataset.json over train entries (and the held-out ones, where given)."""
    entries = [*(heldout[0].shards if heldout else ()), *train]
    rows = {"train": 0, "validation": 0, "test": 0}
    for entry in entries:
        rows[entry.split] += entry.rows
    dataset = Dataset(
        tenant_id=resolved.tenant_id,
        pipeline_id=resolved.pipeline_id,
        dataset_id=resolved.dataset_id,
        spec_sha256=resolved.spec_sha256,
        heldout=heldout[1] if heldout else artifacts.ObjectRef(key="none", size=0, sha256=NOBODY),
        shards=entries,
        rows=rows,
        rejections={},
        deleted_rows=list(deleted_rows),
    )
    key = artifacts.dataset_key(resolved.tenant_id, resolved.dataset_id)
    return dataset, store.put_new_model(key, dataset)


def shard_written(resolved: ResolvedSpec, entry: ShardEntry) -> Envelope:
    event = ShardWritten(
        dataset_id=resolved.dataset_id,
        batch=entry.batch,
        split=entry.split,
        shard=entry.shard,
        rows=entry.rows,
        rejected=entry.rejected,
        supervised_tokens=entry.supervised_tokens,
    )
    return seal(event, tenant_id=resolved.tenant_id, pipeline_id=resolved.pipeline_id)


def heldout_sealed(resolved: ResolvedSpec, heldout: artifacts.ObjectRef) -> Envelope:
    event = HeldoutSealed(dataset_id=resolved.dataset_id, heldout=heldout)
    return seal(event, tenant_id=resolved.tenant_id, pipeline_id=resolved.pipeline_id)


def dataset_sealed(resolved: ResolvedSpec, dataset: Dataset, ref: artifacts.ObjectRef) -> Envelope:
    event = DatasetSealed(
        dataset_id=resolved.dataset_id,
        dataset=ref,
        shards=len(dataset.shards),
        rows=sum(dataset.rows.values()),
    )
    return seal(event, tenant_id=resolved.tenant_id, pipeline_id=resolved.pipeline_id)


def stop_pipeline(store: ObjectStore, resolved: ResolvedSpec) -> None:
    """Write stopped.json, as a cancelled pipeline has it."""
    stopped = Stopped(
        tenant_id=resolved.tenant_id,
        pipeline_id=resolved.pipeline_id,
        outcome="cancelled",
        reason="cancelled_by_user",
        detail="",
        stopped_at="2000-01-01T00:00:00Z",
    )
    key = artifacts.stopped_key(resolved.tenant_id, resolved.pipeline_id)
    store.put_new_model(key, stopped)


def tiny_student(
    folder: Path, *, layers: int = 3, hidden: int = 32, vocabulary: int = VOCABULARY, seed: int = 0
) -> Path:
    """Write a random Llama (SmolLM2's architecture) with the byte tokenizer, as save_pretrained
    does. `seed` decides the weights."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        bos_token_id=min(256, vocabulary - 2),
        eos_token_id=min(257, vocabulary - 1),
        pad_token_id=min(257, vocabulary - 1),
        dtype="float32",
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        LlamaForCausalLM(config).save_pretrained(folder)
    return write_folder(folder)


def _parquet(table: pa.Table) -> bytes:
    sink = io.BytesIO()
    pq.write_table(table, sink, compression="zstd")
    return sink.getvalue()
