"""What one process has while it serves the capture endpoint: memories, a session, calls that run.

A watch looks at the calls from time to time, so that none needs timers of its own.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import aiohttp

from services.teacher_gateway.capture import failures
from services.teacher_gateway.capture.callers import Callers
from services.teacher_gateway.capture.exchange import Answer, Cut, Exchange
from services.teacher_gateway.capture.keeping import Keeping
from services.teacher_gateway.capture.record import Record
from services.teacher_gateway.capture.registrations import ServedTeachers, registered
from services.teacher_gateway.counters import CAPTURE_OPEN, CAPTURE_SECONDS
from services.teacher_gateway.database import reading
from services.teacher_gateway.egress import connector
from services.teacher_gateway.routes.parts import Gateway


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
        self.open: Counter[tuple[str, str]] = Counter()
        self._running: set[Exchange] = set()
        self._marks: dict[Exchange, tuple[float, int]] = {}
        self._watch = asyncio.get_running_loop().create_task(self._watching())

    def start(self, exchange: Exchange) -> asyncio.Task[Answer | None]:
        self.open[exchange.served.tenant_id, exchange.served.name] += 1
        self._running.add(exchange)
        task = asyncio.get_running_loop().create_task(exchange.run())
        exchange.task = task
        return task

    def ended(self, exchange: Exchange, record: Record) -> None:
        """An exchange has its record: keep it, whoever still waits for its answer."""
        self.open[exchange.served.tenant_id, exchange.served.name] -= 1
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
        """Cut what takes too long or drips, and drop a client that does not read."""
        limits = self._times
        since = exchange.sending_since
        if since is not None:
            if clock - since > limits.client:
                exchange.drop_client()
            return  # as long as the client does not read, nothing is asked of the teacher
        seconds = exchange.served.timeout_seconds
        if clock - exchange.started > seconds:
            detail = f"the teacher gave no whole answer within {seconds:g} seconds"
            exchange.cut(Cut(failures.TEACHER_TIMEOUT, 504, detail))
            return
        if exchange.first_byte is None:
            return
        at, received = self._marks.get(exchange, (exchange.first_byte, 0))
        if clock - at < limits.window:
            self._marks.setdefault(exchange, (at, received))
            return
        if exchange.received - received < limits.window_bytes:
            detail = (
                f"the teacher's answer came to less than {limits.window_bytes} bytes in "
                f"{limits.window:g} seconds"
            )
            exchange.cut(Cut(failures.TEACHER_SLOW, 504, detail))
            return
        self._marks[exchange] = (clock, exchange.received)
