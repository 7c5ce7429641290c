"""What one process has while it serves the capture endpoint: memories, a session, calls that run.

A watch looks at the calls from time to time, so that none needs timers of its own.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass

import aiohttp

from services.teacher_gateway.capture import failures
from services.teacher_gateway.capture.callers import Callers
from services.teacher_gateway.capture.exchange import Answer, Cut, Exchange
from services.teacher_gateway.capture.keeping import Keeping
from services.teacher_gateway.capture.record import Record
from services.teacher_gateway.capture.refusal import Refusal
from services.teacher_gateway.capture.registrations import Served, ServedTeachers, registered
from services.teacher_gateway.capture.room import Room, Share
from services.teacher_gateway.counters import CAPTURE_OPEN, CAPTURE_SECONDS
from services.teacher_gateway.database import reading
from services.teacher_gateway.egress import connector
from services.teacher_gateway.routes.parts import Gateway

_BUSY_SECONDS = 1


@dataclass(frozen=True)
class Times:
    """Seconds. A teacher's own deadline is its `limits.timeout_seconds`."""

    # A request's whole body.
    body: float = 60.0
    # A client that does not read what it is sent.
    client: float = 30.0
    # Once an answer has begun, so many bytes must come in each window.
    window: float = 60.0
    window_bytes: int = 64
    watch: float = 0.5
    # How long a segment of the spool is written before it is shipped, and the pause between two
    # looks at what is to be shipped, settled and given back.
    segment: float = 2.0
    turn: float = 0.5


class Serving:
    """What one process has while it serves."""

    def __init__(self, gateway: Gateway, environ: Mapping[str, str], times: Times) -> None:
        settings = gateway.settings
        self._gateway = gateway
        self._times = times
        self._threads = ThreadPoolExecutor(8, thread_name_prefix="capture")
        self.callers = Callers(gateway.engine, settings.key_pepper, self._threads)
        self.teachers = ServedTeachers(
            gateway.engine, gateway.catalogue, settings, environ, self._threads
        )
        self.keeping = Keeping(
            gateway.engine,
            gateway.store,
            settings,
            self._threads,
            segment_seconds=times.segment,
            turn_seconds=times.turn,
        )
        self.session = aiohttp.ClientSession(
            connector=connector(private=settings.private_teachers, limit=0),
            cookie_jar=aiohttp.DummyCookieJar(),
            timeout=aiohttp.ClientTimeout(total=None, sock_connect=10),
            auto_decompress=False,
            trust_env=False,
            skip_auto_headers=("User-Agent", "Accept"),
        )
        self._room = Room(settings.capture_memory_bytes)
        self._open: Counter[tuple[str, str]] = Counter()
        self._running: set[Exchange] = set()
        self._marks: dict[Exchange, tuple[float, int]] = {}
        self._watch = asyncio.get_running_loop().create_task(self._watching())

    def enter(self, served: Served, body_bytes: int) -> Share:
        """Count a call in, before it waits for anything. Raises Refusal (429 or 503)."""
        key = (served.tenant_id, served.name)
        if self._open[key] >= served.concurrency:
            raise Refusal(
                429,
                "too_many_calls",
                f"{served.concurrency} calls to {served.name!r} are open: try again in a second, "
                "or raise `limits.concurrency`",
                retry_after=_BUSY_SECONDS,
            )
        share = self._room.enter(body_bytes)
        if share is None:
            raise Refusal(
                503,
                failures.MEMORY_FULL,
                "calls in flight hold all the memory that they may: try again in a second, or "
                "raise TEACHER_GATEWAY_CAPTURE_MEMORY_BYTES",
                retry_after=_BUSY_SECONDS,
            )
        self._open[key] += 1
        return share

    def leave(self, served: Served, share: Share) -> None:
        """Count it out."""
        self._open[served.tenant_id, served.name] -= 1
        share.leave()

    @contextmanager
    def holding(self, size: int) -> Iterator[None]:
        """Count an answer that is there already, as long as it is given to its client."""
        self._room.used += size
        try:
            yield
        finally:
            self._room.used -= size

    def start(self, exchange: Exchange) -> asyncio.Task[Answer | None]:
        self._running.add(exchange)
        task = asyncio.get_running_loop().create_task(exchange.run())
        exchange.task = task
        return task

    def ended(self, exchange: Exchange, record: Record) -> None:
        """An exchange has its record: keep it, whoever still waits for its answer."""
        self.leave(exchange.served, exchange.share)
        self._running.discard(exchange)
        CAPTURE_SECONDS.observe(record.seconds)
        self.keeping.keep(record)

    async def list_teachers(self, tenant_id: str) -> list[tuple[str, float]]:
        def read() -> list[tuple[str, float]]:
            with reading(self._gateway.engine) as session:
                return [(row.name, row.created_at) for row in registered(session, tenant_id)]

        return await asyncio.get_running_loop().run_in_executor(self._threads, read)

    async def stop(self) -> None:
        """End what still runs, keep what was recorded, give back what was not spent."""
        self._watch.cancel()
        detail = "the gateway stops: ask again"
        for exchange in list(self._running):
            exchange.cut(Cut(failures.GATEWAY_STOPPED, 503, detail))
        tasks = [exchange.task for exchange in self._running if exchange.task is not None]
        if tasks:
            await asyncio.wait(tasks)
        await self.keeping.stop()
        await self.session.close()
        self._threads.shutdown(wait=False, cancel_futures=True)

    async def _watching(self) -> None:
        while True:
            await asyncio.sleep(self._times.watch)
            clock = time.monotonic()
            CAPTURE_OPEN.set(len(self._running))
            for exchange in list(self._running):
                self._look_at(exchange, clock)
            if len(self._marks) > 2 * len(self._running):
                self._marks = {e: m for e, m in self._marks.items() if e in self._running}

    def _look_at(self, exchange: Exchange, clock: float) -> None:
        """Cut what takes too long or drips, and drop a client that does not read.

        A teacher is not asked for the time in which a client did not read. A client has the whole
        call's time for that; after it the answer is still recorded, without it.
        """
        limits = self._times
        since = exchange.sending_since
        waited = exchange.waited + (0.0 if since is None else clock - since)
        age = clock - exchange.started
        seconds = exchange.served.timeout_seconds
        stuck = since is not None and clock - since > limits.client
        if stuck or (age > seconds and waited > limits.watch):
            exchange.drop_client()
        if age - waited > seconds:
            detail = f"the teacher gave no whole answer within {seconds:g} seconds"
            exchange.cut(Cut(failures.TEACHER_TIMEOUT, 504, detail))
            return
        if since is not None or exchange.first_byte is None:
            return
        begun = (exchange.first_byte - exchange.started, 0)
        at, received = self._marks.get(exchange, begun)
        if age - waited - at < limits.window:
            self._marks.setdefault(exchange, begun)
            return
        if exchange.received - received < limits.window_bytes:
            detail = (
                f"the teacher's answer came to less than {limits.window_bytes} bytes in "
                f"{limits.window:g} seconds"
            )
            exchange.cut(Cut(failures.TEACHER_SLOW, 504, detail))
            return
        self._marks[exchange] = (age - waited, exchange.received)
