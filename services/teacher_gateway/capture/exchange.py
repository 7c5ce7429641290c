"""One call upstream: passed on, counted, and made a record, whatever becomes of its client.

The call runs in a task of its own, which nobody but its watch cancels. A stream is passed on while
it comes; the client that asked for it may leave, or stop reading, and the rest is still taken in
(or cut, with `on_disconnect: abort`). In the end there is one record, and what was held for the
call is one cost: by the teacher's own count, or the most that it can have billed where that is not
known.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import aiohttp
import msgspec

from services.teacher_gateway.capture import failures
from services.teacher_gateway.capture.allowance import OpenTranche
from services.teacher_gateway.capture.asked import Asked
from services.teacher_gateway.capture.record import MOST_MICROUSD, Bill, Record
from services.teacher_gateway.capture.refusal import Headers, error_body
from services.teacher_gateway.capture.registrations import Served
from services.teacher_gateway.capture.room import PIECE_BYTES, Share
from services.teacher_gateway.capture.sse import Passing, Usage
from services.teacher_gateway.teachers.endpoint import MAYBE_BILLED, without_key
from stillhouse.chassis.errors import PermanentError
from stillhouse.chassis.logs import logger

log = logger(__name__)

Send = Callable[[dict[str, Any]], Awaitable[None]]

# An answer with log-probabilities takes about 1 kB a token and alternative; this is far beyond.
MOST_ANSWER_BYTES = 64 << 20
MOST_ERROR_BYTES = 1 << 20
_PASSED_ON = ("Content-Type", "Retry-After", "x-request-id")
_STREAM_HEADERS: Headers = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
]
_JSON: Headers = [(b"content-type", b"application/json")]


class _Choice(msgspec.Struct):
    index: int = 0


class _Completion(msgspec.Struct):
    choices: list[_Choice]
    usage: msgspec.Raw = msgspec.Raw(b"null")


_completion = msgspec.json.Decoder(_Completion)
_usage = msgspec.json.Decoder(Usage)


@dataclass(slots=True)
class Answer:
    """What the client gets, where it is not a stream that is on its way already."""

    status: int
    headers: Headers
    body: bytes


class Cut(Exception):
    """The call ends here, for a reason of ours."""

    def __init__(self, failure: str, status: int, detail: str, *, billed: bool = True) -> None:
        # It may quote the teacher, whose headers need not be UTF-8.
        super().__init__(detail.encode(errors="replace").decode())
        self.failure = failure
        self.status = status
        self.billed = billed


class Exchange:
    """A call from when its money is held to its record."""

    def __init__(
        self,
        served: Served,
        asked: Asked,
        body: bytes,
        tranche: OpenTranche | None,
        most: int,
        *,
        share: Share,
        session: aiohttp.ClientSession,
        send: Send,
        ended: Callable[[Exchange, Record], None],
    ) -> None:
        self.served = served
        self.asked = asked
        self.task: asyncio.Task[Answer | None] | None = None
        self._request = body
        self._tranche = tranche
        self._most = most
        self.share = share
        self._session = session
        self._send = send
        self._ended = ended
        self._started_at = time.time()
        self.started = time.monotonic()
        # What the watch looks at:
        self.received = 0
        self.first_byte: float | None = None
        self.sending_since: float | None = None
        self.waited = 0.0  # seconds for a client that does not read, before
        # What the watch did:
        self._cut: Cut | None = None
        self._begun = False
        self._client_is_here = True
        # Set when the client of a stream is not sent to any more.
        self.dropped: asyncio.Future[None] | None = None
        if asked.stream:
            self.dropped = asyncio.get_running_loop().create_future()
        # What came:
        self._status = 0
        self._chunks: list[bytes] = []
        self._kept = 0  # bytes of memory that they take
        self._unrecorded = False  # the answer goes on to its client, and is not kept
        self._usage: Usage | None = None
        self._stream_began = False

    # What the watch may do

    def cut(self, cut: Cut) -> None:
        """End the call now; its record says why."""
        if self._cut is None and self.task is not None and not self.task.done():
            self._cut = cut
            if self._begun:  # a task that is cancelled before it begins never does
                self.task.cancel()

    def drop_client(self) -> None:
        """Stop sending to a client that does not read; what the teacher says is still recorded."""
        if not self._client_is_here or self.dropped is None or self.task is None:
            return
        self._client_is_here = False
        if not self.dropped.done():
            self.dropped.set_result(None)
        if self.sending_since is not None:
            self.task.cancel()

    # The call

    async def run(self) -> Answer | None:
        """Make the call; None when the answer went to the client as a stream."""
        failure: Cut | None = None
        answer: Answer | None = None
        self._begun = True
        try:
            if self._cut is not None:
                raise self._cut
            answer, failure = await self._call()
        except asyncio.CancelledError:
            if self._cut is None:
                self._cut = Cut(failures.GATEWAY_STOPPED, 503, "the gateway stops: ask again")
            failure = self._cut
        except Cut as cut:
            failure = cut
        except (aiohttp.ClientConnectorError, aiohttp.ConnectionTimeoutError) as error:
            detail = f"the teacher cannot be reached: {error}"
            failure = Cut(failures.TEACHER_UNREACHABLE, 502, detail, billed=False)
        except PermanentError as error:  # the address is refused
            failure = Cut(failures.TEACHER_UNREACHABLE, 502, str(error), billed=False)
        except (aiohttp.ClientError, OSError) as error:
            detail = f"the connection to the teacher broke ({type(error).__name__})"
            failure = Cut(failures.TEACHER_ERROR, 502, detail)
        except Exception:
            log.exception("a call failed", teacher=self.served.name)
            detail = "the gateway failed on this call; its log tells why"
            failure = Cut(failures.GATEWAY_ERROR, 500, detail)
        finally:
            self._close(failure)
        if failure is None or answer is not None:
            return answer
        if self._stream_began:
            # A stream that has begun can still say what went wrong; the SDK raises it.
            body = error_body(failure.status, failure.failure, str(failure))
            await self._to_client(b"data: " + body + b"\n\n", last=True)
            return None
        return Answer(
            failure.status, _JSON, error_body(failure.status, failure.failure, str(failure))
        )

    async def _call(self) -> tuple[Answer | None, Cut | None]:
        served = self.served
        async with self._session.post(
            served.urls[self.asked.kind],
            data=self.asked.body_for(served.model),
            headers=served.headers,
            allow_redirects=False,
        ) as response:
            self._status = response.status
            if response.status != 200:
                return await self._refused(response)
            coding = response.headers.get("Content-Encoding", "identity")
            if coding != "identity":
                raise Cut(
                    failures.TEACHER_INVALID, 502, f"the teacher's answer is coded as {coding[:40]}"
                )
            if self.asked.stream:
                await self._pass_stream(response)
                return None, None
            body = await self._read(response, MOST_ANSWER_BYTES)
            self._chunks.append(body)
            self._judge(body)
            return Answer(200, _passed_on(response), body), None

    def _judge(self, body: bytes) -> None:
        try:
            found = _completion.decode(body)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            raise Cut(
                failures.TEACHER_INVALID, 502, f"the teacher sent no completion: {error}"
            ) from error
        if not found.choices:
            raise Cut(failures.TEACHER_INVALID, 502, "the teacher's answer has no choices")
        with suppress(msgspec.DecodeError):  # not given, or not believed: its cost is not known
            self._usage = _usage.decode(found.usage)

    async def _refused(self, response: aiohttp.ClientResponse) -> tuple[Answer | None, Cut]:
        """An error of the teacher goes to the client as it is, but for what would mislead it."""
        status = response.status
        billed = status in MAYBE_BILLED
        if status < 400 or status >= 600:
            detail = f"the teacher answered with status {status}: is `url` its final one?"
            raise Cut(failures.TEACHER_INVALID, 502, detail, billed=False)
        if status == 401:
            # Passed on it would say that the caller's own key is wrong.
            detail = "the teacher refused the gateway's key: the operator should check `api_key`"
            raise Cut(failures.REFUSED_BY_TEACHER, 502, detail, billed=False)
        body = without_key(await self._read(response, MOST_ERROR_BYTES), self.served.key)
        kind = failures.REFUSED_BY_TEACHER
        if status >= 500 or status == 408:
            kind = failures.TEACHER_ERROR
        elif status == 429:
            kind = failures.TEACHER_RATE_LIMITED
        cut = Cut(kind, status, f"the teacher answered with status {status}", billed=billed)
        return Answer(status, _passed_on(response), body), cut

    async def _read(self, response: aiohttp.ClientResponse, most: int) -> bytes:
        """Read a body; `received` tells the watch how it goes."""
        content = response.content
        first = await content.readany()
        self._saw(first, most)
        if content.at_eof():
            return first
        chunks = [first]
        self._kept = len(first) + PIECE_BYTES
        while chunk := await content.readany():
            self._saw(chunk, most)
            self._kept += len(chunk) + PIECE_BYTES
            if self._kept > self.share.answer_bytes and not self.share.grow(self._kept):
                raise _no_memory()
            chunks.append(chunk)
        return b"".join(chunks)

    def _saw(self, chunk: bytes, most: int) -> None:
        if self.first_byte is None:
            self.first_byte = time.monotonic()
        self.received += len(chunk)
        if self.received > most:
            raise Cut(failures.TOO_LARGE, 502, f"the teacher sent over {most} bytes")

    async def _pass_stream(self, response: aiohttp.ClientResponse) -> None:
        kind = response.headers.get("Content-Type", "")
        if not kind.startswith("text/event-stream"):
            detail = f"asked for a stream, the teacher answered with {kind[:80] or 'no type'}"
            raise Cut(failures.TEACHER_INVALID, 502, detail)
        passing = Passing(usage_hidden=self.asked.usage_hidden)
        content = response.content
        try:
            while chunk := await content.readany():
                self._saw(chunk, MOST_ANSWER_BYTES)
                passed = passing.feed(chunk)
                self._keep(chunk, passing.unfinished)
                if passed:
                    await self._to_client(passed)
            last = passing.end()
        finally:
            self._usage = passing.usage
        if not passing.done:
            raise Cut(failures.TRUNCATED, 502, "the teacher's stream ended without [DONE]")
        await self._to_client(last, last=True)

    def _keep(self, chunk: bytes, unfinished: int) -> None:
        """Keep a piece of a stream for its record, while there is memory for it.

        An answer never fails for its record: without memory it is passed on and not kept. Only an
        event without an end, which cannot be passed on yet, needs memory in any case.
        """
        if not self._unrecorded:
            self._chunks.append(chunk)
            self._kept += len(chunk) + PIECE_BYTES
            if self._kept <= self.share.answer_bytes or self.share.grow(self._kept):
                return
            self._unrecorded = True
            self._chunks.clear()
            self.share.shrink()
        if unfinished > self.share.answer_bytes and not self.share.grow(unfinished):
            raise _no_memory()

    async def _to_client(self, body: bytes, *, last: bool = False) -> None:
        """Send, as long as there is someone. Slow ones are dropped by the watch."""
        if not self._client_is_here:
            return
        since = self.sending_since = time.monotonic()
        try:
            if not self._stream_began:
                self._stream_began = True
                await self._send(
                    {"type": "http.response.start", "status": 200, "headers": _STREAM_HEADERS}
                )
            await self._send({"type": "http.response.body", "body": body, "more_body": not last})
        except asyncio.CancelledError:
            if self._client_is_here or self._cut is not None:
                raise
        except Exception:
            self._client_is_here = False  # it went away; the record does not
        finally:
            self.waited += time.monotonic() - since
            self.sending_since = None

    # Its end

    def _close(self, failure: Cut | None) -> None:
        """Settle and record, whatever happened. Nothing in here waits."""
        if failure is None and self._unrecorded:
            detail = "answered, and not recorded: calls in flight held all their memory"
            failure = Cut(failures.MEMORY_FULL, 200, detail)
        usage = self._usage
        bill: Bill = ""
        cost = 0
        if usage is not None:
            bill = "known"
            cost = self.served.rates.cost(usage.prompt_tokens, usage.completion_tokens)
            cost = min(cost, MOST_MICROUSD)
        elif failure is None or (failure.billed and self._status in (0, 200, *MAYBE_BILLED)):
            bill, cost = "unknown", self._most
        tranche = self._tranche
        if tranche is not None:
            tranche.settle_call(self._most, cost)
        record = Record(
            tenant_id=self.served.tenant_id,
            teacher=self.served.name,
            verdict_id=self.served.verdict_id,
            terms=self.served.terms,
            kind=self.asked.kind,
            at=self._started_at,
            seconds=time.monotonic() - self.started,
            status=self._status if failure is None else failure.status,
            streamed=self.asked.stream,
            failure="" if failure is None else failure.failure,
            detail="" if failure is None else str(failure)[:300],
            tags=self.asked.tags,
            prompt_tokens=usage.prompt_tokens if usage else 0,
            completion_tokens=usage.completion_tokens if usage else 0,
            tranche_id=tranche.tranche_id if tranche is not None and cost else "",
            bill=bill,
            microusd=cost,
            request=self._request,
            answer=b"".join(self._chunks) if failure is None else b"",
        )
        self._ended(self, record)


def _no_memory() -> Cut:
    detail = (
        "calls in flight hold all the memory that they may "
        "(TEACHER_GATEWAY_CAPTURE_MEMORY_BYTES): try again in a second"
    )
    return Cut(failures.MEMORY_FULL, 503, detail)


def _passed_on(response: aiohttp.ClientResponse) -> Headers:
    found: Headers = []
    for name in _PASSED_ON:
        if (value := response.headers.get(name)) is not None:
            found.append((name.lower().encode(), value.encode("latin-1", "replace")))
    return found
