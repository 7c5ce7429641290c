"""A TCP proxy that loses things: replies, requests, time. One for each edge under test.

with proxy("127.0.0.1", store_port) as edge:
    edge.cut_replies(to=b"PUT", times=1)     # the other side did the work, we never hear of it
    edge.mode = "hold"                       # nothing passes, nothing is closed
    edge.mode = "refuse"                     # every connection is reset
    edge.delay_requests(to=b"PUT", seconds=3)   # arrives long after the caller gave up
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import struct
import threading
from collections.abc import Coroutine, Iterator
from typing import Any, Literal

Mode = Literal["pass", "hold", "refuse"]


class Proxy:
    """The running proxy; attributes may be changed at any time from any thread."""

    def __init__(self, host: str, port: int) -> None:
        self._target = (host, port)
        self.mode: Mode = "pass"
        self.port = 0
        self.cut = 0
        self._cut: tuple[bytes, int] = (b"", 0)
        self._delay: tuple[bytes, float] = (b"", 0.0)
        self._writers: set[asyncio.StreamWriter] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self._loop = asyncio.new_event_loop()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def cut_replies(self, *, to: bytes = b"", times: int = 1) -> None:
        """Reset the connection instead of passing on replies to requests that begin with `to`."""
        self._cut = (to, times)

    def delay_requests(self, *, to: bytes, seconds: float) -> None:
        """Pass on requests that begin with `to` only after a while, whoever still waits."""
        self._delay = (to, seconds)

    def reset_all(self) -> None:
        """Reset every open connection."""
        self._loop.call_soon_threadsafe(self._reset_all)

    def _reset_all(self) -> None:
        for writer in list(self._writers):
            _reset(writer)

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if self.mode == "refuse":
            _reset(writer)
            return
        self._writers.add(writer)
        try:
            upstream_reader, upstream = await asyncio.open_connection(*self._target)
        except OSError:
            _reset(writer)
            return
        self._writers.add(upstream)
        state = {"cut": False}
        self._start(self._requests(reader, writer, upstream, state))
        self._start(self._replies(upstream_reader, writer, state))

    def _start(self, work: Coroutine[Any, Any, None]) -> None:
        task = self._loop.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _requests(
        self,
        reader: asyncio.StreamReader,
        client: asyncio.StreamWriter,
        upstream: asyncio.StreamWriter,
        state: dict[str, bool],
    ) -> None:
        late = 0.0
        with contextlib.suppress(OSError, asyncio.CancelledError):
            while data := await reader.read(1 << 16):
                if not await self._may_pass(client):
                    return
                prefix, seconds = self._delay
                if prefix and data.startswith(prefix):
                    late, self._delay = seconds, (b"", 0.0)
                prefix, times = self._cut
                if times and data.startswith(prefix):
                    state["cut"], self._cut = True, (prefix, times - 1)
                if late:
                    await asyncio.sleep(late)
                    late = 0.0
                upstream.write(data)
                await upstream.drain()
        if not late:
            upstream.close()

    async def _replies(
        self, reader: asyncio.StreamReader, client: asyncio.StreamWriter, state: dict[str, bool]
    ) -> None:
        with contextlib.suppress(OSError, asyncio.CancelledError):
            while data := await reader.read(1 << 16):
                if not await self._may_pass(client):
                    return
                if state["cut"] and not data.startswith(b"HTTP/1.1 100"):
                    self.cut += 1
                    _reset(client)
                    return
                client.write(data)
                await client.drain()
        client.close()

    async def _may_pass(self, client: asyncio.StreamWriter) -> bool:
        while self.mode == "hold":  # noqa: ASYNC110 (set from other threads)
            await asyncio.sleep(0.02)
        if self.mode == "refuse":
            _reset(client)
            return False
        return True


def _reset(writer: asyncio.StreamWriter) -> None:
    found = writer.get_extra_info("socket")
    if found is not None:
        with contextlib.suppress(OSError):
            found.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    writer.transport.abort()


@contextlib.contextmanager
def proxy(host: str, port: int) -> Iterator[Proxy]:
    """Run a proxy to an address on a thread of its own."""
    edge = Proxy(host, port)
    loop, ready = edge._loop, threading.Event()
    ended = asyncio.Event()

    async def serve() -> None:
        server = await asyncio.start_server(edge._accept, "127.0.0.1", 0)
        edge.port = server.sockets[0].getsockname()[1]
        ready.set()
        await ended.wait()
        server.close()
        edge._reset_all()
        for task in list(edge._tasks):
            task.cancel()
        await asyncio.gather(*edge._tasks, return_exceptions=True)

    def run() -> None:
        loop.run_until_complete(serve())
        loop.close()

    thread = threading.Thread(target=run, name="proxy", daemon=True)
    thread.start()
    ready.wait()
    try:
        yield edge
    finally:
        loop.call_soon_threadsafe(ended.set)
        thread.join(10)
