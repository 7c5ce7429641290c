"""The capture endpoint on real parts, with a teacher that a test holds in its hand."""

from __future__ import annotations

import asyncio
import contextlib
import gzip
import json
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import httpx
import uvicorn
from aiohttp import web
from sqlalchemy import Engine, select

from services.teacher_gateway.api import ApiServer
from services.teacher_gateway.app import GatewayApp, app_of
from services.teacher_gateway.capture.endpoint import CaptureEndpoint
from services.teacher_gateway.capture.registrations import account_of
from services.teacher_gateway.capture.serving import Times
from services.teacher_gateway.database import reading
from services.teacher_gateway.http_protocol import BoundedHttpProtocol
from services.teacher_gateway.models import Account, AccountCharge, CapturedBatch, Tranche
from services.teacher_gateway.routes.parts import Gateway
from stillhouse.chassis.storage import ObjectStore
from stillhouse.contracts.artifacts import ObjectRef
from tests.support.gateway_api import Api
from tests.support.waiting import wait_for

# Nothing waits for long in a test; deadlines that one tries are its own.
QUICK = Times(segment=0.05, watch=0.05, turn=0.05)

# One client for all: a new one takes longer than what it asks.
HTTP = httpx.Client(timeout=60, verify=False, trust_env=False)


@contextlib.contextmanager
def capturing(
    api: Api,
    *,
    times: Times = QUICK,
    environ: dict[str, str] | None = None,
    grace: float = 5,
    **parts: Any,
) -> Iterator[str]:
    """Serve an API with its capture endpoint on a free port; yield its address."""
    gateway: Gateway = replace(api.gateway, **parts)
    app = app_of(gateway)
    app.capture = CaptureEndpoint(gateway, environ=environ or {}, times=times)
    with _serving(app, grace) as url:
        yield url


@contextlib.contextmanager
def _serving(app: GatewayApp, grace: float) -> Iterator[str]:
    config = uvicorn.Config(
        app,
        host="127.0.0.1",
        port=0,
        log_config=None,
        http=BoundedHttpProtocol,
        timeout_graceful_shutdown=int(grace),
    )
    server = ApiServer(config, leaving=app.state.event_streams.close)
    thread = threading.Thread(target=server.run, name="capture")
    thread.start()
    try:
        wait_for(lambda: server.started, 20, "the API serves")
        port = server.servers[0].sockets[0].getsockname()[1]
        yield f"http://127.0.0.1:{port}"
    finally:
        server.should_exit = True
        thread.join(30)
        assert not thread.is_alive(), "the API did not end"


def registration(url: str, **changes: Any) -> dict[str, Any]:
    return {
        "url": url,
        "model": "billing-teacher",
        "terms": "smollm2@self-hosted",
        "usd_per_million": {"input": 1, "output": 2},
        "budget_usd": 10,
        **changes,
    }


def register(api: Api, address: str, name: str, **body: Any) -> dict[str, Any]:
    """Register a teacher; return what the API says of it."""
    answer = HTTP.put(f"{address}/v1/teachers/{name}", json=body, headers=api.headers())
    assert answer.status_code in (200, 201), answer.text
    found: dict[str, Any] = answer.json()
    return found


def captured(api: Api, address: str) -> dict[str, Any]:
    answer = HTTP.get(f"{address}/v1/captured", headers=api.headers())
    assert answer.status_code == 200, answer.text
    found: dict[str, Any] = answer.json()
    return found


def wait_for_records(api: Api, address: str, count: int, *, failures: int = 0) -> dict[str, Any]:
    """Wait until so many exchanges are indexed, and not one more."""
    found = wait_for(
        lambda: captured(api, address),
        20,
        "the records are indexed",
        until=lambda seen: seen["records"] + seen["failures"] >= count + failures,
    )
    assert (found["records"], found["failures"]) == (count, failures), found
    return found


def lines(engine: Engine, store: ObjectStore, tenant: str) -> list[dict[str, Any]]:
    """Every recorded exchange of a tenant, oldest batch first."""
    with reading(engine) as session:
        refs = session.scalars(
            select(CapturedBatch.ref)
            .where(CapturedBatch.tenant_id == tenant)
            .order_by(CapturedBatch.stored_at)
        ).all()
    found: list[dict[str, Any]] = []
    for ref in refs:
        data = gzip.decompress(store.get(ObjectRef.model_validate_json(ref)))
        found += [json.loads(line) for line in data.splitlines()]
    return found


