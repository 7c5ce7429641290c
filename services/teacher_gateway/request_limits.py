"""What a request may be before anyone looks at it: its Host, its size, its coding, its speed.

Plain ASGI, outermost, so that nothing is parsed or held before it was counted. Bodies are counted
as they come, whether their length was announced or not. What is refused is still read for a
while, since a client that is writing cannot hear an answer; it is never kept.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable
from typing import Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from services.teacher_gateway.problems import ProblemError

# A refused body is read up to here, so that the client gets the answer rather than a reset.
DRAIN_BYTES = 64 * 2**20
DRAIN_SECONDS = 10.0
IDLE_SECONDS = 30.0
_HOST = re.compile(r"^(?:\[(?P<six>[0-9a-fA-F:.]+)\]|(?P<name>[A-Za-z0-9.-]+))(?::[0-9]{1,5})?$")
_PROBES = frozenset({"/healthz", "/readyz"})


class RequestLimits:
    """Refuses wrong hosts, coded, oversized and stalled bodies with a problem."""

    def __init__(
        self, app: ASGIApp, *, hosts: frozenset[str], max_bytes: Callable[[str], int]
    ) -> None:
        self._app = app
        self._hosts = hosts
        self._max_bytes = max_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        limit = self._max_bytes(scope["path"])
        try:
            self._check_host(scope)
            self._check_headers(scope, limit)
        except ProblemError as error:
            await drain(receive)
            await error.response()(scope, receive, send)
            return
        counted = 0
        complete = started = False

        async def counting() -> Message:
            nonlocal counted, complete
            try:
                message = await asyncio.wait_for(receive(), None if complete else IDLE_SECONDS)
            except TimeoutError:
                raise ProblemError(
                    408, "stalled", f"nothing came for {IDLE_SECONDS:g} seconds; send it again"
                ) from None
            counted += len(message.get("body", b""))
            complete = not message.get("more_body", False)
            if counted > limit:
                if not complete:
                    await drain(receive)
                raise _too_large(limit)
            return message

        async def noting(message: Message) -> None:
            nonlocal started
            started = True
            await send(message)

        try:
            await self._app(scope, counting, noting)
        except ProblemError as error:
            # What the app could not turn into an answer itself.
            if started:
                raise
            await error.response()(scope, receive, send)

    def _check_host(self, scope: Scope) -> None:
        if scope["path"] in _PROBES:
            return  # an orchestrator asks by address
        found = [value for name, value in scope["headers"] if name == b"host"]
        if len(found) != 1 or not host_is_allowed(found[0], self._hosts):
            raise wrong_host()

    def _check_headers(self, scope: Scope, limit: int) -> None:
        headers = dict(scope["headers"])
        coding = headers.get(b"content-encoding", b"identity").strip().lower()
        if coding not in (b"", b"identity"):
            raise ProblemError(
                415, "content-encoding", "expected a body without Content-Encoding: send it plain"
            )
        length = headers.get(b"content-length", b"0")
        if not length.isdigit() or int(length[:20]) > limit:
            raise _too_large(limit)


def host_is_allowed(header: bytes, hosts: frozenset[str]) -> bool:
    """Whether a Host header names one of these; a port beside the name does not matter."""
    match = _HOST.fullmatch(header.decode("latin-1"))
    return match is not None and (match["six"] or match["name"]).lower() in hosts


def wrong_host() -> ProblemError:
    return ProblemError(
        400,
        "host",
        "the Host header names another server; an operator adds names with "
        "TEACHER_GATEWAY_ALLOWED_HOSTS",
    )


def _too_large(limit: int) -> ProblemError:
    return ProblemError(
        413,
        "too-large",
        f"expected a body of at most {limit} bytes here; put prompts into a file and upload it "
        "with PUT /v1/uploads/<sha256>",
    )


async def drain(receive: Receive) -> None:
    """Read on for a while what is refused already, so that its sender hears the answer."""

    async def read() -> None:
        left = DRAIN_BYTES
        while left > 0:
            message: Any = await receive()
            if message["type"] != "http.request" or not message.get("more_body"):
                return
            left -= len(message.get("body", b""))

    try:
        await asyncio.wait_for(read(), DRAIN_SECONDS)
    except TimeoutError:
        return
