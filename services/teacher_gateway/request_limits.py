"""What a request may be before anyone looks at it: its Host, its size, its coding, its speed.

Plain ASGI, outermost, so that nothing is parsed or held before it was counted. Bodies are counted
as they come, whether their length was announced or not. What is refused is still read for a
while, since a client that is writing cannot hear an answer; it is never kept.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from services.teacher_gateway.problems import ProblemError

# A refused body is read up to here, so that the client gets the answer rather than a reset.
DRAIN_BYTES = 64 * 2**20
DRAIN_SECONDS = 10.0
IDLE_SECONDS = 30.0
_HOST = re.compile(r"^(?:\[(?P<six>[0-9a-fA-F:.]+)\]|(?P<name>[A-Za-z0-9.-]+))(?::[0-9]{1,5})?$")
_MOST_KNOWN = 1000
_PROBES = frozenset({"/healthz", "/readyz"})


class RequestLimits:
    """Refuses wrong hosts, coded, oversized and stalled bodies with a problem."""

    def __init__(
        self, app: ASGIApp, *, hosts: frozenset[str], max_bytes: Callable[[str], int]
    ) -> None:
        self._app = app
        self._heads = Heads(hosts)
        self._max_bytes = max_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        limit = self._max_bytes(scope["path"])
        try:
            # An orchestrator asks by address.
            head = self._heads.read(scope["headers"], any_host=scope["path"] in _PROBES)
            if head.length > limit:
                raise _too_large(limit)
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


class Head(NamedTuple):
    """What is read of a request's headers; a `length` that nobody announced is 0."""

    authorization: bytes
    length: int


class Heads:
    """What the head of a request must be, for REST and capture alike."""

    def __init__(self, hosts: frozenset[str]) -> None:
        self._hosts = hosts
        self._known: set[bytes] = set()  # Host headers that were right before

    def read(self, headers: Iterable[tuple[bytes, bytes]], *, any_host: bool = False) -> Head:
        """Look at each header once. Raises ProblemError (400 or 415)."""
        hosts: list[bytes] = []
        authorization, length = b"", 0
        for name, value in headers:
            if name == b"host":
                hosts.append(value)
            elif name == b"authorization":
                authorization = value
            elif name == b"content-length":
                if not value.isdigit():
                    raise ProblemError(400, "content-length", "expected a number as Content-Length")
                length = int(value[:20])
            elif name == b"content-encoding" and value.strip().lower() not in (b"", b"identity"):
                raise ProblemError(
                    415,
                    "content-encoding",
                    "expected a body without Content-Encoding: send it plain",
                )
        if not any_host and not (len(hosts) == 1 and self._allows(hosts[0])):
            raise wrong_host()
        return Head(authorization, length)

    def _allows(self, host: bytes) -> bool:
        if host in self._known:
            return True
        if not host_is_allowed(host, self._hosts):
            return False
        if len(self._known) < _MOST_KNOWN:
            self._known.add(host)
        return True


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
