"""What the documents say is what the code does: an undocumented name fails, a stale one too."""

from __future__ import annotations

import importlib
import re
import types
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel
from pydantic_core import PydanticUndefined

from stillhouse.chassis.settings import ReferenceSettings, ServiceSettings
from stillhouse.contracts.flow import SERVICES, mermaid
from stillhouse.contracts.spec import SecretRef, Spec
from tests.support.listed_metrics import listed_metrics

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"


def table_rows(path: Path) -> list[list[str]]:
    """The cells of every table row whose first cell is one name in backticks."""
    found = []
    for line in path.read_text().splitlines():
        cells = [cell.strip() for cell in line.strip().strip("|").split(" | ")]
        if line.startswith("| `") and re.fullmatch(r"`[^`]+`", cells[0].strip("| ")):
            found.append([cell.strip("| ") for cell in cells])
    return found


def first_cells(path: Path) -> list[str]:
    return [row[0].strip("`") for row in table_rows(path)]


# Metrics


def test_metrics_md_lists_exactly_the_metrics_of_the_code() -> None:
    documented = {row[0].strip("`"): row for row in table_rows(DOCS / "metrics.md")}
    known = {entry.name: entry for entry in listed_metrics()}
    assert set(documented) == set(known)
    for name, entry in known.items():
        _, kind, labels, *_ = documented[name]
        assert kind == entry.kind, name
        assert re.findall(r"`(\w+)`", labels) == list(entry.labels), name


def test_no_metric_is_listed_twice() -> None:
    names = first_cells(DOCS / "metrics.md")
    assert len(names) == len(set(names))


def test_metrics_are_named_by_the_rule_and_labelled_from_closed_lists() -> None:
    services = "|".join(SERVICES)
    allowed = {
        *("service", "type", "outcome", "job", "state", "stage", "queue", "reason", "pipeline"),
        *("route", "method", "status", "split", "kind", "how", "finish_reason", "signal"),
        *("model", "duty", "teacher"),
    }
    for entry in listed_metrics():
        shared = entry.name.startswith(("stillhouse_event", "stillhouse_job"))
        assert shared or re.match(rf"^stillhouse_({services})_[a-z0-9_]+$", entry.name)
        assert (entry.kind == "counter") == entry.name.endswith("_total"), entry.name
        assert set(entry.labels) <= allowed, entry
        capped = {"pipeline", "teacher"} & set(entry.labels)
        assert not capped or entry.kind == "gauge", entry
        assert entry.text.strip(), entry


def test_metrics_named_in_other_documents_exist() -> None:
    known = {entry.name for entry in listed_metrics()}
    for path in [ROOT / "README.md", *DOCS.rglob("*.md")]:
        named = set(re.findall(rf"stillhouse_(?:{'|'.join(SERVICES)})_\w+", path.read_text()))
        assert named <= known, f"{path.name} names {sorted(named - known)}"


# The spec


def spec_fields(model: type[BaseModel], prefix: str = "") -> Iterator[str]:
    """The paths of all fields that a user may write, lists looked through."""
    for name, field in model.model_fields.items():
        path = f"{prefix}{field.alias or name}"
        inner = _model_in(field.annotation)
        if inner is None or inner is SecretRef:
            yield path
        else:
            yield from spec_fields(inner, f"{path}.")


def _model_in(annotation: Any) -> type[BaseModel] | None:
    if isinstance(annotation, type) and not isinstance(annotation, types.GenericAlias):
        return annotation if issubclass(annotation, BaseModel) else None
    found = [_model_in(argument) for argument in typing.get_args(annotation)]
    return next((model for model in found if model is not None), None)


def test_spec_md_lists_exactly_the_fields_of_a_spec() -> None:
    documented = first_cells(DOCS / "spec.md")
    assert len(documented) == len(set(documented))
    assert set(documented) == set(spec_fields(Spec))


def test_spec_md_says_which_fields_are_required() -> None:
    required = {row[0].strip("`") for row in table_rows(DOCS / "spec.md") if row[1] == "required"}
    for path in spec_fields(Spec):
        model: type[BaseModel] = Spec
        *parents, last = path.split(".")
        for parent in parents:
            found = _model_in(_field(model, parent).annotation)
            assert found is not None
            model = found
        assert (path in required) == _field(model, last).is_required() or path in EITHER, path


# Required as one of several: the class checks them together.
EITHER = {"teachers.url", "student.from", "prompts.from"}


def _field(model: type[BaseModel], name: str) -> Any:
    return next(f for key, f in model.model_fields.items() if (f.alias or key) == name)


