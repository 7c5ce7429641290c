"""What a request may be: its Host, its size, its coding; every refusal is a problem."""

from __future__ import annotations

import asyncio
import tracemalloc
from collections.abc import Iterable
from typing import Any

import pytest
from starlette.requests import Request
from starlette.responses import PlainTextResponse
from starlette.types import Message, Receive, Scope, Send

from services.teacher_gateway import request_limits
from services.teacher_gateway.request_limits import RequestLimits

LIMIT = 1000


async def echo(scope: Scope, receive: Receive, send: Send) -> None:
    body = await Request(scope, receive).body()
    await PlainTextResponse(f"{len(body)}")(scope, receive, send)


def ask(
    headers: list[tuple[bytes, bytes]],
    chunks: Iterable[bytes] = (b"",),
    path: str = "/v1/pipelines",
    stall: bool = False,
) -> tuple[int, str, int]:
    """Send a request; return status, body, and how many chunks were taken."""
    app = RequestLimits(echo, hosts=frozenset({"localhost", "::1"}), max_bytes=lambda _: LIMIT)
    pending = list(chunks)
    taken = 0
    sent: list[Message] = []

    async def receive() -> Message:
        nonlocal taken
        if stall:
            await asyncio.sleep(60)
        taken += 1
        more = len(pending) > 1
        return {"type": "http.request", "body": pending.pop(0), "more_body": more}

    async def send(message: Message) -> None:
        sent.append(message)

    scope: dict[str, Any] = {
        "type": "http",
        "method": "POST",
        "path": path,
        "headers": headers,
        "query_string": b"",
    }
    asyncio.run(app(scope, receive, send))
    body = b"".join(message.get("body", b"") for message in sent)
    return sent[0]["status"], body.decode(), taken


HOST = (b"host", b"localhost:8080")


@pytest.mark.parametrize("host", [b"localhost", b"LOCALHOST:80", b"[::1]:8080"])
def test_a_named_host_is_served(host: bytes) -> None:
    assert ask([(b"host", host)])[0] == 200


@pytest.mark.parametrize(
    "hosts",
    [
        [],
        [b"evil.example"],
        [b"localhost", b"localhost"],
        [b"localhost/x?"],
        [b"localhost:80/#@evil"],
        [b"evil@localhost"],
        [b"localhost\t"],
        [b"localhost.evil.example"],
        [b"localhost:"],
        [b""],
        [b"\xff"],
    ],
)
def test_any_other_host_is_refused_before_routing(hosts: list[bytes]) -> None:
    status, body, _ = ask([(b"host", host) for host in hosts])
    assert status == 400
    assert "urn:stillhouse:problem:host" in body


def test_probes_are_answered_whatever_the_host() -> None:
    assert ask([(b"host", b"10.0.0.7:8080")], path="/readyz")[0] == 200


@pytest.mark.parametrize("length", [b"1001", b"9" * 40])
def test_an_announced_length_over_the_limit_is_refused_unread(length: bytes) -> None:
    status, body, _ = ask([HOST, (b"content-length", length)])
    assert status == 413
    assert "at most 1000 bytes" in body
    assert "PUT /v1/uploads" in body


@pytest.mark.parametrize("length", [b"-1", b"1e3", b"x", b""])
def test_a_length_that_is_no_number_is_refused(length: bytes) -> None:
    status, body, _ = ask([HOST, (b"content-length", length)])
    assert status == 400
    assert "expected a number" in body


def test_an_unannounced_body_is_counted_as_it_comes_and_never_kept() -> None:
    chunks = (b"x" * 100 for _ in range(50))
    status, body, taken = ask([HOST, (b"transfer-encoding", b"chunked")], chunks)
    assert (status, taken) == (413, 50), "the rest is read, so that the client hears the answer"
    assert "too-large" in body


def test_a_refused_body_takes_no_memory() -> None:
    chunks = [b"x" * 65_536] * 500  # 33 MB, of which the test itself holds one chunk
    tracemalloc.start()
    try:
        status, _, taken = ask([HOST], chunks)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert (status, taken) == (413, 500)
    assert peak < 2**20


def test_reading_a_refused_body_ends_somewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(request_limits, "DRAIN_BYTES", 1000)
    chunks = (b"x" * 100 for _ in range(5000))
    status, _, taken = ask([HOST], chunks)
    assert (status, taken) == (413, 21)


def test_a_body_at_the_limit_passes() -> None:
    assert ask([HOST], [b"x" * 500, b"x" * 500])[:2] == (200, "1000")


@pytest.mark.parametrize("coding", [b"gzip", b"zstd", b"gzip, identity"])
def test_a_coded_body_is_refused(coding: bytes) -> None:
    assert ask([HOST, (b"content-encoding", coding)])[0] == 415


def test_a_body_that_stalls_is_answered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(request_limits, "IDLE_SECONDS", 0.05)
    monkeypatch.setattr(request_limits, "DRAIN_SECONDS", 0.05)
    status, body, _ = ask([HOST], stall=True)
    assert status == 408
    assert "stalled" in body
