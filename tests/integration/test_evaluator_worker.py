"""The evaluator's real worker on a real broker: a kill in mid-evaluation changes no figure."""

from __future__ import annotations

import sys
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from stillhouse.chassis import bus
from stillhouse.contracts.artifacts import report_part_key, student_manifest_key
from stillhouse.contracts.envelope import Envelope
from stillhouse.contracts.flow import EVALUATOR, GATEWAY
from stillhouse.embedded.parts import Store, seaweedfs, valkey
from stillhouse.embedded.ports import free_ports
from stillhouse.embedded.process import base_environment, kill_group, spawn, stop
from tests.support import shards
from tests.support.evaluated import Scene, make_scene
from tests.support.reports import checkpoint_saved, training_completed
from tests.support.waiting import wait_for

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, Store]]:
    folder = tmp_path_factory.mktemp("parts")
    with valkey(folder) as broker, seaweedfs(folder) as store:
        yield broker, store


class Worker:
    """One `python -m services.evaluator worker`, which can be killed and started again."""

    def __init__(self, folder: Path, scene: Scene, broker: str, store: Store) -> None:
        self.port = next(free_ports())
        self.log = folder / "worker.log"
        metrics = folder / "metrics"
        metrics.mkdir()
        told = scene.settings
        self._env = base_environment(
            {
                "OMP_NUM_THREADS": "1",
                "PYTHONPATH": str(ROOT),
                "PROMETHEUS_MULTIPROC_DIR": str(metrics),
                "EVALUATOR_BROKER_URL": broker,
                "EVALUATOR_STORE_ENDPOINT_URL": store.endpoint_url,
                "EVALUATOR_STORE_BUCKET": store.bucket,
                "EVALUATOR_STORE_ACCESS_KEY": store.access_key,
                "EVALUATOR_STORE_SECRET_KEY": store.secret_key,
                "EVALUATOR_METRICS_PORT": str(self.port),
                "EVALUATOR_PROFILE": "embedded",
                "EVALUATOR_WORK_DIR": str(told.work_dir),
                "EVALUATOR_FILE_ROOTS": told.file_roots,
                "EVALUATOR_ROWS_PER_PART": str(told.rows_per_part),
                "EVALUATOR_GENERATE_TOKENS": str(told.generate_tokens),
                "EVALUATOR_STOP_RATE_PROMPTS": str(told.stop_rate_prompts),
                "EVALUATOR_METRICS_REFRESH_SECONDS": "1",
            }
        )
        self.start()

    def start(self) -> None:
        argv = [sys.executable, "-m", "services.evaluator", "worker"]
        self.process = spawn(argv, env=self._env, log=self.log, cwd=ROOT)

    def page(self, path: str) -> str:
        with urllib.request.urlopen(f"http://127.0.0.1:{self.port}{path}", timeout=10) as answer:
            body: bytes = answer.read()
        return body.decode()

    def wait(self, look: Callable[[], object], what: str) -> None:
        try:
            wait_for(look, 120, what)
        except AssertionError as error:
            raise AssertionError(f"{error}\n{self.log.read_text()[-3000:]}") from error


def _drive(broker: str, *events: Envelope) -> None:
    """Send events to the evaluator alone, as re-drive does."""
    publisher = bus.Publisher(GATEWAY, broker)
    for envelope in events:
        publisher.republish(envelope, to=EVALUATOR)


@pytest.mark.slow
def test_a_worker_killed_in_mid_evaluation_leaves_the_same_bytes(
    parts: tuple[str, Store], tmp_path: Path
) -> None:
    broker, part = parts
    store = shards.store_of(part)
    scene = make_scene(store, tmp_path, "killed", rows=4)
    scene.settings = scene.settings.model_copy(update={"rows_per_part": 1})
    tenant, resolved = scene.resolved.tenant_id, scene.resolved
    events = (
        checkpoint_saved(resolved, scene.untrained),
        scene.heldout,
        checkpoint_saved(resolved, scene.trained),
        training_completed(resolved, scene.trained),
    )
    worker = Worker(tmp_path, scene, broker, part)
    try:
        _drive(broker, *events)
        first = report_part_key(tenant, resolved.training_id, 0, 0)
        worker.wait(lambda: store.exists(first), "the first part of a report")
        kill_group(worker.process)
        before = scene.written()
        assert not any(key.endswith("/report.json") for key in before)

        worker.start()
        _drive(broker, *events)
        manifest = student_manifest_key(tenant, resolved.student_id)
        worker.wait(lambda: store.exists(manifest), "the student folder")
        worker.wait(lambda: 'pipeline="pl-killed"' in worker.page("/metrics"), "its figures")
        metrics = worker.page("/metrics")
        maps = Path(f"/proc/{worker.process.pid}/maps").read_text()
        assert stop(worker.process, grace_seconds=20), "the worker did not stop when asked"
    finally:
        kill_group(worker.process)

    assert 'stillhouse_evaluator_evaluations_total{outcome="student"} 1.0' in metrics
    assert "stillhouse_evaluator_last_success_timestamp_seconds" in metrics
    assert "libtorch" not in maps, "the main process imported torch"
    killed = scene.written()
    assert before.items() <= killed.items()
    for key in killed:
        store.delete(key)
    scene.take(*events)
    assert scene.written() == killed
