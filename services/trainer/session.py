"""A student in memory with all that its next step depends on, and where it comes from: made from
the spec at step 0, or opened from HEAD."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import TypeAdapter

from services.trainer import checkpoint, matrices, plan, probe, student
from services.trainer.fetching import Fetching
from services.trainer.hold import Hold
from services.trainer.optim import Optimizer
from stillhouse.chassis.crash import crash_point
from stillhouse.chassis.errors import MissingObject, PermanentError
from stillhouse.chassis.logs import logger
from stillhouse.contracts import artifacts
from stillhouse.contracts.artifacts import ObjectRef
from stillhouse.contracts.chat import ChatTokenizer, Message
from stillhouse.contracts.trainings import Cursor, Plan

log = logger(__name__)

_MESSAGES = TypeAdapter(list[Message])


@dataclass
class Session:
    """`ref` is the manifest of the newest checkpoint it wrote or came from, `saved_step` its
    step; a session with `saved_step == cursor.step` holds the same bits as that checkpoint."""

    training_id: str
    plan: Plan
    model: Any
    optimizer: Optimizer
    cursor: Cursor
    ref: ObjectRef | None
    saved_step: int
    bitwise: bool
    loss: float | None = None
    # The teacher's weights, where the loss compares whole distributions.
    teacher: Any = None

    @property
    def saved(self) -> bool:
        return self.saved_step == self.cursor.step


def prepare(hold: Hold) -> Session:
    """Make the student of the spec: its weights, less layers where it is pruned, and its plan."""
    started = time.monotonic()
    tools, store, spec = hold.tools, hold.tools.store, hold.resolved.spec.student
    chat = store.get_model(hold.resolved.tokenizer, ChatTokenizer)
    scratch = tools.scratch / "reference"
    model = student.open_reference(
        spec.weights,
        tools.sources,
        scratch,
        pin=hold.resolved.pinned.get(spec.weights),
        watching=Fetching(hold),
    ).to(tools.device)
    if student.vocabulary(model) < chat.vocabulary:
        raise PermanentError(
            f"the student knows {student.vocabulary(model)} tokens and the teacher's tokenizer "
            f"has {chat.vocabulary}: use a student of the teacher's family",
            reason="student_vocabulary_too_small",
        )
    hold.lease.check()
    settled = plan.find_plan(store, hold.tenant, hold.training)
    if settled is None:
        influence, keep = None, None
        if spec.layers is not None:
            matrices.use(tools.here.matrices)
            influence = student.block_influence(model, _calibration(hold, chat))
            keep = student.layers_to_keep(influence, spec.layers)
        hold.lease.check()
        settled = plan.settle_plan(
            store,
            hold.tenant,
            hold.training,
            suited=probe.suited(
                model,
                spec.layers or len(student.decoder_layers(model)),
                tools.device,
                tools.settings,
                tools.here,
            ),
            here=tools.here,
            layers_kept=keep,
            block_influence=influence,
        )
    crash_point("trainer.planned")
    if settled.layers_kept is not None:
        student.prune(model, settled.layers_kept)
    log.info(
        "student prepared",
        seconds=round(time.monotonic() - started, 1),
        dtype=settled.environment.dtype,
        matrices=settled.environment.matrices,
        micro_batch_tokens=settled.micro_batch_tokens,
    )
    return Session(
        training_id=hold.training,
        plan=settled,
        model=model,
        optimizer=Optimizer(model, hold.resolved.spec.training),
        cursor=Cursor(step=0, phase="stream"),
        ref=None,
        saved_step=-1,
        bitwise=settled.environment == plan.as_planned(tools.here, settled),
        teacher=_teacher(hold, model),
    )


def _teacher(hold: Hold, model: Any) -> Any:
    if hold.resolved.spec.training.distribution == "stored":
        return None
    reference = hold.resolved.reference
    if reference is None:
        raise PermanentError(
            "`training.distribution: weights` compares the student with the teacher's weights, and "
            "spec.json names none that all teachers share and whose tokenizer is the student's: "
            "post the pipeline again with `teachers[0].reference` (or `weights`) of the student's "
            "family, or with `distribution: stored`",
            reason="teacher_weights_unknown",
        )
    tools = hold.tools
    teacher = student.open_teacher(
        reference,
        tools.sources,
        tools.scratch / "teacher",
        model,
        pin=hold.resolved.pinned.get(reference),
        watching=Fetching(hold),
    )
    return teacher.to(tools.device)


def _calibration(hold: Hold, chat: ChatTokenizer) -> list[list[int]]:
    """The first train prompts, rendered, up to CALIBRATION_TOKENS tokens in all."""
    found: list[list[int]] = []
    left = student.CALIBRATION_TOKENS
    batches = hold.resolved.batches
    for batch in range(batches.heldout, batches.total):
        key = artifacts.prompts_key(hold.tenant, hold.pipeline, batch)
        stored = hold.tools.store.read(key)
        if stored is None:
            raise MissingObject(f"{key} is part of every accepted pipeline, and is missing")
        table = pq.read_table(pa.BufferReader(stored.data), columns=["messages", "tools"])
        for row in table.to_pylist():
            tools = json.loads(row["tools"]) if row["tools"] else None
            ids = chat.encode_prompt(_MESSAGES.validate_json(row["messages"]), tools)[:left]
            if ids not in found:  # samples of one prompt lie in different batches
                found.append(ids)
                left -= len(ids)
            if left <= 0:
                return found
    return found


def head_cursor(hold: Hold) -> Cursor:
    """Where HEAD stands, read without its tensors: often the next shard is not there yet."""
    head = hold.lease.state.head
    assert head is not None
    for found in checkpoint.resumable(hold.tools.store, head.manifest):
        return found.cursor
    raise _unreadable(head.manifest)


def resume(hold: Hold) -> Session:
    """Open HEAD, or what it came from where HEAD is damaged."""
    tools, store = hold.tools, hold.tools.store
    head = hold.lease.state.head
    assert head is not None
    settled = plan.find_plan(store, hold.tenant, hold.training)
    if settled is None:
        raise MissingObject("plan.json is written before step 0, and is missing")
    for found in checkpoint.resumable(store, head.manifest):
        try:
            model, state = hold.persist(
                lambda found=found: checkpoint.open_checkpoint(  # type: ignore[misc]
                    store, found, tools.scratch / "resume"
                )
            )
            model = model.to(tools.device)
            optimizer = Optimizer(model, hold.resolved.spec.training)
            if state:
                optimizer.load(state, found.cursor.step)
        except PermanentError as error:
            log.error("a checkpoint is damaged; trying its parent", why=str(error))
            continue
        log.info("resumed", step=found.cursor.step, manifest=found.ref.key)
        return Session(
            training_id=hold.training,
            plan=settled,
            model=model,
            optimizer=optimizer,
            cursor=found.cursor,
            ref=found.ref,
            saved_step=found.cursor.step,
            bitwise=found.manifest.bitwise
            and settled.environment == plan.as_planned(tools.here, settled),
            loss=found.manifest.loss,
            teacher=_teacher(hold, model),
        )
    raise _unreadable(head.manifest)


def _unreadable(head: ObjectRef) -> PermanentError:
    return PermanentError(
        f"neither {head.key} nor what it came from can be read: the store lost or changed "
        "objects; start the pipeline again",
        reason=checkpoint.UNREADABLE,
    )
