"""From a spool to the store: one object a teacher of a segment, and one transaction for it.

A segment does not change any more, so whoever ships it, and however often, makes the same objects
under the same names; the row of the index, with the money in the same transaction, is there once.
"""

from __future__ import annotations

import gzip
import json
import threading
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import msgspec
from sqlalchemy import Engine

from services.teacher_gateway.capture import failures
from services.teacher_gateway.capture.completion import Unusable, whole_answer
from services.teacher_gateway.capture.record import Damage, Record, frames
from services.teacher_gateway.capture.registrations import account_of
from services.teacher_gateway.capture.spool import abandoned, segments, set_aside
from services.teacher_gateway.capture.tranches import Bill, settle_bill
from services.teacher_gateway.counters import CAPTURE_FAILURES, CAPTURE_SHIPPED
from services.teacher_gateway.database import Session, now, transaction
from services.teacher_gateway.ledger import Kind
from services.teacher_gateway.models import CapturedBatch, CapturedTotal
from stillhouse.chassis.crash import crash_point
from stillhouse.chassis.errors import RetryableError, StillhouseError
from stillhouse.chassis.logs import logger
from stillhouse.chassis.storage import AlreadyExists, ObjectStore
from stillhouse.contracts.artifacts import ObjectRef, captured_key
from stillhouse.contracts.canonical import canonical_json, derived_id

log = logger(__name__)

# Level 1: three quarters of level 6's gain for a third of its time.
_GZIP_LEVEL = 1
SWEEP_SECONDS = 20.0
_MOST_TAGS = 200
_FAILURES_SHOWN = 5


class Line(msgspec.Struct):
    """One exchange in an object of the store. `answer` is a whole completion, or null beside a
    `failure`."""

    at: str
    kind: str
    teacher: str
    terms: str
    streamed: bool
    status: int
    seconds: float
    failure: str | None
    detail: str | None
    tags: dict[str, str]
    prompt_tokens: int
    completion_tokens: int
    microusd: int
    request: msgspec.Raw
    answer: msgspec.Raw = msgspec.Raw(b"null")


@dataclass
class Shipped:
    """What a segment's shipping changed: by tranche what its records cost, and what of it came out
    of the tranche."""

    records: list[Record]
    paid: list[tuple[str, int, int]] = field(default_factory=list)


@dataclass
class _Group:
    """The records of a segment that go into one object."""

    records: list[Record]
    lines: list[bytes] = field(default_factory=list)
    tags: Counter[tuple[str, str]] = field(default_factory=Counter)
    reasons: Counter[str] = field(default_factory=Counter)
    failures: list[dict[str, Any]] = field(default_factory=list)
    bills: dict[str, Bill] = field(default_factory=dict)

    def batch_id(self, path: Path) -> str:
        """The name of the object that these records of a segment make, whoever makes it."""
        first = self.records[0]
        return derived_id(
            "cb", path.parent.name, path.name, first.tenant_id, first.teacher, first.verdict_id
        )


_line = msgspec.json.Encoder()


def ship_segment(path: Path, engine: Engine, store: ObjectStore) -> Shipped:
    """Store and index what lies in a closed segment, then remove it.

    Damaged records, and those of a teacher whose batch can never be indexed, hold up none of the
    others: the segment is set aside with them when the others are indexed. Raises StillhouseError
    where store or database cannot or will not take it now, OSError where the disk does not.
    """
    if not path.exists():
        return Shipped([])  # a try whose end nobody waited for had done it
    records, damage = read_segment(path)
    whole = not damage
    for found in damage:
        log.error("a record cannot be read", path=str(path), at=found.at, why=found.why)
    shipped = Shipped(records)
    for group in _grouped(records):
        try:
            shipped.paid += _ship_group(path, group, engine, store)
        except (StillhouseError, OSError, MemoryError):
            raise  # the world's, which changes
        except Exception:
            log.exception("a batch cannot be indexed", path=str(path), batch=group.batch_id(path))
            whole = False
    if whole:
        path.unlink(missing_ok=True)
    else:
        log.error("a segment was set aside", path=str(set_aside(path)))
        CAPTURE_FAILURES.labels(failures.SPOOL_DAMAGED).inc()
    return shipped


