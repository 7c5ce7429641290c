"""Anthropic's Messages API after its published schema: what is asked, and what replies mean."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest

from services.teacher_gateway.teachers.anthropic import AnthropicTeacher, open_anthropic
from services.teacher_gateway.teachers.completions import read_completion
from services.teacher_gateway.teachers.outcomes import (
    Answered,
    Call,
    Outcome,
    Reject,
    Retry,
    Usage,
)
from stillhouse.contracts.chat import Message
from stillhouse.contracts.spec import Signal, Teacher
from tests.support.teacher import MODEL, Fault, running_teacher

TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "get_stock_price",
            "description": "Get the current stock price for a given ticker symbol.",
            "parameters": {"type": "object", "properties": {"ticker": {"type": "string"}}},
        },
    },
    {"type": "function", "function": {"name": "now"}},
]
TALK = [
    {"role": "system", "content": "Be short."},
    {"role": "system", "content": "Be kind."},
    {"role": "user", "content": "What's the S&P 500 at today?"},
    {
        "role": "assistant",
        "content": "I look it up.",
        "tool_calls": [
            {
                "id": "toolu_01D",
                "type": "function",
                "function": {"name": "get_stock_price", "arguments": '{"ticker": "^GSPC"}'},
            },
            {"id": "call:2", "type": "function", "function": {"name": "now", "arguments": "{}"}},
        ],
    },
    {"role": "tool", "tool_call_id": "toolu_01D", "content": "259.75 USD"},
    {"role": "tool", "tool_call_id": "call:2", "content": "noon"},
    {"role": "user", "content": "And?"},
]

KEY = "s3cret-key-0042"


def teacher(**more: Any) -> Teacher:
    return Teacher.model_validate(
        {
            "name": "t",
            "url": "https://llm.example.com/v1/",
            "api": "anthropic",
            "model": MODEL,
            "api_key": {"env": "LLM_KEY"},
            "terms": "own-weights",
            "usd_per_million": {"input": 1, "output": 2},
            **more,
        }
    )


def client(kind: str = "text", temperature: float = 1.0) -> AnthropicTeacher:
    signal = {"kind": kind, "max_tokens": 9, "temperature": temperature}
    return AnthropicTeacher(
        None,  # type: ignore[arg-type]
        teacher(),
        Signal.model_validate(signal),
        KEY,
    )


def call(*turns: dict[str, Any], **more: Any) -> Call:
    return Call([Message.model_validate(turn) for turn in turns], "item-1", **more)


def ask_all(url: str, *calls: Call) -> list[Outcome]:
    signal = Signal.model_validate({"kind": "text", "max_tokens": 9})

    async def ask() -> list[Outcome]:
        spec = teacher(url=url)
        async with open_anthropic(spec, signal, key=KEY, private=True) as opened:
            return [await opened.ask(each, deadline=30) for each in calls]

    return asyncio.run(ask())


def reply(*blocks: dict[str, Any], **more: Any) -> bytes:
    message = {
        "id": "msg_013Zva2CMHLNnXjNJJKqJ2EF",
        "type": "message",
        "role": "assistant",
        "model": "claude-sonnet-5",
        "content": list(blocks) or [{"type": "text", "text": "Hi!", "citations": None}],
        "stop_reason": "end_turn",
        "stop_sequence": None,
        "usage": {
            "input_tokens": 2095,
            "output_tokens": 503,
            "cache_creation_input_tokens": 10,
            "cache_read_input_tokens": 5,
            "service_tier": "standard",
        },
        **more,
    }
    return json.dumps(message).encode()


def answer(body: bytes) -> dict[str, Any]:
    """The chat completion that a reply is stored as, which every route's reader must read."""
    outcome = client().judge(200, {}, body)
    assert isinstance(outcome, Answered)
    read_completion(outcome.body.encode())
    return json.loads(outcome.body)


