"""Re-drive: a step whose input is there and that does not move gets its input again.

All from the stored history and `flow.STEPS`: messages are only wake-ups, so a lost one costs the
deadline of this and nothing else. The input goes verbatim to the one service, for the lowest
missing items, with a growing pause. A try counts only when the service took the event and yet
nothing moved; steps that wait for a GPU are never counted.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from dataclasses import dataclass, field

from sqlalchemy import Engine, func, select
from sqlalchemy.orm import Session

from services.teacher_gateway.counters import REDRIVES
from services.teacher_gateway.database import now, reading, transaction
from services.teacher_gateway.ledger import lock
from services.teacher_gateway.models import History, Pipeline, Redrive
from services.teacher_gateway.stop import ENDED_STAGES, fail_pipeline
from services.teacher_gateway.timeouts import GatewayTimeouts, backoff
from stillhouse.chassis.logs import logger
from stillhouse.contracts.envelope import Envelope
from stillhouse.contracts.events import StageProgressed
from stillhouse.contracts.flow import STEPS, Service, Step

log = logger(__name__)

ITEMS_AT_ONCE = 8
# Pauses grow to 2 ** this times the deadline.
MOST_DOUBLINGS = 6
MOVED = "moved_at"  # beside the stages' figures: when each reported progress last
WHOLE = -1  # the pair of a step that a pipeline has once


@dataclass(frozen=True)
class Missing:
    """An output that is due: the event to send again, and since when it could have come."""

    step: Step
    pair: int
    sequence: int
    since: float

    @property
    def name(self) -> str:
        return f"{self.step.input.TYPE}->{self.step.output.TYPE}"


@dataclass
class Seen:
    """A pipeline's history in short: when each (type, pair) was last recorded, and where."""

    last: dict[str, dict[int, tuple[float, int]]] = field(default_factory=dict)
    moved: dict[str, float] = field(default_factory=dict)

    def first_time(self, event_type: str) -> float | None:
        found = self.last.get(event_type)
        return min(at for at, _ in found.values()) if found else None


def look(session: Session, pipeline: Pipeline) -> Seen:
    """Read what re-drive needs of a history; progress has its times beside the figures."""
    seen = Seen()
    rows = session.execute(
        select(
            History.type, History.pair, func.max(History.recorded_at), func.max(History.sequence)
        )
        .where(History.pipeline_id == pipeline.pipeline_id, History.type != StageProgressed.TYPE)
        .group_by(History.type, History.pair)
    )
    for event_type, pair, at, sequence in rows:
        place = seen.last.setdefault(event_type, {})
        place[WHOLE if pair is None else pair] = (at, sequence)
    seen.moved.update(json.loads(pipeline.figures).get(MOVED, {}))
    for step in STEPS:
        for at, _ in seen.last.get(step.output.TYPE, {}).values():
            seen.moved[step.stage] = max(seen.moved.get(step.stage, 0.0), at)
    return seen


def find_missing(seen: Seen, heldout_batches: int) -> list[Missing]:
    """All outputs whose inputs are there, the lowest items of each step first."""
    found: list[Missing] = []
    for step in STEPS:
        inputs = seen.last.get(step.input.TYPE, {})
        outputs = seen.last.get(step.output.TYPE, {})
        if not inputs:
            continue
        ready_at = 0.0
        if step.requires is not None:
            required = seen.first_time(step.requires.TYPE)
            if required is None:
                continue
            ready_at = required
        if step.gathers is not None:
            gathered = seen.last.get(step.gathers.TYPE, {})
            needed = [gathered.get(batch) for batch in range(heldout_batches)]
            if not needed or any(entry is None for entry in needed):
                continue
            ready_at = max(ready_at, *(entry[0] for entry in needed if entry is not None))
        if step.per is None:
            if not outputs:
                at, sequence = inputs[min(inputs)]
                found.append(Missing(step, WHOLE, sequence, max(at, ready_at)))
            continue
        missing = sorted(pair for pair in inputs if pair not in outputs)
        for pair in missing[:ITEMS_AT_ONCE]:
            at, sequence = inputs[pair]
            found.append(Missing(step, pair, sequence, max(at, ready_at)))
    return found


def redrive(
    engine: Engine,
    pipeline_id: str,
    times: GatewayTimeouts,
    *,
    republish: Callable[[Envelope, Service], None],
    waiting_messages: Callable[[Service], int],
    rng: random.Random,
) -> int:
    """Send again what one pipeline waits for in vain; return how many events were sent.

    `republish` puts an event on one service's queue; `waiting_messages` counts what the service
    has not taken yet. Neither is called inside a transaction.
    """
    with reading(engine) as session:
        pipeline = session.get(Pipeline, pipeline_id)
        if pipeline is None or pipeline.state != "running" or pipeline.stopping:
            return 0
        clock = now(session)
        seen = look(session, pipeline)
        due: list[tuple[Missing, Envelope]] = []
        for missing in find_missing(seen, pipeline.heldout_batches):
            if getattr(pipeline, missing.step.stage) in ENDED_STAGES:
                continue
            idle_since = max(missing.since, seen.moved.get(missing.step.stage, 0.0))
            row = session.get(Redrive, (pipeline_id, missing.name, missing.pair))
            if clock - idle_since < times.redrive or (row is not None and row.next_at > clock):
                continue
            stored = session.get(History, (pipeline_id, missing.sequence))
            assert stored is not None, "history is never deleted"
            due.append((missing, Envelope.decode(stored.envelope)))
    sent = 0
    taken: dict[Service, bool] = {}
    for missing, envelope in due:
        service = missing.step.service
        if service not in taken:
            taken[service] = waiting_messages(service) == 0
        moved = seen.moved.get(missing.step.stage, 0.0)
        if _note(engine, pipeline_id, missing, times, taken[service], moved, rng):
            log.info("re-drive", step=missing.name, pair=missing.pair, pipeline=pipeline_id)
            republish(envelope, service)
            REDRIVES.labels(missing.step.stage).inc()
            sent += 1
    return sent


def _note(
    engine: Engine,
    pipeline_id: str,
    missing: Missing,
    times: GatewayTimeouts,
    taken: bool,
    moved: float,
    rng: random.Random,
) -> bool:
    """Count the last try and plan the next; False when nothing is to be sent."""
    step = missing.step
    with transaction(engine) as session:
        pipeline = lock(session, pipeline_id)
        if pipeline is None or pipeline.state != "running" or pipeline.stopping:
            return False
        clock = now(session)
        row = session.get(Redrive, (pipeline_id, missing.name, missing.pair))
        if row is None:
            row = Redrive(
                pipeline_id=pipeline_id,
                step=missing.name,
                pair=missing.pair,
                tries=0,
                sent=0,
                last_at=0.0,
                next_at=clock,
            )
            session.add(row)
        pause = backoff(times.redrive, min(row.sent, MOST_DOUBLINGS), rng=rng)
        # A queue that is not empty still holds the last one: sending more helps nobody.
        if not taken:
            row.next_at = clock + backoff(times.redrive, 0, rng=rng)
            return False
        if row.sent and not step.may_wait and moved <= row.last_at:
            row.tries += 1
        if row.tries >= times.redrive_tries:
            fail_pipeline(
                session,
                pipeline,
                step.stage,
                "does_not_move",
                f"{step.service} took {missing.step.input.TYPE} {row.tries} times and made no "
                f"{missing.step.output.TYPE} of it: see its logs",
            )
            return False
        row.sent += 1
        row.last_at = clock
        row.next_at = clock + pause
    return True
