"""A provider's batch API, as OpenAI defines it: a file of requests in, files of replies out.

The lines of the file are the bodies that `OpenAITeacher` would have sent, and their replies are
judged by it. A provider may take a day; nothing here waits for it.
"""

from __future__ import annotations

import json
import re
from collections.abc import AsyncGenerator, AsyncIterator, Mapping, Sequence
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote

import aiohttp
import msgspec

from services.teacher_gateway import reasons
from services.teacher_gateway.teachers.endpoint import (
    judge_status,
    longest_reply,
    open_session,
    send,
    without_key,
)
from services.teacher_gateway.teachers.openai import OpenAITeacher
from services.teacher_gateway.teachers.outcomes import Call, Outcome, Reject, Retry
from stillhouse.contracts.spec import Signal, Teacher

ENDED = frozenset({"completed", "failed", "expired", "cancelled"})
ENDPOINT = "/v1/chat/completions"
# The provider's times are its own: one listed as so much older than ours may still be ours.
_CLOCKS_APART = 3600
_LISTED = 100
_MOST_PAGES = 20
_ID = re.compile(r"[A-Za-z0-9._=:+-]{1,500}")
_REPLY_BYTES = 4 << 20
_CHUNK = 1 << 16
# What a provider says of a request whose answer it may have computed and does not give.
_MAYBE_BILLED = frozenset({"request_timeout"})
_OUT_OF_TIME = frozenset({"batch_expired", "request_timeout"})


class NoAnswer(Exception):
    """The provider did not do it now; `outcome.lost` where it may have done it all the same."""

    def __init__(self, outcome: Retry) -> None:
        super().__init__(outcome.detail)
        self.outcome = outcome


class Refused(Exception):
    """The provider will never do it."""

    def __init__(self, outcome: Reject) -> None:
        super().__init__(outcome.detail)
        self.outcome = outcome


class CannotList(Exception):
    """The provider does not tell which batches it has."""


@dataclass(frozen=True)
class Progress:
    """How far a provider is. `completed` counts the lines that it answered, where it tells."""

    id: str
    status: str
    output_file: str = ""
    error_file: str = ""
    completed: int | None = None
    detail: str = ""

    @property
    def ended(self) -> bool:
        return self.status in ENDED


class _Counts(msgspec.Struct):
    completed: int | None = None


class _Batch(msgspec.Struct):
    id: str
    status: str
    input_file_id: str | None = None
    output_file_id: str | None = None
    error_file_id: str | None = None
    request_counts: _Counts | None = None
    errors: Any = None
    metadata: Any = None
    created_at: Any = None

    @property
    def progress(self) -> Progress:
        counts = self.request_counts
        return Progress(
            id=self.id,
            status=self.status,
            output_file=self.output_file_id or "",
            error_file=self.error_file_id or "",
            completed=counts.completed if counts else None,
            detail=_said(self.errors),
        )


class _Page(msgspec.Struct):
    data: list[_Batch]
    has_more: bool | None = None

    @property
    def more(self) -> bool:
        return len(self.data) >= _LISTED if self.has_more is None else self.has_more

    def all_before(self, moment: float) -> bool:
        """Whether this page, and so all that follow, is older; told only by newest-first lists."""
        times = [b.created_at for b in self.data if isinstance(b.created_at, int | float)]
        falling = len(times) > 1 and times == sorted(times, reverse=True)
        return falling and times[0] < moment


class _List(msgspec.Struct):
    data: list[msgspec.Raw]


class _File(msgspec.Struct):
    id: str


class _Response(msgspec.Struct):
    status_code: int
    body: msgspec.Raw = msgspec.Raw(b"null")


class _Error(msgspec.Struct):
    code: str | None = None
    message: str | None = None


class Line(msgspec.Struct):
    """One line of an output or error file."""

    custom_id: str
    response: _Response | None = None
    error: _Error | None = None


_line = msgspec.json.Decoder(Line)