def _ship_group(
    path: Path, group: _Group, engine: Engine, store: ObjectStore
) -> list[tuple[str, int, int]]:
    first = group.records[0]
    batch_id = group.batch_id(path)
    for record in group.records:
        _add_line(group, record)
    data = gzip.compress(b"".join(group.lines), _GZIP_LEVEL, mtime=0)
    key = captured_key(first.tenant_id, first.teacher, batch_id)
    try:
        ref = store.put_new(key, data)
    except AlreadyExists:
        # Of another version of this program; what is stored was made from the same records.
        found = store.find(key)
        if found is None:
            raise RetryableError(f"{key} was there, and is not any more") from None
        ref = found
    crash_point("captured_stored")
    paid = _index(engine, batch_id, group, ref)
    crash_point("captured_indexed")
    return paid


def ship_abandoned(folder: Path, engine: Engine, store: ObjectStore) -> int:
    """Ship the spools of dead processes; return how many records they held.

    What cannot be shipped for a reason of its own is passed over. Raises RetryableError where
    store or database are away.
    """
    count = 0
    for spool in abandoned(folder):
        found = segments(spool)
        for path in found:
            try:
                count += len(ship_segment(path, engine, store).records)
            except RetryableError:
                raise
            except Exception:
                log.exception("a dead process's segment could not be shipped", path=str(path))
        if found:
            log.info("a dead process's spool was shipped", spool=spool.name, segments=len(found))
    return count


def sweep_until(ended: threading.Event, folder: Path, engine: Engine, store: ObjectStore) -> None:
    """Ship the spools of dead processes on this machine, from time to time, until the end."""
    while not ended.wait(SWEEP_SECONDS):
        try:
            ship_abandoned(folder, engine, store)
        except RetryableError as error:
            log.warning("a dead process's spool waits", why=str(error))
        except Exception:
            log.exception("a dead process's spool could not be shipped")


def read_segment(path: Path) -> tuple[list[Record], list[Damage]]:
    """The records of a segment, and what in it is damaged. One that its writer's death cut off is
    nobody's, and neither."""
    records: list[Record] = []
    damage: list[Damage] = []
    for found in frames(path.read_bytes()):
        if isinstance(found, Record):
            records.append(found)
        elif found.cut:
            log.info("the last record of a spool was cut", path=str(path), why=found.why)
        else:
            damage.append(found)
    return records, damage


def _grouped(records: Iterable[Record]) -> list[_Group]:
    groups: dict[tuple[str, str, str], _Group] = {}
    for record in records:
        key = (record.tenant_id, record.teacher, record.verdict_id)
        groups.setdefault(key, _Group([])).records.append(record)
    return list(groups.values())


def _add_line(group: _Group, record: Record) -> None:
    """Add a record to its object and to the sums over it. What is not usable is a failure."""
    failure, detail = record.failure, record.detail
    request = answer = b"null"
    try:
        request = _request_of(record)
        if not failure:
            answer = whole_answer(record.answer, streamed=record.streamed)
    except Unusable as error:
        failure, detail = error.reason, str(error)
    except Exception:
        log.exception("a record cannot be used", teacher=record.teacher)
        failure, detail = failures.GATEWAY_ERROR, "the gateway failed on it; its log tells why"
    if failure:
        group.reasons[failure] += 1
        group.failures.append(
            {"at": record.at, "reason": failure, "status": record.status, "detail": detail[:300]}
        )
    else:
        group.tags.update(record.tags.items())
    if record.bill:
        bill = group.bills.setdefault(record.tranche_id, Bill(record.tranche_id))
        known: Kind = "unused" if failure else "answers"
        bill.add(known if record.bill == "known" else "unknown", record.microusd)
    group.lines.append(_line.encode(_line_of(record, failure, detail, request, answer)) + b"\n")