@dataclass(frozen=True)
class Money:
    """An account with its lines, read at once."""

    budget: int
    spent: int
    reserved: int
    charges: dict[str, int]

    def of(self, kind: str) -> int:
        return sum(v for k, v in self.charges.items() if k.endswith(f":{kind}"))

    @property
    def listed(self) -> int:
        return sum(v for k, v in self.charges.items() if k.startswith("tranche:"))


def money(engine: Engine, tenant: str, teacher: str) -> Money:
    account = account_of(tenant, teacher)
    with reading(engine) as session:
        row = session.get(Account, (tenant, account.name))
        assert row is not None
        charges = {
            charge.charge_id: charge.microusd
            for charge in session.scalars(
                select(AccountCharge).where(
                    AccountCharge.tenant_id == tenant, AccountCharge.account == account.name
                )
            )
        }
        open_tranches = sum(
            session.scalars(
                select(Tranche.microusd).where(
                    Tranche.state == "open",
                    Tranche.tenant_id == tenant,
                    Tranche.account == account.name,
                )
            ).all()
        )
        found = Money(row.budget_microusd, row.spent_microusd, row.reserved_microusd, charges)
    assert found.spent + found.reserved <= found.budget, found
    assert found.spent == sum(charges.values()), found
    assert found.reserved == open_tranches, "what is reserved is held by somebody"
    return found


# A teacher that a test holds in hand


def completion(content: str = "An answer.", **usage: int) -> dict[str, Any]:
    return {
        "id": "chatcmpl-1",
        "object": "chat.completion",
        "created": 1_790_000_000,
        "model": "upstream",
        "choices": [
            {
                "index": 0,
                "message": {"role": "assistant", "content": content},
                "finish_reason": "stop",
            }
        ],
        "usage": {"prompt_tokens": 10, "completion_tokens": 5, **usage},
    }


@dataclass
class HeldTeacher:
    """Answers a question when the test lets it. `seen` are the bodies as they came."""

    url: str = ""
    seen: list[dict[str, Any]] = field(default_factory=list)
    left: int = 0  # callers that went before they had their answer
    go: threading.Event = field(default_factory=threading.Event)
    body: dict[str, Any] = field(default_factory=completion)

    async def answer(self, request: web.Request) -> web.StreamResponse:
        self.seen.append(await request.json())
        try:
            await self._wait()
        except asyncio.CancelledError:
            self.left += 1
            raise
        return web.json_response(self.body)

    async def _wait(self) -> None:
        # An event of threads: the test is on another one.
        while not self.go.is_set():  # noqa: ASYNC110
            await asyncio.sleep(0.01)


Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


@contextlib.contextmanager
def upstream(handler: Handler, path: str = "/v1/chat/completions") -> Iterator[str]:
    """Serve a handler on a thread of its own; yield the base URL with /v1."""
    loop = asyncio.new_event_loop()
    ready, ended = threading.Event(), asyncio.Event()
    found: list[str] = []

    @contextlib.asynccontextmanager
    async def served() -> AsyncIterator[None]:
        app = web.Application(client_max_size=64 << 20)
        app.router.add_post(path, handler)
        runner = web.AppRunner(
            app, access_log=None, shutdown_timeout=0.1, handler_cancellation=True
        )
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0, backlog=1024)
        await site.start()
        found.append(f"http://127.0.0.1:{runner.addresses[0][1]}/v1")
        try:
            yield
        finally:
            await runner.cleanup()

    async def serve() -> None:
        async with served():
            ready.set()
            await ended.wait()

    thread = threading.Thread(target=lambda: loop.run_until_complete(serve()), daemon=True)
    thread.start()
    assert ready.wait(10)
    try:
        yield found[0]
    finally:
        loop.call_soon_threadsafe(ended.set)
        thread.join(10)
        loop.close()


@contextlib.contextmanager
def held_teacher() -> Iterator[HeldTeacher]:
    teacher = HeldTeacher()
    with upstream(teacher.answer) as url:
        teacher.url = url
        try:
            yield teacher
        finally:
            teacher.go.set()
