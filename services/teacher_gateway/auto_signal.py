"""`signal: auto`: the best that each teacher gives, found out at acceptance.

Local weights give `counts`, since the whole distribution is there. An endpoint is asked the
probe's question for as many log-probabilities as `signal.k`, then for fewer, three times at most;
the questions are in the pipeline's ledger. What gives no usable ones gives text.
"""

from __future__ import annotations

import asyncio
import os
import secrets
from collections.abc import Callable, Collection, Iterable, Sequence
from contextlib import AsyncExitStack

from sqlalchemy.orm import Session

from services.teacher_gateway import reasons
from services.teacher_gateway.context import Context
from services.teacher_gateway.database import now, transaction
from services.teacher_gateway.depths import Found, depths, find_depth
from services.teacher_gateway.fitness import Unfit, did_not_answer
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
from services.teacher_gateway.teachers.outcomes import Call, Outcome, Retry
from services.teacher_gateway.teachers.routes import open_teacher
from services.teacher_gateway.timeouts import backoff
from stillhouse.chassis.crash import crash_point
from stillhouse.chassis.errors import PermanentError, RetryableError
from stillhouse.chassis.logs import logger
from stillhouse.contracts.chat import ChatTokenizer
from stillhouse.contracts.spec import Signal, Spec, Teacher

log = logger(__name__)

QUESTION_SECONDS = 30.0
# Fewer than those of an acceptance that breaks off without a word.
MOST_ATTEMPTS = 6
_LONGEST_PAUSE = 60.0


class TeacherAway(RetryableError):
    """A teacher did not answer; when to ask again is noted."""


def resolve_signals(
    context: Context,
    pipeline: Pipeline,
    spec: Spec,
    chat: ChatTokenizer,
    text_only: Collection[str],
    accepting: Callable[[Session], Pipeline],
) -> dict[str, Signal]:
    """Settle what each teacher is asked for, by its name.

    `text_only` are teachers with a tokenizer of their own; `accepting` locks the pipeline's row,
    and raises when it is not being accepted any more.
    Raises TeacherAway, or PermanentError that says what to change.
    """
    if spec.signal.kind != "auto":
        return {teacher.name: spec.signal for teacher in spec.teachers}
    signals = {t.name: without_asking(spec, t, text_only) for t in spec.teachers}
    asked = [teacher for teacher in spec.teachers if signals[teacher.name] is None]
    heard = _ask(context, pipeline, spec, asked, chat, accepting) if asked else {}
    for number, teacher in enumerate(spec.teachers):
        found = heard.get(teacher.name)
        if found is not None and isinstance(found.outcome, Retry):
            when = f" the questions of `signal.kind: auto` in {pipeline.attempts} attempts"
            gone = did_not_answer(teacher.name, f"teachers[{number}]", found.outcome, when)
            _put_off(context, pipeline, found.outcome, gone, accepting)
    settled = {
        name: heard[name].signal if signal is None else signal for name, signal in signals.items()
    }
    why = {name: found.unfit for name, found in heard.items()}
    if unfit := gives_nothing(spec, settled, why):
        raise PermanentError(unfit.detail, reason=unfit.reason)
    log.info(
        "signals settled",
        pipeline=pipeline.pipeline_id,
        signals={name: signal.kind for name, signal in settled.items()},
    )
    return settled


def without_asking(spec: Spec, teacher: Teacher, text_only: Collection[str]) -> Signal | None:
    """What a teacher gives by its route alone; None where it has to be asked."""
    if teacher.name in text_only:
        return spec.signal.model_copy(update={"kind": "text"})
    if teacher.weights is not None:
        return spec.signal.model_copy(update={"kind": "counts"})
    if teacher.url is None or not teacher.gives_logprobs:
        return spec.signal.model_copy(update={"kind": "text"})
    return None


def gives_nothing(
    spec: Spec, signals: dict[str, Signal], why: dict[str, Unfit | None] | None = None
) -> Unfit | None:
    """Why the teachers do not do for the loss: it needs log-probabilities, and all give text."""
    loss, stored = spec.training.loss, spec.training.distribution == "stored"
    if loss == "sft" or not stored or any(signal.kind != "text" for signal in signals.values()):
        return None
    said = "; ".join(unfit.detail for unfit in (why or {}).values() if unfit)
    found = f"no teacher gives usable ones{said and f' ({said})'}"
    instead = "a teacher with the student's tokenizer whose server gives `top_logprobs`"
    if any(teacher.answers and not teacher.weights for teacher in spec.teachers):
        found = "`signal.kind: auto` takes answers that are given along as text"
        instead = (
            "`signal.kind: topk` where the answers carry `top_logprobs`, or `weights` beside "
            "`answers: given`, which score them"
        )
    return Unfit(
        reasons.MISSING_LOGPROBS,
        f"`training.loss: {loss}` needs log-probabilities and {found}: use `training.loss: sft`, "
        f"or {instead}",
        "training.loss",
    )


