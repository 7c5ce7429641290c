"""Acceptance: from a posted spec to prompts in the store and `pipeline.accepted`.

    rejections -> prompts/batch-N.parquet -> tokenizer.json -> spec.json -> batches and items
    -> one transaction: running, pipeline.accepted

Each step can be repeated: what it writes is derived from the same inputs and never overwritten.
Once `spec.json` is there it decides, and an interrupted acceptance goes on from the store alone.
Whatever ends it (terms, tokenizer, prompts) becomes the pipeline's reason.
"""

from __future__ import annotations

import io
import json
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq
from sqlalchemy import delete, update

from services.teacher_gateway.admission import admit
from services.teacher_gateway.auto_signal import TeacherAway, resolve_signals
from services.teacher_gateway.batch_input import bytes_bound, counts_as_we_do
from services.teacher_gateway.context import Context
from services.teacher_gateway.database import Session, insert_new, now, transaction
from services.teacher_gateway.ledger import changed, lock
from services.teacher_gateway.limits.endpoints import endpoint_of
from services.teacher_gateway.models import Batch, Item, Pipeline
from services.teacher_gateway.outbox import emit
from services.teacher_gateway.problems import ProblemError
from services.teacher_gateway.prompts.file import (
    PromptsRefused,
    RefusedLine,
    judge_all,
    max_line_bytes,
    read_again,
    read_prompts,
)
from services.teacher_gateway.prompts.lines import PromptLine, answer_of
from services.teacher_gateway.prompts.sources import snapshot
from services.teacher_gateway.prompts.split import Plan, Slot, plan, teacher_of
from services.teacher_gateway.stop import mark_stopping
from services.teacher_gateway.terms.gate import load_catalogue
from services.teacher_gateway.tokenizers import find_tokenizer, prompt_tokens
from stillhouse.chassis.crash import crash_point
from stillhouse.chassis.errors import MissingObject, PermanentError, RetryableError
from stillhouse.chassis.hub import HUB_AWAY, HubUnavailable
from stillhouse.chassis.logs import logger
from stillhouse.chassis.references import sources_of
from stillhouse.chassis.storage import AlreadyExists
from stillhouse.contracts import artifacts
from stillhouse.contracts.artifacts import ObjectRef
from stillhouse.contracts.canonical import canonical_json, sha256_hex
from stillhouse.contracts.events import PipelineAccepted, StageFailed
from stillhouse.contracts.responses import PROMPT_SCHEMA, item_id, prompt_id
from stillhouse.contracts.spec import ResolvedSpec, Signal, Spec, spec_digest

log = logger(__name__)

# Acceptances that died without a word (killed, or a defect) before the pipeline is given up.
MAX_ATTEMPTS = 8
_ROWS_AT_ONCE = 1000
_WRITERS = 4
_BEAT_SECONDS = 3.0


class _NotAccepting(Exception):
    """The pipeline was cancelled, or another worker accepted it: there is nothing to do."""


@dataclass(frozen=True)
class _Written:
    """A batch whose prompts are in the store."""

    batch: int
    prompts: ObjectRef
    item_ids: list[str]


def accept_pipeline(context: Context, pipeline_id: str) -> None:
    """Accept a posted pipeline, or fail it with a reason. Does nothing when it is not due.

    Raises RetryableError after it noted when to try again.
    """
    try:
        pipeline = _claim(context, pipeline_id)
        _accept(context, pipeline)
    except (_NotAccepting, TeacherAway):
        return
    except HubUnavailable as error:
        # No part of ours: a machine without a way out must say so in the end.
        if pipeline.attempts >= MAX_ATTEMPTS:
            _fail(context, pipeline_id, HUB_AWAY, str(error))
            return
        _put_off(context, pipeline_id, counted=True)
        raise
    except RetryableError:
        _put_off(context, pipeline_id, counted=False)
        raise
    except ProblemError as error:
        _fail(context, pipeline_id, error.problem.type.rsplit(":", 1)[-1], str(error))
    except PermanentError as error:
        if error.reason == "store_refused":
            # The operator's mistake, not the user's: it may be mended meanwhile.
            _put_off(context, pipeline_id, counted=True)
            raise
        _fail(context, pipeline_id, error.reason, str(error))


