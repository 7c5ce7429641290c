"""Single questions to teachers, paid one by one: a probe, a check's preflight.

Each is booked at its worst case before it is asked, and corrected by what the teacher says; so a
crash leaves it listed. What was booked and not asked after all costs nothing.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from sqlalchemy import Engine
from sqlalchemy.orm import Session

from services.teacher_gateway import reasons
from services.teacher_gateway.batch_input import prompt_tokens_bound
from services.teacher_gateway.counters import CALLS
from services.teacher_gateway.database import transaction
from services.teacher_gateway.fitness import Unfit
from services.teacher_gateway.ledger import Line, Purse, correct, cost_microusd, lock, settle
from services.teacher_gateway.teachers.outcomes import (
    Answered,
    Call,
    Outcome,
    Reject,
    TeacherClient,
)
from stillhouse.chassis.crash import crash_point
from stillhouse.chassis.errors import PermanentError
from stillhouse.contracts.chat import ChatTokenizer, Message
from stillhouse.contracts.spec import Price, Teacher

PROBE_MESSAGES = [Message(role="user", content="Name one colour.")]
PROBE_TOKENS = 8
# Providers take half the price for batches, and that one stands in the spec of a teacher with
# `batch_api`; a single question costs the whole.
_DIRECT = 2


@dataclass(frozen=True)
class Question:
    """One call, with the tokens and the money that it takes at most."""

    charge_id: str
    teacher: Teacher
    call: Call
    tokens: int
    worst_microusd: int


def make_question(
    charge_id: str, teacher: Teacher, call: Call, chat: ChatTokenizer, max_tokens: int
) -> Question:
    """Weigh a call. Whether the teacher's tokenizer is ours is what such questions find out."""
    prompt = prompt_tokens_bound(chat, call.messages, call.tools, ours=False)
    asked = asked_directly(teacher)
    worst = cost_microusd(asked.usd_per_million, prompt, max_tokens)
    return Question(charge_id, asked, call, prompt + max_tokens, worst)


def probe_question(charge_id: str, teacher: Teacher, call: Call, chat: ChatTokenizer) -> Question:
    """The probe's few tokens, with what else `call` says."""
    short = replace(call, messages=PROBE_MESSAGES, max_tokens=PROBE_TOKENS)
    return make_question(charge_id, teacher, short, chat, PROBE_TOKENS)


def asked_directly(teacher: Teacher) -> Teacher:
    """The teacher as single questions reach it, at its price for those."""
    if not teacher.batch_api:
        return teacher
    price = teacher.usd_per_million
    whole = Price(input=price.input * _DIRECT, output=price.output * _DIRECT)
    return teacher.model_copy(update={"batch_api": False, "usd_per_million": whole})


def worst_of(questions: Iterable[Question]) -> int:
    """What they cost at most, in micro-dollars."""
    return sum(question.worst_microusd for question in questions)


def unpaid(what: str, questions: Iterable[Question], instead: str = "") -> Unfit:
    """Why a pipeline fails whose budget does not pay for these questions."""
    return Unfit(
        reasons.BUDGET_EXHAUSTED,
        f"`budget.teacher_usd` does not pay for {what} "
        f"({worst_of(questions) / 1e6:.6f} USD at the worst): raise it{instead}",
        "budget.teacher_usd",
    )


def book_worst(session: Session, purse: Purse, questions: Iterable[Question]) -> bool:
    """Book questions that are about to be asked: all, or none (False) where money is short."""
    detail = "a question whose answer is not known"
    lines = [Line(q.charge_id, "unknown", q.worst_microusd, detail=detail) for q in questions]
    return settle(session, purse, lines, release=0)


def book(
    session: Session, purse: Purse, charge_id: str, outcome: Outcome, teacher: Teacher, worst: int
) -> int:
    """Replace a pessimistic charge by what the outcome tells; keep it where it tells nothing.
    Return what stays booked."""
    price = teacher.usd_per_million
    lock(session, purse)
    if isinstance(outcome, Answered) or (isinstance(outcome, Reject) and outcome.usage):
        usage = outcome.usage
        assert usage is not None, "checked above"
        cost = cost_microusd(price, usage.prompt_tokens, usage.completion_tokens)
        if cost <= worst:
            correct(session, purse, charge_id, "probe", cost, "a question about the teacher")
            return cost
    elif not outcome.lost:
        correct(session, purse, charge_id, "probe", 0, f"not billed: {outcome.detail}")
        return 0
    return worst


class PaidCalls:
    """Questions that are booked already, while they are asked."""

    def __init__(self, engine: Engine, purse: Purse, questions: Sequence[Question]) -> None:
        self._engine = engine
        self._purse = purse
        self._open = {question.charge_id: question for question in questions}
        self.spent_microusd = 0

    async def ask(self, client: TeacherClient, question: Question, *, deadline: float) -> Outcome:
        """Ask, and book what it came to. An address that may not be asked is a Reject."""
        del self._open[question.charge_id]
        try:
            outcome = await client.ask(question.call, deadline=deadline)
        except PermanentError as error:
            outcome = Reject(error.reason, str(error))
        crash_point("question_answered")
        CALLS.labels("answered" if isinstance(outcome, Answered) else outcome.reason).inc()
        stays = await asyncio.to_thread(self._book, question, outcome)
        self.spent_microusd += stays
        return outcome

    def _book(self, question: Question, outcome: Outcome) -> int:
        with transaction(self._engine) as session:
            return book(
                session,
                self._purse,
                question.charge_id,
                outcome,
                question.teacher,
                question.worst_microusd,
            )

    def close(self) -> None:
        """Take back what was booked and not asked."""
        with transaction(self._engine) as session:
            lock(session, self._purse)
            for charge_id in self._open:
                correct(session, self._purse, charge_id, "probe", 0, "not asked after all")
        self._open.clear()
