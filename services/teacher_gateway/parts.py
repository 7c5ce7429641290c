"""The stored answers of a batch: for each attempt a series of parts, numbered from 1.

A series grows only by conditional writes, and it is ended by an empty part. Whoever takes a batch
over reads each earlier series up to where nothing is yet, and puts the empty part there: a late
writer then meets it and stops, and what was read is all there will ever be.
"""

from __future__ import annotations

import gzip
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from stillhouse.chassis.errors import DigestMismatch
from stillhouse.chassis.storage import AlreadyExists, ObjectStore
from stillhouse.contracts.artifacts import ObjectRef, part_key
from stillhouse.contracts.canonical import sha256_hex
from stillhouse.contracts.responses import Answer

PART_ANSWERS = 16
PART_SECONDS = 5.0


@dataclass(frozen=True)
class Part:
    """A part as it lies in the store."""

    ref: ObjectRef
    answers: tuple[Answer, ...]


def answers_in(parts: Iterable[Part]) -> list[Answer]:
    return [answer for part in parts for answer in part.answers]


@dataclass(frozen=True)
class Series:
    """What one attempt stored."""

    attempt: int
    parts: tuple[Part, ...]


def encode_part(answers: list[Answer]) -> bytes:
    """JSON lines, compressed; the same answers give the same bytes."""
    lines = b"".join(answer.model_dump_json().encode() + b"\n" for answer in answers)
    return gzip.compress(lines, compresslevel=6, mtime=0)


def decode_part(data: bytes, key: str) -> list[Answer]:
    try:
        lines = gzip.decompress(data).splitlines()
        return [Answer.model_validate_json(line) for line in lines]
    except (OSError, EOFError, ValueError) as error:
        raise DigestMismatch(f"{key} is not a part: {error}") from error


END_OF_SERIES = encode_part([])


def close_series(
    store: ObjectStore, tenant: str, pipeline: str, batch: int, attempt: int
) -> Series:
    """Read an earlier attempt's parts and end its series for good."""
    return _read(store, lambda number: part_key(tenant, pipeline, batch, attempt, number), attempt)


def _read(store: ObjectStore, key_of: Callable[[int], str], attempt: int) -> Series:
    parts: list[Part] = []
    number = 1
    while True:
        key = key_of(number)
        stored = store.read(key)
        if stored is None:
            try:
                store.put_new(key, END_OF_SERIES)
            except AlreadyExists:
                continue  # the late writer was first: read what it wrote
            break
        if stored.data == END_OF_SERIES:
            break
        ref = ObjectRef(key=key, size=len(stored.data), sha256=sha256_hex(stored.data))
        parts.append(Part(ref, tuple(decode_part(stored.data, key))))
        number += 1
    return Series(attempt, tuple(parts))
