"""Events of pipelines as server-sent streams: many readers, one look at the database.

While anybody reads, one query a second asks how far all the pipelines have come that are watched
in this process; a stream reads its events only when there are new ones. No stream holds a thread.
A stream ends when its pipeline has ended and all was sent, when the process is to end, when the
database cannot be read, when its key was revoked or when its reader is too slow; a reader that
comes back with the last sequence it saw misses nothing.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from sqlalchemy import Engine, select
from starlette.concurrency import run_in_threadpool
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from services.teacher_gateway.counters import EVENT_STREAMS
from services.teacher_gateway.database import reading
from services.teacher_gateway.keys import KeyRefused
from services.teacher_gateway.models import Pipeline
from services.teacher_gateway.problems import ProblemError, unavailable
from services.teacher_gateway.schemas import EventView
from services.teacher_gateway.settings import TeacherGatewaySettings
from services.teacher_gateway.stop import TERMINAL
from stillhouse.chassis.errors import RetryableError
from stillhouse.chassis.logs import logger

log = logger(__name__)

LOOK_SECONDS = 1.0
HEARTBEAT_SECONDS = 15.0
SEND_SECONDS = 30.0  # without a byte taken
PAGE = 50
_RETRY_MILLISECONDS = 2000


class StreamEnds(Exception):
    """A stream cannot go on here; its reader comes back."""


@dataclass(frozen=True)
class Mark:
    """How far a pipeline has come: its last event, and whether it has ended."""

    last: int
    ended: bool

    @classmethod
    def of(cls, pipeline: Pipeline) -> Mark:
        return cls(pipeline.next_event - 1, pipeline.state in TERMINAL)


@dataclass
class _Watched:
    """A pipeline with readers; `news` is set, and replaced, when its mark moves."""

    mark: Mark
    readers: int = 0
    news: asyncio.Event = field(default_factory=asyncio.Event)


class EventStreams:
    """All open streams of a process. Used in its event loop alone."""

    def __init__(self, engine: Engine, settings: TeacherGatewaySettings) -> None:
        self._engine = engine
        self._most = settings.max_event_streams
        self._most_of_tenant = settings.max_tenant_event_streams
        self._open: Counter[str] = Counter()
        self._watched: dict[str, _Watched] = {}
        self._looking: asyncio.Task[None] | None = None
        self._closed = False

    def close(self) -> None:
        """End every stream, and take no new ones: the process is to end."""
        self._closed = True
        _tell(self._watched)

    @contextlib.contextmanager
    def reader(self, tenant_id: str, pipeline_id: str, mark: Mark) -> Iterator[None]:
        """Count a reader in. Raises ProblemError where there are too many."""
        if self._closed:
            raise unavailable("the gateway is being stopped")
        if self._open[tenant_id] >= self._most_of_tenant:
            raise _too_many(f"of this tenant ({self._most_of_tenant} at most)")
        if self._open.total() >= self._most:
            raise _too_many(f"of all tenants together ({self._most} at most)")
        watched = self._watched.setdefault(pipeline_id, _Watched(mark))
        watched.readers += 1
        self._open[tenant_id] += 1
        EVENT_STREAMS.inc()
        if self._looking is None:
            self._looking = asyncio.get_running_loop().create_task(self._look_on())
        try:
            yield
        finally:
            EVENT_STREAMS.dec()
            self._open[tenant_id] -= 1
            watched.readers -= 1
            if not watched.readers and self._watched.get(pipeline_id) is watched:
                del self._watched[pipeline_id]

    async def beyond(self, pipeline_id: str, sequence: int) -> Mark:
        """Wait until a pipeline has an event beyond a sequence, or has ended. Raises StreamEnds."""
        while True:
            watched = self._watched.get(pipeline_id)
            if self._closed or watched is None:
                raise StreamEnds
            if watched.mark.ended or watched.mark.last > sequence:
                return watched.mark
            await watched.news.wait()

    async def _look_on(self) -> None:
        """Look as long as there are readers."""
        try:
            while self._watched and not self._closed:
                await asyncio.sleep(LOOK_SECONDS)
                marks = await run_in_threadpool(_look, self._engine, list(self._watched))
                moved = {}
                for name, watched in self._watched.items():
                    mark = marks.get(name, watched.mark)
                    if mark != watched.mark:
                        watched.mark = mark
                        moved[name] = watched
                _tell(moved)
        except RetryableError as error:
            log.warning("event streams end: their database cannot be read", why=str(error))
        except Exception:
            log.exception("event streams end")
        finally:
            self._looking = None
            if self._watched:
                # Who reads on is without a look; who comes next starts another.
                left, self._watched = self._watched, {}
                _tell(left)


def _tell(whom: Mapping[str, _Watched]) -> None:
    """Wake the readers of pipelines."""
    for watched in whom.values():
        watched.news.set()
        watched.news = asyncio.Event()


def _too_many(whose: str) -> ProblemError:
    return ProblemError(
        429,
        "too-many-streams",
        f"too many event streams {whose} are open here: close one, or read /events in pages",
        headers={"Retry-After": "5"},
    )


def _look(engine: Engine, pipelines: Sequence[str]) -> dict[str, Mark]:
    columns = (Pipeline.pipeline_id, Pipeline.next_event, Pipeline.state)
    with reading(engine) as session:
        rows = session.execute(select(*columns).where(Pipeline.pipeline_id.in_(pipelines)))
        return {name: Mark(following - 1, state in TERMINAL) for name, following, state in rows}


class EventStream(Response):
    """One stream as an ASGI response.

    `read` returns the events beyond a sequence, at most PAGE; `check_key` raises KeyRefused once
    the reader's key holds no more. Both block and run in the thread pool.
    """

    media_type = "text/event-stream"

    def __init__(
        self,
        streams: EventStreams,
        *,
        tenant_id: str,
        pipeline_id: str,
        mark: Mark,
        after: int,
        read: Callable[[int], list[EventView]],
        check_key: Callable[[], object],
    ) -> None:
        self.status_code = 200
        self.background = None
        self.raw_headers = [
            (b"content-type", b"text/event-stream; charset=utf-8"),
            (b"cache-control", b"no-store"),
            (b"x-accel-buffering", b"no"),  # nginx would keep events back
        ]
        self._streams = streams
        self._tenant_id = tenant_id
        self._pipeline_id = pipeline_id
        self._mark = mark
        self._after = after
        self._read = read
        self._check_key = check_key

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            with self._streams.reader(self._tenant_id, self._pipeline_id, self._mark):
                await self._serve(receive, send)
        except ProblemError as error:
            await error.response()(scope, receive, send)

    async def _serve(self, receive: Receive, send: Send) -> None:
        sending = asyncio.ensure_future(self._send_all(send))
        leaving = asyncio.ensure_future(_left(receive))
        try:
            await asyncio.wait({sending, leaving}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in (sending, leaving):
                task.cancel()
            results = await asyncio.gather(sending, leaving, return_exceptions=True)
        if isinstance(results[0], Exception):
            raise results[0]

    async def _send_all(self, send: Send) -> None:
        start = {"type": "http.response.start", "status": 200, "headers": self.raw_headers}
        try:
            async with asyncio.timeout(SEND_SECONDS):
                await send(start)
            await _put(send, b"retry: %d\n\n" % _RETRY_MILLISECONDS)
            try:
                await self._send_events(send)
            except (StreamEnds, KeyRefused):
                pass
            except RetryableError as error:
                log.warning("an event stream ends", why=str(error))
            await _put(send, b"", more=False)
        except TimeoutError:
            # The connection is closed by the server, since the answer is not whole.
            log.info("an event stream is cut: its reader is too slow", pipeline=self._pipeline_id)

    async def _send_events(self, send: Send) -> None:
        sequence = self._after
        checked_at = time.monotonic()
        while True:
            try:
                async with asyncio.timeout(HEARTBEAT_SECONDS):
                    mark = await self._streams.beyond(self._pipeline_id, sequence)
            except TimeoutError:
                await _put(send, b": nothing new\n\n")
            else:
                while sequence < mark.last:
                    page = await run_in_threadpool(self._read, sequence)
                    if not page:
                        raise StreamEnds  # never seen: history is not deleted
                    sequence = page[-1].sequence
                    await _put(send, b"".join(map(_encoded, page)))
                if mark.ended:
                    return
            if time.monotonic() - checked_at >= HEARTBEAT_SECONDS:
                await run_in_threadpool(self._check_key)
                checked_at = time.monotonic()


async def _put(send: Send, data: bytes, *, more: bool = True) -> None:
    """Send some bytes. Raises TimeoutError where the reader takes none of those before."""
    async with asyncio.timeout(SEND_SECONDS):
        await send({"type": "http.response.body", "body": data, "more_body": more})


async def _left(receive: Receive) -> None:
    """Return when the reader has left."""
    with contextlib.suppress(ProblemError):  # of a request body that stalls: it has none
        while (await receive())["type"] != "http.disconnect":
            pass


def _encoded(event: EventView) -> bytes:
    """An event as the stream carries it; JSON has no line ends of its own."""
    data = event.model_dump_json()
    return f"id: {event.sequence}\nevent: {event.type}\ndata: {data}\n\n".encode()
