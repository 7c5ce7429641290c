"""What a pipeline would come to, from the answers to a few of its prompts."""

from __future__ import annotations

import math
from dataclasses import dataclass

from services.teacher_gateway.admission import Survey
from services.teacher_gateway.preflight import estimates
from services.teacher_gateway.preflight.heard import Heard
from services.teacher_gateway.preflight.views import Estimate, TeacherPreflight
from stillhouse.contracts.spec import Spec, Teacher

# A log-probability that is not the model's own moves by whole nats at temperature 0.5; in bf16 the
# shape of the batch moves it by 0.2.
UNCHANGED_NATS = 0.4


@dataclass(frozen=True)
class Share:
    """What of a pipeline falls to one teacher."""

    items: int
    train_items: int
    prompt_tokens: int


@dataclass(frozen=True)
class Forecast:
    teachers: list[TeacherPreflight]
    cost_usd: Estimate | None
    seconds: Estimate | None
    training_steps: Estimate | None


def forecast(spec: Spec, survey: Survey, heard: list[Heard]) -> Forecast:
    """Figures for each teacher and for the whole; none where a teacher was not heard."""
    shares = [_share(survey, one.teacher) for one in heard]
    teachers = [_teacher(one, share, spec) for one, share in zip(heard, shares, strict=True)]
    asked = [
        teacher for teacher, one in zip(teachers, heard, strict=True) if one.teacher.answers is None
    ]
    trained = estimates.total(
        [
            estimates.scaled(teacher.completion_tokens, share.train_items)
            for teacher, share in zip(teachers, shares, strict=True)
        ]
    )
    return Forecast(
        teachers=teachers,
        cost_usd=estimates.total([teacher.cost_usd for teacher in asked]),
        seconds=estimates.longest([teacher.seconds for teacher in asked]),
        training_steps=estimates.scaled(
            trained, spec.training.passes / spec.training.tokens_per_step
        ),
    )


def _share(survey: Survey, teacher: Teacher) -> Share:
    plan = survey.plan
    mine = [
        (number, len(batch))
        for number, (batch, name) in enumerate(zip(plan.batches, plan.teachers, strict=True))
        if name == teacher.name
    ]
    items = sum(count for _, count in mine)
    return Share(
        items=items,
        train_items=sum(count for number, count in mine if number >= plan.numbers.heldout),
        prompt_tokens=math.ceil(survey.prompt_tokens * items / plan.items),
    )


def _teacher(one: Heard, share: Share, spec: Spec) -> TeacherPreflight:
    most = math.inf if one.teacher.answers else spec.signal.max_tokens
    tokens = estimates.mean([answer.completion_tokens for answer in one.answers], most=most)
    seconds = estimates.mean([a.seconds for a in one.answers if a.seconds is not None])
    price = one.teacher.usd_per_million
    signal = one.found.signal if one.found is not None else one.known
    return TeacherPreflight(
        name=one.teacher.name,
        calls=one.calls,
        answered=len(one.answers),
        signal=None if signal is None or signal.kind == "auto" else signal.kind,
        k=signal.k if signal is not None and signal.kind == "topk" else None,
        raw_logprobs=_raw(one),
        disagreement_nats=one.disagreement,
        ended=estimates.share(sum(answer.ended for answer in one.answers), len(one.answers)),
        completion_tokens=tokens,
        call_seconds=seconds,
        items=share.items,
        cost_usd=estimates.scaled(
            tokens, share.items * price.output / 1e6, share.prompt_tokens * price.input / 1e6
        ),
        seconds=_duration(one.teacher, share, seconds, tokens),
    )


def _raw(one: Heard) -> bool | None:
    if any(change > UNCHANGED_NATS for change in one.changes.values()):
        return False
    return True if len(one.changes) == 2 else None


def _duration(
    teacher: Teacher, share: Share, seconds: Estimate | None, tokens: Estimate | None
) -> Estimate | None:
    """How long all items take at the speed that was seen, and within the limits of the spec."""
    if seconds is None or tokens is None or teacher.batch_api:
        return None
    limits = teacher.limits
    least = 60 * share.items / limits.requests_per_minute if limits.requests_per_minute else 0.0
    if limits.tokens_per_minute:
        answered = share.prompt_tokens + share.items * tokens.value
        least = max(least, 60 * answered / limits.tokens_per_minute)
    found = estimates.scaled(seconds, share.items / limits.concurrency)
    return estimates.at_least(found, least)