def _claim(context: Context, pipeline_id: str) -> Pipeline:
    with transaction(context.engine) as session:
        pipeline = _accepting(session, pipeline_id)
        exhausted = pipeline.attempts >= MAX_ATTEMPTS
        if not exhausted:
            pipeline.attempts += 1
            pipeline.next_attempt_at = now(session) + context.times.enqueue_again
    if exhausted:
        raise PermanentError(
            f"acceptance broke off {MAX_ATTEMPTS} times; the gateway's worker logs tell why",
            reason="acceptance_failed",
        )
    return pipeline


def _accepting(session: Session, pipeline_id: str) -> Pipeline:
    pipeline = lock(session, pipeline_id)
    if pipeline is None or pipeline.state != "accepting" or pipeline.stopping:
        raise _NotAccepting
    return pipeline


def _accept(context: Context, pipeline: Pipeline) -> None:
    key = artifacts.spec_key(pipeline.tenant_id, pipeline.pipeline_id)
    found = context.store.find_model(key, ResolvedSpec)
    written: Iterable[_Written]
    if found is None:
        resolved, ref, written = _prepare(context, pipeline)
    else:
        resolved, ref = found
        written = _read_back(context, resolved)
    _insert(context, pipeline, resolved, written)
    crash_point("acceptance_inserted")
    with transaction(context.engine) as session:
        held = _accepting(session, pipeline.pipeline_id)
        held.state = "running"
        held.attempts, held.next_attempt_at = 0, None  # from here on the probe's
        held.dataset_id = resolved.dataset_id
        held.training_id = resolved.training_id
        held.student_id = resolved.student_id
        held.batches = resolved.batches.total
        held.heldout_batches = resolved.batches.heldout
        held.items = resolved.items
        accepted = PipelineAccepted(
            spec=ref, dataset_id=resolved.dataset_id, training_id=resolved.training_id
        )
        emit(session, held, accepted)
    log.info(
        "pipeline accepted",
        pipeline=pipeline.pipeline_id,
        items=resolved.items,
        batches=resolved.batches.total,
        rejected=resolved.rejected,
    )


def _prepare(
    context: Context, pipeline: Pipeline
) -> tuple[ResolvedSpec, ObjectRef, list[_Written]]:
    """Write everything up to `spec.json`."""
    store, settings = context.store, context.settings
    tenant, pipeline_id = pipeline.tenant_id, pipeline.pipeline_id
    spec = Spec.model_validate_json(pipeline.spec)
    alive = _beat(context, pipeline_id)
    catalogue = load_catalogue(settings.terms_file)
    verdicts = admit(spec, tenant, settings, catalogue, store, context.engine)
    accepted_on = datetime.fromtimestamp(pipeline.created_at, UTC).date()
    tokenizer = find_tokenizer(spec, sources_of(settings), lambda *_: alive())
    chat = tokenizer.chat.on(accepted_on)
    signals = resolve_signals(
        context,
        pipeline,
        spec,
        chat,
        tokenizer.text_only,
        lambda session: _accepting(session, pipeline_id),
    )

    def tokens_of(line: PromptLine) -> int:
        alive()
        return prompt_tokens(chat, line)

    with snapshot(
        spec,
        tenant,
        settings=settings,
        engine=context.engine,
        store=store,
        stored_before=pipeline.created_at,  # so that an interrupted acceptance reads the same
        alive=alive,
    ) as file:
        prompts, refused = judge_all(
            read_prompts(
                file,
                max_lines=settings.max_prompts,
                max_line_bytes=max_line_bytes(spec),
                max_tokens=spec.dataset.max_tokens,
                teacher_of=teacher_of(spec),
                tokens_of=tokens_of,
            )
        )
        planned = plan(prompts, spec)
        _record_refused(context, pipeline, refused)
        written = _write_prompts(context, pipeline, file, planned, spec, signals, alive)
    crash_point("acceptance_prompts")
    digest = spec_digest(spec)
    dataset = artifacts.dataset_id(pipeline_id, digest)
    training = artifacts.training_id(dataset, digest)
    resolved = ResolvedSpec(
        tenant_id=tenant,
        pipeline_id=pipeline_id,
        spec=spec,
        spec_sha256=digest,
        dataset_id=dataset,
        training_id=training,
        student_id=artifacts.student_id(training),
        tokenizer=_put_tokenizer(context, pipeline, chat.model_dump_json()),
        tokenizer_sha256=chat.tokenizer_sha256,
        template_sha256=chat.template_sha256,
        signals=signals,
        batch_teachers=planned.teachers,
        reference=tokenizer.reference,
        pinned=dict(tokenizer.pins),
        verdicts=verdicts,
        batches=planned.numbers,
        items=planned.items,
        rejected=len(refused),
    )
    return *_put_spec(context, resolved), written


