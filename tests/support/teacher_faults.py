"""What the billing teacher does wrong on demand, whichever API it speaks."""

from __future__ import annotations

import asyncio
import gzip
import json
from dataclasses import dataclass
from typing import Any, Literal, get_args

from aiohttp import web

from tests.support.teacher_apis import Api

FaultKind = Literal[
    # Errors, never billed unless `billed` says so
    "rate_limited",  # 429, with Retry-After where `retry_after` is set
    "status",  # `status`, with an error body of the API's form, Retry-After as above
    "redirect",  # 302 to `location`, with a cookie
    "echoes_key",  # 400 with the caller's key in its text
    # What happens to the reply on its way
    "invalid_json",  # 200 and a page of HTML
    "truncated_json",  # 200 and the first half of the answer, with a fitting Content-Length
    "cut_reply",  # the whole Content-Length promised, half of it sent, connection reset
    "wrong_schema",  # 200 and JSON of another shape
    "huge_body",  # 200 and `size` bytes of JSON string
    "gzip_bomb",  # `size` zero bytes, gzipped
    "stalls",  # the first half of the answer, and then nothing
    "slow_drip",  # the answer, one byte each `seconds`
    "kept_alive",  # 20 blank lines, one each `seconds`, then the answer
    "no_done",  # a stream that is whole, without its [DONE]
    "garbled_chunk",  # a stream with a chunk that is no JSON
    "never_answers",
    "closed",  # connection reset before the first byte of the reply
    # Answers that are true
    "tool_call",  # calls the first tool offered instead of answering
    "reasoning",  # reasons beside the answer
    # Answers that cannot be used, or lie
    "empty_choices",
    "null_content",
    "still_reasoning",  # reasoning up to the limit, and no answer
    "refusal",
    "content_filter",
    "strange_finish",  # a reason to end that is none of the known ones
    "missing_logprobs",
    "missing_ids",
    "missing_usage",
    "wrong_usage",  # ten times the completion tokens
    "wrong_prompt_tokens",  # another tokenizer or template than ours
    "inflated",  # probabilities that sum to more than one
    "other_text",  # content that is not what the ids decode to
    "few_logprobs",  # 3 alternatives, however many were asked for
    # Another distribution than the model's
    "tempered",  # log-probabilities after the request's temperature
    "nucleus",  # log-probabilities after the request's top_p
    "replicas",  # every second call meets a replica of another quantisation
]
# These change what is reported of each distribution, not the reply.
VIEWS = frozenset({"tempered", "nucleus", "replicas"})
# Without a stream the answer is an honest one.
STREAMS_ONLY = frozenset({"no_done", "garbled_chunk"})
NOT_BILLED = frozenset({"rate_limited", "status", "redirect", "echoes_key"})


@dataclass(frozen=True)
class Fault:
    """One scripted misbehaviour: for conversations that contain `match` (or whose digest starts
    with it), at these attempts (counted from 1 for each conversation; none given: always)."""

    kind: FaultKind
    match: str = ""
    attempts: tuple[int, ...] = ()
    retry_after: float | None = None
    status: int = 500
    size: int = 64 << 20
    seconds: float = 1.0
    message: str = "The server had an error"
    location: str = "http://169.254.169.254/latest/meta-data/"
    billed: bool | None = None

    def __post_init__(self) -> None:
        if self.kind not in get_args(FaultKind):
            raise ValueError(f"expected a fault of {get_args(FaultKind)}, found {self.kind!r}")

    def fits(self, text: str, digest: str, attempt: int) -> bool:
        meant = self.match in text or (len(self.match) >= 8 and digest.startswith(self.match))
        return meant and (not self.attempts or attempt in self.attempts)

    @property
    def bills(self) -> bool:
        """Whether the caller pays: a provider bills what it computed, arrived or not."""
        return self.billed if self.billed is not None else self.kind not in NOT_BILLED


