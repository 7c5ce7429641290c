"""JSON schemas of what crosses a border, and `docs/events.md`, both made from the classes.

    python -m stillhouse.contracts.schema                # write both where they are committed
    python -m stillhouse.contracts.schema --events-doc   # print docs/events.md

They are committed, so that a change of a contract shows in review and others can read them without
Python; a test compares them with the classes.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from stillhouse.contracts.artifacts import ID_PATTERN
from stillhouse.contracts.envelope import MAX_BYTES, Envelope
from stillhouse.contracts.events import EVENTS, Event
from stillhouse.contracts.flow import FLOW, SERVICES, Route
from stillhouse.contracts.spec import ResolvedSpec, Spec

FOLDER = Path(__file__).parent / "schemas"
EVENTS_DOC = Path(__file__).parents[2] / "docs" / "events.md"

_DIALECT = "https://json-schema.org/draft/2020-12/schema"


def schemas() -> dict[str, dict[str, Any]]:
    """Every schema by the name of its file."""
    models: dict[str, type[BaseModel]] = {
        "envelope.json": Envelope,
        "spec.json": Spec,
        "resolved_spec.json": ResolvedSpec,
    }
    for event in EVENTS.values():
        models[f"events/{event.TYPE}.v{event.VERSION}.json"] = event
    return {
        name: {"$schema": _DIALECT, **model.model_json_schema(by_alias=True)}
        for name, model in models.items()
    }


def schema_text(schema: dict[str, Any]) -> str:
    return json.dumps(schema, indent=2, sort_keys=True) + "\n"


def events_doc() -> str:
    """The catalogue of events, from the flow table and the classes' docstrings."""
    lines = [
        "# Events",
        "",
        "Made from `stillhouse/contracts/events.py` and `flow.py` by",
        "`python -m stillhouse.contracts.schema`; edit the docstrings there, not this page.",
        "",
        "An event is a fact in the past tense. It carries ids, references and digests, never data:",
        f"JSON of at most {MAX_BYTES:,} bytes in the envelope of `schemas/envelope.json`. Within a",
        "version only optional fields are added, and readers ignore unknown ones; a break is a new",
        "type beside the old one. The same fact has the same `event_id`, however often it is sent.",
        "",
        "| event | published by | consumed by |",
        "|---|---|---|",
    ]
    for route in FLOW:
        lines.append(
            f"| [`{route.event.TYPE}`](#{_anchor(route.event)}) | {_names(route.publishers)} "
            f"| {_names(route.consumers)} |"
        )
    for route in FLOW:
        lines += _section(route)
    return "\n".join(lines) + "\n"


def _section(route: Route) -> list[str]:
    event = route.event
    schema = event.model_json_schema(by_alias=True)
    lines = ["", f"## `{event.TYPE}`", "", " ".join((event.__doc__ or "").split()), ""]
    lines += ["| field | type | required |", "|---|---|---|"]
    for name, field in schema["properties"].items():
        described = f": {field['description']}" if "description" in field else ""
        required = "yes" if name in schema.get("required", []) else "no"
        lines.append(f"| `{name}` | {_type(field)}{described} | {required} |")
    return lines


def _type(field: dict[str, Any]) -> str:
    if "$ref" in field:
        return "reference: `key`, `size`, `sha256`"
    if "enum" in field:
        return ", ".join(f"`{value}`" for value in field["enum"])
    if field["type"] == "object":
        values = field.get("additionalProperties") or next(
            iter(field["patternProperties"].values())
        )
        return f"map of names to {_type(values)}"
    if field.get("pattern") == ID_PATTERN:
        return "id"
    if "pattern" in field:
        return f"string `{field['pattern']}`"
    least = field.get("minimum")
    return str(field["type"]) + (f" from {least}" if least is not None else "")


def _anchor(event: type[Event]) -> str:
    return event.TYPE.replace(".", "")


def _names(services: Sequence[str]) -> str:
    if tuple(services) == SERVICES:
        return "all"
    return ", ".join(services) or "nobody; kept in the history"


def main(argv: Sequence[str] | None = None) -> int:
    """Write the schemas and the catalogue, or print the catalogue."""
    parser = argparse.ArgumentParser(prog="python -m stillhouse.contracts.schema")
    parser.add_argument("--events-doc", action="store_true", help="print docs/events.md instead")
    if parser.parse_args(argv).events_doc:
        sys.stdout.write(events_doc())
        return 0
    for stale in FOLDER.rglob("*.json"):
        stale.unlink()
    for name, schema in schemas().items():
        path = FOLDER / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(schema_text(schema))
    EVENTS_DOC.write_text(events_doc())
    return 0


if __name__ == "__main__":
    sys.exit(main())
