"""One question before all others: can this teacher be asked as the spec asks?

The probe is a paid call like any other, so it is in the ledger: booked at its worst case before
it is made and corrected by what the teacher says, hence a crash leaves it listed. It finds out
what would spoil every row: no log-probabilities or too few, another tokenizer or template, an
endpoint that cannot be reached. Then the pipeline fails with what to change.
"""

from __future__ import annotations

import asyncio
import math
import os
from dataclasses import dataclass
from typing import Any

import msgspec
from sqlalchemy import update
from sqlalchemy.orm import Session

from services.teacher_gateway import reasons
from services.teacher_gateway.batch_input import read_spec, read_tokenizer
from services.teacher_gateway.context import Context
from services.teacher_gateway.counters import CALLS
from services.teacher_gateway.database import now, transaction
from services.teacher_gateway.ledger import Line, changed, correct, cost_microusd, lock, settle
from services.teacher_gateway.models import Pipeline
from services.teacher_gateway.stop import TERMINAL, fail_pipeline, finish_stopping
from services.teacher_gateway.teachers.openai import open_teacher
from services.teacher_gateway.teachers.outcomes import Answered, Outcome, Reject, Retry
from stillhouse.chassis.crash import crash_point
from stillhouse.chassis.errors import PermanentError, StoreUnavailable
from stillhouse.chassis.logs import logger
from stillhouse.contracts.chat import ChatTokenizer, Message
from stillhouse.contracts.spec import ResolvedSpec, Spec

log = logger(__name__)

PROBE_MESSAGES = [Message(role="user", content="Name one colour.")]
PROBE_TOKENS = 8
TEXT_INSTEAD = "use `signal.kind: text` with `training.loss: sft`"
# Sums of probabilities are those of rounded numbers.
MOST_MASS = 1.001


@dataclass(frozen=True)
class Unfit:
    """Why this teacher cannot be asked as the spec asks, and what to change."""

    reason: str
    detail: str


class _Outcome(msgspec.Struct):
    logprob: float
    id: int | None = None
    bytes: list[int] | None = None
    top_logprobs: list[_Outcome] = []


class _Logprobs(msgspec.Struct):
    content: list[_Outcome]


class _Choice(msgspec.Struct):
    logprobs: _Logprobs


class _Completion(msgspec.Struct):
    choices: list[_Choice]


def probe_teacher(context: Context, pipeline_id: str) -> None:
    """Ask once; open the collection, try again later, or fail the pipeline."""
    with transaction(context.engine) as session:
        claimed = _claim(session, context, pipeline_id)
    if claimed is None:
        finish_stopping(context.engine, context.store, pipeline_id)
        return
    tenant, attempt = claimed
    try:
        resolved = read_spec(context.store, tenant, pipeline_id)
        chat = read_tokenizer(context.store, resolved.tokenizer)
    except StoreUnavailable:
        _put_off(context, pipeline_id)
        raise
    charge_id = f"probe:{attempt}"
    price = resolved.teacher.usd_per_million
    expected = len(chat.encode_prompt(PROBE_MESSAGES))
    worst = cost_microusd(price, expected, PROBE_TOKENS)
    with transaction(context.engine) as session:
        line = Line(charge_id, "unknown", worst, detail="a probe whose answer is not known")
        if not settle(session, pipeline_id, [line], release=0):
            pipeline = lock(session, pipeline_id)
            assert pipeline is not None, "pipelines are never deleted"
            detail = (
                f"`budget.teacher_usd` does not pay for one short answer ({worst} micro-USD at "
                "the worst): raise it"
            )
            fail_pipeline(session, pipeline, "collect", reasons.BUDGET_EXHAUSTED, detail)
            failed = True
        else:
            failed = False
    if not failed:
        crash_point("probe_booked")
        try:
            outcome = asyncio.run(_ask(context, resolved))
        except PermanentError as error:
            outcome = Reject(error.reason, str(error))
        CALLS.labels("answered" if isinstance(outcome, Answered) else "probe_failed").inc()
        unfit = judge(outcome, resolved.spec, chat, expected)
        with transaction(context.engine) as session:
            book(session, pipeline_id, charge_id, outcome, resolved, worst)
            failed = _decide(session, context, pipeline_id, attempt, outcome, unfit)
    if failed:
        finish_stopping(context.engine, context.store, pipeline_id)