def test_a_conversation_is_brought_into_turns_and_blocks() -> None:
    body = client().request(call(*TALK, tools=TOOLS))
    assert body == {
        "model": MODEL,
        "max_tokens": 9,
        "stream": False,
        "system": "Be short.\n\nBe kind.",
        "messages": [
            {
                "role": "user",
                "content": [{"type": "text", "text": "What's the S&P 500 at today?"}],
            },
            {
                "role": "assistant",
                "content": [
                    {"type": "text", "text": "I look it up."},
                    {
                        "type": "tool_use",
                        "id": "toolu_01D",
                        "name": "get_stock_price",
                        "input": {"ticker": "^GSPC"},
                    },
                    {"type": "tool_use", "id": "toolu_0002", "name": "now", "input": {}},
                ],
            },
            {
                "role": "user",
                "content": [
                    {"type": "tool_result", "tool_use_id": "toolu_01D", "content": "259.75 USD"},
                    {"type": "tool_result", "tool_use_id": "toolu_0002", "content": "noon"},
                    {"type": "text", "text": "And?"},
                ],
            },
        ],
        "tools": [
            {
                "name": "get_stock_price",
                "description": "Get the current stock price for a given ticker symbol.",
                "input_schema": {"type": "object", "properties": {"ticker": {"type": "string"}}},
            },
            {"name": "now", "input_schema": {"type": "object", "properties": {}}},
        ],
    }


def test_calls_without_ids_and_ids_used_twice_get_their_own() -> None:
    function = {"type": "function", "function": {"name": "now", "arguments": "{}"}}
    turns = [
        {"role": "user", "content": "When?"},
        {"role": "assistant", "tool_calls": [function]},
        {"role": "tool", "content": "noon"},
        {"role": "assistant", "tool_calls": [{**function, "id": "c1"}]},
        {"role": "tool", "tool_call_id": "c1", "content": "later"},
        {"role": "assistant", "tool_calls": [{**function, "id": "c1"}]},
        {"role": "tool", "tool_call_id": "c1", "content": "evening"},
    ]
    blocks = [turn["content"][0] for turn in client().request(call(*turns))["messages"][1:]]
    asked = [block["id"] for block in blocks if block["type"] == "tool_use"]
    told = [block["tool_use_id"] for block in blocks if block["type"] == "tool_result"]
    assert asked == told
    assert len(set(asked)) == 3


@pytest.mark.parametrize(
    ("temperature", "asked", "sent"),
    [
        (1.0, {}, {}),  # newer models refuse the parameter, even with its default
        (0.5, {}, {"temperature": 0.5}),
        (0.5, {"temperature": 1.0}, {}),
        (1.0, {"temperature": 0.0, "top_p": 0.9}, {"temperature": 0.0, "top_p": 0.9}),
        (1.0, {"top_p": 1.0}, {}),
    ],
)
def test_sampling_is_named_only_where_it_is_not_the_default(
    temperature: float, asked: dict[str, float], sent: dict[str, float]
) -> None:
    user = {"role": "user", "content": "Hello"}
    body = client(temperature=temperature).request(call(user, **asked))
    assert {name: body[name] for name in ("temperature", "top_p") if name in body} == sent
    assert "seed" not in body


@pytest.mark.parametrize(
    ("turns", "tools", "detail"),
    [
        ([{"role": "user", "content": "a"}, {"role": "system", "content": "b"}], None, "beginning"),
        ([{"role": "tool", "tool_call_id": "c9", "content": "a"}], None, "'c9'"),
        (
            [
                {
                    "role": "assistant",
                    "tool_calls": [{"function": {"name": "f", "arguments": "[1]"}}],
                }
            ],
            None,
            "JSON object",
        ),
        ([{"role": "user", "content": "a"}], [{"type": "custom", "name": "x"}], "'custom'"),
    ],
)
def test_what_the_api_cannot_express_is_refused_without_a_call(
    turns: list[dict[str, Any]], tools: list[dict[str, Any]] | None, detail: str
) -> None:
    outcome = asyncio.run(client().ask(call(*turns, tools=tools), deadline=1))
    assert isinstance(outcome, Reject)
    assert (outcome.reason, outcome.lost) == ("unsupported_conversation", False)
    assert detail in outcome.detail


def test_a_signal_is_refused_without_a_call() -> None:
    asked = call({"role": "user", "content": "Hello"})
    outcome = asyncio.run(client("topk").ask(asked, deadline=1))
    assert isinstance(outcome, Reject)
    assert outcome.reason == "missing_logprobs"


