"""/metrics and /healthz as served, and files of processes that were killed."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from prometheus_client.core import GaugeMetricFamily

from stillhouse.chassis import metrics
from stillhouse.chassis.health import Heartbeat
from tests.support.recording_service import Settings


def serve(**options: Any) -> str:
    settings = Settings(broker_url="redis://nowhere")
    return f"http://127.0.0.1:{metrics.serve(settings, **options)}"


def get(url: str) -> httpx.Response:
    return httpx.get(url, trust_env=False)


class Fixed:
    def collect(self) -> Iterator[GaugeMetricFamily]:
        yield GaugeMetricFamily("stillhouse_test_stored_state", "From a store", value=42)

    def describe(self) -> list[Any]:
        return []


class Broken(Fixed):
    def collect(self) -> Iterator[GaugeMetricFamily]:
        raise RuntimeError("the database is gone")
        yield


def test_metrics_and_health_are_served() -> None:
    url = serve(collectors=[Fixed()])
    answer = get(f"{url}/metrics")
    assert answer.status_code == 200
    assert answer.headers["Content-Type"].startswith("text/plain; version=")
    assert "stillhouse_test_stored_state 42.0" in answer.text
    assert "stillhouse_events_total" in answer.text
    assert get(f"{url}/healthz").text == "ok\n"
    assert get(f"{url}/other").status_code == 404


def test_a_stalled_process_says_so() -> None:
    url = serve(health=lambda: False)
    assert get(f"{url}/healthz").status_code == 503


def test_a_heartbeat_grows_stale(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [100.0]
    monkeypatch.setattr("time.monotonic", lambda: clock[0])
    beat = Heartbeat(stale_after=10)
    clock[0] += 9
    assert beat.healthy()
    clock[0] += 2
    assert not beat.healthy()
    beat.beat()
    assert beat.healthy()


def test_a_collector_that_fails_fails_the_scrape_alone() -> None:
    url = serve(collectors=[Broken()])
    assert get(f"{url}/metrics").status_code == 503
    assert get(f"{url}/healthz").status_code == 200


def test_live_gauges_of_dead_processes_are_swept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PROMETHEUS_MULTIPROC_DIR", str(tmp_path))
    ended = subprocess.Popen(["true"])
    ended.wait()
    kept = [f"gauge_livemostrecent_{os.getpid()}.db", f"counter_{ended.pid}.db"]
    swept = [f"gauge_livesum_{ended.pid}.db", f"gauge_livemostrecent_{ended.pid}.db"]
    for name in kept + swept:
        (tmp_path / name).touch()
    metrics.sweep_dead()
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(kept)