def _claim(session: Session, context: Context, pipeline_id: str) -> tuple[str, int] | None:
    """Count the attempt; None when the probe is done, under way, not due, or given up."""
    pipeline = lock(session, pipeline_id)
    clock = now(session)
    if (
        pipeline is None
        or pipeline.state != "running"
        or pipeline.collect != "waiting"
        or pipeline.stopping
        or (pipeline.next_attempt_at or 0) > clock
    ):
        return None
    if pipeline.attempts >= context.times.probe_attempts:
        # An attempt that ends by itself decides: these were killed, or met a defect.
        detail = (
            f"the probe broke off in {pipeline.attempts} attempts, before the teacher's answer was "
            "known: the logs of the gateway's worker tell why"
        )
        log.warning("the probe is given up", pipeline=pipeline_id, attempts=pipeline.attempts)
        fail_pipeline(session, pipeline, "collect", reasons.WORKER_LOST, detail)
        return None
    pipeline.attempts += 1
    # Until then no other job asks: longer than a call may take.
    pipeline.next_attempt_at = clock + _call_seconds(context) + context.times.lease_ttl
    return pipeline.tenant_id, pipeline.attempts


def _put_off(context: Context, pipeline_id: str) -> None:
    """Take an attempt back that asked nothing, since the store was down."""
    with transaction(context.engine) as session:
        changed(
            session,
            update(Pipeline)
            .where(Pipeline.pipeline_id == pipeline_id, Pipeline.collect == "waiting")
            .values(
                attempts=Pipeline.attempts - 1,
                next_attempt_at=now(session) + context.times.batch_backoff,
            ),
        )


def _call_seconds(context: Context) -> float:
    return min(context.times.call, 60.0)


async def _ask(context: Context, resolved: ResolvedSpec) -> Outcome:
    async with open_teacher(
        resolved.teacher,
        resolved.spec.signal,
        environ=os.environ,
        private=context.settings.private_teachers,
        connections=1,
    ) as client:
        return await client.ask(
            PROBE_MESSAGES,
            seed_of=resolved.pipeline_id,
            deadline=min(_call_seconds(context), resolved.teacher.limits.timeout_seconds),
            max_tokens=PROBE_TOKENS,
        )


def judge(outcome: Outcome, spec: Spec, chat: ChatTokenizer, expected: int) -> Unfit | None:
    """Say why a teacher is unfit; None when it is fit, or when only time can tell."""
    if isinstance(outcome, Retry):
        return None
    name, signal = spec.teachers[0].name, spec.signal
    if isinstance(outcome, Reject):
        if outcome.reason == reasons.MISSING_LOGPROBS:
            return Unfit(
                reasons.MISSING_LOGPROBS,
                f"teacher {name!r} gave no log-probabilities, which `signal.kind: topk` needs: "
                f"use a server that gives them, or {TEXT_INSTEAD}",
            )
        return Unfit(outcome.reason, f"teacher {name!r} cannot be asked: {outcome.detail}")
    if outcome.usage.prompt_tokens != expected:
        return Unfit(
            "tokenizer_mismatch",
            f"teacher {name!r} counted {outcome.usage.prompt_tokens} tokens in a prompt that our "
            f"tokenizer and chat template render to {expected}: name the teacher's own weights "
            "in `teachers[0].reference` (or `student.of`), of the same revision as it serves",
        )
    if signal.kind != "topk":
        return None
    return _judge_logprobs(outcome.body, name, signal.k, chat)