def test_a_message_becomes_a_chat_completion() -> None:
    found = answer(reply())
    assert (found["id"], found["model"]) == ("msg_013Zva2CMHLNnXjNJJKqJ2EF", "claude-sonnet-5")
    assert found["object"] == "chat.completion"
    assert found["choices"] == [
        {
            "index": 0,
            "message": {"role": "assistant", "content": "Hi!"},
            "finish_reason": "stop",
            "logprobs": None,
        }
    ]
    assert found["usage"] == {
        "prompt_tokens": 2110,
        "completion_tokens": 503,
        "total_tokens": 2613,
    }
    assert client().judge(200, {}, reply()).usage == Usage(2110, 503)  # type: ignore[union-attr]


def test_thinking_is_kept_apart_and_texts_are_joined() -> None:
    found = answer(
        reply(
            {"type": "thinking", "thinking": "Hm.", "signature": "EqQB"},
            {"type": "redacted_thinking", "data": "EmwK"},
            {"type": "text", "text": "One, "},
            {"type": "text", "text": "tw\u00f6."},
        )
    )
    message = found["choices"][0]["message"]
    assert message == {
        "role": "assistant",
        "content": "One, tw\u00f6.",
        "reasoning_content": "Hm.",
    }


def test_calls_of_tools_become_tool_calls() -> None:
    use = {"type": "tool_use", "id": "toolu_01", "name": "now", "input": {"zone": "M\u00fcnchen"}}
    choice = answer(reply(use, stop_reason="tool_use"))["choices"][0]
    assert choice["finish_reason"] == "tool_calls"
    assert choice["message"]["content"] is None
    (made,) = choice["message"]["tool_calls"]
    assert (made["id"], made["type"], made["function"]["name"]) == ("toolu_01", "function", "now")
    assert json.loads(made["function"]["arguments"]) == {"zone": "M\u00fcnchen"}
    # What came back can be asked again as a turn of a conversation.
    Message.model_validate(choice["message"])


@pytest.mark.parametrize(
    ("stop_reason", "finish_reason"),
    [
        ("end_turn", "stop"),
        ("stop_sequence", "stop"),
        ("max_tokens", "length"),
        ("model_context_window_exceeded", "length"),
    ],
)
def test_why_it_stopped_is_said_in_the_words_of_a_completion(
    stop_reason: str, finish_reason: str
) -> None:
    assert answer(reply(stop_reason=stop_reason))["choices"][0]["finish_reason"] == finish_reason


def test_an_empty_answer_is_an_answer() -> None:
    assert answer(reply(content=[]))["choices"][0]["message"]["content"] == ""


@pytest.mark.parametrize(
    ("body", "reason", "detail"),
    [
        (
            reply(
                stop_reason="refusal",
                stop_details={"type": "refusal", "category": "cyber", "explanation": "No harm."},
            ),
            "refused_by_teacher",
            "No harm.",
        ),
        (reply(stop_reason="refusal", stop_details=None), "refused_by_teacher", "refused"),
        (reply(stop_reason="pause_turn"), "teacher_invalid", "'pause_turn'"),
        (reply(stop_reason="compaction"), "teacher_invalid", "'compaction'"),
        (reply(stop_reason=None), "teacher_invalid", "None"),
        (reply(stop_reason="tool_use"), "teacher_invalid", "without a call"),
        (
            reply({"type": "server_tool_use", "id": "s", "name": "web_search", "input": {}}),
            "teacher_invalid",
            "server_tool_use",
        ),
        (
            reply(
                {"type": "thinking", "thinking": "Hm", "signature": ""}, stop_reason="max_tokens"
            ),
            "still_reasoning",
            "signal.max_tokens",
        ),
    ],
)
def test_an_unusable_message_is_rejected_with_its_bill(
    body: bytes, reason: str, detail: str
) -> None:
    outcome = client().judge(200, {}, body)
    assert isinstance(outcome, Reject)
    assert (outcome.reason, outcome.usage, outcome.lost) == (reason, Usage(2110, 503), False)
    assert detail in outcome.detail


