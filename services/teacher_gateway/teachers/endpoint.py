"""One HTTP endpoint of a teacher: what all of its APIs have in common.

Every call has a deadline, a cap on its reply and, once the reply has begun, a least rate; it
follows no redirect and takes no compression. Errors become outcomes: whether to ask again, and
whether the teacher may have billed what did not arrive.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from email.utils import parsedate_to_datetime

import aiohttp

from services.teacher_gateway import reasons
from services.teacher_gateway.egress import check_url, connector
from services.teacher_gateway.teachers.outcomes import Reject, Retry
from stillhouse.contracts.spec import Signal, Teacher

LONGEST_RETRY_AFTER = 86_400.0
# A reply is written from memory, so it comes at the network's speed. One that has begun and then
# brings less than this holds a connection and one of the teacher's places for nothing: a server
# that wrote while it generated would bring as much at six tokens a second. Before its first byte
# a server may be silent as long as the deadline allows, because it answers when it is done.
LEAST_BYTES = 256
LEAST_SECONDS = 10.0
# About the account or the moment, not about the item: asked again within the bounds.
_LATER = frozenset({401, 402, 403, 409, 425})
# A proxy (524: one that calls its time-out so) gave up on an answer that may have been computed.
MAYBE_BILLED = frozenset({408, 502, 504, 524})
_CONNECT_SECONDS = 10
_CHUNK = 1 << 16
# A token with its alternatives takes about 100 bytes of JSON an outcome; ten times that is none.
_BYTES_AN_OUTCOME = 1024
# Less is no secret but a word that some server wants, such as `none`; and words stand in answers.
_SHORTEST_KEY = 12


@dataclass(frozen=True)
class Reply:
    status: int
    headers: Mapping[str, str]
    body: bytes


class _TooLong(Exception):
    """The reply is over its cap."""


class _TooSlow(Exception):
    """The reply began, and then hardly anything came."""


@asynccontextmanager
async def open_session(
    teacher: Teacher, *, private: bool, connections: int | None
) -> AsyncIterator[aiohttp.ClientSession]:
    """Open a session that reaches allowed addresses only. Raises EgressRefused."""
    assert teacher.url is not None, "the spec requires a URL"
    check_url(teacher.url, private=private)
    async with aiohttp.ClientSession(
        connector=connector(private=private, limit=connections or teacher.limits.concurrency),
        cookie_jar=aiohttp.DummyCookieJar(),
        auto_decompress=False,
        trust_env=False,
    ) as session:
        yield session


def longest_reply(signal: Signal, tokens: int) -> int:
    """The bytes that a reply of so many tokens may have at most."""
    outcomes = signal.k + 1 if signal.kind == "topk" else 1
    return (1 << 20) + tokens * outcomes * _BYTES_AN_OUTCOME


def without_key(said: bytes, key: str | None) -> bytes:
    """What a teacher said, without the key that we sent: as such, or as JSON writes it."""
    if not key or len(key) < _SHORTEST_KEY:
        return said
    for form in {key, json.dumps(key)[1:-1], key.replace("/", "\\/")}:
        said = said.replace(form.encode(), b"[key]")
    return said


async def post(
    session: aiohttp.ClientSession,
    url: str,
    headers: Mapping[str, str],
    data: bytes,
    *,
    key: str | None,
    cap: int,
    deadline: float,
) -> Reply | Retry:
    """Post JSON, `deadline` seconds at most. Raises nothing but EgressRefused."""
    sent = {"Content-Type": "application/json", **headers}
    return await send(session, "POST", url, sent, data, key=key, cap=cap, deadline=deadline)


async def send(
    session: aiohttp.ClientSession,
    method: str,
    url: str,
    headers: Mapping[str, str],
    data: bytes | aiohttp.FormData | None,
    *,
    key: str | None,
    cap: int,
    deadline: float,
) -> Reply | Retry:
    """Make one call, `deadline` seconds at most. Raises nothing but EgressRefused.

    `key` is what the headers hold and nothing that comes back may: neither answers nor details,
    which are stored, logged and shown to tenants.
    """
    try:
        async with session.request(
            method,
            url,
            data=data,
            headers={"Accept": "application/json", "Accept-Encoding": "identity", **headers},
            allow_redirects=False,
            timeout=aiohttp.ClientTimeout(
                total=deadline, sock_connect=min(_CONNECT_SECONDS, deadline)
            ),
        ) as response:
            body = await _read(response.content, cap)
            return Reply(response.status, response.headers, without_key(body, key))
    except _TooLong:
        return Retry(reasons.TEACHER_INVALID, f"the reply is over {cap} bytes", lost=True)
    except _TooSlow:
        return Retry(
            reasons.TEACHER_TIMEOUT,
            f"the reply began and then brought under {LEAST_BYTES} bytes in {LEAST_SECONDS:g} s",
            lost=True,
            away=True,
        )
    except (aiohttp.ConnectionTimeoutError, aiohttp.ClientConnectorError) as error:
        hasty = isinstance(error, TimeoutError) and deadline < _CONNECT_SECONDS
        return Retry(
            reasons.TEACHER_UNREACHABLE,
            f"no connection: {error}"[:300],
            away=True,
            waited=deadline if hasty else None,
        )
    except TimeoutError:
        return Retry(
            reasons.TEACHER_TIMEOUT,
            f"no answer in {deadline:.3g} s",
            lost=True,
            away=True,
            waited=deadline,
        )
    except (aiohttp.ClientError, OSError) as error:
        # A parser's error repeats what the server sent.
        said = without_key(
            f"{type(error).__name__}: {error}".encode(errors="replace"), key
        ).decode()
        return Retry(
            reasons.TEACHER_ERROR,
            f"the connection broke: {said}"[:300],
            lost=True,
            away=True,
        )


async def _read(content: aiohttp.StreamReader, cap: int) -> bytes:
    """Read a body to its end. Raises _TooLong or _TooSlow."""
    clock = asyncio.get_running_loop().time
    found = bytearray()
    ends: float | None = None  # of the window in which LEAST_BYTES must come; None: not begun
    had = 0
    while True:
        chunk: bytes | None = None
        try:
            async with asyncio.timeout_at(ends) as window:
                chunk = await content.read(_CHUNK)
        except TimeoutError:
            if not window.expired():
                raise  # the call's own deadline
        if chunk == b"":
            return bytes(found)
        found += chunk or b""
        if len(found) > cap:
            raise _TooLong
        if ends is None:
            # Blanks are how some servers keep a connection alive until they have the answer.
            if chunk and not chunk.isspace():
                ends, had = clock() + LEAST_SECONDS, len(found) - len(chunk)
        elif clock() >= ends:
            if len(found) - had < LEAST_BYTES:
                raise _TooSlow
            ends, had = clock() + LEAST_SECONDS, len(found)


def judge_status(status: int, headers: Mapping[str, str], body: bytes) -> Retry | Reject | None:
    """Decide what a reply means by its status; None where its body must tell (200)."""
    if status == 200:
        return None
    said = _said(body)
    if status == 429:
        after = retry_after(headers, time.time())
        return Retry(reasons.TEACHER_RATE_LIMITED, said, after=after, away=True)
    if status == 408:
        return Retry(reasons.TEACHER_TIMEOUT, f"status {status}: {said}", lost=True, away=True)
    if status >= 500 or status in _LATER:
        return Retry(
            reasons.TEACHER_ERROR,
            f"status {status}: {said}",
            after=retry_after(headers, time.time()) if status >= 500 else None,
            lost=status in MAYBE_BILLED,
            away=status >= 500,
        )
    if status >= 400:
        return Reject(reasons.REFUSED_BY_TEACHER, f"status {status}: {said}")
    return Reject(
        reasons.TEACHER_INVALID, f"status {status}: redirects are not followed; give the final URL"
    )


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


def _said(body: bytes) -> str:
    """What an error reply says, shortened, on one line."""
    return " ".join(body[:2000].decode(errors="replace")[:300].split())
