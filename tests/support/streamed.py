"""A chat completion sent as a stream of chunks, whole or not, as OpenAI's API sends them."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from typing import Any

from aiohttp import web

from tests.support.teacher_faults import Fault

# Faults of the answer, and of its way, that a stream can have; with others it is none.
LIES = frozenset({"tool_call", "reasoning", "missing_usage", "wrong_usage"})
STREAMED = LIES | {
    *("cut_reply", "truncated_json", "no_done", "slow_drip", "stalls", "garbled_chunk"),
}
_PIECE = 12  # characters of a chunk's text


def chunks_of(answer: dict[str, Any], *, usage: bool) -> Iterator[dict[str, Any]]:
    """The chunks that make up a completion; with `usage` another one that carries it."""
    head = {key: answer[key] for key in ("id", "created", "model")}
    head["object"] = "chat.completion.chunk"
    more: dict[str, Any] = {"usage": None} if usage else {}
    choice = answer["choices"][0]
    message = choice["message"]
    deltas: list[dict[str, Any]] = [{"role": "assistant", "content": ""}]
    for name in ("reasoning_content", "content"):
        text = message.get(name) or ""
        deltas += [{name: text[at : at + _PIECE]} for at in range(0, len(text), _PIECE)]
    for index, call in enumerate(message.get("tool_calls") or ()):
        function = {"name": call["function"]["name"], "arguments": ""}
        deltas.append({"tool_calls": [{**call, "index": index, "function": function}]})
        text = call["function"]["arguments"]
        deltas += [
            {"tool_calls": [{"index": index, "function": {"arguments": text[at : at + _PIECE]}}]}
            for at in range(0, len(text), _PIECE)
        ]
    positions = list((choice.get("logprobs") or {}).get("content") or ())
    share = -(-len(positions) // max(len(deltas) - 1, 1))
    for number, delta in enumerate(deltas):
        part: dict[str, Any] = {"index": 0, "delta": delta, "finish_reason": None}
        if positions and number:
            part["logprobs"] = {"content": positions[(number - 1) * share : number * share]}
        yield {**head, "choices": [part], **more}
    ending = {"index": 0, "delta": {}, "finish_reason": choice["finish_reason"]}
    yield {**head, "choices": [ending], **more}
    if usage and "usage" in answer:
        yield {**head, "choices": [], "usage": answer["usage"]}


async def stream(
    request: web.Request, answer: dict[str, Any], fault: Fault | None, *, usage: bool
) -> web.StreamResponse:
    """Send the chunks of an answer, as the fault says."""
    response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
    await response.prepare(request)
    kind = fault.kind if fault else ""
    chunks = chunks_of(answer, usage=usage)
    events = [b"data: " + json.dumps(chunk).encode() + b"\n\n" for chunk in chunks]
    if kind == "garbled_chunk":
        events[len(events) // 2] = b"data: {not json\n\n"
    if kind in ("cut_reply", "truncated_json", "stalls"):
        events = events[: len(events) // 2]
    elif kind != "no_done":
        events.append(b"data: [DONE]\n\n")
    for event in events:
        await response.write(event)
        if fault is not None and kind == "slow_drip":
            await asyncio.sleep(fault.seconds)
    if kind == "stalls":
        await asyncio.sleep(3600)
    if kind == "cut_reply":
        await asyncio.sleep(0.02)  # let the bytes leave before the reset overtakes them
        if request.transport is not None:
            request.transport.abort()
        return response
    await response.write_eof()
    return response
