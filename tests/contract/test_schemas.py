"""The committed schemas and the catalogue of events are what the classes say."""

from __future__ import annotations

from typing import Any

import jsonschema
import pytest

from stillhouse.contracts import schema
from stillhouse.contracts.spec import Spec
from tests.support.shards import make_resolved_spec

MADE = schema.schemas()


def test_the_committed_files_are_those_that_the_classes_make() -> None:
    committed = {
        str(path.relative_to(schema.FOLDER)): path.read_text()
        for path in schema.FOLDER.rglob("*.json")
    }
    assert committed == {name: schema.schema_text(made) for name, made in MADE.items()}, (
        "run `python -m stillhouse.contracts.schema` and commit what it writes"
    )


def test_the_catalogue_of_events_is_made_from_the_classes() -> None:
    assert schema.EVENTS_DOC.read_text() == schema.events_doc(), (
        "run `python -m stillhouse.contracts.schema` and commit what it writes"
    )


@pytest.mark.parametrize("name", MADE)
def test_a_schema_is_valid_json_schema(name: str) -> None:
    jsonschema.Draft202012Validator.check_schema(MADE[name])


def test_specs_in_code_fit_the_schema() -> None:
    resolved = make_resolved_spec()
    jsonschema.validate(resolved.model_dump(mode="json", by_alias=True), MADE["resolved_spec.json"])
    posted = resolved.spec.model_dump(mode="json", by_alias=True, exclude_none=True)
    jsonschema.validate(posted, MADE["spec.json"])


def test_the_schema_of_a_spec_refuses_unknown_fields_everywhere() -> None:
    def objects(part: Any) -> list[dict[str, Any]]:
        if isinstance(part, list):
            return [found for entry in part for found in objects(entry)]
        if not isinstance(part, dict):
            return []
        here = [part] if "properties" in part and part.get("type") == "object" else []
        return here + [found for value in part.values() for found in objects(value)]

    for found in objects(MADE["spec.json"]):
        assert found.get("additionalProperties") is False, found.get("title")
    assert Spec.model_config["extra"] == "forbid"
