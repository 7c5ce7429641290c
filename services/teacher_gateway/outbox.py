"""Events that leave the gateway: written in the transaction of their effect, published after.

`emit` puts an event into history and outbox at once; `relay`, run by the clock, publishes what
the outbox holds and removes it once the broker confirmed. A crash between the two publishes it
again, and a duplicate costs nothing.
"""

from __future__ import annotations

from collections.abc import Callable

from sqlalchemy import Engine, delete, select
from sqlalchemy.orm import Session

from services.teacher_gateway.database import now, reading, transaction
from services.teacher_gateway.ledger import changed, lock
from services.teacher_gateway.models import History, Outbox, Pipeline
from stillhouse.chassis.crash import crash_point
from stillhouse.contracts.envelope import Envelope, seal
from stillhouse.contracts.events import Event
from stillhouse.contracts.flow import STEPS

RELAYED_AT_ONCE = 100

# The field that pairs a step's input with its output, by type of event.
PAIR_FIELDS: dict[str, str] = {
    event.TYPE: step.per for step in STEPS if step.per for event in (step.input, step.output)
}


def emit(
    session: Session, pipeline: Pipeline, event: Event, caused_by: Envelope | None = None
) -> Envelope:
    """Put an event of the gateway into history and outbox; once, however often it is called."""
    envelope = seal(
        event,
        tenant_id=pipeline.tenant_id,
        pipeline_id=pipeline.pipeline_id,
        caused_by=caused_by,
        traceparent=None if caused_by and caused_by.traceparent else pipeline.traceparent or None,
    )
    encoded = envelope.encode().decode()
    if record(session, pipeline, envelope):
        session.add(
            Outbox(
                tenant_id=pipeline.tenant_id,
                pipeline_id=pipeline.pipeline_id,
                envelope=encoded,
                created_at=now(session),
            )
        )
        session.flush()
    return envelope


def record(session: Session, pipeline: Pipeline, envelope: Envelope) -> bool:
    """Append an event to its pipeline's history; False when it is there already."""
    session.flush()
    lock(session, pipeline.pipeline_id)
    known = select(History.sequence).where(
        History.pipeline_id == pipeline.pipeline_id, History.event_id == envelope.event_id
    )
    if session.execute(known).first() is not None:
        return False
    sequence = pipeline.next_event
    pipeline.next_event = sequence + 1
    field = PAIR_FIELDS.get(envelope.type)
    session.add(
        History(
            pipeline_id=pipeline.pipeline_id,
            sequence=sequence,
            tenant_id=pipeline.tenant_id,
            event_id=envelope.event_id,
            type=envelope.type,
            pair=int(envelope.payload[field]) if field else None,
            envelope=envelope.encode().decode(),
            recorded_at=now(session),
        )
    )
    session.flush()
    return True


def relay(engine: Engine, publish: Callable[..., None], limit: int = RELAYED_AT_ONCE) -> int:
    """Publish the oldest events of the outbox and remove them; return how many there were."""
    with reading(engine) as session:
        rows = session.execute(
            select(Outbox.number, Outbox.envelope).order_by(Outbox.number).limit(limit)
        ).all()
    if not rows:
        return 0
    publish(*(Envelope.decode(row.envelope) for row in rows))
    crash_point("outbox_published")
    with transaction(engine) as session:
        changed(session, delete(Outbox).where(Outbox.number.in_([row.number for row in rows])))
    return len(rows)