class BatchApi(OpenAITeacher):
    """One teacher's batch API over one HTTP session; use `open_batch_api`.

    Methods raise NoAnswer, Refused, or EgressRefused.
    """

    def __init__(
        self,
        session: aiohttp.ClientSession,
        teacher: Teacher,
        signal: Signal,
        key: str | None,
        *,
        deadline: float,
    ) -> None:
        super().__init__(session, teacher, signal, key)
        assert teacher.url is not None, "the spec requires a URL"
        self._base = teacher.url.rstrip("/")
        self._deadline = deadline

    # Which of a request's parameters this provider was found not to know, to be kept between jobs.

    @property
    def form(self) -> str:
        return json.dumps({"limit": self._limit, "left_out": sorted(self._left_out)})

    @form.setter
    def form(self, known: str) -> None:
        if known:
            said = json.loads(known)
            self._limit, self._left_out = said["limit"], set(said["left_out"])

    def encode(self, calls: Mapping[str, Call]) -> bytes:
        """The file of requests, by their ids."""
        lines = (
            {"custom_id": name, "method": "POST", "url": ENDPOINT, "body": self.request(call)}
            for name, call in calls.items()
        )
        return b"".join(msgspec.json.encode(line) + b"\n" for line in lines)

    # The calls

    async def exists(self) -> bool:
        """Whether the server has files and batches at all: one that has them without lists answers
        otherwise than that there is no such path. Costs nothing."""
        for path in ("/batches?limit=1", "/files?limit=1"):
            reply = await self._send("GET", path, None, self._deadline)
            if reply.status in (404, 501):
                continue
            if reply.status != 405:
                _decoded(self._taken(reply.status, reply.headers, reply.body), _List)
            return True
        return False

    async def upload(self, data: bytes, *, deadline: float) -> str:
        """Upload a file of requests; return its id."""
        form = aiohttp.FormData()
        form.add_field("purpose", "batch")
        form.add_field("file", data, filename="requests.jsonl", content_type="application/jsonl")
        body = await self._call("POST", "/files", form, deadline=deadline)
        return _checked(_decoded(body, _File).id)

    async def delete(self, file_id: str) -> None:
        """Delete a file, if it is there."""
        path = f"/files/{quote(file_id, safe='')}"
        reply = await self._send("DELETE", path, None, self._deadline)
        if reply.status != 404:
            self._taken(reply.status, reply.headers, reply.body)

    async def create(self, file_id: str, metadata: Mapping[str, str]) -> Progress:
        """Let the provider begin. `NoAnswer` with `lost`: perhaps it has."""
        asked = {
            "input_file_id": file_id,
            "endpoint": ENDPOINT,
            "completion_window": "24h",
            "metadata": dict(metadata),
        }
        body = await self._call("POST", "/batches", json.dumps(asked).encode())
        made: _Batch = _decoded(body, _Batch)
        _checked(made.id)
        return made.progress

    async def look(self, batch_id: str) -> Progress | None:
        """See how far a batch is; None when the provider does not know it."""
        return await self._known("GET", f"/batches/{quote(batch_id, safe='')}")

    async def cancel(self, batch_id: str) -> Progress | None:
        """Ask for the end of a batch; what it has answered by then it keeps."""
        try:
            return await self._known("POST", f"/batches/{quote(batch_id, safe='')}/cancel")
        except Refused:
            return await self.look(batch_id)  # it ended by itself meanwhile

    async def find(
        self, metadata: Mapping[str, str], file_id: str, since: float
    ) -> Progress | None:
        """Look for a batch whose id was lost; None when there is none. Raises CannotList."""
        after = ""
        for _ in range(_MOST_PAGES):
            path = f"/batches?limit={_LISTED}" + (f"&after={quote(after)}" if after else "")
            try:
                body = await self._call("GET", path)
                page = msgspec.json.decode(body, type=_Page)
            except (Refused, msgspec.DecodeError) as error:
                raise CannotList(str(error)[:300]) from error
            for listed in page.data:
                known = listed.metadata if isinstance(listed.metadata, dict) else {}
                if listed.input_file_id == file_id or metadata.items() <= known.items():
                    _checked(listed.id)
                    return listed.progress
            if not page.data or not page.more or page.all_before(since - _CLOCKS_APART):
                return None
            if page.data[-1].id == after:
                raise CannotList("its list of batches does not go on")
            after = page.data[-1].id
        raise CannotList(f"it has more than {_LISTED * _MOST_PAGES} newer batches")

    async def lines(self, file_id: str, *, most: int, deadline: float) -> AsyncGenerator[bytes]:
        """Stream the lines of a file, at most so many; one that is too long is left out."""
        cap = longest_reply(self._signal, self._signal.max_tokens) + (1 << 16)
        held, count, skipping = bytearray(), 0, False
        path = f"/files/{quote(file_id, safe='')}/content"
        async with aclosing(self._chunks(path, deadline)) as chunks:
            async for chunk in chunks:
                first, *rest = chunk.split(b"\n")
                held += first
                for piece in rest:
                    if held.strip() and not skipping and len(held) <= cap:
                        yield without_key(bytes(held), self._key)
                    count += 1
                    if count > most:
                        return
                    held, skipping = bytearray(piece), False
                if len(held) > cap:
                    held, skipping = bytearray(), True
        if held.strip() and not skipping and len(held) <= cap:
            yield without_key(bytes(held), self._key)

    # What a line means

    def judge_line(self, line: Line, sent: Mapping[str, Any]) -> Outcome:
        """Decide what a line means. `sent` is a body as it was sent: a parameter that the provider
        does not know is left out the next time."""
        if line.response is None:
            error = line.error or _Error()
            late = error.code in _OUT_OF_TIME
            return Retry(
                reasons.TEACHER_TIMEOUT if late else reasons.TEACHER_ERROR,
                f"no response, but {error.code}: {error.message}"[:300],
                lost=error.code in _MAYBE_BILLED,
            )
        status, body = line.response.status_code, bytes(line.response.body)
        outcome = self.judge(status, {}, body)
        if isinstance(outcome, Reject) and self._adapt(sent, status, body):
            return Retry(outcome.reason, outcome.detail)
        return outcome

    # HTTP

    async def _known(self, method: str, path: str) -> Progress | None:
        reply = await self._send(method, path, None, self._deadline)
        if reply.status == 404:
            return None
        found: _Batch = _decoded(self._taken(reply.status, reply.headers, reply.body), _Batch)
        return found.progress

    async def _call(
        self, method: str, path: str, data: Any = None, *, deadline: float | None = None
    ) -> bytes:
        reply = await self._send(method, path, data, deadline or self._deadline)
        return self._taken(reply.status, reply.headers, reply.body)

    async def _send(self, method: str, path: str, data: Any, deadline: float) -> Any:
        kind = {"Content-Type": "application/json"} if isinstance(data, bytes) else {}
        reply = await send(
            self._session,
            method,
            self._base + path,
            {**self._headers, **kind},
            data,
            key=self._key,
            cap=_REPLY_BYTES,
            deadline=deadline,
        )
        if isinstance(reply, Retry):
            raise NoAnswer(reply)
        return reply

    def _taken(self, status: int, headers: Mapping[str, str], body: bytes) -> bytes:
        outcome = judge_status(200 if status in (201, 202, 204) else status, headers, body)
        if isinstance(outcome, Retry):
            raise NoAnswer(outcome)
        if outcome is not None:
            raise Refused(outcome)
        return body

    async def _chunks(self, path: str, deadline: float) -> AsyncGenerator[bytes]:
        try:
            async with self._session.get(
                self._base + path,
                headers={**self._headers, "Accept-Encoding": "identity"},
                allow_redirects=False,
                timeout=aiohttp.ClientTimeout(total=deadline, sock_read=self._deadline),
            ) as response:
                if response.status != 200:
                    said = without_key(await response.content.read(2000), self._key)
                    self._taken(response.status, response.headers, said)
                async for chunk in response.content.iter_chunked(_CHUNK):
                    yield chunk
        except (TimeoutError, aiohttp.ClientError, OSError) as error:
            detail = f"the provider's file did not arrive: {type(error).__name__}"
            raise NoAnswer(Retry(reasons.TEACHER_ERROR, detail, away=True)) from error


