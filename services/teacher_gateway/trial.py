"""One question to a teacher beside a check, for `?check=true&probe=true`.

It is the pipeline's own probe before there is a pipeline: a few tokens, asked and judged the same
way. No budget pays for it, so it is noted in the audit with its cost.
"""

from __future__ import annotations

import asyncio
import os

from services.teacher_gateway.admission import Survey
from services.teacher_gateway.ledger import cost_microusd
from services.teacher_gateway.probe import PROBE_MESSAGES, PROBE_TOKENS, judge
from services.teacher_gateway.problems import FieldError, ProblemError
from services.teacher_gateway.settings import TeacherGatewaySettings
from services.teacher_gateway.teachers.openai import open_teacher
from services.teacher_gateway.teachers.outcomes import Answered, Outcome
from stillhouse.chassis.errors import PermanentError
from stillhouse.contracts.spec import Spec

ASKED_SECONDS = 30.0


def ask_once(spec: Spec, found: Survey, settings: TeacherGatewaySettings) -> int:
    """Ask the teacher of a surveyed spec; return the cost in micro-dollars.

    Raises ProblemError (422) that says why the teacher cannot be asked as the spec asks.
    """
    expected = len(found.tokenizer.chat.encode_prompt(PROBE_MESSAGES))
    try:
        outcome = asyncio.run(_ask(spec, settings))
    except PermanentError as error:
        raise _unfit(error.reason, str(error)) from error
    unfit = judge(outcome, spec, found.tokenizer.chat, expected)
    if unfit is not None:
        raise _unfit(unfit.reason, unfit.detail)
    if not isinstance(outcome, Answered):
        raise _unfit(
            outcome.reason,
            f"the teacher did not answer ({outcome.detail}): check `teachers[0].url`, and that "
            "it is up",
        )
    usage = outcome.usage
    price = spec.teachers[0].usd_per_million
    return cost_microusd(price, usage.prompt_tokens, usage.completion_tokens)


async def _ask(spec: Spec, settings: TeacherGatewaySettings) -> Outcome:
    teacher = spec.teachers[0]
    async with open_teacher(
        teacher,
        spec.signal,
        environ=os.environ,
        private=settings.private_teachers,
        connections=1,
    ) as client:
        return await client.ask(
            PROBE_MESSAGES,
            seed_of=spec.name,
            deadline=min(ASKED_SECONDS, teacher.limits.timeout_seconds),
            max_tokens=PROBE_TOKENS,
        )


def _unfit(reason: str, detail: str) -> ProblemError:
    errors = [FieldError(field="teachers[0]", message=detail)]
    return ProblemError(422, reason.replace("_", "-"), detail, errors=errors)
