"""Every metric of every process, found in the code: what `docs/metrics.md` must list.

python -m tests.support.listed_metrics      # the rows of the table, as the code has them
"""

from __future__ import annotations

import importlib
import tempfile
from dataclasses import dataclass
from pathlib import Path

from prometheus_client import Counter
from prometheus_client.metrics import MetricWrapperBase

MODULES = (
    "stillhouse.chassis.metrics",
    "services.teacher_gateway.metrics",
    "services.teacher_gateway.counters",
    "services.dataset_builder.metrics",
    "services.trainer.metrics",
    "services.evaluator.metrics",
)


@dataclass(frozen=True, order=True)
class Listed:
    """One metric, as a scrape names it."""

    name: str
    kind: str
    labels: tuple[str, ...]
    text: str


def listed_metrics() -> list[Listed]:
    found = {entry for module in MODULES for entry in _of_module(module)}
    return sorted(found | set(_of_gateway_state()) | set(_of_stored_figures()))


def _of_module(name: str) -> list[Listed]:
    found = []
    for value in vars(importlib.import_module(name)).values():
        if isinstance(value, MetricWrapperBase):
            suffix = "_total" if isinstance(value, Counter) else ""
            labels = tuple(value._labelnames)
            found.append(
                Listed(f"{value._name}{suffix}", value._type, labels, value._documentation)
            )
    return found


def _of_gateway_state() -> list[Listed]:
    from services.teacher_gateway.database import open_engine
    from services.teacher_gateway.metrics import StateCollector
    from services.teacher_gateway.migrate import migrate
    from tests.support.gateway_api import make_settings

    with tempfile.TemporaryDirectory() as folder:
        settings = make_settings(Path(folder))
        engine = open_engine(settings.database_url)
        try:
            migrate(engine)
            families = list(StateCollector(engine, settings).collect())
        finally:
            engine.dispose()
    return [_family(family) for family in families]


def _of_stored_figures() -> list[Listed]:
    from services.evaluator.metrics import _families

    return [_family(family) for family in _families([])]


def _family(family: object) -> Listed:
    labels = tuple(getattr(family, "_labelnames", ()))
    return Listed(family.name, family.type, labels, family.documentation)  # type: ignore[attr-defined]


if __name__ == "__main__":
    for entry in listed_metrics():
        shown = ", ".join(f"`{label}`" for label in entry.labels)
        print(f"| `{entry.name}` | {entry.kind} | {shown} | {entry.text} |")
