"""One finished exchange as it lies in a spool: bytes as they came, and what is known about them.

    4 bytes each: the payload's length, its CRC-32, the CRC-32 of these 8 bytes; then the payload,
    in MessagePack

A record that was only half written when its process died is told by its length. One that is
damaged costs no other: its length has a checksum of its own, so the next one is found.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Literal

import msgspec

from services.teacher_gateway.capture.asked import Kind

_HEAD = struct.Struct(">III")
_MEASURED = 8  # bytes of a head that its own checksum covers
_encoder = msgspec.msgpack.Encoder()

# What a count of tokens can be. A teacher that says more is not believed: sums of it would not fit
# the database.
MOST_TOKENS = 1 << 40
# The largest budget that there is, so the most that a call can be paid with.
MOST_MICROUSD = 10**13
Tokens = Annotated[int, msgspec.Meta(ge=0, le=MOST_TOKENS)]
_Microusd = Annotated[int, msgspec.Meta(ge=0, le=MOST_MICROUSD)]
_Seconds = Annotated[float, msgspec.Meta(ge=0, le=1e11)]

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
    at: _Seconds
    seconds: _Seconds
    status: int
    streamed: bool
    failure: str
    detail: str
    tags: dict[str, str]
    prompt_tokens: Tokens
    completion_tokens: Tokens
    tranche_id: str
    bill: Bill
    microusd: _Microusd
    request: bytes
    answer: bytes


_decoder = msgspec.msgpack.Decoder(Record)


@dataclass(frozen=True)
class Damage:
    """Bytes of a spool from `at` on that are no record of ours. `cut`: it is the last one without
    its end, as a process leaves it that is killed while it writes."""

    at: int
    why: str
    cut: bool = False


def frame(record: Record) -> bytes:
    """A record as it is appended to a spool."""
    payload = _encoder.encode(record)
    checksum = zlib.crc32(payload)
    measured = zlib.crc32(_HEAD.pack(len(payload), checksum, 0)[:_MEASURED])
    return _HEAD.pack(len(payload), checksum, measured) + payload


def frames(data: bytes) -> Iterator[Record | Damage]:
    """Read the records of a spool, each by itself: after one that is damaged comes the next.

    Only where a head is damaged nothing is read behind it: a search for the next one could find
    what a client wrote into its request.
    """
    at = 0
    while at < len(data):
        start = at + _HEAD.size
        if start > len(data):
            yield Damage(at, "a record was cut", cut=True)
            return
        length, checksum, measured = _HEAD.unpack_from(data, at)
        if zlib.crc32(data[at : at + _MEASURED]) != measured:
            yield Damage(at, "the head of a record has another checksum")
            return
        payload = data[start : start + length]
        if len(payload) < length:
            yield Damage(at, "a record was cut", cut=True)
            return
        yield _read(at, payload, checksum)
        at = start + length


def _read(at: int, payload: bytes, checksum: int) -> Record | Damage:
    if zlib.crc32(payload) != checksum:
        return Damage(at, "a record has another checksum")
    try:
        return _decoder.decode(payload)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        return Damage(at, f"a record is none of this version ({error})")
