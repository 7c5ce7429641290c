"""A conversation in the form of Anthropic's Messages API, and its reply as a chat completion.

System prompts stand apart, tools are called and answered in blocks of a turn's content, and turns
of one role in a row are one turn. Thinking is kept apart as `reasoning_content`.
"""

from __future__ import annotations

import json
import re
import time
from typing import Any

import msgspec

from services.teacher_gateway.teachers.outcomes import Usage
from stillhouse.contracts.chat import Message, Tools

FINISHED = {
    "end_turn": "stop",
    "stop_sequence": "stop",
    "max_tokens": "length",
    "model_context_window_exceeded": "length",
    "tool_use": "tool_calls",
}
_ID = re.compile(r"[A-Za-z0-9_-]{1,64}")


class Unsayable(ValueError):
    """A conversation or a tool that this API cannot express; the text says which."""


class Block(msgspec.Struct):
    type: str
    text: str = ""
    thinking: str = ""
    id: str = ""
    name: str = ""
    input: dict[str, Any] = {}


class Counts(msgspec.Struct):
    """The prompt's tokens are the sum of the three counts of input."""

    input_tokens: int
    output_tokens: int
    cache_creation_input_tokens: int | None = None
    cache_read_input_tokens: int | None = None


class StopDetails(msgspec.Struct):
    explanation: str | None = None
    category: str | None = None


class Reply(msgspec.Struct):
    id: str
    model: str
    content: list[Block]
    stop_reason: str | None = None
    stop_details: StopDetails | None = None
    usage: Counts | None = None

    @property
    def used(self) -> Usage | None:
        """What it bills; None where it does not say."""
        counts = self.usage
        if counts is None:
            return None
        read = [
            counts.input_tokens,
            counts.cache_creation_input_tokens or 0,
            counts.cache_read_input_tokens or 0,
        ]
        if min(*read, counts.output_tokens) < 0:
            return None
        return Usage(sum(read), counts.output_tokens)


def to_turns(messages: list[Message]) -> tuple[str, list[dict[str, Any]]]:
    """Return the system prompt and the turns. Raises Unsayable."""
    system: list[str] = []
    turns: list[dict[str, Any]] = []
    open_calls: dict[str, str] = {}  # ids of calls without an answer, as given and as sent
    used: set[str] = set()
    for message in messages:
        if message.role == "system":
            if turns:
                raise Unsayable(
                    "a system message stands after the first turn, and this API takes system "
                    "prompts at the beginning alone"
                )
            system.append(message.text)
            continue
        blocks: list[dict[str, Any]] = []
        if message.role == "tool":
            given = message.tool_call_id or next(iter(open_calls), "")
            if given not in open_calls:
                raise Unsayable(f"a tool's answer belongs to no call (tool_call_id {given!r})")
            sent = open_calls.pop(given)
            blocks.append({"type": "tool_result", "tool_use_id": sent, "content": message.text})
        elif message.content:
            blocks.append({"type": "text", "text": message.content})
        for call in message.tool_calls or ():
            # Ids must be of this form, and used once in a conversation.
            fits = call.id and _ID.fullmatch(call.id) and call.id not in used
            sent = call.id if fits and call.id else f"toolu_{len(used) + 1:04d}"
            used.add(sent)
            open_calls[call.id or sent] = sent
            arguments = _arguments(call.function.arguments)
            named = {"id": sent, "name": call.function.name, "input": arguments}
            blocks.append({"type": "tool_use", **named})
        role = "assistant" if message.role == "assistant" else "user"
        if turns and turns[-1]["role"] == role:
            turns[-1]["content"] += blocks
        else:
            turns.append({"role": role, "content": blocks})
    return "\n\n".join(system), turns


def _arguments(text: str) -> dict[str, Any]:
    try:
        found = json.loads(text)
    except ValueError:
        found = None
    if not isinstance(found, dict):
        raise Unsayable("the arguments of a call are not a JSON object, as this API requires")
    return found


def to_tools(tools: Tools) -> list[dict[str, Any]]:
    """Return the tools with their schemas. Raises Unsayable."""
    found = []
    for tool in tools:
        function = tool.get("function")
        if tool.get("type") != "function" or not isinstance(function, dict):
            raise Unsayable(f"expected tools of type `function`, found {tool.get('type')!r}")
        schema = function.get("parameters") or {"type": "object", "properties": {}}
        entry = {"name": function.get("name"), "input_schema": schema}
        if function.get("description"):
            entry["description"] = function["description"]
        found.append(entry)
    return found


def to_completion(reply: Reply, usage: Usage, finish_reason: str) -> str:
    """Write a reply as the JSON of a chat completion, under the provider's id and model."""
    text = "".join(block.text for block in reply.content if block.type == "text")
    thinking = "\n\n".join(block.thinking for block in reply.content if block.thinking)
    calls = [
        {
            "id": block.id,
            "type": "function",
            "function": {
                "name": block.name,
                "arguments": json.dumps(block.input, ensure_ascii=False),
            },
        }
        for block in reply.content
        if block.type == "tool_use"
    ]
    message: dict[str, Any] = {"role": "assistant", "content": text or (None if calls else "")}
    if thinking:
        message["reasoning_content"] = thinking
    if calls:
        message["tool_calls"] = calls
    choice = {"index": 0, "message": message, "finish_reason": finish_reason, "logprobs": None}
    completion = {
        "id": reply.id,
        "object": "chat.completion",
        "created": int(time.time()),
        "model": reply.model,
        "choices": [choice],
        "usage": {
            "prompt_tokens": usage.prompt_tokens,
            "completion_tokens": usage.completion_tokens,
            "total_tokens": usage.prompt_tokens + usage.completion_tokens,
        },
    }
    return json.dumps(completion, ensure_ascii=False)
