"""Answers given along: read and judged, never asked for."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest
from pydantic import ValidationError

from services.teacher_gateway.teachers.outcomes import Answered, Call, Outcome, Reject, Usage
from services.teacher_gateway.teachers.routes import open_teacher
from stillhouse.contracts.chat import Message
from stillhouse.contracts.spec import Signal, Teacher
from tests.support.gateway import make_settings


def teacher(**more: Any) -> Teacher:
    return Teacher.model_validate(
        {
            "name": "t",
            "answers": "given",
            "model": "m",
            "terms": "own-data",
            "usd_per_million": {"input": 0, "output": 0},
            **more,
        }
    )


def ask(given: str | None, kind: str = "text") -> Outcome:
    signal = Signal.model_validate({"kind": kind})
    call = Call([Message(role="user", content="Hello")], "item-1", given=given)

    async def asked() -> Outcome:
        settings = make_settings("sqlite://")
        async with open_teacher(teacher(), signal, settings, environ={}) as client:
            return await client.ask(call, deadline=1)

    return asyncio.run(asked())


def completion(**more: Any) -> str:
    message = {"role": "assistant", "content": "Hi."}
    return json.dumps({"choices": [{"message": message, "finish_reason": "stop"}], **more})


def test_it_is_returned_with_the_tokens_that_it_counts() -> None:
    usage = {"prompt_tokens": 7, "completion_tokens": 3}
    assert ask(completion(usage=usage)) == Answered(completion(usage=usage), Usage(7, 3))
    assert ask(completion()) == Answered(completion(), Usage(0, 0))


@pytest.mark.parametrize(
    ("given", "kind", "reason"),
    [
        (None, "text", "no_given_answer"),
        ("Hi.", "text", "teacher_invalid"),
        ("\ud800", "text", "teacher_invalid"),
        ('{"choices": []}', "text", "teacher_invalid"),
        (completion(), "topk", "missing_logprobs"),
    ],
)
def test_one_that_cannot_be_used_is_rejected_and_nothing_was_lost(
    given: str | None, kind: str, reason: str
) -> None:
    outcome = ask(given, kind)
    assert isinstance(outcome, Reject)
    assert (outcome.reason, outcome.lost) == (reason, False)


def test_nothing_is_bought_so_nothing_is_priced() -> None:
    with pytest.raises(ValidationError, match="nothing is bought"):
        teacher(usd_per_million={"input": 0, "output": 1})
