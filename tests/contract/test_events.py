"""Events and envelopes: small, stable, readable by the next version and the one before."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from pathlib import Path

import jsonschema
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from stillhouse.contracts import events as e
from stillhouse.contracts.artifacts import ObjectRef
from stillhouse.contracts.envelope import MAX_BYTES, Envelope, UnknownEvent, seal
from stillhouse.contracts.events import EVENTS, Event
from stillhouse.contracts.schema import schemas
from tests.support.examples import PIPELINE, TENANT, largest_event, plain_events

SAMPLES = Path(__file__).parent / "samples"
TRACE = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"


def sealed(event: Event, **more: object) -> Envelope:
    return seal(event, tenant_id=TENANT, pipeline_id=PIPELINE, **more)  # type: ignore[arg-type]


@pytest.mark.parametrize("event", EVENTS.values(), ids=EVENTS)
def test_an_event_at_its_largest_fits_a_message(event: type[Event]) -> None:
    cause = seal(largest_event(event), tenant_id="t" * 63, pipeline_id="p" * 63, traceparent=TRACE)
    envelope = seal(largest_event(event), tenant_id="t" * 63, pipeline_id="p" * 63, caused_by=cause)
    assert len(envelope.encode()) <= MAX_BYTES


@given(detail=st.text(max_size=3000))
def test_the_report_of_an_error_fits_whatever_its_text(detail: str) -> None:
    event = e.StageFailed(stage="build", reason="error", detail=detail, fatal=False)
    assert detail.startswith(event.detail) or "?" in event.detail
    Envelope.decode(sealed(event).encode()).event()


def test_lone_surrogates_in_an_error_do_not_stop_its_report() -> None:
    event = e.StageFailed(stage="build", reason="error", detail="\ud800 broken", fatal=False)
    assert Envelope.decode(sealed(event).encode()).event() == event
    assert event.detail == "? broken"


@pytest.mark.parametrize("event", plain_events(), ids=lambda event: event.TYPE)
def test_an_event_comes_back_from_its_message(event: Event) -> None:
    envelope = sealed(event, traceparent=TRACE)
    again = Envelope.decode(envelope.encode())
    assert again == envelope
    assert again.event() == event


def test_the_id_of_an_event_is_its_content() -> None:
    event = plain_events()[1]
    first = sealed(event, occurred_at=datetime(2026, 1, 1, tzinfo=UTC))
    later = sealed(event, occurred_at=datetime(2027, 1, 1, tzinfo=UTC), traceparent=TRACE)
    assert first.event_id == later.event_id
    others = {
        seal(event, tenant_id="other", pipeline_id=PIPELINE).event_id,
        seal(event, tenant_id=TENANT, pipeline_id="other").event_id,
        sealed(event.model_copy(update={"batch": 43})).event_id,
    }
    assert len(others | {first.event_id}) == 4
    # Stable over releases: a stored history and a fresh event must agree.
    assert first.event_id == "ev-6a46b309416fd715dbc987d0"


def test_ids_of_all_plain_events_differ() -> None:
    ids = {sealed(event).event_id for event in plain_events()}
    assert len(ids) == len(EVENTS)


@pytest.mark.parametrize("event", plain_events(), ids=lambda event: event.TYPE)
def test_committed_messages_of_every_past_version_still_decode(event: Event) -> None:
    found = sorted(SAMPLES.glob(f"{event.TYPE}.v*.json"))
    assert found, f"no committed message of {event.TYPE}: write one with its version in the name"
    for path in found:
        envelope = Envelope.decode(path.read_bytes())
        version = int(path.stem.rsplit(".v", 1)[1])
        assert (envelope.type, envelope.version) == (event.TYPE, version)
        if version == event.VERSION:
            assert type(envelope.event()) is type(event)
            assert sealed(envelope.event()).event_id == envelope.event_id


@pytest.mark.parametrize("path", sorted(SAMPLES.glob("*.json")), ids=lambda path: path.stem)
def test_committed_messages_fit_the_committed_schemas(path: Path) -> None:
    message = json.loads(path.read_bytes())
    jsonschema.validate(message, schemas()["envelope.json"])
    jsonschema.validate(message["payload"], schemas()[f"events/{path.stem}.json"])


@pytest.mark.parametrize("event", plain_events(), ids=lambda event: event.TYPE)
def test_a_reader_ignores_what_a_later_release_adds(event: Event) -> None:
    message = json.loads(sealed(event).encode())
    message["added"] = 1
    message["payload"]["added"] = {"anything": [1, 2]}
    assert Envelope.decode(json.dumps(message)).event() == event


def test_unknown_types_and_versions_are_refused_by_name() -> None:
    message = json.loads(sealed(plain_events()[0]).encode())
    for change in ({"type": "pipeline.dreamt"}, {"version": 2}):
        envelope = Envelope.decode(json.dumps(message | change))
        with pytest.raises(UnknownEvent, match=rf"{envelope.type}' version {envelope.version}"):
            envelope.event()


@pytest.mark.parametrize(
    "change",
    [
        {"tenant_id": "../other"},
        {"pipeline_id": "a/b"},
        {"event_id": ""},
        {"occurred_at": "2026-01-01T00:00:00"},
        {"traceparent": "00-zz"},
        {"version": 0},
        {"payload": []},
    ],
)
def test_a_malformed_envelope_is_refused(change: dict[str, object]) -> None:
    message = json.loads(sealed(plain_events()[0]).encode())
    with pytest.raises(ValidationError):
        Envelope.decode(json.dumps(message | change))


def test_an_envelope_over_the_limit_is_not_encoded() -> None:
    envelope = sealed(plain_events()[0])
    large = envelope.model_copy(update={"payload": {"text": "x" * MAX_BYTES}})
    with pytest.raises(ValueError, match="expected at most 4096"):
        large.encode()


def test_a_message_over_the_limit_is_not_read() -> None:
    with pytest.raises(ValueError, match="expected at most 4096"):
        Envelope.decode(b" " * MAX_BYTES + sealed(plain_events()[0]).encode())


@given(key=st.text(max_size=40))
def test_a_reference_names_a_plain_key_or_is_refused(key: str) -> None:
    try:
        ref = ObjectRef(key=key, size=1, sha256="0" * 64)
    except ValidationError:
        return
    assert ref.key.isascii()
    assert not ref.key.startswith("/")
    assert not set(ref.key) & set(" \\\n\r\t\0?#%")
