"""Anthropic's Messages API for the billing teacher, after the published schema.

Requests are refused where the API would: a field that it does not know, a missing header, a
system prompt among the turns, an empty text, a call without its answer in the next turn.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from aiohttp import web

from stillhouse.contracts.chat import FunctionCall, Message, ToolCall
from tests.support.teacher_apis import THOUGHTS, BadRequest, Question
from tests.support.teacher_language import Spoken

FIELDS = {
    "model", "max_tokens", "messages", "system", "tools", "tool_choice", "temperature", "top_p",
    "top_k", "stop_sequences", "stream", "metadata", "thinking", "service_tier", "cache_control",
    "container", "output_config",
}  # fmt: skip
ERRORS = {
    400: "invalid_request_error",
    401: "authentication_error",
    402: "billing_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    500: "api_error",
    504: "timeout_error",
    529: "overloaded_error",
}


@dataclass
class Anthropic:
    """`refuses` are parameters that its model does not take any more, such as `temperature`."""

    refuses: tuple[str, ...] = ()
    path: str = "/v1/messages"
    hidden_tokens: int = 25  # its tokenizer and prompt are not ours

    def key_of(self, headers: Mapping[str, str]) -> str | None:
        return headers.get("x-api-key")

    def read(self, headers: Mapping[str, str], body: dict[str, Any]) -> Question:
        if headers.get("anthropic-version") != "2023-06-01":
            raise BadRequest("anthropic-version: header is required")
        for name in body:
            if name not in FIELDS:
                raise BadRequest(f"{name}: Extra inputs are not permitted")
            if name in self.refuses:
                raise BadRequest(f"`{name}` is deprecated for this model.")
        if not isinstance(body.get("max_tokens"), int) or body["max_tokens"] < 1:
            raise BadRequest("max_tokens: Field required")
        if not 0 <= body.get("temperature", 1.0) <= 1:
            raise BadRequest("temperature: range: 0..1")
        system = body.get("system")
        first = [Message(role="system", content=system)] if system else []
        return Question(
            model=str(body.get("model")),
            messages=[*first, *_conversation(body["messages"])],
            max_tokens=body["max_tokens"],
            tools=[_tool(tool) for tool in body.get("tools") or ()],
            temperature=body.get("temperature"),
        )

    def write(self, request_id: str, spoken: Spoken, question: Question) -> dict[str, Any]:
        return {
            "id": f"msg_{request_id}",
            "type": "message",
            "role": "assistant",
            "model": question.model,
            "content": [{"type": "text", "text": spoken.text, "citations": None}],
            "stop_reason": "end_turn" if spoken.finish_reason == "stop" else "max_tokens",
            "stop_sequence": None,
            "stop_details": None,
            "container": None,
            "usage": {
                # As if a part of the prompt had been cached before.
                "input_tokens": spoken.prompt_tokens - 3,
                "cache_creation_input_tokens": 1,
                "cache_read_input_tokens": 2,
                "cache_creation": {"ephemeral_5m_input_tokens": 1, "ephemeral_1h_input_tokens": 0},
                "output_tokens": spoken.completion_tokens,
                "server_tool_use": None,
                "service_tier": "standard",
            },
        }

    def error(
        self, status: int, message: str, headers: Mapping[str, str] | None = None, **fields: Any
    ) -> web.Response:
        kind = ERRORS.get(status, "invalid_request_error" if status < 500 else "api_error")
        error = {"type": kind, "message": message, **fields}
        body = {"type": "error", "error": error, "request_id": "req_011CSHoEeqs5C35K2UUqR7Fy"}
        return web.json_response(body, status=status, headers=headers)

    def lie(self, kind: str, answer: dict[str, Any], tool: str) -> None:
        content, usage = answer["content"], answer["usage"]
        thinking = {"type": "thinking", "thinking": THOUGHTS, "signature": "c2lnbmVk"}
        match kind:
            case "empty_choices":
                answer["content"] = []
            case "tool_call":
                answer["stop_reason"] = "tool_use"
                called = {"text": content[0]["text"]}
                content[:] = [
                    {"type": "text", "text": "I look it up.", "citations": None},
                    {"type": "tool_use", "id": "toolu_01A", "name": tool, "input": called},
                ]
            case "reasoning":
                content.insert(0, thinking)
                content.insert(1, {"type": "redacted_thinking", "data": "b3BhcXVl"})
            case "still_reasoning":
                content[:] = [thinking]
                answer["stop_reason"] = "max_tokens"
            case "refusal" | "content_filter":
                answer["stop_reason"] = "refusal"
                answer["stop_details"] = {
                    "type": "refusal",
                    "category": "cyber",
                    "explanation": "This request could enable harm.",
                }
            case "strange_finish":
                answer["stop_reason"] = "pause_turn"
            case "missing_usage":
                del answer["usage"]
            case "wrong_usage":
                usage["output_tokens"] *= 10
            case _:
                raise ValueError(f"this API has no {kind}")


def _tool(tool: dict[str, Any]) -> dict[str, Any]:
    unknown = set(tool) - {"name", "description", "input_schema", "type", "cache_control", "strict"}
    if unknown or "name" not in tool or tool.get("input_schema", {}).get("type") != "object":
        raise BadRequest(f"tools.0: expected name and input_schema of type object, found {tool}")
    function = {"name": tool["name"], "parameters": tool["input_schema"]}
    return {"type": "function", "function": function}


def _conversation(turns: list[dict[str, Any]]) -> list[Message]:
    if not turns or turns[0]["role"] != "user":
        raise BadRequest("messages: first message must use the user role")
    found: list[Message] = []
    called: list[str] = []  # in the turn before
    seen: set[str] = set()
    for number, turn in enumerate(turns):
        role, content = turn["role"], turn["content"]
        if role not in ("user", "assistant"):
            raise BadRequest(f"messages.{number}.role: Input should be 'user' or 'assistant'")
        blocks = [{"type": "text", "text": content}] if isinstance(content, str) else content
        if not blocks:
            raise BadRequest(f"messages.{number}: all messages must have non-empty content")
        answered = [block["tool_use_id"] for block in blocks if block["type"] == "tool_result"]
        if sorted(answered) != sorted(called):
            raise BadRequest(f"messages.{number}: `tool_use` and `tool_result` do not match")
        called = [block["id"] for block in blocks if block["type"] == "tool_use"]
        if len(set(called)) < len(called) or seen & set(called):
            raise BadRequest("messages: `tool_use` ids must be unique")
        seen |= set(called)
        found += _messages(role, blocks, number)
    if called:
        raise BadRequest("messages: `tool_use` ids were found without `tool_result` blocks")
    return found


def _messages(role: str, blocks: list[dict[str, Any]], number: int) -> list[Message]:
    texts, calls, found = [], [], []
    for block in blocks:
        match block["type"]:
            case "text":
                if not block["text"].strip():
                    raise BadRequest(f"messages.{number}: text content blocks must be non-empty")
                texts.append(block["text"])
            case "tool_use" if role == "assistant" and isinstance(block["input"], dict):
                function = FunctionCall(name=block["name"], arguments=json.dumps(block["input"]))
                calls.append(ToolCall(id=block["id"], function=function))
            case "tool_result" if role == "user":
                sent = {"tool_call_id": block["tool_use_id"], "content": block["content"]}
                found.append(Message(role="tool", **sent))
            case kind:
                raise BadRequest(f"messages.{number}: a block of type {kind} is not expected here")
    if texts or calls:
        text = "\n\n".join(texts) or None
        turn = Message.model_validate({"role": role, "content": text, "tool_calls": calls or None})
        found.append(turn)
    return found
