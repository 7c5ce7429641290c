"""What must hold of captured traffic whatever fails: one record, one charge, nobody waits."""

from __future__ import annotations

import asyncio
import json
import os
import socket
import threading
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
from services.teacher_gateway.capture import memory, tranches
from services.teacher_gateway.capture.endpoint import CaptureEndpoint
from services.teacher_gateway.counters import CAPTURE_REQUESTS
from services.teacher_gateway.database import open_engine
from services.teacher_gateway.keys import create_key
from services.teacher_gateway.settings import TeacherGatewaySettings
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


def connected(address: str) -> closing[socket.socket]:
    port = int(address.rpartition(":")[2])
    return closing(socket.create_connection(("127.0.0.1", port), timeout=30))


def request_of(api: Api, **body: Any) -> bytes:
    """A call as its bytes, for a client that a test holds in its hand."""
    asked = json.dumps({"model": "fast", "messages": QUESTION, **body}).encode()
    head = "POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\n"
    head += f"Authorization: Bearer {api.key}\r\nContent-Length: {len(asked)}\r\n\r\n"
    return head.encode() + asked


# G8: who is slow does not hold anything for long


def test_a_connection_that_sends_no_request_is_closed(
    api: Api, monkeypatch: pytest.MonkeyPatch
) -> None:
    with capturing(api) as address, ExitStack() as stack:
        answered = stack.enter_context(connected(address))
        answered.sendall(b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\n")
        assert b"200 OK" in answered.recv(65_536)
        # From here on nothing has to come in time.
        monkeypatch.setattr(http_protocol, "HEAD_SECONDS", 0.3)
        answered.sendall(b"\r\n")  # begins no request, and ends uvicorn's own patience
        silent = stack.enter_context(connected(address))
        dripping = stack.enter_context(connected(address))
        sent = b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nX-Slow: "

        def drip() -> bytes:
            nonlocal sent
            try:
                dripping.sendall(sent[:1] or b"a")
                sent = sent[1:]
                dripping.settimeout(0.05)
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
        whole = request_of(api, max_tokens=24)
        with connected(address) as slow, connected(address) as other:
            slow.sendall(whole[:-10])
            other.sendall(whole)  # at once, so that nothing of it can be late
            assert other.recv(65_536).startswith(b"HTTP/1.1 200")
            assert slow.recv(65_536).startswith(b"HTTP/1.1 408")


class Flood:
    """A teacher that streams more than the buffers of any socket hold."""

    PIECE = "x" * 4096
    PIECES = 2500

    async def __call__(self, request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        chunk = {"choices": [{"index": 0, "delta": {"content": self.PIECE}}]}
        event = b"data: " + json.dumps(chunk).encode() + b"\n\n"
        for _ in range(self.PIECES):
            await response.write(event)
        ending: dict[str, Any] = {"choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]}
        usage = {"choices": [], "usage": {"prompt_tokens": 1, "completion_tokens": self.PIECES}}
        for last in (ending, usage):
            await response.write(b"data: " + json.dumps(last).encode() + b"\n\n")
        await response.write(b"data: [DONE]\n\n")
        return response

    def check(self, api: Api, store: ObjectStore) -> None:
        """One record, whole, that is paid once."""
        (line,) = lines(api.engine, store, api.tenant)
        content = line["answer"]["choices"][0]["message"]["content"]
        assert len(content) == self.PIECES * len(self.PIECE)
        assert money(api.engine, api.tenant, "fast").of("answers") == 1 + 2 * self.PIECES


def test_a_client_that_does_not_read_is_dropped_and_its_answer_recorded(
    api: Api, store: ObjectStore
) -> None:
    flood = Flood()
    times = replace(QUICK, client=0.3)
    with upstream(flood) as url, capturing(api, times=times) as address:
        register(api, address, "fast", **registration(url))
        with connected(address) as client:
            client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            client.sendall(request_of(api, stream=True))
            wait_for_records(api, address, 1)
    flood.check(api, store)


def test_a_client_that_reads_slowly_is_dropped_at_the_calls_deadline_and_its_answer_recorded(
    api: Api, store: ObjectStore
) -> None:
    """It reads now and then, so no single write ever waits for long."""
    flood = Flood()
    limits = {"timeout_seconds": 1.5}
    ended = threading.Event()
    with (
        upstream(flood) as url,
        capturing(api, times=replace(QUICK, client=60)) as address,
        ThreadPoolExecutor(1) as pool,
        connected(address) as client,
    ):
        register(api, address, "fast", **registration(url, limits=limits))
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        client.sendall(request_of(api, stream=True))

        def read() -> int:
            got = 0
            while not ended.wait(0.01) and (data := client.recv(16_384)):
                got += len(data)
            return got

        reading = pool.submit(read)
        try:
            wait_for_records(api, address, 1)
        finally:
            ended.set()
        assert reading.result(30) < flood.PIECES * len(flood.PIECE)
    flood.check(api, store)


def test_a_client_that_reads_no_long_answer_is_left_at_the_calls_deadline(
    api: Api, held: HeldTeacher
) -> None:
    held.body["choices"][0]["message"]["content"] = "x" * (16 << 20)
    held.go.set()
    ended = CAPTURE_REQUESTS.labels("2xx")._value
    before = ended.get()
    with capturing(api, times=replace(QUICK, client=600)) as address, connected(address) as client:
        register(api, address, "fast", **registration(held.url, limits={"timeout_seconds": 1.5}))
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        client.sendall(request_of(api))
        wait_for_records(api, address, 1)
        wait_for(lambda: ended.get() - before, 20, "nobody waits for it any more")


def test_a_client_that_reads_nothing_is_closed_whoever_answers_it(
    api: Api, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(http_protocol, "UNREAD_SECONDS", 0.3)
    with capturing(api) as address, connected(address) as client:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        ask_much = b"GET /openapi.json HTTP/1.1\r\nHost: localhost\r\n\r\n"

        def closed() -> bool:
            client.settimeout(0.05)
            try:
                client.sendall(ask_much * 20)
            except TimeoutError:
                return False
            except OSError:
                return True
            return False

        wait_for(closed, 30, "the connection is closed")
        assert HTTP.get(f"{address}/healthz").status_code == 200


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
        with connected(address) as client:
            client.sendall(request_of(api, max_tokens=10))
            wait_for(lambda: held.seen, 20, "the call is upstream")
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


def test_a_server_whose_client_is_gone_ends_no_call(
    api: Api, teacher: Teacher, store: ObjectStore
) -> None:
    """uvicorn swallows what is sent to nobody; other servers raise."""
    teacher.forgive()
    app = app_of(api.gateway)
    app.capture = CaptureEndpoint(api.gateway, environ={}, times=QUICK)
    with capturing(api) as address:
        register(api, address, "fast", **registration(teacher.url))
    body = {"model": "fast", "messages": QUESTION, "max_tokens": 24, "stream": True}
    scope = {
        "type": "http",
        "method": "POST",
        "path": "/v1/chat/completions",
        "headers": [(b"host", b"localhost"), (b"authorization", f"Bearer {api.key}".encode())],
    }

    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": json.dumps(body).encode(), "more_body": False}

    async def send(_: Any) -> None:
        raise OSError("the client is gone")

    async def serve() -> None:
        async with app.capture.running():
            await app.capture(scope, receive, send)
            while not lines(api.engine, store, api.tenant):  # noqa: ASYNC110
                await asyncio.sleep(0.05)

    before = teacher.invoiced_microusd()
    asyncio.run(asyncio.wait_for(serve(), 30))
    (line,) = lines(api.engine, store, api.tenant)
    assert line["failure"] is None
    billed = teacher.invoiced_microusd() - before
    assert money(api.engine, api.tenant, "fast").of("answers") == billed > 0


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
        if kind == "gzip_bomb":
            assert "coded as gzip" in answer.json()["error"]["message"]  # and not unpacked
    reason, bill = (STREAMED if stream else WHOLE)[kind]
    found = wait_for_records(api, address, 0, failures=1)
    assert found["reasons"] == {reason: 1}
    (line,) = lines(api.engine, store, tenant)
    assert line["answer"] is None
    spent = money(api.engine, tenant, "fast")
    assert spent.spent >= teacher.invoiced_microusd() - before
    assert spent.spent == (spent.of(bill) if bill else 0)


def test_a_teachers_cookies_are_not_kept(api: Api, teacher: Teacher) -> None:
    teacher.forgive()
    teacher.script(Fault("redirect"))
    with capturing(api) as address:
        # By its name: cookies of an address are not kept in any case.
        url = teacher.url.replace("127.0.0.1", "localhost")
        register(api, address, "fast", **registration(url))
        assert [ask(api, address).status_code for _ in range(2)] == [502, 502]
    assert [seen["cookie"] for seen in teacher.requests[-2:]] == [None, None]


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
    # Each deadline by itself: the slow call meets the one that is tried, and others meet neither.
    seconds = 1.5 if code == "teacher_timeout" else 300
    times = replace(QUICK, window=0.5, window_bytes=4096)
    with capturing(api, times=times) as address, ThreadPoolExecutor(1) as pool:
        register(
            api, address, "slow", **registration(teacher.url, limits={"timeout_seconds": seconds})
        )
        register(api, address, "fast", **registration(teacher.url, limits={"timeout_seconds": 300}))
        slow = pool.submit(ask, api, address, "[slow]", stream=stream, model="slow")
        assert ask(api, address).status_code == 200
        if stream:
            assert code.encode() in slow.result(30).content
        else:
            answer = slow.result(30)
            assert (answer.status_code, answer.json()["error"]["code"]) == (504, code)
        found = wait_for_records(api, address, 1, failures=1)
        assert found["reasons"] == {code: 1}
    assert money(api.engine, api.tenant, "slow").of("unknown") > 0


def test_a_teacher_takes_no_more_calls_at_once_than_it_may(api: Api, held: HeldTeacher) -> None:
    with capturing(api) as address, ThreadPoolExecutor(3) as pool:
        register(api, address, "fast", **registration(held.url, limits={"concurrency": 2}))
        calls = [pool.submit(ask, api, address) for _ in range(2)]
        wait_for(lambda: len(held.seen), 20, "two calls are open", until=lambda n: n == 2)
        refused = ask(api, address)
        assert (refused.status_code, refused.headers["Retry-After"]) == (429, "1")
        held.go.set()
        assert [call.result(30).status_code for call in calls] == [200, 200]


def test_a_burst_before_the_first_answer_takes_no_more_calls_than_it_may(
    api: Api, held: HeldTeacher, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All of them come while nothing is known yet: no registration, no money, no open call."""
    refused = threading.Event()
    take = tranches.take

    def slow_take(*given: Any, **named: Any) -> tranches.Taken:
        assert refused.wait(30), "calls beyond the limit are refused while money is taken"
        return take(*given, **named)

    monkeypatch.setattr(tranches, "take", slow_take)
    with capturing(api) as address, ThreadPoolExecutor(12) as pool:
        register(api, address, "fast", **registration(held.url, limits={"concurrency": 2}))
        calls = [pool.submit(ask, api, address) for _ in range(12)]
        try:
            wait_for(
                lambda: sum(call.done() for call in calls),
                20,
                "all others are refused",
                until=lambda done: done == 10,
            )
        finally:
            refused.set()
        wait_for(lambda: len(held.seen), 20, "two are open", until=lambda n: n == 2)
        held.go.set()
        statuses = [call.result(30).status_code for call in calls]
        assert (statuses.count(200), statuses.count(429)) == (2, 10)
        # A place is free again after an answer, and after a refusal for money too.
        assert ask(api, address, max_tokens=10**12).status_code == 402
        with ThreadPoolExecutor(2) as both:
            again = [both.submit(ask, api, address) for _ in range(2)]
            assert [call.result(30).status_code for call in again] == [200, 200]
    assert len(held.seen) == 4


# Memory


def with_memory(api: Api, size: int) -> TeacherGatewaySettings:
    return api.gateway.settings.model_copy(update={"capture_memory_bytes": size})


def test_a_stream_that_memory_cannot_hold_is_answered_and_not_recorded(
    api: Api, store: ObjectStore
) -> None:
    flood = Flood()
    settings = with_memory(api, 4 << 20)
    with upstream(flood) as url, capturing(api, settings=settings) as address:
        register(api, address, "fast", **registration(url))
        answer = ask(api, address, stream=True)
        assert answer.status_code == 200
        assert answer.content.count(Flood.PIECE.encode()) == flood.PIECES, "all of it"
        assert answer.content.endswith(b"data: [DONE]\n\n")
        found = wait_for_records(api, address, 0, failures=1)
        assert found["reasons"] == {"memory_full": 1}
        assert found["last_failures"][0]["status"] == 200
    (line,) = lines(api.engine, store, api.tenant)
    assert line["answer"] is None
    assert line["request"]["messages"][0]["content"] == "Say something."
    after = money(api.engine, api.tenant, "fast")
    assert after.spent == after.of("unused") == 1 + 2 * flood.PIECES


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "an event without end"])
def test_an_answer_that_must_be_held_and_cannot_be_is_cut(api: Api, stream: bool) -> None:
    async def endless(request: web.Request) -> web.StreamResponse:
        kind = "text/event-stream" if stream else "application/json"
        response = web.StreamResponse(headers={"Content-Type": kind})
        await response.prepare(request)
        await response.write(b"data: {")
        for _ in range(1000):
            await response.write(b"x" * 65_536)
        return response

    settings = with_memory(api, 4 << 20)
    with upstream(endless) as url, capturing(api, settings=settings) as address:
        register(api, address, "fast", **registration(url))
        answer = ask(api, address, stream=stream)
        if stream:
            assert b'"code":"memory_full"' in answer.content
        else:
            assert (answer.status_code, answer.json()["error"]["code"]) == (503, "memory_full")
        found = wait_for_records(api, address, 0, failures=1)
        assert found["reasons"] == {"memory_full": 1}
    assert money(api.engine, api.tenant, "fast").of("unknown") > 0


def test_calls_are_refused_while_those_in_flight_hold_all_memory(
    api: Api, held: HeldTeacher
) -> None:
    settings = with_memory(api, 4 << 20)
    text = "x" * (1 << 20)
    with capturing(api, settings=settings) as address, ThreadPoolExecutor(3) as pool:
        register(api, address, "fast", **registration(held.url, budget_usd=1000))
        calls = [pool.submit(ask, api, address, text) for _ in range(3)]
        wait_for(lambda: len(held.seen), 20, "three calls are open", until=lambda n: n == 3)
        refused = ask(api, address, text)
        assert (refused.status_code, refused.headers["Retry-After"]) == (503, "1")
        assert refused.json()["error"]["code"] == "memory_full"
        held.go.set()
        assert [call.result(30).status_code for call in calls] == [200] * 3
        assert ask(api, address, text).status_code == 200, "it is free again"


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