def _put_tokenizer(context: Context, pipeline: Pipeline, data: str) -> ObjectRef:
    key = artifacts.tokenizer_key(pipeline.tenant_id, pipeline.pipeline_id)
    try:
        return context.store.put_new(key, data.encode())
    except AlreadyExists as error:
        raise PromptsRefused(
            "the tokenizer's files changed while the pipeline was being accepted: submit it again",
            reason="inputs_changed",
        ) from error


def _put_spec(context: Context, resolved: ResolvedSpec) -> tuple[ResolvedSpec, ObjectRef]:
    key = artifacts.spec_key(resolved.tenant_id, resolved.pipeline_id)
    try:
        encoded = resolved.model_dump(mode="json", by_alias=True)
        return resolved, context.store.put_new(key, canonical_json(encoded))
    except AlreadyExists:
        found = context.store.find_model(key, ResolvedSpec)
        assert found is not None, "it was there a moment ago and is never removed"
        return found


def _write_prompts(
    context: Context,
    pipeline: Pipeline,
    file: BinaryIO,
    planned: Plan,
    spec: Spec,
    signals: Mapping[str, Signal],
    alive: Callable[[], None],
) -> list[_Written]:
    reading = threading.Lock()
    given = {teacher.name for teacher in spec.teachers if teacher.answers}
    ours = {t.name for t in spec.teachers if counts_as_we_do(t, signals[t.name])}
    # Batches of answers given along are large, and a writer holds one whole.
    writers = 1 if given else _WRITERS

    def write(numbered: tuple[int, Sequence[Slot]]) -> _Written:
        batch, slots = numbered
        with reading:
            rows = [
                _row(
                    pipeline.pipeline_id,
                    slot,
                    read_again(file, slot.prompt),
                    given=slot.prompt.teacher in given,
                    ours=slot.prompt.teacher in ours,
                )
                for slot in slots
            ]
        key = artifacts.prompts_key(pipeline.tenant_id, pipeline.pipeline_id, batch)
        try:
            ref = context.store.put_new(key, _parquet(rows))
        except AlreadyExists as error:
            raise PromptsRefused(
                "the prompts changed while the pipeline was being accepted: submit it again",
                reason="inputs_changed",
            ) from error
        return _Written(batch, ref, [row["item_id"] for row in rows])

    written: list[_Written] = []
    with ThreadPoolExecutor(writers, thread_name_prefix="prompts") as pool:
        numbered = list(enumerate(planned.batches))
        for start in range(0, len(numbered), 4 * writers):
            written += pool.map(write, numbered[start : start + 4 * writers])
            alive()
    return written


def _row(
    pipeline_id: str, slot: Slot, line: PromptLine, *, given: bool, ours: bool
) -> dict[str, Any]:
    prompt, tokens = prompt_id(pipeline_id, slot.prompt.sha256), slot.prompt.tokens
    return {
        "item_id": item_id(prompt, slot.sample),
        "prompt_id": prompt,
        "sample": slot.sample,
        "messages": json.dumps([m.as_sent() for m in line.messages], ensure_ascii=False),
        "tools": json.dumps(line.tools, ensure_ascii=False) if line.tools else None,
        "answer": answer_of(line) if given else None,
        "prompt_sha256": slot.prompt.sha256,
        "prompt_tokens": tokens if ours else max(tokens, bytes_bound(line.messages, line.tools)),
    }


def _parquet(rows: list[dict[str, Any]]) -> bytes:
    sink = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows, schema=PROMPT_SCHEMA), sink, compression="zstd")
    return sink.getvalue()


def _read_back(context: Context, resolved: ResolvedSpec) -> Iterator[_Written]:
    """Name the batches again from the store, where an earlier acceptance left them."""
    for batch in range(resolved.batches.total):
        key = artifacts.prompts_key(resolved.tenant_id, resolved.pipeline_id, batch)
        stored = context.store.read(key)
        if stored is None:
            raise MissingObject(f"{key} is missing although spec.json is there")
        ref = ObjectRef(key=key, size=len(stored.data), sha256=sha256_hex(stored.data))
        ids = pq.read_table(io.BytesIO(stored.data), columns=["item_id"])["item_id"].to_pylist()
        yield _Written(batch, ref, ids)


