"""What the gateway does with events: it records all of them, in a job of its own each."""

from __future__ import annotations

from stillhouse.chassis.jobs import Handler, Job
from stillhouse.contracts.envelope import Envelope
from stillhouse.contracts.events import EVENTS, Event
from stillhouse.contracts.flow import GATEWAY, consumed_by


def on_event(envelope: Envelope, _: Event) -> list[Job]:
    """Record it: history, states, items; see `record`."""
    return [Job.of("record_event", envelope)]


HANDLERS: dict[type[Event], Handler] = {EVENTS[name]: on_event for name in consumed_by(GATEWAY)}