# Settings


def settings_classes() -> dict[str, type[ServiceSettings]]:
    found: dict[str, type[ServiceSettings]] = {}
    for service in SERVICES:
        module = importlib.import_module(f"services.{service}.settings")
        for value in vars(module).values():
            if (
                isinstance(value, type)
                and issubclass(value, ServiceSettings)
                and value.__module__ == module.__name__
            ):
                found[service] = value
    return found


def test_every_service_has_its_settings() -> None:
    assert set(settings_classes()) == set(SERVICES)
    for service, cls in settings_classes().items():
        assert cls.PREFIX.lower() == f"{service}_"
        assert cls.model_config.get("frozen")
        for name, field in cls.model_fields.items():
            assert field.description, f"{cls.__name__}.{name} needs a description"


def test_operations_md_lists_exactly_the_settings_with_their_defaults() -> None:
    documented = {row[0].strip("`"): row for row in table_rows(DOCS / "operations.md")}
    expected = {f"<SERVICE>_{name.upper()}": f for name, f in ServiceSettings.model_fields.items()}
    shared = set(ServiceSettings.model_fields)
    expected |= {
        f"<READER>_{name.upper()}": field
        for name, field in ReferenceSettings.model_fields.items()
        if name not in shared
    }
    for cls in settings_classes().values():
        common = ReferenceSettings if issubclass(cls, ReferenceSettings) else ServiceSettings
        expected |= {
            f"{cls.PREFIX}{name}".upper(): field
            for name, field in cls.model_fields.items()
            if name not in common.model_fields
        }
    setting = r"^(<SERVICE>|<READER>|[A-Z_]+)_[A-Z0-9_]+$"
    settings = {name for name in documented if re.match(setting, name)} - {
        name for name in documented if name.startswith("STILLHOUSE_")
    }
    assert settings == set(expected)
    for name, field in expected.items():
        if name == "<SERVICE>_WORK_DIR":
            continue  # the default is the machine's
        default = field.get_default(call_default_factory=True)
        shown = documented[name][1].strip("`")
        if default is PydanticUndefined:
            assert shown == "required", name
        elif default is None:
            assert shown == "none", name
        elif default in ("", ()):
            assert shown == "empty", name
        else:
            assert shown == str(default).removesuffix(".0"), name


# README and Makefile


def make_targets() -> set[str]:
    return set(re.findall(r"^([a-z-]+):.*?## ", (ROOT / "Makefile").read_text(), re.MULTILINE))


def test_make_targets_in_the_documents_exist() -> None:
    for path in [ROOT / "README.md", ROOT / "tests" / "README.md", *DOCS.rglob("*.md")]:
        named = set(re.findall(r"`make ([a-z-]+)", path.read_text()))
        named |= set(re.findall(r"^make ([a-z-]+)", path.read_text(), re.MULTILINE))
        assert named <= make_targets(), f"{path.name} names {sorted(named - make_targets())}"


def test_the_readme_shows_the_flow_as_the_table_has_it() -> None:
    assert f"```mermaid\n{mermaid()}\n```" in (ROOT / "README.md").read_text(), (
        "put the output of stillhouse.contracts.flow.mermaid() into README.md"
    )


@pytest.mark.parametrize(
    "path",
    [ROOT / "README.md", ROOT / "tests" / "README.md", *sorted(DOCS.rglob("*.md"))],
    ids=lambda path: str(path.relative_to(ROOT)),
)
def test_links_and_paths_in_the_documents_lead_somewhere(path: Path) -> None:
    text = path.read_text()
    for target in re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", text):
        if "://" not in target:
            assert (path.parent / target).exists(), f"{path.name} links to {target}"
    for named in re.findall(
        r"`((?:stillhouse|services|tests|docs|benchmarks|demo)/[\w./-]+)`", text
    ):
        assert (ROOT / named).exists(), f"{path.name} names {named}"


def test_documents_are_ascii() -> None:
    for path in [ROOT / "README.md", *DOCS.rglob("*.md"), ROOT / "tests" / "README.md"]:
        assert path.read_text().isascii(), path.name


@pytest.mark.parametrize(
    "path", [ROOT / "README.md", *sorted(DOCS.rglob("*.md"))], ids=lambda path: path.name
)
def test_no_place_was_left_to_be_filled_in(path: Path) -> None:
    left = re.findall(r"\b[A-Z]+_WHEN\b|\bTESTTIME\b|\bTODO\b|^[A-Z]{4,}$", path.read_text(), re.M)
    assert not left
