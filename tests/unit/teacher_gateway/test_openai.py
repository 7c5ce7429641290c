"""What an OpenAI-compatible endpoint is asked, and what its replies mean."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest

from services.teacher_gateway.teachers.endpoint import retry_after
from services.teacher_gateway.teachers.openai import OpenAITeacher, open_openai
from services.teacher_gateway.teachers.outcomes import (
    Answered,
    Call,
    Outcome,
    Reject,
    Retry,
    Usage,
)
from services.teacher_gateway.timeouts import DEPLOYED, EMBEDDED
from stillhouse.contracts.chat import Message
from stillhouse.contracts.spec import Signal, Teacher
from tests.support.teacher import MODEL, Fault, running_teacher

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


def ask_all(url: str, *calls: Call, kind: str = "text", **more: Any) -> list[Outcome]:
    """Ask one client for several calls, one after another."""
    asked = teacher(url=url, model=MODEL, **more)
    signal = Signal.model_validate({"kind": kind, "k": 5, "max_tokens": 9})

    async def ask() -> list[Outcome]:
        key = "s3cret-key-0042" if asked.api_key else None
        async with open_openai(asked, signal, key=key, private=True) as client:
            return [await client.ask(call, deadline=30) for call in calls]

    return asyncio.run(ask())


def hello(name: str = "item-1", **more: Any) -> Call:
    return Call([Message(role="user", content=f"Hello [{name}]")], name, **more)


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
    body = client().request(Call([Message(role="user", content="Hello")], "item-1"))
    assert body["logprobs"] is True
    assert (body["top_logprobs"], body["max_tokens"], body["temperature"], body["top_p"]) == (
        5,
        9,
        1.0,
        1,
    )
    assert body["seed"] == client().request(Call([], "item-1"))["seed"]
    assert body["seed"] != client().request(Call([], "item-2"))["seed"]
    assert "logprobs" not in client("text").request(Call([], "item-1"))


def test_a_call_may_ask_otherwise_than_the_signal() -> None:
    body = client().request(hello(max_tokens=1, temperature=0.5, top_p=0.9))
    assert (body["max_tokens"], body["temperature"], body["top_p"]) == (1, 0.5, 0.9)


def test_a_conversation_with_tools_goes_out_as_it_is() -> None:
    tools = [{"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}]
    turns = [
        {"role": "system", "content": "Be short."},
        {"role": "user", "content": "1 + 1?"},
        {
            "role": "assistant",
            "tool_calls": [
                {
                    "id": "c1",
                    "type": "function",
                    "function": {"name": "add", "arguments": '{"a": 1}'},
                }
            ],
        },
        {"role": "tool", "tool_call_id": "c1", "content": "2"},
        {"role": "assistant", "content": "2"},
        {"role": "user", "content": "Sure?"},
    ]
    messages = [Message.model_validate(turn) for turn in turns]
    body = client().request(Call(messages, "item-1", tools=tools))
    assert body["messages"] == turns
    assert body["tools"] == tools
    assert "tools" not in client().request(hello())


@pytest.mark.parametrize(
    "choice",
    [
        {
            "message": {
                "content": None,
                "tool_calls": [{"id": "c1", "function": {"name": "f", "arguments": "{}"}}],
            },
            "finish_reason": "tool_calls",
            "logprobs": None,
        },
        {
            "message": {"content": None, "function_call": {"name": "f", "arguments": "{}"}},
            "finish_reason": "function_call",
            "logprobs": None,
        },
        {"message": {"content": "4", "reasoning_content": "2 + 2 is 4."}},
        {"message": {"content": "4", "reasoning": "2 + 2 is 4.", "tool_calls": []}},
    ],
    ids=["tool_calls", "function_call", "reasoning_content", "reasoning"],
)
def test_calls_of_tools_and_reasoning_are_kept_as_they_came(choice: dict[str, Any]) -> None:
    body = reply(**choice)
    assert client().judge(200, {}, body) == Answered(body.decode(), Usage(7, 3))


@pytest.mark.parametrize(
    "message",
    [
        {"content": None, "reasoning": "Well, let me see"},
        {"content": "", "reasoning_content": "Well, let me see"},
        {"content": ""},  # as providers answer that keep the reasoning to themselves
    ],
)
def test_reasoning_up_to_the_limit_says_what_to_raise(message: dict[str, Any]) -> None:
    body = reply(message=message, finish_reason="length", logprobs=None)
    outcome = client("text").judge(200, {}, body)
    assert isinstance(outcome, Reject)
    assert (outcome.reason, outcome.usage) == ("still_reasoning", Usage(7, 3))
    assert "`signal.max_tokens`" in outcome.detail
    stopped = client("text").judge(200, {}, reply(message={"content": ""}))
    assert isinstance(stopped, Answered)


def test_half_a_character_that_was_scored_is_an_answer() -> None:
    outcome = client().judge(200, {}, reply(message={"content": ""}, finish_reason="length"))
    assert isinstance(outcome, Answered)


def test_parameters_that_a_model_refuses_are_learnt_once(tmp_path: Path) -> None:
    refuses = ("max_tokens", "top_p", "temperature", "n", "seed")
    with running_teacher(tmp_path / "log", refuses=refuses) as running:
        outcomes = ask_all(running.url, hello("item-1"), hello("item-2"))
    assert all(isinstance(outcome, Answered) for outcome in outcomes)
    assert running.bad_requests == len(refuses)
    assert [seen["max_tokens"] for seen in running.requests] == [9, 9]
    assert [seen["seed"] for seen in running.requests] == [None, None]


def test_what_a_call_asks_for_is_never_left_out(tmp_path: Path) -> None:
    with running_teacher(tmp_path / "log", refuses=("temperature",)) as running:
        (outcome,) = ask_all(running.url, hello(temperature=0.5))
    assert isinstance(outcome, Reject)
    assert "'temperature' is not supported" in outcome.detail
    assert running.requests == []


def test_a_limit_that_is_too_high_is_no_other_name(tmp_path: Path) -> None:
    # Under a name that a server does not know, there would be no limit at all.
    message = "'max_tokens' of 9 is not supported, expected at most 4"
    with running_teacher(tmp_path / "log") as running:
        running.script(Fault("status", status=400, message=message, attempts=(1,)))
        first, second = ask_all(running.url, hello(), hello())
    assert isinstance(first, Reject)
    assert isinstance(second, Answered)
    assert [seen["max_tokens"] for seen in running.requests] == [9, 9]


def test_a_key_that_an_error_repeats_is_not_repeated(tmp_path: Path) -> None:
    with running_teacher(tmp_path / "log", api_key="s3cret-key-0042") as running:
        running.script(Fault("echoes_key"))
        (outcome,) = ask_all(running.url, hello(), api_key={"env": "LLM_KEY"})
    assert isinstance(outcome, Reject)
    assert "no such plan for [key]" in outcome.detail
    assert "s3cret" not in outcome.detail


def test_an_overloaded_endpoint_says_when_to_come_back() -> None:
    outcome = client().judge(529, {"Retry-After": "7"}, b"{}")
    assert isinstance(outcome, Retry)
    assert (outcome.reason, outcome.after, outcome.away) == ("teacher_error", 7.0, True)


@pytest.mark.parametrize(
    ("status", "kind", "reason", "lost"),
    [
        (429, Retry, "teacher_rate_limited", False),
        (500, Retry, "teacher_error", False),
        (503, Retry, "teacher_error", False),
        (529, Retry, "teacher_error", False),
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


def test_both_tables_of_timeouts_hold() -> None:
    for times in (EMBEDDED, DEPLOYED):
        times.check()
        times.for_jobs.check()