# SQL


def _record_refused(context: Context, pipeline: Pipeline, refused: list[RefusedLine]) -> None:
    """Record the lines that became no prompt; an earlier attempt's record is replaced."""
    rows = [
        {
            "pipeline_id": pipeline.pipeline_id,
            "item_id": f"line-{line.line}",
            "tenant_id": pipeline.tenant_id,
            "outcome": "rejected",
            "stage": "accept",
            "reason": line.reason,
            "detail": line.detail.replace("\0", "?"),
        }
        for line in refused
    ]
    with transaction(context.engine) as session:
        _accepting(session, pipeline.pipeline_id)
        earlier = (Item.pipeline_id == pipeline.pipeline_id, Item.batch.is_(None))
        changed(session, delete(Item).where(*earlier))
    for chunk in _chunks(rows):
        with transaction(context.engine) as session:
            _accepting(session, pipeline.pipeline_id)
            insert_new(session, Item, chunk)


def _insert(
    context: Context, pipeline: Pipeline, resolved: ResolvedSpec, written: Iterable[_Written]
) -> None:
    """Insert batches with their items, whatever an earlier attempt had inserted already."""
    alive = _beat(context, pipeline.pipeline_id)
    common = {"pipeline_id": pipeline.pipeline_id, "tenant_id": pipeline.tenant_id}
    batches: list[dict[str, Any]] = []
    items: list[dict[str, Any]] = []

    def flush() -> None:
        with transaction(context.engine) as session:
            _accepting(session, pipeline.pipeline_id)
            insert_new(session, Batch, batches)
            insert_new(session, Item, items)
        batches.clear()
        items.clear()
        alive()

    for one in written:
        batches.append(
            {
                **common,
                "batch": one.batch,
                "split": resolved.batches.split_of(one.batch),
                "teacher": resolved.batch_teachers[one.batch],
                "endpoint": endpoint_of(resolved.teacher_of(one.batch), pipeline.tenant_id),
                "items": len(one.item_ids),
                "prompts": one.prompts.model_dump_json(),
            }
        )
        items += [{**common, "item_id": name, "batch": one.batch} for name in one.item_ids]
        if len(items) >= _ROWS_AT_ONCE:
            flush()
    flush()


def _chunks(rows: list[dict[str, Any]]) -> Iterator[list[dict[str, Any]]]:
    for start in range(0, len(rows), _ROWS_AT_ONCE):
        yield rows[start : start + _ROWS_AT_ONCE]


def _beat(context: Context, pipeline_id: str) -> Callable[[], None]:
    """Return what keeps the clock from handing the acceptance to another worker."""
    last = time.monotonic()

    def alive() -> None:
        nonlocal last
        if time.monotonic() - last < _BEAT_SECONDS:
            return
        last = time.monotonic()
        with transaction(context.engine) as session:
            pipeline = _accepting(session, pipeline_id)
            pipeline.next_attempt_at = now(session) + context.times.enqueue_again

    return alive


def _put_off(context: Context, pipeline_id: str, *, counted: bool) -> None:
    with transaction(context.engine) as session:
        changed(
            session,
            update(Pipeline)
            .where(Pipeline.pipeline_id == pipeline_id, Pipeline.state == "accepting")
            .values(
                attempts=Pipeline.attempts - (0 if counted else 1),
                next_attempt_at=now(session) + context.times.batch_backoff,
            ),
        )


def _fail(context: Context, pipeline_id: str, reason: str, detail: str) -> None:
    """End a pipeline that was never accepted: nobody else knows of it yet."""
    reason = reason.replace("-", "_")
    # By bytes: an event has room for 4 KiB in all.
    detail = detail.replace("\0", "?").encode()[:1000].decode(errors="ignore")
    with transaction(context.engine) as session:
        pipeline = lock(session, pipeline_id)
        if pipeline is None or pipeline.state != "accepting" or pipeline.stopping:
            return
        failed = StageFailed(stage="collect", reason=reason, detail=detail, fatal=True)
        emit(session, pipeline, failed)
        mark_stopping(session, pipeline, "failed", f"{reason}: {detail}")
        pipeline.state = "failed"
        pipeline.next_attempt_at = None
        pipeline.ended_at = now(session)
    log.info("pipeline not accepted", pipeline=pipeline_id, reason=reason)