def _request_of(record: Record) -> bytes:
    try:
        record.request.decode()
        return msgspec.json.format(record.request, indent=-1)
    except (UnicodeDecodeError, msgspec.DecodeError, RecursionError) as error:
        detail = f"the recorded request is no JSON: {error}"
        raise Unusable(failures.RECORD_UNUSABLE, detail) from error


def _line_of(record: Record, failure: str, detail: str, request: bytes, answer: bytes) -> Line:
    return Line(
        at=datetime.fromtimestamp(record.at, UTC).isoformat(),
        kind=record.kind,
        teacher=record.teacher,
        terms=record.terms,
        streamed=record.streamed,
        status=record.status,
        seconds=round(record.seconds, 3),
        failure=failure or None,
        detail=detail or None,
        tags=record.tags,
        prompt_tokens=record.prompt_tokens,
        completion_tokens=record.completion_tokens,
        microusd=record.microusd,
        request=msgspec.Raw(request),
        answer=msgspec.Raw(answer),
    )


def _index(
    engine: Engine, batch_id: str, group: _Group, ref: ObjectRef
) -> list[tuple[str, int, int]]:
    """Make a batch known and settle what it cost: once, however often it is shipped."""
    records = group.records
    first = records[0]
    account = account_of(first.tenant_id, first.teacher)
    paid: list[tuple[str, int, int]] = []
    bills = [bill for bill in group.bills.values() if bill.microusd]
    with transaction(engine) as session:
        if session.get(CapturedBatch, batch_id) is not None:
            # Done before, and perhaps its answer was lost.
            return [(bill.tranche_id, bill.microusd, bill.microusd) for bill in bills]
        for bill in bills:
            taken = settle_bill(session, account, bill, f"{batch_id}:{bill.tranche_id}")
            paid.append((bill.tranche_id, bill.microusd, taken))
        batch = CapturedBatch(
            batch_id=batch_id,
            tenant_id=first.tenant_id,
            teacher=first.teacher,
            verdict_id=first.verdict_id,
            terms=first.terms,
            first_at=min(record.at for record in records),
            last_at=max(record.at for record in records),
            records=len(records) - len(group.failures),
            failures=len(group.failures),
            microusd=sum(record.microusd for record in records),
            tags=_tags_text(group.tags),
            reasons=canonical_json(dict(group.reasons)).decode(),
            last_failures=json.dumps(group.failures[-_FAILURES_SHOWN:]),
            ref=ref.model_dump_json(),
            stored_at=now(session),
        )
        session.add(batch)
        _add_to_total(session, batch)
    CAPTURE_SHIPPED.inc(len(records))
    for reason, count in group.reasons.items():
        CAPTURE_FAILURES.labels(reason).inc(count)
    return paid


def _add_to_total(session: Session, batch: CapturedBatch) -> None:
    # Made when the teacher was registered, so that no two processes make it at once.
    total = session.get(CapturedTotal, (batch.tenant_id, batch.teacher), with_for_update=True)
    if total is None:
        raise LookupError(f"{batch.teacher} of {batch.tenant_id} was never registered")
    fresh = total.records + total.failures == 0
    total.first_at = batch.first_at if fresh else min(total.first_at, batch.first_at)
    total.last_at = max(total.last_at, batch.last_at)
    total.records += batch.records
    total.failures += batch.failures
    total.microusd += batch.microusd


def _tags_text(tags: Counter[tuple[str, str]]) -> str:
    """Tags with how many records have them; empty when they are too many to list."""
    if len(tags) > _MOST_TAGS:
        return ""
    found: dict[str, dict[str, int]] = {}
    for (name, value), count in sorted(tags.items()):
        found.setdefault(name, {})[value] = count
    return canonical_json(found).decode()
