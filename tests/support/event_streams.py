"""Histories that grow while somebody follows them, and readers of the stream."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import httpx
from sqlalchemy import Engine

from services.teacher_gateway.database import now, transaction
from services.teacher_gateway.ledger import lock
from services.teacher_gateway.models import History, Pipeline
from services.teacher_gateway.outbox import record
from stillhouse.contracts.envelope import seal
from stillhouse.contracts.events import StageFailed, StageProgressed


def put_pipeline(engine: Engine, tenant: str, pipeline_id: str = "pl-streamed") -> str:
    """Make a running pipeline without a history."""
    with transaction(engine) as session:
        session.add(
            Pipeline(
                pipeline_id=pipeline_id,
                tenant_id=tenant,
                name="streamed",
                body_sha256="0" * 64,
                spec="{}",
                traceparent="",
                state="running",
                created_at=now(session),
            )
        )
    return pipeline_id


def tell(engine: Engine, pipeline_id: str, count: int = 1) -> None:
    """Record events as those of other services are."""
    with transaction(engine) as session:
        pipeline = lock(session, pipeline_id)
        assert pipeline is not None
        for _ in range(count):
            figures = {"n": float(pipeline.next_event)}
            event = StageProgressed(stage="train", figures=figures)
            record(
                session,
                pipeline,
                seal(event, tenant_id=pipeline.tenant_id, pipeline_id=pipeline_id),
            )


def tell_much(engine: Engine, pipeline_id: str, megabytes: int) -> int:
    """Record as many large events as make so many megabytes; return how many there are."""
    with transaction(engine) as session:
        pipeline = lock(session, pipeline_id)
        assert pipeline is not None
        for number in range(megabytes * 1024):
            event = StageFailed(
                stage="train", reason="example", detail=f"{number:0>1000}", fatal=False
            )
            envelope = seal(event, tenant_id=pipeline.tenant_id, pipeline_id=pipeline_id)
            session.add(
                History(
                    pipeline_id=pipeline_id,
                    sequence=pipeline.next_event + number,
                    tenant_id=pipeline.tenant_id,
                    event_id=envelope.event_id,
                    type=envelope.type,
                    envelope=envelope.encode().decode(),
                    recorded_at=0.0,
                )
            )
        pipeline.next_event += megabytes * 1024
    return megabytes * 1024


def end(engine: Engine, pipeline_id: str) -> None:
    """Record a last event in the transaction that ends the pipeline."""
    tell(engine, pipeline_id)
    with transaction(engine) as session:
        pipeline = lock(session, pipeline_id)
        assert pipeline is not None
        pipeline.state = "released"


def messages(answer: httpx.Response) -> Iterator[dict[str, Any]]:
    """Read a stream as the standard says: fields by name; comments as `{"": text}`."""
    found: dict[str, Any] = {}
    for line in answer.iter_lines():
        if not line:
            if found:
                yield found
            found = {}
        else:
            name, _, value = line.partition(":")
            found[name] = value.removeprefix(" ")
            if name == "data":
                found["data"] = json.loads(value)
