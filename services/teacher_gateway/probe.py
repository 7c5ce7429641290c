"""One question to each teacher before all others: can it be asked as the spec asks?

The probe is paid like any other call, so it is in the ledger: booked at its worst case before it
is made and corrected by what the teacher says, hence a crash leaves it listed. It finds out what
would spoil every row: no log-probabilities or too few, another tokenizer or template, an endpoint
that cannot be reached. Then the pipeline fails with what to change. Answers that are given along
need no question.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import date
from typing import Any

from sqlalchemy import update
from sqlalchemy.orm import Session

from services.teacher_gateway import reasons
from services.teacher_gateway.batch_input import read_spec, read_tokenizer
from services.teacher_gateway.context import Context
from services.teacher_gateway.database import now, transaction
from services.teacher_gateway.fitness import Unfit, did_not_answer, judge
from services.teacher_gateway.ledger import changed, lock
from services.teacher_gateway.limits.endpoints import count_call
from services.teacher_gateway.models import Pipeline
from services.teacher_gateway.paid_calls import (
    PROBE_MESSAGES,
    PaidCalls,
    Question,
    book_worst,
    probe_question,
    unpaid,
)
from services.teacher_gateway.stop import TERMINAL, fail_pipeline, finish_stopping
from services.teacher_gateway.teachers.outcomes import Call, Outcome, Reject, Retry
from services.teacher_gateway.teachers.routes import open_teacher
from services.teacher_gateway.timeouts import backoff
from stillhouse.chassis.crash import crash_point
from stillhouse.chassis.errors import PermanentError, StoreUnavailable
from stillhouse.chassis.logs import logger
from stillhouse.contracts.chat import ChatTokenizer
from stillhouse.contracts.spec import ResolvedSpec, Spec

log = logger(__name__)


@dataclass(frozen=True)
class Heard:
    """What one teacher said to its question."""

    number: int
    question: Question
    outcome: Outcome
    unfit: Unfit | None


def probe_teacher(context: Context, pipeline_id: str) -> None:
    """Ask each teacher once; open the collection, try again later, or fail the pipeline."""
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
        _put_off(context, pipeline_id, context.times.batch_backoff)
        raise
    expected = len(chat.encode_prompt(PROBE_MESSAGES))
    questions = probe_questions(resolved.spec, attempt, pipeline_id, chat)
    # They are few, and do not wait for their turn among the items; but a pause holds for them too.
    pauses = [
        count_call(context.engine, question.teacher, tenant, question.tokens)
        for question in questions.values()
    ]
    if max(pauses, default=0.0) > 0:
        _put_off(context, pipeline_id, max(pauses))
        return
    with transaction(context.engine) as session:
        failed = not _book(session, context, pipeline_id, questions)
    if not failed:
        crash_point("probe_booked")
        calls = PaidCalls(context.engine, pipeline_id, list(questions.values()))
        try:
            heard = asyncio.run(_ask_all(context, resolved, questions, calls, chat, expected))
        finally:
            calls.close()
        with transaction(context.engine) as session:
            failed = _decide(session, context, pipeline_id, attempt, heard)
    if failed:
        finish_stopping(context.engine, context.store, pipeline_id)


def probe_questions(
    spec: Spec, attempt: int, pipeline_id: str, chat: ChatTokenizer
) -> dict[int, Question]:
    """A question to each teacher that can be asked, by its place in the spec."""
    return {
        number: probe_question(
            f"probe:{attempt}:{teacher.name}", teacher, Call(PROBE_MESSAGES, pipeline_id), chat
        )
        for number, teacher in enumerate(spec.teachers)
        if teacher.answers is None
    }


def probe_unpaid(questions: Iterable[Question]) -> Unfit:
    return unpaid("one short answer of each teacher", questions)


def _book(
    session: Session, context: Context, pipeline_id: str, questions: dict[int, Question]
) -> bool:
    """Book the questions; False, and the pipeline failed, where the budget does not pay."""
    pipeline = lock(session, pipeline_id)
    assert pipeline is not None, "pipelines are never deleted"
    if not book_worst(session, pipeline_id, questions.values()):
        short = probe_unpaid(questions.values())
        fail_pipeline(session, pipeline, "collect", short.reason, short.detail)
        return False
    if any(question.teacher.weights for question in questions.values()):
        # Weights are loaded first, for as long as a job may take.
        pipeline.next_attempt_at = now(session) + context.times.job
    return True


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


def _put_off(context: Context, pipeline_id: str, seconds: float) -> None:
    """Take an attempt back that asked nothing: the store was down, or a teacher has a pause."""
    with transaction(context.engine) as session:
        changed(
            session,
            update(Pipeline)
            .where(Pipeline.pipeline_id == pipeline_id, Pipeline.collect == "waiting")
            .values(
                attempts=Pipeline.attempts - 1,
                next_attempt_at=now(session) + seconds,
            ),
        )


def _call_seconds(context: Context) -> float:
    return min(context.times.call, 60.0)


async def _ask_all(
    context: Context,
    resolved: ResolvedSpec,
    questions: dict[int, Question],
    calls: PaidCalls,
    chat: ChatTokenizer,
    expected: int,
) -> list[Heard]:
    async def ask(number: int, question: Question) -> Heard:
        signal = resolved.signals[question.teacher.name]
        outcome = await _ask(context, question, calls, resolved, chat.today)
        place = f"teachers[{number}]"
        unfit = judge(outcome, question.teacher, signal, chat, expected, field=place)
        return Heard(number, question, outcome, unfit)

    return list(await asyncio.gather(*(ask(*pair) for pair in questions.items())))


async def _ask(
    context: Context,
    question: Question,
    calls: PaidCalls,
    resolved: ResolvedSpec,
    today: date | None,
) -> Outcome:
    teacher = question.teacher
    # Weights are loaded first, which takes as long as it takes.
    seconds = context.times.call if teacher.weights else _call_seconds(context)
    try:
        async with open_teacher(
            teacher,
            resolved.signals[teacher.name],
            context.settings,
            environ=os.environ,
            connections=1,
            today=today,
            pin=resolved.pinned.get(teacher.weights or ""),
        ) as client:
            deadline = min(seconds, teacher.limits.timeout_seconds)
            return await calls.ask(client, question, deadline=deadline)
    except PermanentError as error:
        return Reject(error.reason, str(error))


def _decide(
    session: Session, context: Context, pipeline_id: str, attempt: int, heard: list[Heard]
) -> bool:
    """Open the collection, plan the next attempt, or fail; True when it failed."""
    pipeline = lock(session, pipeline_id)
    assert pipeline is not None, "pipelines are never deleted"
    if pipeline.stopping or pipeline.state in TERMINAL:
        return False
    unfit = [one.unfit for one in heard if one.unfit is not None]
    away = [one for one in heard if isinstance(one.outcome, Retry)]
    if attempt >= context.times.probe_attempts:
        unfit += [
            did_not_answer(
                one.question.teacher.name,
                f"teachers[{one.number}]",
                one.outcome,
                f" the probe in {attempt} attempts",
            )
            for one in away
            if isinstance(one.outcome, Retry)
        ]
    if unfit:
        log.warning("the probe failed", reasons=[one.reason for one in unfit])
        detail = "; ".join(one.detail for one in unfit)
        fail_pipeline(session, pipeline, "collect", unfit[0].reason, detail)
        return True
    values: dict[str, Any] = {"attempts": 0, "next_attempt_at": None, "collect": "running"}
    if away:
        asked = max(a.outcome.after or 0.0 for a in away if isinstance(a.outcome, Retry))
        pause = backoff(context.times.probe_backoff, attempt - 1, cap=60.0)
        values = {"next_attempt_at": now(session) + max(pause, min(asked, 60.0))}
    changed(session, update(Pipeline).where(Pipeline.pipeline_id == pipeline_id).values(**values))
    return False