@pytest.mark.parametrize(
    "usage", [None, {"input_tokens": -1, "output_tokens": 3}, {"input_tokens": 1}]
)
def test_without_its_usage_nobody_knows_what_a_message_cost(usage: dict[str, int] | None) -> None:
    outcome = client().judge(200, {}, reply(usage=usage))
    assert isinstance(outcome, Reject | Retry)
    assert (outcome.reason, outcome.lost) == ("teacher_invalid", True)


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"<html>",
        b"{}",
        b'{"type":"error","error":{"type":"overloaded_error","message":"Overloaded"}}',
        b"\xff\xfe",
        reply()[:-20],
        b'{"id":"m","model":"m","content":' + b"[" * 100_000,
        b'{"id":"m","model":"m","content":[{"type":"text","text":"\xff"}]}',
    ],
)
def test_garbage_is_asked_again_and_may_have_been_billed(body: bytes) -> None:
    outcome = client().judge(200, {}, body)
    assert isinstance(outcome, Retry)
    assert (outcome.reason, outcome.lost) == ("teacher_invalid", True)


@pytest.mark.parametrize(
    ("status", "error", "kind", "reason", "lost", "away"),
    [
        (400, "invalid_request_error", Reject, "refused_by_teacher", False, None),
        (401, "authentication_error", Retry, "teacher_error", False, False),
        (402, "billing_error", Retry, "teacher_error", False, False),
        (403, "permission_error", Retry, "teacher_error", False, False),
        (404, "not_found_error", Reject, "refused_by_teacher", False, None),
        (413, "request_too_large", Reject, "refused_by_teacher", False, None),
        (429, "rate_limit_error", Retry, "teacher_rate_limited", False, True),
        (500, "api_error", Retry, "teacher_error", False, True),
        (504, "timeout_error", Retry, "teacher_error", True, True),
        (529, "overloaded_error", Retry, "teacher_error", False, True),
    ],
)
def test_every_error_of_the_api_decides(
    status: int, error: str, kind: type, reason: str, lost: bool, away: bool | None
) -> None:
    body = {"type": "error", "error": {"type": error, "message": "No."}, "request_id": "req_1"}
    headers = {"Retry-After": "7"}
    outcome = client().judge(status, headers, json.dumps(body).encode())
    assert isinstance(outcome, kind)
    assert (outcome.reason, outcome.lost) == (reason, lost)  # type: ignore[union-attr]
    if isinstance(outcome, Retry):
        assert outcome.away is away
        assert outcome.after == (7.0 if away else None)


@pytest.mark.parametrize(
    "message",
    [
        "You have reached your specified API usage limits. You will regain access on 2026-01-01.",
        "You have reached your specified workspace API usage limits.",
        "Your credit balance is too low to access the Anthropic API.",
    ],
)
def test_an_account_at_its_limit_costs_no_item(message: str) -> None:
    error = {"type": "error", "error": {"type": "invalid_request_error", "message": message}}
    outcome = client().judge(400, {}, json.dumps(error).encode())
    assert isinstance(outcome, Retry)
    assert (outcome.away, outcome.lost) == (True, False)
    assert message[:30] in outcome.detail


def test_the_published_schema_takes_what_is_asked(tmp_path: Path) -> None:
    with running_teacher(tmp_path / "log", api="anthropic", api_key=KEY) as running:
        running.script(
            Fault("tool_call", match="[tool]"),
            Fault("reasoning", match="[think]"),
            Fault("echoes_key", match="[key]"),
        )
        user = {"role": "user", "content": "Hello [tool]"}
        long, called, thought, echoed = ask_all(
            running.url,
            call(*TALK, tools=TOOLS),
            call(user, tools=TOOLS),
            call({"role": "user", "content": "Hello [think]"}),
            call({"role": "user", "content": "Hello [key]"}),
        )
    assert isinstance(long, Answered)
    assert isinstance(called, Answered)
    message = json.loads(called.body)["choices"][0]["message"]
    assert message["tool_calls"][0]["function"]["name"] == "get_stock_price"
    assert isinstance(thought, Answered)
    message = json.loads(thought.body)["choices"][0]["message"]
    assert message["reasoning_content"] == "Let me think about it."
    assert isinstance(echoed, Reject)
    assert "no such plan for [key]" in echoed.detail
    assert [seen["tools"] for seen in running.requests] == [2, 2, 0, 0]
    invoices = running.invoices()
    assert long.usage == Usage(invoices[0].prompt_tokens, invoices[0].completion_tokens)
