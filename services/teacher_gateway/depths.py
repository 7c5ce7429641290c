"""How many log-probabilities an endpoint gives for a token: asked from the most on."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from services.teacher_gateway import reasons
from services.teacher_gateway.fitness import TOO_FEW_LOGPROBS, Unfit, judge, too_few
from services.teacher_gateway.fitness import without_logprobs as gave_none
from services.teacher_gateway.teachers.outcomes import Answered, Outcome, Reject
from stillhouse.contracts.chat import ChatTokenizer
from stillhouse.contracts.spec import Signal, Teacher

# What public endpoints bear where they refuse more.
COMMON_DEPTHS = (20, 5)
# A teacher that says so about one question may answer another.
_TRY_FEWER = frozenset({reasons.REFUSED_BY_TEACHER, reasons.MISSING_LOGPROBS})


@dataclass(frozen=True)
class Found:
    """The best signal that a teacher gave, and the last thing that it said.

    `unfit`: why it is no better, with what to change for a spec that needs it. `outcome` is a
    Retry where nobody answered, which says nothing about signals.
    """

    signal: Signal
    outcome: Outcome
    unfit: Unfit | None = None


def depths(k: int) -> list[int]:
    """What to ask for, one after the other."""
    return [k, *(depth for depth in COMMON_DEPTHS if depth < k)]


async def find_depth(
    ask: Callable[[Signal], Awaitable[Outcome]],
    teacher: Teacher,
    signal: Signal,
    chat: ChatTokenizer,
    expected: int,
    *,
    field: str,
) -> Found:
    """Ask for fewer and fewer log-probabilities until the teacher gives usable ones."""
    text, said = signal.model_copy(update={"kind": "text"}), ""
    for depth in depths(signal.k):
        asked = signal.model_copy(update={"kind": "topk", "k": depth})
        outcome = await ask(asked)
        unfit = judge(outcome, teacher, asked, chat, expected, field=field)
        if isinstance(outcome, Answered):
            if unfit is None:
                fewer = depth < signal.k
                unfit = too_few(teacher.name, signal.k, depth, said) if fewer else None
                return Found(asked, outcome, unfit)
            if unfit.reason == TOO_FEW_LOGPROBS and unfit.depth:
                unfit = too_few(teacher.name, signal.k, unfit.depth)
                return Found(asked.model_copy(update={"k": unfit.depth}), outcome, unfit)
            return Found(text, outcome, unfit)
        if not (isinstance(outcome, Reject) and outcome.reason in _TRY_FEWER):
            return Found(text, outcome, unfit)
        if outcome.reason == reasons.REFUSED_BY_TEACHER:
            said = outcome.detail
    return Found(text, outcome, gave_none(teacher.name, field, said))
