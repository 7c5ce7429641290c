"""The flow table against the events, the steps, the services and the picture."""

from __future__ import annotations

import importlib

import pytest

from stillhouse.contracts.events import EVENTS, Event
from stillhouse.contracts.flow import (
    FLOW,
    REPUBLISHER,
    SERVICES,
    STEPS,
    TRAINER,
    Service,
    consumed_by,
    mermaid,
    published_by,
)


def test_every_event_has_one_route_and_someone_publishes_it() -> None:
    routed = [route.event.TYPE for route in FLOW]
    assert sorted(routed) == sorted(EVENTS)
    for route in FLOW:
        assert route.publishers, f"nobody publishes {route.event.TYPE}"
        assert set(route.publishers) | set(route.consumers) <= set(SERVICES)
        assert len(set(route.consumers)) == len(route.consumers)


def test_only_events_about_every_stage_come_back_to_their_publisher() -> None:
    for route in FLOW:
        if route.publishers != SERVICES:
            assert not set(route.publishers) & set(route.consumers), route.event.TYPE


def test_the_gateways_history_holds_the_input_and_output_of_every_step() -> None:
    known = published_by(REPUBLISHER) | consumed_by(REPUBLISHER)
    for step in STEPS:
        for event in (step.input, step.output, step.requires, step.gathers):
            assert event is None or event.TYPE in known, f"{step}: {event}"


def test_a_step_is_of_the_service_that_consumes_its_input_and_publishes_its_output() -> None:
    for step in STEPS:
        assert step.input.TYPE in consumed_by(step.service)
        assert step.output.TYPE in published_by(step.service)
        if step.per is not None:
            for event in (step.input, step.output):
                assert step.per in event.model_fields, f"{event.TYPE} has no {step.per}"


def test_every_output_but_progress_and_decisions_is_looked_after_by_a_step() -> None:
    outputs = {step.output.TYPE for step in STEPS}
    others = {r.event.TYPE for r in FLOW if REPUBLISHER not in r.publishers} - outputs
    assert others == set()


# To the trainer every event is the same wake-up: it looks at the store, so it has no handlers.
@pytest.mark.parametrize("service", [service for service in SERVICES if service != TRAINER])
def test_a_services_handlers_are_what_the_flow_lets_it_consume(service: Service) -> None:
    handlers = importlib.import_module(f"services.{service}.handlers").HANDLERS
    assert {event.TYPE for event in handlers} == consumed_by(service)


def test_names_follow_the_rule() -> None:
    for name, event in EVENTS.items():
        assert name == event.TYPE
        words = [word.capitalize() for part in name.split(".") for word in part.split("_")]
        assert event.__name__ == "".join(words)
        assert issubclass(event, Event)
        assert (event.__doc__ or "").split("\n")[0].strip(), f"{event} needs a docstring"


def test_the_picture_has_an_edge_for_each_pair_and_names_its_events() -> None:
    picture = mermaid()
    for route in FLOW:
        for publisher in route.publishers:
            for consumer in route.consumers:
                if route.publishers == SERVICES:
                    continue
                [line] = [
                    line
                    for line in picture.splitlines()
                    if line.strip().startswith(f"{publisher} -- ") and line.endswith(consumer)
                ]
                assert route.event.TYPE in line
