"""The evaluator's real worker on a real broker: a kill in mid-evaluation changes no figure."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from stillhouse.chassis import bus
from stillhouse.contracts.artifacts import report_part_key, student_manifest_key
from stillhouse.contracts.envelope import Envelope
from stillhouse.contracts.flow import EVALUATOR, GATEWAY
from stillhouse.embedded.parts import Store, seaweedfs, valkey
from stillhouse.embedded.process import kill_group, stop
from tests.support import shards
from tests.support.evaluated import make_scene
from tests.support.reports import checkpoint_saved, training_completed
from tests.support.workers import Worker


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, Store]]:
    folder = tmp_path_factory.mktemp("parts")
    with valkey(folder) as broker, seaweedfs(folder) as store:
        yield broker, store


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
    told = scene.settings
    worker = Worker(
        EVALUATOR,
        tmp_path,
        broker,
        part,
        work_dir=told.work_dir,
        file_roots=os.pathsep.join(map(str, told.file_roots)),
        rows_per_part=told.rows_per_part,
        generate_tokens=told.generate_tokens,
        stop_rate_prompts=told.stop_rate_prompts,
        metrics_refresh_seconds=1,
    )
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
