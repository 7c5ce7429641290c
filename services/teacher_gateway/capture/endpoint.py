"""The endpoint itself: ASGI, beside the REST API and before its middleware.

What must be refused is refused in this order: Host, coding, key, size, body, teacher, money. Then
the call goes upstream in a task of its own (`exchange`), so that nothing that becomes of the client
ends it.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from typing import Any

import msgspec
from starlette.types import Receive, Scope, Send

from services.teacher_gateway.capture import failures
from services.teacher_gateway.capture.allowance import OpenTranche
from services.teacher_gateway.capture.asked import Kind, read_body
from services.teacher_gateway.capture.exchange import Answer, Cut, Exchange
from services.teacher_gateway.capture.refusal import Refusal, from_problem
from services.teacher_gateway.capture.serving import Serving, Times
from services.teacher_gateway.counters import CAPTURE_REQUESTS
from services.teacher_gateway.keys import Caller, KeyRefused
from services.teacher_gateway.problems import from_exception, unauthorized
from services.teacher_gateway.request_limits import Heads, drain
from services.teacher_gateway.routes.parts import Gateway

CHAT, TEXT, MODELS = "/v1/chat/completions", "/v1/completions", "/v1/models"
_KINDS: Mapping[str, Kind] = {CHAT: "chat", TEXT: "text"}
_PIECE = 1 << 16


class CaptureEndpoint:
    """One process's endpoint. `running` is entered on the event loop that serves it."""

    def __init__(
        self,
        gateway: Gateway,
        *,
        environ: Mapping[str, str],
        times: Times | None = None,
    ) -> None:
        self._gateway = gateway
        self._settings = gateway.settings
        self._environ = environ
        self._times = times or Times()
        self._heads = Heads(gateway.settings.hosts)
        self._serving: Serving | None = None

    @staticmethod
    def takes(path: str) -> bool:
        """Whether a request is for this endpoint."""
        return path in _KINDS or path == MODELS or path.startswith(f"{MODELS}/")

    def forget(self, tenant_id: str, teacher: str) -> None:
        """A registration was changed: use it as it is stored now."""
        if self._serving is not None:
            self._serving.teachers.forget(tenant_id, teacher)

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Serve until the end of the block; then finish, and bring home what was recorded."""
        self._serving = Serving(self._gateway, self._environ, self._times)
        try:
            yield
        finally:
            serving, self._serving = self._serving, None
            await serving.stop()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            status = await self._answer(scope, receive, send)
        except Exception as error:
            refusal = error if isinstance(error, Refusal) else from_problem(from_exception(error))
            status = refusal.status
            await _send(send, status, refusal.headers, refusal.body)
        _COUNTED[status // 100].inc()

    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> int:
        try:
            serving, caller, most = await self._admit(scope)
        except Exception:
            await drain(receive)  # a client that is writing cannot hear an answer
            raise
        kind = _KINDS.get(scope["path"])
        if kind is None:
            return await self._models(serving, caller, scope, send)
        body = await self._body(receive, most)
        if body is None:
            return 499  # gone before it had asked
        return await self._call(serving, caller, kind, body, receive, send)

    async def _admit(self, scope: Scope) -> tuple[Serving, Caller, int]:
        """Judge all that comes before a body. Raises Refusal or an error of the world."""
        head = self._heads.read(scope["headers"])
        serving = self._serving
        if serving is None:
            raise Refusal(503, "stopping", "the gateway starts or stops: try again", retry_after=1)
        if (caller := serving.callers.known(head.authorization)) is None:
            try:
                caller = await serving.callers.find(head.authorization)
            except KeyRefused:
                raise from_problem(unauthorized()) from None
        expected = "POST" if scope["path"] in _KINDS else "GET"
        if scope["method"] != expected:
            raise Refusal(405, "method_not_allowed", f"expected {expected}")
        most = self._settings.capture_max_body_bytes
        if head.length > most:
            raise _too_large(most)
        return serving, caller, most

    async def _body(self, receive: Receive, most: int) -> bytes | None:
        """Read a body; None when the client left meanwhile. Raises Refusal."""
        body: bytes = b""
        try:
            async with asyncio.timeout(self._times.body):
                while True:
                    message = await receive()
                    if message["type"] != "http.request":
                        return None
                    part: bytes = message.get("body", b"")
                    body = body + part if body else part
                    more = message.get("more_body", False)
                    if len(body) > most:
                        if more:
                            await drain(receive)
                        raise _too_large(most)
                    if not more:
                        return body
        except TimeoutError:
            seconds = self._times.body
            raise Refusal(
                408, "stalled", f"the body took over {seconds:g} seconds: send it again"
            ) from None

    async def _call(
        self,
        serving: Serving,
        caller: Caller,
        kind: Kind,
        body: bytes,
        receive: Receive,
        send: Send,
    ) -> int:
        asked = read_body(body, kind, max_tokens=self._settings.capture_max_tokens)
        served = serving.teachers.known(caller.tenant_id, asked.model)
        if served is None:
            served = await serving.teachers.find(caller.tenant_id, asked.model)
        share = serving.enter(served, len(body))
        try:
            most = served.most(asked)
            tranche: OpenTranche | None = None
            if most:
                allowance = serving.keeping.allowance(served)
                tranche = allowance.hold(most, served.budget_microusd)
                if tranche is None:
                    tranche = await allowance.hold_more(most, served.budget_microusd)
        except BaseException:
            serving.leave(served, share)
            raise
        exchange = Exchange(
            served,
            asked,
            body,
            tranche,
            most,
            share=share,
            session=serving.session,
            send=send,
            ended=serving.ended,
        )
        task = serving.start(exchange)
        answer = await _wait(exchange, task, receive)
        if answer is None:
            return 200
        if len(answer.body) <= _PIECE:
            await _send(send, answer.status, answer.headers, answer.body)
        else:
            with serving.holding(len(answer.body)):
                await self._give(answer, send, served.timeout_seconds)
        return answer.status

    async def _give(self, answer: Answer, send: Send, seconds: float) -> None:
        """Give a long answer to a client that may read slowly, but not for ever."""
        length = (b"content-length", str(len(answer.body)).encode())
        headers = [*answer.headers, length]
        try:
            async with asyncio.timeout(seconds):
                await send(
                    {"type": "http.response.start", "status": answer.status, "headers": headers}
                )
                for start in range(0, len(answer.body), _PIECE):
                    piece = answer.body[start : start + _PIECE]
                    more = start + _PIECE < len(answer.body)
                    async with asyncio.timeout(self._times.client):
                        await send({"type": "http.response.body", "body": piece, "more_body": more})
        except TimeoutError:
            return  # the server closes what was not sent whole

    async def _models(self, serving: Serving, caller: Caller, scope: Scope, send: Send) -> int:
        rows = await serving.list_teachers(caller.tenant_id)
        wanted = scope["path"].removeprefix(MODELS).removeprefix("/")
        models = [
            {"id": name, "object": "model", "created": int(at), "owned_by": caller.tenant_id}
            for name, at in rows
        ]
        if wanted:
            found = next((model for model in models if model["id"] == wanted), None)
            if found is None:
                raise Refusal(404, "model_not_found", "there is no such registered teacher")
            body = msgspec.json.encode(found)
        else:
            body = msgspec.json.encode({"object": "list", "data": models})
        await _send(send, 200, [(b"content-type", b"application/json")], body)
        return 200


async def _wait(
    exchange: Exchange, task: asyncio.Task[Answer | None], receive: Receive
) -> Answer | None:
    """Wait for an exchange without being able to end it. Where its teacher says so, a client that
    leaves ends it; a client that does not read is not waited for."""
    if not exchange.served.aborts:
        if exchange.dropped is None:
            return await asyncio.shield(task)
        either: set[asyncio.Future[Any]] = {task, exchange.dropped}
        await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
        return task.result() if task.done() else None
    left = asyncio.ensure_future(_left(receive))
    either = {task, left}
    try:
        await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            exchange.cut(Cut(failures.CLIENT_LEFT, 499, "the client left"))
        return await asyncio.shield(task)
    finally:
        left.cancel()


async def _left(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        continue


async def _send(send: Send, status: int, headers: list[tuple[bytes, bytes]], body: bytes) -> None:
    length = (b"content-length", str(len(body)).encode())
    await send({"type": "http.response.start", "status": status, "headers": [*headers, length]})
    await send({"type": "http.response.body", "body": body})


def _too_large(limit: int) -> Refusal:
    return Refusal(413, "too_large", f"expected a body of at most {limit} bytes")


_COUNTED = {number: CAPTURE_REQUESTS.labels(f"{number}xx") for number in range(2, 6)}
