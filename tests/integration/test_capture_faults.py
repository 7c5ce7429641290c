"""What must hold of captured traffic whatever fails: one record, one charge, nobody waits."""

from __future__ import annotations

import asyncio
import json
import os
import socket
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import httpx
import pytest
from aiohttp import web

from services.teacher_gateway import http_protocol
from services.teacher_gateway.app import app_of
from services.teacher_gateway.capture import memory
from services.teacher_gateway.capture.endpoint import CaptureEndpoint
from services.teacher_gateway.database import open_engine
from services.teacher_gateway.keys import create_key
from stillhouse.chassis.storage import ObjectStore
from tests.support.capture import (
    HTTP,
    QUICK,
    HeldTeacher,
    capturing,
    held_teacher,
    lines,
    money,
    register,
    registration,
    upstream,
    wait_for_records,
)
from tests.support.gateway_api import Api, gateway_api
from tests.support.teacher import Fault, Teacher, running_teacher
from tests.support.waiting import wait_for

QUESTION = [{"role": "user", "content": "Say something."}]


@pytest.fixture
def api(tmp_path: Path, store: ObjectStore, tenant: str) -> Iterator[Api]:
    with gateway_api(tmp_path, store, tenant) as found:
        yield found


@pytest.fixture
def either(tmp_path: Path, store: ObjectStore, tenant: str, database_url: str) -> Iterator[Api]:
    """On SQLite and on PostgreSQL."""
    with gateway_api(tmp_path, store, tenant, DATABASE_URL=database_url) as found:
        yield found


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Teacher]:
    log = tmp_path_factory.mktemp("teacher") / "invoices.jsonl"
    with running_teacher(log) as found:
        yield found


@pytest.fixture
def held() -> Iterator[HeldTeacher]:
    with held_teacher() as found:
        yield found


def ask(api: Api, address: str, text: str = "Say something.", **body: Any) -> httpx.Response:
    """Ask the teacher `fast` without patience for more than a test has."""
    asked = {
        "model": "fast",
        "max_tokens": 24,
        "messages": [{"role": "user", "content": text}],
        **body,
    }
    return HTTP.post(f"{address}/v1/chat/completions", json=asked, headers=api.headers())


# G8: who is slow does not hold anything for long


