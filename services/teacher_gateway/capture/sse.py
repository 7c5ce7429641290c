"""Server-sent events: cut into whole ones as they pass, and read.

On the way through, bytes are only searched: an event is decoded when it may carry the usage.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

import msgspec

from services.teacher_gateway.capture.record import Tokens
from services.teacher_gateway.capture.room import PIECE_BYTES

DONE = b"[DONE]"
_SEAM = 3  # one byte less than the longest end of an event
_END = re.compile(rb"\r\n\r\n|\n\n|\r\r")
_HAS_USAGE = re.compile(rb'"usage"\s*:\s*\{')
_IS_DONE = re.compile(rb"(?:^|[\r\n])data:[ ]?\[DONE\]")


class Usage(msgspec.Struct):
    """What the teacher bills, in its own count."""

    prompt_tokens: Tokens
    completion_tokens: Tokens


class _WithUsage(msgspec.Struct):
    usage: Usage | None = None
    choices: list[msgspec.Raw] | None = None


_decoder = msgspec.json.Decoder(_WithUsage)


class Passing:
    """A stream on its way to the client: whole events, without the one that it did not ask for."""

    def __init__(self, *, usage_hidden: bool) -> None:
        self._hidden = usage_hidden
        # The event that has not ended: its pieces, joined when it has, and its last few bytes,
        # since the empty line that ends it may come in two pieces.
        self._pieces: list[bytes] = []
        self._last = b""
        self.unfinished = 0  # bytes of memory that it takes
        self.usage: Usage | None = None
        self.done = False

    def feed(self, data: bytes) -> bytes:
        """Take what came; return what may go on."""
        seam = len(self._last)
        end = _last_end(self._last + data if seam else data) - seam
        if end <= 0:
            self._pieces.append(data)
            self.unfinished += len(data) + PIECE_BYTES
            self._last = (self._last + data[-_SEAM:])[-_SEAM:]
            return b""
        whole = data[:end]
        if self._pieces:
            whole = b"".join((*self._pieces, whole))
            self._pieces = []
        rest = data[end:]
        if rest:
            self._pieces.append(rest)
        self._last = rest[-_SEAM:]
        self.unfinished = len(rest)
        return self._passed(whole)

    def end(self) -> bytes:
        """What is left when nothing more comes, such as an event without its empty line."""
        rest, self._pieces, self._last = b"".join(self._pieces), [], b""
        return self._passed(rest) if rest else b""

    def _passed(self, data: bytes) -> bytes:
        if not self.done and DONE in data and _IS_DONE.search(data):
            self.done = True
        if not _HAS_USAGE.search(data):
            return data
        passed = []
        for event in _split(data):
            if not (_HAS_USAGE.search(event) and self._note(event) and self._hidden):
                passed.append(event)
        return b"".join(passed)

    def _note(self, event: bytes) -> bool:
        """Note an event's usage; whether it carries nothing else."""
        for data in data_of(event):
            try:
                found = _decoder.decode(data)
            except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
                return False  # such as a text that looks like it
            if found.usage is None:
                return False
            self.usage = found.usage
            return not found.choices
        return False


def data_of(stream: bytes) -> Iterator[bytes]:
    """The data of each event; comments and other fields are left out."""
    lines: list[bytes] = []
    for line in stream.splitlines():
        if line.startswith(b"data:"):
            lines.append(line[6:] if line.startswith(b"data: ") else line[5:])
        elif not line and lines:
            yield b"\n".join(lines)
            lines = []
    if lines:
        yield b"\n".join(lines)


def _last_end(data: bytes) -> int:
    """Where the last whole event ends; 0 when there is none."""
    return max(
        data.rfind(b"\n\n") + 2 if b"\n\n" in data else 0,
        data.rfind(b"\r\n\r\n") + 4 if b"\r\n\r\n" in data else 0,
    )


def _split(data: bytes) -> Iterator[bytes]:
    """Whole events with the empty lines that end them."""
    start = 0
    for match in _END.finditer(data):
        yield data[start : match.end()]
        start = match.end()
    if start < len(data):
        yield data[start:]
