"""An upstream that answers at once, and a client that asks as fast as it is answered.

    python -m benchmarks.load upstream --port 9911 --delay-ms 0
    python -m benchmarks.load ask --url http://127.0.0.1:8080/v1/chat/completions ...

Both are bare asyncio protocols, so that they cost far less than any gateway between them. An answer
is 1.1 kB, tells which question it answers, and the client checks that: an answer that is not its
question's is an error, as is any status but 200. `ask` prints one JSON line.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import re
import sys
import time
from typing import Any, ClassVar
from urllib.parse import urlsplit

try:
    import uvloop
except ImportError:
    uvloop = None  # type: ignore[assignment]

MARKS = 64
FILLER = "The distillery keeps what boils off first apart from what is worth keeping. " * 8
_MARK = re.compile(rb"\[mark ([0-9]+)\]")


def content(mark: int) -> str:
    """What the upstream says to the question with this mark."""
    return f"Answer to [mark {mark}]: {FILLER}".strip()


def question(model: str, mark: int) -> bytes:
    """The body of a request: the mark in one short prompt."""
    body: dict[str, Any] = {
        "model": model,
        "messages": [{"role": "user", "content": f"Say something of length. [mark {mark}]"}],
        "max_tokens": 256,
        "temperature": 1,
        "metadata": {"app": "benchmark"},
    }
    return json.dumps(body).encode()


def completion(mark: int) -> bytes:
    """A whole HTTP response with the chat completion that answers a mark."""
    body = json.dumps(
        {
            "id": f"chatcmpl-{mark}",
            "object": "chat.completion",
            "created": 1_790_000_000,
            "model": "upstream",
            "choices": [
                {
                    "index": 0,
                    "message": {"role": "assistant", "content": content(mark)},
                    "finish_reason": "stop",
                    "logprobs": None,
                }
            ],
            "usage": {"prompt_tokens": 20, "completion_tokens": 130, "total_tokens": 150},
        }
    ).encode()
    head = (
        b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n"
        b"Content-Length: %d\r\nConnection: keep-alive\r\n\r\n" % len(body)
    )
    return head + body


class Upstream(asyncio.Protocol):
    """Answers every POST; one request at a time on a connection, as HTTP clients send them."""

    answers: ClassVar = [completion(mark) for mark in range(MARKS)]
    served: ClassVar[list[float]] = []  # when each question came

    def __init__(self, delay: float) -> None:
        self._delay = delay
        self._buffer = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport: Any = transport

    def data_received(self, data: bytes) -> None:
        self._buffer += data
        while (end := self._buffer.find(b"\r\n\r\n")) >= 0:
            head = self._buffer[:end].lower()
            if head.startswith(b"get "):
                self._buffer = self._buffer[end + 4 :]
                self._transport.write(_times(self.served))
                continue
            length = int(head.split(b"content-length:")[1].split(b"\r\n")[0])
            whole = end + 4 + length
            if len(self._buffer) < whole:
                return
            body, self._buffer = self._buffer[end + 4 : whole], self._buffer[whole:]
            found = _MARK.search(body)
            mark = int(found[1]) % MARKS if found else 0
            self.served.append(time.time())
            if self._delay:
                asyncio.get_running_loop().call_later(self._delay, self._answer, mark)
            else:
                self._answer(mark)

    def _answer(self, mark: int) -> None:
        if not self._transport.is_closing():
            self._transport.write(self.answers[mark])


def _times(served: list[float]) -> bytes:
    body = json.dumps(served).encode()
    head = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n"
    return head % len(body) + body


class Asker(asyncio.Protocol):
    """Keeps one connection busy until its time is over."""

    def __init__(self, load: Load, number: int) -> None:
        self._load = load
        self._mark = number % MARKS
        self._buffer = b""
        self.done: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport: Any = transport
        self._send()

    def connection_lost(self, exc: Exception | None) -> None:
        if not self.done.done():
            self._load.errors.append(f"the connection was lost: {exc}")
            self.done.set_result(None)

    def _send(self) -> None:
        if time.perf_counter() >= self._load.until:
            self.done.set_result(None)
            self._transport.close()
            return
        self._mark = (self._mark + 7) % MARKS
        self._sent = time.perf_counter()
        self._transport.write(self._load.requests[self._mark])

    def data_received(self, data: bytes) -> None:
        self._buffer += data
        body = _whole_body(self._buffer)
        if body is None:
            return
        self._load.latencies.append(time.perf_counter() - self._sent)
        if not self._buffer.startswith(b"HTTP/1.1 200"):
            self._load.errors.append(self._buffer[:300].decode(errors="replace"))
        elif self._load.expected[self._mark] not in body:
            self._load.errors.append(f"the answer is not that of mark {self._mark}: {body[:300]!r}")
        self._buffer = b""
        self._send()


def _whole_body(data: bytes) -> bytes | None:
    end = data.find(b"\r\n\r\n")
    if end < 0:
        return None
    head = data[:end].lower()
    if b"transfer-encoding: chunked" in head:
        return data[end + 4 :] if data.endswith(b"0\r\n\r\n") else None
    length = int(head.split(b"content-length:")[1].split(b"\r\n")[0])
    return data[end + 4 :] if len(data) >= end + 4 + length else None


class Load:
    """What the connections share: requests, the end, and what was seen."""

    def __init__(self, url: str, model: str, key: str, path_host: str) -> None:
        path = urlsplit(url).path
        self.latencies: list[float] = []
        self.errors: list[str] = []
        self.until = 0.0
        self.expected = [content(mark).encode() for mark in range(MARKS)]
        self.requests = []
        for mark in range(MARKS):
            body = question(model, mark)
            head = (
                f"POST {path} HTTP/1.1\r\nHost: {path_host}\r\nAuthorization: Bearer {key}\r\n"
                f"Content-Type: application/json\r\nAccept: application/json\r\n"
                f"Content-Length: {len(body)}\r\n\r\n"
            )
            self.requests.append(head.encode() + body)


async def ask(url: str, model: str, key: str, connections: int, seconds: float) -> dict[str, Any]:
    """Keep `connections` busy for so long; return counts and latencies."""
    parts = urlsplit(url)
    load = Load(url, model, key, parts.netloc)
    loop = asyncio.get_running_loop()
    started = time.perf_counter()
    load.until = started + seconds
    made = [
        await loop.create_connection(lambda n=n: Asker(load, n), parts.hostname, parts.port)
        for n in range(connections)
    ]
    await asyncio.gather(*(asker.done for _, asker in made))
    took = time.perf_counter() - started
    ordered = sorted(load.latencies)
    return {
        "requests": len(ordered),
        "seconds": took,
        "p50_ms": 1000 * ordered[len(ordered) // 2] if ordered else None,
        "p99_ms": 1000 * ordered[int(len(ordered) * 0.99)] if ordered else None,
        "errors": len(load.errors),
        "first_errors": load.errors[:3],
    }


async def serve(port: int, delay: float) -> None:
    loop = asyncio.get_running_loop()
    server = await loop.create_server(lambda: Upstream(delay), "127.0.0.1", port, backlog=1024)
    print("ready", flush=True)
    await server.serve_forever()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    upstream = commands.add_parser("upstream")
    upstream.add_argument("--port", type=int, required=True)
    upstream.add_argument("--delay-ms", type=float, default=0)
    asking = commands.add_parser("ask")
    asking.add_argument("--url", required=True)
    asking.add_argument("--model", required=True)
    asking.add_argument("--key", default="none")
    asking.add_argument("--connections", type=int, required=True)
    asking.add_argument("--seconds", type=float, required=True)
    told = parser.parse_args()
    runner = asyncio.Runner(loop_factory=uvloop.new_event_loop if uvloop else None)
    with runner:
        if told.command == "upstream":
            runner.run(serve(told.port, told.delay_ms / 1000))
            return 0
        found = runner.run(ask(told.url, told.model, told.key, told.connections, told.seconds))
    print(json.dumps(found))
    return 0 if not found["errors"] else 1


if __name__ == "__main__":
    sys.exit(main())
