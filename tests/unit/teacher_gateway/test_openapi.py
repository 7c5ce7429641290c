"""The OpenAPI document is true: every route, every parameter, every error as problem+json."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fastapi.routing import APIRoute

from services.teacher_gateway.app import ROUTERS, create_app
from tests.support.gateway_api import make_settings

OPEN = {"/healthz", "/readyz", "/metrics"}


@pytest.fixture(scope="module")
def document(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    settings = make_settings(
        tmp_path_factory.mktemp("api"), STORE_ENDPOINT_URL="http://127.0.0.1:1"
    )
    return create_app(settings).openapi()


def operations(document: dict[str, Any]) -> Iterator[tuple[str, str, dict[str, Any]]]:
    for path, methods in document["paths"].items():
        for method, operation in methods.items():
            yield path, method, operation


def test_every_route_is_in_the_document(document: dict[str, Any]) -> None:
    routed = {
        (route.path, method.lower())
        for router in ROUTERS
        for route in router.routes
        if isinstance(route, APIRoute)
        for method in route.methods
    }
    assert {(path, method) for path, method, _ in operations(document)} == routed
    assert len(routed) == 23


def test_every_error_is_declared_as_a_problem(document: dict[str, Any]) -> None:
    for path, method, operation in operations(document):
        for status, answer in operation["responses"].items():
            if status[0] in "45":
                schema = answer["content"]["application/problem+json"]["schema"]
                assert schema == {"$ref": "#/components/schemas/Problem"}, (path, method, status)
                assert list(answer["content"]) == ["application/problem+json"]


def test_every_route_but_the_probes_needs_a_key(document: dict[str, Any]) -> None:
    for path, method, operation in operations(document):
        assert ("security" in operation) == (path not in OPEN), (path, method)
        assert ("401" in operation["responses"]) == (path not in OPEN), (path, method)


def test_every_reference_of_the_document_leads_somewhere(document: dict[str, Any]) -> None:
    def references(value: Any) -> Iterator[str]:
        if isinstance(value, dict):
            if isinstance(value.get("$ref"), str):
                yield value["$ref"]
            for inner in value.values():
                yield from references(inner)
        elif isinstance(value, list):
            for inner in value:
                yield from references(inner)

    found = set(references(document))
    assert "#/components/schemas/Spec" in found
    for reference in found:
        assert reference.removeprefix("#/components/schemas/") in document["components"]["schemas"]


def test_a_spec_is_taken_as_json_and_as_yaml(document: dict[str, Any]) -> None:
    content = document["paths"]["/v1/pipelines"]["post"]["requestBody"]["content"]
    assert {"application/json", "application/yaml", "application/x-yaml"} <= set(content)


def test_the_stream_of_events_is_described_message_by_message(document: dict[str, Any]) -> None:
    operation = document["paths"]["/v1/pipelines/{pipeline_id}/events/stream"]["get"]
    item = operation["responses"]["200"]["content"]["text/event-stream"]["itemSchema"]
    event = item["properties"]["data"]["contentSchema"]
    assert event == {"$ref": "#/components/schemas/EventView"}
    assert {"204", "404", "429"} <= set(operation["responses"])
    names = {parameter["name"] for parameter in operation["parameters"]}
    assert names == {"pipeline_id", "after", "Last-Event-ID"}


def test_making_an_app_opens_nothing(tmp_path: Path) -> None:
    settings = make_settings(tmp_path, STORE_ENDPOINT_URL="http://127.0.0.1:1")
    create_app(settings)
    assert not (tmp_path / "gateway.sqlite3").exists()
