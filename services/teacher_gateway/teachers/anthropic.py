"""Teachers behind Anthropic's Messages API: one message for each item, text without a signal.

The API gives no log-probabilities and takes no seed. Its answers are stored in the form of a chat
completion, like those of every other route.
"""

from __future__ import annotations

import re
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from typing import Any

import aiohttp
import msgspec

from services.teacher_gateway import reasons
from services.teacher_gateway.teachers.anthropic_messages import (
    FINISHED,
    Reply,
    Unsayable,
    to_completion,
    to_tools,
    to_turns,
)
from services.teacher_gateway.teachers.completions import STILL_REASONING
from services.teacher_gateway.teachers.endpoint import (
    judge_status,
    longest_reply,
    open_session,
    post,
)
from services.teacher_gateway.teachers.outcomes import Answered, Call, Outcome, Reject, Retry
from stillhouse.contracts.spec import Signal, Teacher

API_VERSION = "2023-06-01"
_BLOCKS = frozenset({"text", "thinking", "redacted_thinking", "tool_use"})
# A spending limit or an empty account is a 400 here, and no fault of the item: it is asked again.
_ACCOUNT = re.compile(rb"API usage limits|credit balance is too low")

_decoder = msgspec.json.Decoder(Reply)


class AnthropicTeacher:
    """One teacher over one HTTP session; use `open_anthropic`."""

    def __init__(
        self,
        session: aiohttp.ClientSession,
        teacher: Teacher,
        signal: Signal,
        key: str | None,
    ) -> None:
        assert teacher.url is not None, "the spec requires a URL"
        self._session = session
        self._url = teacher.url.rstrip("/") + "/messages"
        self._model = teacher.model
        self._signal = signal
        self._key = key
        self._headers = {"anthropic-version": API_VERSION}
        if key:
            self._headers["x-api-key"] = key

    def request(self, call: Call) -> dict[str, Any]:
        """The body of a call. Raises Unsayable.

        Temperature and top-p are sent only where they are not 1, the API's own value: newer models
        refuse both.
        """
        temperature = self._signal.temperature if call.temperature is None else call.temperature
        system, turns = to_turns(call.messages)
        body: dict[str, Any] = {
            "model": self._model,
            "max_tokens": call.max_tokens or self._signal.max_tokens,
            "messages": turns,
            "stream": False,
        }
        if system:
            body["system"] = system
        if call.tools:
            body["tools"] = to_tools(call.tools)
        if temperature != 1:
            body["temperature"] = temperature
        if call.top_p not in (None, 1):
            body["top_p"] = call.top_p
        return body

    async def ask(self, call: Call, *, deadline: float) -> Outcome:
        """Make one call, `deadline` seconds at most. Raises nothing but EgressRefused."""
        if self._signal.kind in ("topk", "counts"):
            return Reject(reasons.MISSING_LOGPROBS, "this API gives no log-probabilities")
        try:
            asked = self.request(call)
        except Unsayable as error:
            return Reject(reasons.UNSUPPORTED_CONVERSATION, str(error))
        reply = await post(
            self._session,
            self._url,
            self._headers,
            msgspec.json.encode(asked),
            key=self._key,
            cap=longest_reply(self._signal, asked["max_tokens"]),
            deadline=deadline,
        )
        if isinstance(reply, Retry):
            return reply
        return self.judge(reply.status, reply.headers, reply.body)

    def judge(self, status: int, headers: Mapping[str, str], body: bytes) -> Outcome:
        """Decide what a reply means."""
        refused = judge_status(status, headers, body)
        if isinstance(refused, Reject) and status == 400 and _ACCOUNT.search(body):
            return Retry(reasons.TEACHER_ERROR, refused.detail, away=True)
        return refused or _judge_message(body)


def _judge_message(body: bytes) -> Outcome:
    try:
        reply = _decoder.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        return Retry(
            reasons.TEACHER_INVALID,
            f"expected a message, found {body[:80]!r} ({error})"[:300],
            lost=True,
        )
    usage = reply.used
    if usage is None:
        return Reject(
            reasons.TEACHER_INVALID, "expected `usage` with token counts, found none", lost=True
        )
    if reply.stop_reason == "refusal":
        details = reply.stop_details
        said = details and (details.explanation or details.category)
        return Reject(reasons.REFUSED_BY_TEACHER, (said or "the model refused")[:300], usage)
    finish = FINISHED.get(reply.stop_reason or "")
    if finish is None:
        return Reject(
            reasons.TEACHER_INVALID,
            f"expected stop_reason {' or '.join(FINISHED)}, found {reply.stop_reason!r}",
            usage,
        )
    kinds = {block.type for block in reply.content}
    if strange := sorted(kinds - _BLOCKS):
        detail = f"the answer holds {', '.join(strange)}, which nobody asked for"
        return Reject(reasons.TEACHER_INVALID, detail[:300], usage)
    if finish == "tool_calls" and "tool_use" not in kinds:
        return Reject(reasons.TEACHER_INVALID, "stop_reason 'tool_use' without a call", usage)
    if finish == "length" and not kinds & {"text", "tool_use"}:
        return Reject(reasons.STILL_REASONING, STILL_REASONING, usage)
    return Answered(to_completion(reply, usage, finish), usage)


@asynccontextmanager
async def open_anthropic(
    teacher: Teacher,
    signal: Signal,
    *,
    key: str | None,
    private: bool,
    connections: int | None = None,
) -> AsyncIterator[AnthropicTeacher]:
    """Open a client. Raises EgressRefused."""
    async with open_session(teacher, private=private, connections=connections) as session:
        yield AnthropicTeacher(session, teacher, signal, key)