@asynccontextmanager
async def open_batch_api(
    teacher: Teacher,
    signal: Signal,
    *,
    key: str | None,
    private: bool,
    deadline: float,
) -> AsyncIterator[BatchApi]:
    """Open a client whose calls take `deadline` seconds at most, each. Raises EgressRefused."""
    async with open_session(teacher, private=private, connections=2) as session:
        yield BatchApi(session, teacher, signal, key, deadline=deadline)


def read_line(data: bytes) -> Line | None:
    """Parse a line; None where it is none of ours."""
    try:
        return _line.decode(data)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return None


def _decoded(body: bytes, kind: type[Any]) -> Any:
    try:
        return msgspec.json.decode(body, type=kind)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        said = f"expected {kind.__name__[1:].lower()} as OpenAI writes it, found {body[:80]!r}"
        detail = f"{said} ({error})"[:300]
        raise NoAnswer(Retry(reasons.TEACHER_INVALID, detail, lost=True, away=True)) from error


def _checked(found: str) -> str:
    """An id becomes part of a URL and of a row."""
    if not _ID.fullmatch(found):
        detail = f"expected an id of at most 500 plain characters, found {found[:80]!r}"
        raise NoAnswer(Retry(reasons.TEACHER_INVALID, detail, lost=True, away=True))
    return found


def _said(errors: Any) -> str:
    """What a batch's `errors` say, in whatever shape, on one line."""
    found: Sequence[Any] = errors.get("data") or [] if isinstance(errors, dict) else errors or []
    said = []
    for error in found if isinstance(found, list) else [found]:
        if isinstance(error, dict):
            said.append(": ".join(str(error[k]) for k in ("code", "message") if error.get(k)))
        else:
            said.append(str(error))
    return " ".join("; ".join(said).split())[:300]
