"""What a teacher's reply means, without a network."""

from __future__ import annotations

import json
from typing import Any

import pytest

from services.teacher_gateway.teachers.openai import OpenAITeacher, api_key, retry_after
from services.teacher_gateway.teachers.outcomes import Answered, Reject, Retry, Usage
from services.teacher_gateway.timeouts import DEPLOYED, EMBEDDED
from stillhouse.chassis.errors import PermanentError
from stillhouse.contracts.chat import Message
from stillhouse.contracts.spec import Signal, Teacher

USAGE = {"prompt_tokens": 7, "completion_tokens": 3}


def teacher(**more: Any) -> Teacher:
    return Teacher.model_validate(
        {
            "name": "t",
            "url": "https://llm.example.com/v1/",
            "model": "m",
            "terms": "own-weights",
            "usd_per_million": {"input": 1, "output": 2},
            **more,
        }
    )


def client(kind: str = "topk", key: str | None = None) -> OpenAITeacher:
    signal = Signal.model_validate({"kind": kind, "k": 5, "max_tokens": 9})
    return OpenAITeacher(None, teacher(), signal, key)  # type: ignore[arg-type]


def reply(change: dict[str, Any] | None = None, **choice: Any) -> bytes:
    one = {
        "message": {"role": "assistant", "content": "Hi."},
        "finish_reason": "stop",
        "logprobs": {"content": [{"token": "Hi", "logprob": -0.1, "top_logprobs": []}]},
        **choice,
    }
    return json.dumps({"choices": [one], "usage": USAGE, **(change or {})}).encode()


def test_an_answer_is_kept_as_it_came() -> None:
    body = reply()
    assert client().judge(200, {}, body) == Answered(body.decode(), Usage(7, 3))


def test_the_request_asks_for_raw_distributions() -> None:
    body = client().request([Message(role="user", content="Hello")], "item-1")
    assert body["logprobs"] is True
    assert (body["top_logprobs"], body["max_tokens"], body["temperature"], body["top_p"]) == (
        5,
        9,
        1.0,
        1,
    )
    assert body["seed"] == client().request([], "item-1")["seed"]
    assert body["seed"] != client().request([], "item-2")["seed"]
    assert "logprobs" not in client("text").request([], "item-1")


@pytest.mark.parametrize(
    ("status", "kind", "reason", "lost"),
    [
        (429, Retry, "teacher_rate_limited", False),
        (500, Retry, "teacher_error", False),
        (503, Retry, "teacher_error", False),
        (401, Retry, "teacher_error", False),
        (408, Retry, "teacher_timeout", True),
        (502, Retry, "teacher_error", True),
        (504, Retry, "teacher_error", True),
        (524, Retry, "teacher_error", True),
        (400, Reject, "refused_by_teacher", False),
        (404, Reject, "refused_by_teacher", False),
        (302, Reject, "teacher_invalid", False),
    ],
)
def test_a_status_decides(status: int, kind: type, reason: str, lost: bool) -> None:
    outcome = client().judge(status, {}, b'{"error": "no\n no"}')
    assert isinstance(outcome, kind)
    assert (outcome.reason, outcome.lost) == (reason, lost)  # type: ignore[union-attr]


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"<html>",
        b'{"choices": []}',
        b'{"choices": [{}]}',
        b'{"choices": [{"message": {"content": "x"}, "logprobs": {"content": [{"a": NaN}]}}]}',
        b'{"x":' + b"[" * 100_000,
        b'{"choices": [{"message": {"content": "x"}, "logprobs": {"content": ' + b"[" * 100_000,
        b"\xff\xfe",
        reply()[:-20],
        b"\x1f\x8b" + b"0" * 30,
    ],
)
def test_garbage_is_asked_again_and_may_have_been_billed(body: bytes) -> None:
    outcome = client().judge(200, {}, body)
    assert isinstance(outcome, Retry)
    assert (outcome.reason, outcome.lost) == ("teacher_invalid", True)


@pytest.mark.parametrize(
    ("body", "reason", "usage"),
    [
        (reply(logprobs=None), "missing_logprobs", Usage(7, 3)),
        (reply(logprobs={"content": []}), "missing_logprobs", Usage(7, 3)),
        (reply(finish_reason="content_filter"), "refused_by_teacher", Usage(7, 3)),
        (
            reply(message={"content": None, "refusal": "I cannot."}),
            "refused_by_teacher",
            Usage(7, 3),
        ),
        (reply(message={"content": None}), "teacher_invalid", Usage(7, 3)),
        (reply(finish_reason="tool_calls"), "teacher_invalid", Usage(7, 3)),
        (reply({"usage": None}), "teacher_invalid", None),
    ],
)
def test_an_unusable_answer_is_rejected_with_its_bill(
    body: bytes, reason: str, usage: Usage | None
) -> None:
    outcome = client().judge(200, {}, body)
    assert isinstance(outcome, Reject)
    assert (outcome.reason, outcome.usage, outcome.lost) == (reason, usage, usage is None)


def test_text_needs_no_logprobs() -> None:
    assert isinstance(client("text").judge(200, {}, reply(logprobs=None)), Answered)


@pytest.mark.parametrize(
    ("header", "seconds"),
    [
        ("3", 3.0),
        ("0.5", 0.5),
        ("-4", 0.0),
        ("1e12", 86_400.0),
        ("nan", None),
        ("soon", None),
        ("", None),
        ("Thu, 01 Jan 1970 00:01:40 GMT", 40.0),
        ("Thu, 01 Jan 1970 00:00:00 GMT", 0.0),
    ],
)
def test_retry_after_is_read_in_both_forms(header: str, seconds: float | None) -> None:
    assert retry_after({"Retry-After": header}, 60.0) == seconds


def test_a_key_comes_from_the_environment_and_never_from_our_own_variables() -> None:
    named = teacher(api_key={"env": "LLM_KEY"})
    assert api_key(named, {"LLM_KEY": "s3cret"}) == "s3cret"
    assert api_key(teacher(), {}) is None
    with pytest.raises(PermanentError, match="LLM_KEY"):
        api_key(named, {})
    for own in ("TEACHER_GATEWAY_KEY_PEPPER", "AWS_SECRET_ACCESS_KEY"):
        with pytest.raises(PermanentError, match="not a teacher's key"):
            api_key(teacher(api_key={"env": own}), {own: "x"})


def test_both_tables_of_timeouts_hold() -> None:
    for times in (EMBEDDED, DEPLOYED):
        times.check()
        times.for_jobs.check()
