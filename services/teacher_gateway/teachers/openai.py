"""Teachers behind an OpenAI-compatible endpoint: one chat completion for each item.

Every call has a deadline and a cap on its reply, follows no redirect and takes no compression.
The reply is stored as it came; only what decides about it is parsed here, and log-probabilities
stay raw bytes. Errors become outcomes: whether to ask again, and whether the teacher may have
billed what did not arrive.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from email.utils import parsedate_to_datetime
from typing import Any

import aiohttp
import msgspec

from services.teacher_gateway import reasons
from services.teacher_gateway.egress import check_url, connector
from services.teacher_gateway.teachers.outcomes import Answered, Outcome, Reject, Retry, Usage
from stillhouse.chassis.errors import PermanentError
from stillhouse.contracts.chat import Message
from stillhouse.contracts.spec import Signal, Teacher

FINISHED = ("stop", "length")
LONGEST_RETRY_AFTER = 86_400.0
# About the account or the moment, not about the item: asked again within the bounds.
_LATER = frozenset({401, 402, 403, 409, 425})
# A proxy (524: one that calls its time-out so) gave up on an answer that may have been computed.
_MAYBE_BILLED = frozenset({408, 502, 504, 524})
_CONNECT_SECONDS = 10
_CHUNK = 1 << 16
# A token with its alternatives takes about 100 bytes of JSON an outcome; ten times that is none.
_BYTES_AN_OUTCOME = 1024
# What other services of this stack are told must not be what a user's `api_key: {env: ...}` names.
_OWN_VARIABLES = ("TEACHER_GATEWAY_", "STILLHOUSE_", "AWS_", "PG", "POSTGRES")


class _Logprobs(msgspec.Struct):
    content: list[msgspec.Raw] | None = None


class _Message(msgspec.Struct):
    content: str | None = None
    refusal: str | None = None


class _Choice(msgspec.Struct):
    message: _Message
    finish_reason: str | None = None
    logprobs: _Logprobs | None = None


class _Usage(msgspec.Struct):
    prompt_tokens: int
    completion_tokens: int


class _Completion(msgspec.Struct):
    choices: list[_Choice]
    usage: _Usage | None = None


_decoder = msgspec.json.Decoder(_Completion)


def api_key(teacher: Teacher, environ: Mapping[str, str]) -> str | None:
    """Read the key that a spec names. Raises PermanentError that says what to set."""
    if teacher.api_key is None:
        return None
    name = teacher.api_key.env
    if name.startswith(_OWN_VARIABLES):
        raise PermanentError(
            f"`api_key: {{env: {name}}}` names a variable that is not a teacher's key: choose "
            "another name",
            reason="missing_api_key",
        )
    if not environ.get(name):
        raise PermanentError(
            f"the gateway's environment has no {name}, which `api_key` names: set it where the "
            "gateway's workers start",
            reason="missing_api_key",
        )
    return environ[name]


class OpenAITeacher:
    """One teacher over one HTTP session; use `open_teacher`."""

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
        self._headers = {"Accept": "application/json", "Accept-Encoding": "identity"}
        if key:
            self._headers["Authorization"] = f"Bearer {key}"

    def request(
        self, messages: list[Message], seed_of: str, max_tokens: int | None = None
    ) -> dict[str, Any]:
        """The body of a call. The seed is the item's, so that asking again says the same where
        the endpoint honours it."""
        body: dict[str, Any] = {
            "model": self._model,
            "messages": [message.model_dump() for message in messages],
            "max_tokens": max_tokens or self._signal.max_tokens,
            "temperature": self._signal.temperature,
            "top_p": 1,
            "n": 1,
            "stream": False,
            "seed": int.from_bytes(hashlib.sha256(seed_of.encode()).digest()[:4], "big") >> 1,
        }
        if self._signal.kind == "topk":
            body["logprobs"] = True
            body["top_logprobs"] = self._signal.k
        return body

    async def ask(
        self,
        messages: list[Message],
        *,
        seed_of: str,
        deadline: float,
        max_tokens: int | None = None,
    ) -> Outcome:
        """Make one call, `deadline` seconds at most. Raises nothing but EgressRefused."""
        tokens = max_tokens or self._signal.max_tokens
        outcomes = self._signal.k + 1 if self._signal.kind == "topk" else 1
        cap = (1 << 20) + tokens * outcomes * _BYTES_AN_OUTCOME
        try:
            async with self._session.post(
                self._url,
                data=msgspec.json.encode(self.request(messages, seed_of, max_tokens)),
                headers={**self._headers, "Content-Type": "application/json"},
                allow_redirects=False,
                timeout=aiohttp.ClientTimeout(
                    total=deadline, sock_connect=min(_CONNECT_SECONDS, deadline)
                ),
            ) as response:
                body = await _read(response, cap)
                if body is None:
                    return Retry(
                        reasons.TEACHER_INVALID, f"the reply is over {cap} bytes", lost=True
                    )
                return self.judge(response.status, response.headers, body)
        except (aiohttp.ConnectionTimeoutError, aiohttp.ClientConnectorError) as error:
            return Retry(reasons.TEACHER_UNREACHABLE, f"no connection: {error}"[:300], away=True)
        except TimeoutError:
            return Retry(
                reasons.TEACHER_TIMEOUT, f"no answer in {deadline:.0f} s", lost=True, away=True
            )
        except (aiohttp.ClientError, OSError) as error:
            return Retry(
                reasons.TEACHER_ERROR,
                f"the connection broke: {type(error).__name__}: {error}"[:300],
                lost=True,
                away=True,
            )

    def judge(self, status: int, headers: Mapping[str, str], body: bytes) -> Outcome:
        """Decide what a reply means."""
        if status == 429:
            after = retry_after(headers, time.time())
            return Retry(reasons.TEACHER_RATE_LIMITED, _said(body), after=after, away=True)
        if status == 408:
            return Retry(
                reasons.TEACHER_TIMEOUT, f"status {status}: {_said(body)}", lost=True, away=True
            )
        if status >= 500 or status in _LATER:
            return Retry(
                reasons.TEACHER_ERROR,
                f"status {status}: {_said(body)}",
                after=retry_after(headers, time.time()) if status == 503 else None,
                lost=status in _MAYBE_BILLED,
                away=status >= 500,
            )
        if status >= 400:
            return Reject(reasons.REFUSED_BY_TEACHER, f"status {status}: {_said(body)}")
        if status != 200:
            return Reject(
                reasons.TEACHER_INVALID,
                f"status {status}: redirects are not followed; give the final URL",
            )
        try:
            text = body.decode()
            completion = _decoder.decode(body)
            choice = completion.choices[0]
        except (UnicodeDecodeError, msgspec.DecodeError, IndexError, RecursionError) as error:
            # ValidationError is a DecodeError: JSON of another shape. RecursionError: nested
            # deeper than anyone means.
            return Retry(
                reasons.TEACHER_INVALID,
                f"expected a chat completion, found {body[:80]!r} ({error})"[:300],
                lost=True,
            )
        if (
            completion.usage is None
            or min(completion.usage.prompt_tokens, completion.usage.completion_tokens) < 0
        ):
            return Reject(
                reasons.TEACHER_INVALID, "expected `usage` with token counts, found none", lost=True
            )
        usage = Usage(completion.usage.prompt_tokens, completion.usage.completion_tokens)
        if choice.message.refusal or choice.finish_reason == "content_filter":
            said = choice.message.refusal or "its content filter cut the answer"
            return Reject(reasons.REFUSED_BY_TEACHER, said[:300], usage)
        if choice.message.content is None:
            return Reject(reasons.TEACHER_INVALID, "expected text, found null", usage)
        if choice.finish_reason not in FINISHED:
            return Reject(
                reasons.TEACHER_INVALID,
                f"expected finish_reason {' or '.join(FINISHED)}, found {choice.finish_reason!r}",
                usage,
            )
        if self._signal.kind == "topk" and not (choice.logprobs and choice.logprobs.content):
            return Reject(
                reasons.MISSING_LOGPROBS, "asked for log-probabilities, found none", usage
            )
        return Answered(text, usage)


@asynccontextmanager
async def open_teacher(
    teacher: Teacher,
    signal: Signal,
    *,
    environ: Mapping[str, str],
    private: bool,
    connections: int | None = None,
) -> AsyncIterator[OpenAITeacher]:
    """Open a client. Raises EgressRefused or PermanentError that says what to change."""
    assert teacher.url is not None, "the spec requires a URL"
    check_url(teacher.url, private=private)
    key = api_key(teacher, environ)
    async with aiohttp.ClientSession(
        connector=connector(private=private, limit=connections or teacher.limits.concurrency),
        cookie_jar=aiohttp.DummyCookieJar(),
        auto_decompress=False,
        trust_env=False,
    ) as session:
        yield OpenAITeacher(session, teacher, signal, key)


def retry_after(headers: Mapping[str, str], clock: float) -> float | None:
    """Seconds that a Retry-After header asks for, by number or by date; None without one."""
    value = headers.get("Retry-After", "").strip()
    if not value:
        return None
    try:
        seconds = float(value)
    except ValueError:
        try:
            seconds = parsedate_to_datetime(value).timestamp() - clock
        except ValueError:
            return None
    if seconds != seconds:  # not a number
        return None
    return min(max(seconds, 0.0), LONGEST_RETRY_AFTER)


async def _read(response: aiohttp.ClientResponse, cap: int) -> bytes | None:
    found = bytearray()
    async for chunk in response.content.iter_chunked(_CHUNK):
        found += chunk
        if len(found) > cap:
            return None
    return bytes(found)


def _said(body: bytes) -> str:
    """What an error reply says, shortened, on one line."""
    return " ".join(body[:300].decode(errors="replace").split())
