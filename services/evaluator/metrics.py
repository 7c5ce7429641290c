"""Metrics of the evaluator. Figures are rendered from stored reports, so they survive a restart.

Counting metrics are written by the pool's child; the figures are a collector of the main process,
which reads the store and never imports torch.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

from prometheus_client import Counter, Gauge, Histogram
from prometheus_client.core import GaugeMetricFamily

from stillhouse.chassis.errors import StillhouseError
from stillhouse.chassis.logs import logger
from stillhouse.chassis.storage import ObjectStore
from stillhouse.contracts import artifacts
from stillhouse.contracts.trainings import CheckpointManifest, Figures, Report

log = logger(__name__)

EVALUATIONS = Counter(
    "stillhouse_evaluator_evaluations_total",
    "Finished evaluations: reports of checkpoints, students",
    ["outcome"],
)
ROWS = Counter("stillhouse_evaluator_rows_total", "Held-out rows and prompts measured")
PART_SECONDS = Histogram(
    "stillhouse_evaluator_part_seconds",
    "Duration of one part of a report",
    buckets=(0.5, 1, 2, 5, 10, 20, 60, 180, 600),
)
LAST_SUCCESS = Gauge(
    "stillhouse_evaluator_last_success_timestamp_seconds",
    "When the last report or student was written",
    multiprocess_mode="mostrecent",
)

NAMES = ("kl_top20", "kl_full", "ppl", "top1", "stop_rate")
_HELP = {
    "kl_top20": "KL to the teacher in nats over the stored outcomes and their tail",
    "kl_full": "KL to the teacher in nats over the full vocabulary",
    "ppl": "Perplexity on the teacher's answers",
    "top1": "Share of positions whose likeliest token is the teacher's",
    "stop_rate": "Share of answers that end by themselves",
}
_UNITS = {"kl_top20": "nats", "kl_full": "nats", "ppl": "ratio", "top1": "ratio"}


def metric_name(figure: str) -> str:
    return f"stillhouse_evaluator_{figure}_{_UNITS.get(figure, 'ratio')}"


@dataclass
class _Training:
    """What is known of one training: its pipeline, and its newest reports."""

    tenant: str
    training: str
    pipeline: str = ""
    saved_at: str = ""
    step: int = -1
    reports: dict[str, Figures] = field(default_factory=dict)
    seen: set[str] = field(default_factory=set)
    final: bool = False


class StoredFigures:
    """A collector: the newest figures of each active pipeline, as gauges.

    It lists reports (metrics may list), reads each one once, and looks again at most every
    `refresh_seconds`; while the store is away the last known figures stay.
    """

    def __init__(
        self, open_store: Callable[[], ObjectStore], *, most: int, refresh_seconds: float
    ) -> None:
        self._open = open_store
        self._store: ObjectStore | None = None
        self._most = most
        self._refresh = refresh_seconds
        self._looked = -float("inf")
        self._known: dict[str, _Training] = {}
        self._lock = threading.Lock()

    def describe(self) -> list[Any]:
        """Nothing: registering must not read the store."""
        return []

    def collect(self) -> Iterable[GaugeMetricFamily]:
        with self._lock:
            if time.monotonic() - self._looked >= self._refresh:
                self._looked = time.monotonic()
                try:
                    self._look()
                except StillhouseError as error:
                    log.warning("figures not refreshed; the last ones stay", why=str(error))
            newest = sorted(self._known.values(), key=lambda t: t.saved_at)
            shown = [t for t in newest if t.reports][-self._most :] if self._most else []
            return _families(shown)

    def _look(self) -> None:
        if self._store is None:
            self._store = self._open()
        for prefix in self._trainings(self._store):
            known = self._known.get(prefix)
            if known is None:
                _, tenant, _, training = prefix.rstrip("/").split("/")
                known = self._known[prefix] = _Training(tenant, training)
            if not known.final:
                self._read(self._store, known)

    def _trainings(self, store: ObjectStore) -> Iterable[str]:
        for tenant in store.folders("tenants/"):
            yield from store.folders(f"{tenant}trainings/")

    def _read(self, store: ObjectStore, known: _Training) -> None:
        prefix = artifacts.training_prefix(known.tenant, known.training)
        keys = [k for k in store.keys(f"{prefix}/reports/") if k.endswith("/report.json")]
        # Steps are padded with zeros: the last key is the newest step.
        for key in sorted(set(keys) - known.seen)[-1:]:
            stored = store.find_model(key, Report)
            if stored is None:
                continue
            report = stored[0]
            manifest = store.get_model(report.checkpoint, CheckpointManifest)
            known.pipeline, known.saved_at = manifest.pipeline_id, manifest.saved_at
            known.step = report.step
            known.reports = {"student": report.model, "teacher": report.teacher}
        known.seen.update(keys)
        if not known.pipeline:
            return
        student = artifacts.student_id(known.training)
        if store.exists(artifacts.student_manifest_key(known.tenant, student)):
            known.final = True  # nothing more will come of it
        elif store.exists(artifacts.stopped_key(known.tenant, known.pipeline)):
            known.final, known.reports = True, {}


def _families(trainings: list[_Training]) -> list[GaugeMetricFamily]:
    labels = ["pipeline", "model"]
    families = []
    for name in NAMES:
        family = GaugeMetricFamily(
            metric_name(name), f"{_HELP[name]}, newest validation report", labels=labels
        )
        for training in trainings:
            for model, figures in training.reports.items():
                value = getattr(figures, name)
                if value is not None:
                    family.add_metric([training.pipeline, model], value)
        families.append(family)
    steps = GaugeMetricFamily(
        "stillhouse_evaluator_step_count",
        "Step of the newest validation report",
        labels=["pipeline"],
    )
    for training in trainings:
        steps.add_metric([training.pipeline], training.step)
    return [*families, steps]
