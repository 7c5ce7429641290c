"""What every message carries around its event.

`event_id` is derived from the content, so the same fact published twice has the same id.
"""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Annotated, Any

from pydantic import AwareDatetime, BaseModel, ConfigDict, Field, StringConstraints

from stillhouse.contracts.artifacts import Id
from stillhouse.contracts.canonical import canonical_json, derived_id
from stillhouse.contracts.events import EVENTS, Event

MAX_BYTES = 4096

TraceParent = Annotated[
    str, StringConstraints(pattern=r"^00-[0-9a-f]{32}-[0-9a-f]{16}-[0-9a-f]{2}$")
]


class UnknownEvent(ValueError):
    """A message names a type or a version that this reader does not know."""


class Envelope(BaseModel):
    """One message on the broker. `payload` is the event's own fields."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    event_id: Id
    type: str = Field(max_length=64)
    version: int = Field(ge=1)
    occurred_at: AwareDatetime
    tenant_id: Id
    pipeline_id: Id
    caused_by: Id | None = None
    traceparent: TraceParent | None = None
    payload: dict[str, Any]

    def event(self) -> Event:
        """Return the typed event. Raises UnknownEvent, or pydantic's ValidationError."""
        known = EVENTS.get(self.type)
        if known is None or self.version != known.VERSION:
            raise UnknownEvent(
                f"expected one of {sorted(EVENTS)}, found {self.type!r} version {self.version}"
            )
        return known.model_validate(self.payload)

    def encode(self) -> bytes:
        data = canonical_json(self.model_dump(mode="json", exclude_none=True))
        if len(data) > MAX_BYTES:
            raise ValueError(
                f"{self.type} is {len(data)} bytes, expected at most {MAX_BYTES}: "
                "put data into the store and name it by reference"
            )
        return data

    @classmethod
    def decode(cls, data: bytes | str) -> Envelope:
        """Read a message. Raises ValueError for one that `encode` cannot have made."""
        if len(data) > MAX_BYTES:
            raise ValueError(f"a message of {len(data)} bytes, expected at most {MAX_BYTES}")
        return cls.model_validate_json(data)


def seal(
    event: Event,
    *,
    tenant_id: str,
    pipeline_id: str,
    caused_by: Envelope | None = None,
    traceparent: str | None = None,
    occurred_at: datetime | None = None,
) -> Envelope:
    """Put an event into its envelope. The trace goes on from the event that caused it."""
    payload = event.model_dump(mode="json")
    return Envelope(
        event_id=derived_id(
            "ev",
            event.TYPE,
            event.VERSION,
            tenant_id,
            pipeline_id,
            canonical_json(payload).decode(),
        ),
        type=event.TYPE,
        version=event.VERSION,
        occurred_at=occurred_at or datetime.now(UTC),
        tenant_id=tenant_id,
        pipeline_id=pipeline_id,
        caused_by=caused_by.event_id if caused_by else None,
        traceparent=traceparent or (caused_by.traceparent if caused_by else None),
        payload=payload,
    )
