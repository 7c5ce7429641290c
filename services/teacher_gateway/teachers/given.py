"""Answers that the user gave along with the prompts: read, judged like a teacher's, never asked."""

from __future__ import annotations

from services.teacher_gateway import reasons
from services.teacher_gateway.teachers.completions import (
    Unreadable,
    judge_choice,
    read_completion,
    usage_of,
)
from services.teacher_gateway.teachers.outcomes import Answered, Call, Outcome, Reject, Usage
from stillhouse.contracts.spec import Signal


class GivenAnswers:
    """Returns each call's own answer. Nothing is bought, so nothing is ever lost."""

    def __init__(self, signal: Signal) -> None:
        self._signal = signal

    async def ask(self, call: Call, *, deadline: float) -> Outcome:
        """Return the answer given along, with the tokens that it counts, if it counts them."""
        if call.given is None:
            return Reject(
                reasons.NO_GIVEN_ANSWER,
                "the teacher's answers are `given`, and this prompt carries none",
            )
        try:
            completion = read_completion(call.given.encode(errors="replace"))
        except Unreadable as error:
            return Reject(reasons.TEACHER_INVALID, f"the answer given along: {error}"[:300])
        usage = usage_of(completion) or Usage(0, 0)
        return judge_choice(completion, usage, self._signal) or Answered(call.given, usage)