def fault_from(entry: dict[str, Any]) -> Fault:
    return Fault(**{**entry, "attempts": tuple(entry.get("attempts", ()))})


async def misbehave(
    fault: Fault, request: web.Request, api: Api, answer: dict[str, Any], tool: str
) -> web.StreamResponse:
    """Reply to a request as the fault says, given the answer that an honest teacher would send.

    `tool` is the name of the tool that is called where the fault is a call."""
    whole = json.dumps(answer).encode()
    headers = {} if fault.retry_after is None else {"Retry-After": f"{fault.retry_after:g}"}
    match fault.kind:
        case "rate_limited":
            return api.error(429, "Rate limit reached", headers)
        case "status":
            return api.error(fault.status, fault.message, headers)
        case "redirect":
            sent = {"Location": fault.location, "Set-Cookie": "session=1; Path=/"}
            return web.Response(status=302, headers=sent)
        case "echoes_key":
            return api.error(400, f"no such plan for {api.key_of(request.headers)}")
        case "invalid_json":
            return web.Response(text="<html>upstream went away</html>", content_type="text/html")
        case "truncated_json":
            return _json_bytes(whole[: len(whole) // 2])
        case "cut_reply":
            return await _send_slowly(request, whole, stop_at=len(whole) // 2)
        case "stalls":
            return await _send_slowly(request, whole, stop_at=len(whole) // 2, resets=False)
        case "slow_drip":
            return await _send_slowly(request, whole, seconds=fault.seconds)
        case "kept_alive":
            return await _send_kept_alive(request, whole, fault.seconds)
        case "wrong_schema":
            return web.json_response({"output": "of another form"})
        case "huge_body":
            return await _send_chunks(request, fault.size)
        case "gzip_bomb":
            bomb = {"Content-Encoding": "gzip", "Content-Type": "application/json"}
            return web.Response(body=gzip.compress(b"\0" * fault.size, 9), headers=bomb)
        case "never_answers":
            await asyncio.sleep(3600)
        case "closed":
            _reset(request)
            return web.Response()
        case kind if kind not in VIEWS and kind not in STREAMS_ONLY:
            api.lie(kind, answer, tool)
    return web.json_response(answer)


def _json_bytes(data: bytes) -> web.Response:
    return web.Response(body=data, content_type="application/json")


def _reset(request: web.Request) -> None:
    if request.transport is not None:
        request.transport.abort()


async def _send_slowly(
    request: web.Request,
    data: bytes,
    *,
    seconds: float = 0.0,
    stop_at: int | None = None,
    resets: bool = True,
) -> web.StreamResponse:
    response = web.StreamResponse(headers={"Content-Type": "application/json"})
    response.content_length = len(data)
    await response.prepare(request)
    if stop_at is not None:
        await response.write(data[:stop_at])
        if not resets:
            await asyncio.sleep(3600)
        await asyncio.sleep(0.02)  # let the bytes leave before the reset overtakes them
        _reset(request)
        return response
    for number in range(len(data)):
        await response.write(data[number : number + 1])
        await asyncio.sleep(seconds)
    await response.write_eof()
    return response


async def _send_kept_alive(request: web.Request, data: bytes, seconds: float) -> web.StreamResponse:
    response = web.StreamResponse(headers={"Content-Type": "application/json"})
    await response.prepare(request)
    for _ in range(20):
        await response.write(b"\n")
        await asyncio.sleep(seconds)
    await response.write(data)
    await response.write_eof()
    return response


async def _send_chunks(request: web.Request, size: int) -> web.StreamResponse:
    response = web.StreamResponse(headers={"Content-Type": "application/json"})
    await response.prepare(request)
    await response.write(b'{"choices": [{"message": {"content": "')
    chunk = b"a" * (1 << 16)
    for _ in range(size // len(chunk)):
        await response.write(chunk)
    await response.write(b'"}}]}')
    await response.write_eof()
    return response