def _judge_logprobs(body: str, name: str, k: int, chat: ChatTokenizer) -> Unfit | None:
    try:
        positions = msgspec.json.decode(body, type=_Completion).choices[0].logprobs.content
    except (msgspec.DecodeError, RecursionError) as error:
        return Unfit(
            reasons.MISSING_LOGPROBS,
            f"teacher {name!r} gave log-probabilities in a form that is not OpenAI's ({error}): "
            f"use a server that does, or {TEXT_INSTEAD}",
        )
    depth = max((len(position.top_logprobs) for position in positions), default=0)
    if depth < k:
        return Unfit(
            "too_few_logprobs",
            f"teacher {name!r} gave {depth} log-probabilities for a token where `signal.k` asks "
            f"for {k}: set `signal.k: {depth}`"
            if depth
            else f"teacher {name!r} gave no alternatives (`top_logprobs`): use a server that "
            f"does, or {TEXT_INSTEAD}",
        )
    for position in positions:
        outcomes = [position, *position.top_logprobs]
        ids = [outcome.id for outcome in outcomes if outcome.id is not None]
        if any(not 0 <= found < chat.vocabulary for found in ids):
            return Unfit(
                "tokenizer_mismatch",
                f"teacher {name!r} gave token ids outside our tokenizer's vocabulary of "
                f"{chat.vocabulary}: name the teacher's own weights in `teachers[0].reference`",
            )
        if any(outcome.id is None and outcome.bytes is None for outcome in outcomes):
            return Unfit(
                "logprobs_without_tokens",
                f"teacher {name!r} names its alternatives neither by `id` nor by `bytes`: use a "
                f"server that does, or {TEXT_INSTEAD}",
            )
        mass = sum(math.exp(min(outcome.logprob, 1.0)) for outcome in position.top_logprobs)
        if mass > MOST_MASS:
            return Unfit(
                "logprobs_not_raw",
                f"teacher {name!r} gave probabilities that sum to {mass:.3f}: they are not the "
                f"model's own; use a server that gives raw ones, or {TEXT_INSTEAD}",
            )
    return None


def book(
    session: Session,
    pipeline_id: str,
    charge_id: str,
    outcome: Outcome,
    resolved: ResolvedSpec,
    worst: int,
) -> None:
    """Replace the pessimistic charge by what the outcome tells; keep it where it tells nothing."""
    price = resolved.teacher.usd_per_million
    lock(session, pipeline_id)
    if isinstance(outcome, Answered) or (isinstance(outcome, Reject) and outcome.usage):
        usage = outcome.usage
        assert usage is not None, "checked above"
        cost = cost_microusd(price, usage.prompt_tokens, usage.completion_tokens)
        if cost <= worst:
            correct(session, pipeline_id, charge_id, "probe", cost, "the probe")
    elif not outcome.lost:
        correct(session, pipeline_id, charge_id, "probe", 0, f"not billed: {outcome.detail}")


def _decide(
    session: Session,
    context: Context,
    pipeline_id: str,
    attempt: int,
    outcome: Outcome,
    unfit: Unfit | None,
) -> bool:
    """Open the collection, plan the next attempt, or fail; True when it failed."""
    pipeline = lock(session, pipeline_id)
    assert pipeline is not None, "pipelines are never deleted"
    if pipeline.stopping or pipeline.state in TERMINAL:
        return False
    if isinstance(outcome, Retry) and attempt >= context.times.probe_attempts:
        unfit = Unfit(
            outcome.reason,
            f"the teacher did not answer the probe in {attempt} attempts ({outcome.detail}): "
            "check `teachers[0].url`, and that it is up",
        )
    if unfit is not None:
        log.warning("the probe failed", reason=unfit.reason)
        fail_pipeline(session, pipeline, "collect", unfit.reason, unfit.detail)
        return True
    values: dict[str, Any] = {"attempts": 0, "next_attempt_at": None, "collect": "running"}
    if isinstance(outcome, Retry):
        pause = min(context.times.probe_backoff * 2 ** (attempt - 1), 60.0)
        values = {"next_attempt_at": now(session) + max(pause, min(outcome.after or 0.0, 60.0))}
    changed(session, update(Pipeline).where(Pipeline.pipeline_id == pipeline_id).values(**values))
    return False
