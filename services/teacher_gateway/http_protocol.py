"""What a connection may do before a request is one: uvicorn's fast parser, with bounds.

httptools holds whatever a client sends as headers, for as long as it takes. Here a head has a
length and a deadline, as it has with uvicorn's h11. A client that reads nothing of what it is sent
has a deadline too: without it whoever answers would wait for ever.
"""

from __future__ import annotations

import asyncio

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

MOST_HEAD_BYTES = 32_768
HEAD_SECONDS = 10.0
# More than the capture endpoint gives a client, so that there the call's own end comes first.
UNREAD_SECONDS = 60.0


class HeadTooLong(Exception):
    """Raised inside of the parser, which refuses the request for it."""


class BoundedHttpProtocol(HttpToolsProtocol):
    """Closes connections whose request does not begin or whose answers nobody reads, and refuses
    heads without end."""

    _reading_head = True
    _parsed = 0
    _unparsed: int | None = None
    _deadline: asyncio.TimerHandle | None = None
    _unread: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._wait()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_waiting()
        self._stop_unread()
        super().connection_lost(exc)

    def pause_writing(self) -> None:
        """The buffers are full: whoever answers waits for the client now."""
        super().pause_writing()
        if self._unread is None:
            self._unread = self.loop.call_later(UNREAD_SECONDS, self.transport.abort)

    def resume_writing(self) -> None:
        self._stop_unread()
        super().resume_writing()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self.transport.is_closing():
            return
        if self._reading_head:
            # Most heads come whole, and never get here. The first part may begin with the end of
            # another request, so it is not counted.
            self._unparsed = 0 if self._unparsed is None else self._unparsed + len(data)
            if self._unparsed > MOST_HEAD_BYTES:
                self.send_400_response("Request head too long.")
                return
        elif not self.cycle.response_complete:
            return
        if self._deadline is None:
            self._wait()  # also after bytes that begin no request

    def on_message_begin(self) -> None:
        self._reading_head = True
        self._parsed = 0
        self._unparsed = None
        super().on_message_begin()

    def on_url(self, url: bytes) -> None:
        self._count(len(url))
        super().on_url(url)

    def on_header(self, name: bytes, value: bytes) -> None:
        self._count(len(name) + len(value))
        super().on_header(name, value)

    def on_headers_complete(self) -> None:
        self._reading_head = False
        self._stop_waiting()
        super().on_headers_complete()

    def _count(self, more: int) -> None:
        self._parsed += more
        if self._parsed > MOST_HEAD_BYTES:
            raise HeadTooLong

    def _wait(self) -> None:
        self._deadline = self.loop.call_later(HEAD_SECONDS, self._late)

    def _stop_waiting(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None

    def _stop_unread(self) -> None:
        if self._unread is not None:
            self._unread.cancel()
            self._unread = None

    def _late(self) -> None:
        self._deadline = None
        if not self.transport.is_closing():
            self.transport.close()
