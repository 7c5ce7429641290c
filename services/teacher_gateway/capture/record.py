"""One finished exchange as it lies in a spool: bytes as they came, and what is known about them.

    length (4 bytes), CRC-32 of the payload (4 bytes), payload (MessagePack)

A record that was only half written when its process died is told by its length or its checksum.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator
from typing import Literal

import msgspec

from services.teacher_gateway.capture.asked import Kind

_HEAD = struct.Struct(">II")
# A record holds a request and an answer, each of which has a limit of its own, far below.
_LONGEST = 1 << 28
_encoder = msgspec.msgpack.Encoder()

# Nothing was billed; by the teacher's own count; at the most that it can have been.
Bill = Literal["", "known", "unknown"]


class Record(msgspec.Struct, array_like=True, gc=False):
    """`failure` is empty where the answer is whole. `answer` is the body as it came, all events of
    a stream."""

    tenant_id: str
    teacher: str
    verdict_id: str
    terms: str
    kind: Kind
    at: float
    seconds: float
    status: int
    streamed: bool
    failure: str
    detail: str
    tags: dict[str, str]
    prompt_tokens: int
    completion_tokens: int
    tranche_id: str
    bill: Bill
    microusd: int
    request: bytes
    answer: bytes


_decoder = msgspec.msgpack.Decoder(Record)


class DamagedSpool(Exception):
    """What follows in a spool cannot be read. `at` is the byte where it begins; `cut`: it is one
    record without its end, as a process leaves it that is killed while it writes."""

    def __init__(self, at: int, why: str, *, cut: bool = False) -> None:
        super().__init__(f"byte {at}: {why}")
        self.at = at
        self.cut = cut


def frame(record: Record) -> bytes:
    """A record as it is appended to a spool."""
    payload = _encoder.encode(record)
    return _HEAD.pack(len(payload), zlib.crc32(payload)) + payload


def frames(data: bytes) -> Iterator[Record]:
    """Read the records of a spool. Raises DamagedSpool after the last whole one, also where the
    last one was cut."""
    at = 0
    while at < len(data):
        start = at + _HEAD.size
        if start > len(data):
            raise DamagedSpool(at, "a record was cut", cut=True)
        length, checksum = _HEAD.unpack_from(data, at)
        payload = data[start : start + length]
        if length > _LONGEST:
            raise DamagedSpool(at, f"a record of {length} bytes is none of ours")
        if len(payload) < length:
            raise DamagedSpool(at, "a record was cut", cut=True)
        if zlib.crc32(payload) != checksum:
            raise DamagedSpool(at, "a record has another checksum")
        try:
            yield _decoder.decode(payload)
        except msgspec.DecodeError as error:
            raise DamagedSpool(at, f"a record is of another version ({error})") from error
        at = start + length
