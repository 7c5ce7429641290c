"""Teachers behind an OpenAI-compatible endpoint: one chat completion for each item.

The reply is stored as it came. Providers differ in what a request may hold: a parameter that one
refuses by name is sent under its other name from then on, or left out where it says no more than
the default does.
"""

from __future__ import annotations

import hashlib
import re
import time
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from typing import Any

import aiohttp
import msgspec

from services.teacher_gateway.teachers.completions import judge_reply
from services.teacher_gateway.teachers.endpoint import (
    judge_status,
    longest_reply,
    open_session,
    post,
)
from services.teacher_gateway.teachers.outcomes import Call, Outcome, Retry
from stillhouse.contracts.spec import Signal, Teacher

# What a model that takes no choice does anyway: `seed` is a wish, the others are the API's values.
_DEFAULTS = {"n": 1, "top_p": 1, "temperature": 1}
_MAY_BE_LEFT_OUT = ("seed", *_DEFAULTS)
_UNSUPPORTED = re.compile(
    r"unsupported|not support|unrecogni[sz]ed|unknown|not permitted|extra_forbidden|deprecated"
)
# An error's own words stand at its beginning; some servers repeat the request behind them.
_ERROR_BYTES = 600


class OpenAITeacher:
    """One teacher over one HTTP session; use `open_openai`."""

    def __init__(
        self,
        session: aiohttp.ClientSession,
        teacher: Teacher,
        signal: Signal,
        key: str | None,
    ) -> None:
        assert teacher.url is not None, "the spec requires a URL"
        self._session = session
        self._url = teacher.url.rstrip("/") + "/chat/completions"
        self._model = teacher.model
        self._signal = signal
        self._key = key
        self._headers = {"Authorization": f"Bearer {key}"} if key else {}
        self._limit = "max_tokens"
        self._left_out: set[str] = set()

    def request(self, call: Call) -> dict[str, Any]:
        """The body of a call. The seed is the item's, so that asking again says the same where
        the endpoint honours it."""
        signal = self._signal
        body: dict[str, Any] = {
            "model": self._model,
            "messages": [message.as_sent() for message in call.messages],
            self._limit: call.max_tokens or signal.max_tokens,
            "temperature": signal.temperature if call.temperature is None else call.temperature,
            "top_p": 1 if call.top_p is None else call.top_p,
            "n": 1,
            "stream": False,
            "seed": int.from_bytes(hashlib.sha256(call.seed_of.encode()).digest()[:4], "big") >> 1,
        }
        for name in self._left_out:
            if body[name] == _DEFAULTS.get(name, body[name]):
                del body[name]
        if signal.kind == "topk":
            body["logprobs"] = True
            body["top_logprobs"] = signal.k
        if call.tools:
            body["tools"] = call.tools
        return body

    async def ask(self, call: Call, *, deadline: float) -> Outcome:
        """Make one call, `deadline` seconds at most. Raises nothing but EgressRefused."""
        ends = time.monotonic() + deadline
        cap = longest_reply(self._signal, call.max_tokens or self._signal.max_tokens)
        while True:
            asked = self.request(call)
            reply = await post(
                self._session,
                self._url,
                self._headers,
                msgspec.json.encode(asked),
                key=self._key,
                cap=cap,
                deadline=max(ends - time.monotonic(), 0.001),
            )
            if isinstance(reply, Retry):
                return reply
            # Nothing is billed for a refused request, and each round sends one parameter less.
            if not self._adapt(asked, reply.status, reply.body):
                return self.judge(reply.status, reply.headers, reply.body)

    def _adapt(self, asked: Mapping[str, Any], status: int, body: bytes) -> bool:
        """Learn from an error which parameter the endpoint does not know; True if there is one."""
        if status not in (400, 422):
            return False
        said = body[:_ERROR_BYTES].decode(errors="replace").lower()
        if not _UNSUPPORTED.search(said):
            return False
        # Without the other name in the error, the limit itself may be what is not supported; and
        # who does not know the other name would answer without a limit.
        if _names("max_tokens", said) and "max_completion_tokens" in said and "max_tokens" in asked:
            self._limit = "max_completion_tokens"
            return True
        for name in _MAY_BE_LEFT_OUT:
            default = _DEFAULTS.get(name, asked.get(name))
            if name in asked and asked[name] == default and _names(name, said):
                self._left_out.add(name)
                return True
        return False

    def judge(self, status: int, headers: Mapping[str, str], body: bytes) -> Outcome:
        """Decide what a reply means."""
        refused = judge_status(status, headers, body)
        return refused or judge_reply(body, self._signal)


def _names(parameter: str, said: str) -> bool:
    return re.search(rf"""['"`]{parameter}['"`]""", said) is not None


@asynccontextmanager
async def open_openai(
    teacher: Teacher,
    signal: Signal,
    *,
    key: str | None,
    private: bool,
    connections: int | None = None,
) -> AsyncIterator[OpenAITeacher]:
    """Open a client. Raises EgressRefused."""
    async with open_session(teacher, private=private, connections=connections) as session:
        yield OpenAITeacher(session, teacher, signal, key)