def auto_questions(
    spec: Spec, teachers: Sequence[Teacher], attempt: str, pipeline_id: str, chat: ChatTokenizer
) -> dict[tuple[str, int], Question]:
    """A question to each teacher for each number of log-probabilities, by both."""
    return {
        (teacher.name, depth): probe_question(
            f"auto:{attempt}:{number}:{depth}", teacher, Call(PROBE_MESSAGES, pipeline_id), chat
        )
        for number, teacher in enumerate(teachers)
        for depth in depths(spec.signal.k)
    }


def auto_unpaid(questions: Iterable[Question]) -> Unfit:
    return unpaid("the short questions of `signal.kind: auto`", questions, ", or name the signal")


def _ask(
    context: Context,
    pipeline: Pipeline,
    spec: Spec,
    teachers: list[Teacher],
    chat: ChatTokenizer,
    accepting: Callable[[Session], Pipeline],
) -> dict[str, Found]:
    # Its own in each attempt: one that broke off stays listed, and is paid for apart.
    attempt = secrets.token_hex(4)
    questions = auto_questions(spec, teachers, attempt, pipeline.pipeline_id, chat)
    with transaction(context.engine) as session:
        held = accepting(session)
        if not book_worst(session, pipeline.pipeline_id, questions.values()):
            short = auto_unpaid(questions.values())
            raise PermanentError(short.detail, reason=short.reason)
        # Until then no other worker takes the acceptance: longer than the questions may take.
        asking = QUESTION_SECONDS * len(depths(spec.signal.k))
        held.next_attempt_at = now(session) + asking + context.times.lease_ttl
    crash_point("auto_booked")
    calls = PaidCalls(context.engine, pipeline.pipeline_id, list(questions.values()))
    try:
        return asyncio.run(
            _find_all(context, spec, teachers, chat, questions, calls, pipeline.tenant_id)
        )
    finally:
        calls.close()


async def _find_all(
    context: Context,
    spec: Spec,
    teachers: list[Teacher],
    chat: ChatTokenizer,
    questions: dict[tuple[str, int], Question],
    calls: PaidCalls,
    tenant_id: str,
) -> dict[str, Found]:
    expected = len(chat.encode_prompt(PROBE_MESSAGES))
    async with AsyncExitStack() as stack:

        async def find(teacher: Teacher) -> Found:
            async def ask(signal: Signal) -> Outcome:
                question = questions[teacher.name, signal.k]
                pause = await asyncio.to_thread(
                    count_call, context.engine, teacher, tenant_id, question.tokens
                )
                if pause > 0:
                    wait = f"it asked for a pause, of which {pause:.0f} s are left"
                    return Retry(reasons.TEACHER_RATE_LIMITED, wait, after=pause, away=True)
                client = await stack.enter_async_context(
                    open_teacher(
                        question.teacher,
                        signal,
                        context.settings,
                        environ=os.environ,
                        connections=1,
                    )
                )
                deadline = min(QUESTION_SECONDS, teacher.limits.timeout_seconds)
                return await calls.ask(client, question, deadline=deadline)

            field = f"teachers[{spec.teachers.index(teacher)}]"
            return await find_depth(ask, teacher, spec.signal, chat, expected, field=field)

        found = await asyncio.gather(*(find(teacher) for teacher in teachers))
    return {teacher.name: one for teacher, one in zip(teachers, found, strict=True)}


def _put_off(
    context: Context,
    pipeline: Pipeline,
    away: Retry,
    gone: Unfit,
    accepting: Callable[[Session], Pipeline],
) -> None:
    """Note when to ask again, or give up. Always raises."""
    attempt, times = pipeline.attempts, context.times
    if attempt >= min(times.probe_attempts, MOST_ATTEMPTS):
        raise PermanentError(gone.detail, reason=gone.reason)
    pause = backoff(times.probe_backoff, attempt - 1, cap=_LONGEST_PAUSE)
    with transaction(context.engine) as session:
        held = accepting(session)
        held.next_attempt_at = now(session) + max(pause, min(away.after or 0.0, _LONGEST_PAUSE))
    raise TeacherAway(away.detail)