def test_a_connection_that_sends_no_request_is_closed(
    api: Api, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(http_protocol, "HEAD_SECONDS", 0.3)
    with capturing(api) as address:
        port = int(address.rpartition(":")[2])
        silent = socket.create_connection(("127.0.0.1", port), timeout=20)
        dripping = socket.create_connection(("127.0.0.1", port), timeout=20)
        answered = socket.create_connection(("127.0.0.1", port), timeout=20)
        with closing(silent), closing(dripping), closing(answered):
            answered.sendall(b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\n")
            assert b"200 OK" in answered.recv(65_536)
            answered.sendall(b"\r\n")  # begins no request, and ends uvicorn's own patience
            sent = b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nX-Slow: "

            def drip() -> bytes:
                nonlocal sent
                dripping.sendall(sent[:1] or b"a")
                sent = sent[1:]
                dripping.settimeout(0.05)
                try:
                    return dripping.recv(1)
                except TimeoutError:
                    return b"still open"
                except OSError:
                    return b""

            assert silent.recv(1) == b""
            assert answered.recv(1) == b""
            wait_for(drip, 20, "the slow head is cut", until=lambda seen: seen == b"")


@pytest.mark.parametrize("name", [b"X-Long", b"Cookie"])
def test_a_head_without_end_is_refused_in_bounded_memory(api: Api, name: bytes) -> None:
    with capturing(api) as address:
        port = int(address.rpartition(":")[2])
        with closing(socket.create_connection(("127.0.0.1", port), timeout=20)) as client:
            client.sendall(b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n" + name + b": ")
            sent = 0
            with pytest.raises(OSError):  # noqa: PT012 (the refusal comes while we write)
                while sent < 64 << 20:
                    client.sendall(b"a" * 65_536)
                    sent += 65_536
            assert sent < 16 << 20
        many = {f"X-{n}": "a" * 1000 for n in range(40)}
        assert httpx.get(f"{address}/healthz", headers=many).status_code == 400
        few = {f"X-{n}": "a" * 1000 for n in range(20)}
        assert httpx.get(f"{address}/healthz", headers=few).status_code == 200


def test_a_body_that_does_not_come_is_cut_and_others_are_served(api: Api, teacher: Teacher) -> None:
    teacher.forgive()
    with capturing(api, times=replace(QUICK, body=0.3)) as address:
        register(api, address, "fast", **registration(teacher.url))
        port = int(address.rpartition(":")[2])
        with closing(socket.create_connection(("127.0.0.1", port), timeout=20)) as slow:
            head = "POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\n"
            head += f"Authorization: Bearer {api.key}\r\nContent-Length: 100\r\n\r\n"
            slow.sendall(head.encode() + b"{")
            assert ask(api, address).status_code == 200
            assert slow.recv(65_536).startswith(b"HTTP/1.1 408")


def test_a_client_that_does_not_read_is_dropped_and_its_answer_recorded(
    api: Api, store: ObjectStore
) -> None:
    piece = "x" * 4096

    async def flood(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        for _ in range(2500):  # about 10 MB, which no socket's buffers hold
            chunk = {"choices": [{"index": 0, "delta": {"content": piece}}]}
            await response.write(b"data: " + json.dumps(chunk).encode() + b"\n\n")
        ending: dict[str, Any] = {"choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]}
        usage = {"choices": [], "usage": {"prompt_tokens": 1, "completion_tokens": 2500}}
        for last in (ending, usage):
            await response.write(b"data: " + json.dumps(last).encode() + b"\n\n")
        await response.write(b"data: [DONE]\n\n")
        return response

    times = replace(QUICK, client=0.3)
    with upstream(flood) as url, capturing(api, times=times) as address:
        register(api, address, "fast", **registration(url))
        port = int(address.rpartition(":")[2])
        with closing(socket.create_connection(("127.0.0.1", port), timeout=20)) as client:
            client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            body = json.dumps({"model": "fast", "stream": True, "messages": QUESTION}).encode()
            head = "POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\n"
            head += f"Authorization: Bearer {api.key}\r\nContent-Length: {len(body)}\r\n\r\n"
            client.sendall(head.encode() + body)
            wait_for_records(api, address, 1)
    (line,) = lines(api.engine, store, api.tenant)
    assert len(line["answer"]["choices"][0]["message"]["content"]) == 2500 * len(piece)
    assert money(api.engine, api.tenant, "fast").of("answers") == 1 + 2 * 2500


# G9: a client that leaves


def leave_after_the_first_chunk(api: Api, address: str) -> None:
    body = {"model": "fast", "stream": True, "max_tokens": 24, "messages": QUESTION}
    with httpx.stream(
        "POST", f"{address}/v1/chat/completions", json=body, headers=api.headers(), timeout=60
    ) as answer:
        assert answer.status_code == 200
        assert next(answer.iter_bytes())


@pytest.mark.parametrize("policy", ["finish", "abort"])
def test_a_client_that_leaves_a_stream_loses_nothing(
    api: Api, teacher: Teacher, store: ObjectStore, policy: str
) -> None:
    teacher.forgive()
    teacher.script(Fault("slow_drip", seconds=0.1))
    before = teacher.invoiced_microusd()
    with capturing(api) as address:
        register(api, address, "fast", **registration(teacher.url, on_disconnect=policy))
        leave_after_the_first_chunk(api, address)
        if policy == "finish":
            wait_for_records(api, address, 1)
        else:
            found = wait_for_records(api, address, 0, failures=1)
            assert found["reasons"] == {"client_left": 1}
    (line,) = lines(api.engine, store, api.tenant)
    spent = money(api.engine, api.tenant, "fast")
    billed = teacher.invoiced_microusd() - before
    if policy == "finish":
        assert line["answer"]["choices"][0]["message"]["content"]
        assert spent.charges == {next(iter(spent.charges)): billed}
        assert spent.of("answers") == billed
    else:
        assert line["answer"] is None
        assert spent.of("unknown") == spent.spent >= billed
    assert spent.reserved == 0


@pytest.mark.parametrize("policy", ["finish", "abort"])
def test_a_client_that_leaves_before_any_answer_loses_nothing(
    api: Api, held: HeldTeacher, policy: str
) -> None:
    with capturing(api) as address:
        register(api, address, "fast", **registration(held.url, on_disconnect=policy))
        body = {"model": "fast", "messages": QUESTION, "max_tokens": 10}
        with pytest.raises(httpx.ReadTimeout):
            httpx.post(
                f"{address}/v1/chat/completions",
                json=body,
                headers=api.headers(),
                timeout=httpx.Timeout(10, read=0.5),
            )
        assert len(held.seen) == 1
        if policy == "abort":
            wait_for(lambda: held.left, 20, "the call upstream is cut")
            wait_for_records(api, address, 0, failures=1)
        held.go.set()
        if policy == "finish":
            wait_for_records(api, address, 1)
        assert held.left == (policy == "abort")
    spent = money(api.engine, api.tenant, "fast")
    assert len(spent.charges) == 1
    assert spent.reserved == 0


def test_a_server_that_cancels_its_handlers_ends_no_call(
    api: Api, held: HeldTeacher, store: ObjectStore
) -> None:
    """uvicorn lets a handler go on when its client left; other servers do not."""
    app = app_of(api.gateway)
    app.capture = CaptureEndpoint(api.gateway, environ={}, times=QUICK)
    with capturing(api) as address:
        register(api, address, "fast", **registration(held.url))

    async def serve() -> None:
        async with app.capture.running():
            transport = httpx.ASGITransport(app)
            async with httpx.AsyncClient(
                transport=transport, base_url="http://localhost"
            ) as client:
                body = {"model": "fast", "messages": QUESTION}
                call = asyncio.create_task(
                    client.post("/v1/chat/completions", json=body, headers=api.headers())
                )
                while not held.seen:  # noqa: ASYNC110
                    await asyncio.sleep(0.01)
                call.cancel()
                await asyncio.gather(call, return_exceptions=True)
                held.go.set()
                while not lines(api.engine, store, api.tenant):  # noqa: ASYNC110
                    await asyncio.sleep(0.05)

    asyncio.run(asyncio.wait_for(serve(), 30))
    (line,) = lines(api.engine, store, api.tenant)
    assert line["failure"] is None
    assert money(api.engine, api.tenant, "fast").of("answers") == 20


# G11: what is not whole


STREAMED: dict[str, tuple[str, str]] = {
    "no_done": ("truncated", "unused"),
    "truncated_json": ("truncated", "unknown"),
    "cut_reply": ("teacher_error", "unknown"),
    "garbled_chunk": ("teacher_invalid", "unused"),
    "invalid_json": ("teacher_invalid", "unknown"),
    "closed": ("teacher_error", "unknown"),
}
WHOLE: dict[str, tuple[str, str]] = {
    "truncated_json": ("teacher_invalid", "unknown"),
    "cut_reply": ("teacher_error", "unknown"),
    "invalid_json": ("teacher_invalid", "unknown"),
    "wrong_schema": ("teacher_invalid", "unknown"),
    "empty_choices": ("teacher_invalid", "unknown"),
    "closed": ("teacher_error", "unknown"),
    "gzip_bomb": ("teacher_invalid", "unknown"),
    "redirect": ("teacher_invalid", ""),
}


@pytest.fixture(scope="module")
def faulty(
    tmp_path_factory: pytest.TempPathFactory, store: ObjectStore, teacher: Teacher
) -> Iterator[tuple[Api, str]]:
    with (
        gateway_api(tmp_path_factory.mktemp("faulty"), store, "faulty") as api,
        capturing(api) as address,
    ):
        yield api, address


@pytest.mark.parametrize(
    ("kind", "stream"), [*((k, True) for k in STREAMED), *((k, False) for k in WHOLE)]
)
def test_what_is_not_whole_is_a_failure_and_charged_once(
    faulty: tuple[Api, str], teacher: Teacher, store: ObjectStore, kind: Any, stream: bool
) -> None:
    common, address = faulty
    tenant = f"{kind.replace('_', '-')}-{'s' if stream else 'w'}-{os.urandom(3).hex()}"
    key = create_key(common.engine, common.gateway.settings.key_pepper, tenant)
    api = replace(common, tenant=tenant, key=key)
    teacher.forgive()
    before = teacher.invoiced_microusd()
    teacher.script(Fault(kind, size=1 << 20))
    register(api, address, "fast", **registration(teacher.url))
    answer = ask(api, address, stream=stream)
    if stream and kind not in ("invalid_json", "closed"):
        # It had begun: the stream says that it broke off, in a form that the SDK raises.
        assert answer.status_code == 200
        if kind != "garbled_chunk":
            assert b'data: {"error"' in answer.content
            assert b"data: [DONE]" not in answer.content
    else:
        assert answer.status_code == 502
        assert answer.json()["error"]["code"] == WHOLE.get(kind, ("teacher_error",))[0]
    reason, bill = (STREAMED if stream else WHOLE)[kind]
    found = wait_for_records(api, address, 0, failures=1)
    assert found["reasons"] == {reason: 1}
    (line,) = lines(api.engine, store, tenant)
    assert line["answer"] is None
    spent = money(api.engine, tenant, "fast")
    assert spent.spent >= teacher.invoiced_microusd() - before
    assert spent.spent == (spent.of(bill) if bill else 0)


def test_an_answer_without_usage_is_recorded_and_listed_at_its_most(
    api: Api, teacher: Teacher, store: ObjectStore
) -> None:
    teacher.forgive()
    teacher.script(Fault("missing_usage"))
    with capturing(api) as address:
        register(api, address, "fast", **registration(teacher.url))
        assert ask(api, address).status_code == 200
        assert ask(api, address, stream=True).status_code == 200
        wait_for_records(api, address, 2)
    spent = money(api.engine, api.tenant, "fast")
    assert spent.spent == spent.of("unknown") > 0


def test_a_teacher_that_is_away_is_not_paid(api: Api) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with capturing(api) as address:
        register(api, address, "fast", **registration(f"http://127.0.0.1:{port}/v1"))
        answer = ask(api, address)
        assert (answer.status_code, answer.json()["error"]["code"]) == (502, "teacher_unreachable")
        wait_for_records(api, address, 0, failures=1)
    assert money(api.engine, api.tenant, "fast").spent == 0


# G12: slow upstream


@pytest.mark.parametrize(
    ("kind", "stream", "code"),
    [
        ("slow_drip", False, "teacher_slow"),
        ("stalls", True, "teacher_slow"),
        ("never_answers", False, "teacher_timeout"),
    ],
)
def test_an_answer_that_drips_is_cut_and_others_go_on(
    api: Api, teacher: Teacher, kind: Any, stream: bool, code: str
) -> None:
    teacher.forgive()
    teacher.script(Fault(kind, match="[slow]", seconds=0.05))
    times = replace(QUICK, window=0.5, window_bytes=64)
    limits = {"timeout_seconds": 1.5, "concurrency": 2}
    with capturing(api, times=times) as address, ThreadPoolExecutor(1) as pool:
        register(api, address, "fast", **registration(teacher.url, limits=limits))
        slow = pool.submit(ask, api, address, "[slow]", stream=stream)
        assert ask(api, address).status_code == 200
        if stream:
            assert code.encode() in slow.result(30).content
        else:
            answer = slow.result(30)
            assert (answer.status_code, answer.json()["error"]["code"]) == (504, code)
        found = wait_for_records(api, address, 1, failures=1)
        assert found["reasons"] == {code: 1}
    assert money(api.engine, api.tenant, "fast").of("unknown") > 0


def test_a_teacher_takes_no_more_calls_at_once_than_it_may(api: Api, held: HeldTeacher) -> None:
    with capturing(api) as address, ThreadPoolExecutor(3) as pool:
        register(api, address, "fast", **registration(held.url, limits={"concurrency": 2}))
        calls = [pool.submit(ask, api, address) for _ in range(2)]
        wait_for(lambda: len(held.seen), 20, "two calls are open", until=lambda n: n == 2)
        refused = ask(api, address)
        assert (refused.status_code, refused.headers["Retry-After"]) == (429, "1")
        held.go.set()
        assert [call.result(30).status_code for call in calls] == [200, 200]


# G13: the last cent


@dataclass
class Callers:
    """64 calls at once, by two processes in turn; statuses as they come."""

    api: Api
    addresses: list[str]
    held: HeldTeacher
    statuses: list[int] = field(default_factory=list)

    async def race(self) -> None:
        limits = httpx.Limits(max_connections=64)
        async with httpx.AsyncClient(
            headers=self.api.headers(), timeout=60, limits=limits
        ) as client:
            calls = [asyncio.create_task(self._ask(client, n)) for n in range(64)]
            # Until each was admitted or refused: nobody has an answer yet.
            while len(self.statuses) + len(self.held.seen) < 64:  # noqa: ASYNC110
                await asyncio.sleep(0.02)
            self.held.go.set()
            await asyncio.gather(*calls)

    async def _ask(self, client: httpx.AsyncClient, number: int) -> None:
        asked = {"model": "fast", "messages": QUESTION, "max_tokens": 100}
        address = self.addresses[number % 2]
        answer = await client.post(f"{address}/v1/chat/completions", json=asked)
        self.statuses.append(answer.status_code)


def test_64_callers_on_the_last_cent_are_admitted_as_often_as_it_pays_for(
    either: Api, held: HeldTeacher, monkeypatch: pytest.MonkeyPatch
) -> None:
    api = either
    monkeypatch.setattr(memory, "FRESH_SECONDS", 0.05)
    monkeypatch.setattr(memory, "HELD_SECONDS", 0.1)
    request = httpx.Request(
        "POST", "http://x", json={"model": "fast", "messages": QUESTION, "max_tokens": 100}
    )
    most = len(request.content) + 512 + 100 * 2  # at 1 and 2 dollars for a million tokens
    with ExitStack() as stack:
        # Two processes share the budget: each has an engine and a memory of its own.
        engines = [open_engine(api.gateway.settings.database_url) for _ in range(2)]
        addresses = [stack.enter_context(capturing(api, engine=engine)) for engine in engines]
        told = registration(held.url, budget_usd=(10 * most + most - 1) / 1e6)
        register(api, addresses[0], "fast", **told)
        callers = Callers(api, addresses, held)
        asyncio.run(asyncio.wait_for(callers.race(), 60))
        assert callers.statuses.count(200) == len(held.seen) == 10
        assert set(callers.statuses) <= {200, 402, 429}
        wait_for(
            lambda: money(api.engine, api.tenant, "fast").reserved,
            20,
            "nothing stays reserved",
            until=lambda left: left == 0,
        )
        assert money(api.engine, api.tenant, "fast").of("answers") == 10 * 20
        # What the calls did not cost is there again, for as many as it pays for.
        assert ask(api, addresses[1], max_tokens=100).status_code == 200
    for engine in engines:
        engine.dispose()
