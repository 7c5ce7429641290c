"""A paid batch that local weights answer, over a real store and database."""

from __future__ import annotations

import dataclasses
import threading
from pathlib import Path
from typing import Any

import psutil
import pytest

from services.teacher_gateway.database import open_engine
from services.teacher_gateway.migrate import migrate
from services.teacher_gateway.teachers.local import weights
from services.teacher_gateway.worker import make_shell
from stillhouse.chassis.errors import PermanentError
from stillhouse.chassis.jobs import Job, enqueue, make_app
from stillhouse.chassis.storage import ObjectStore
from stillhouse.contracts.flow import GATEWAY
from stillhouse.embedded.parts import Store
from stillhouse.embedded.process import kill_group
from tests.support.gateway import World, make_settings, make_world
from tests.support.local_weights import speaking_weights
from tests.support.waiting import wait_for
from tests.support.workers import Worker


@pytest.fixture
def sqlite_url(tmp_path: Path) -> str:
    return f"sqlite:///{tmp_path / 'gateway.sqlite3'}"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder: Path = tmp_path_factory.mktemp("local")
    speaking_weights(folder / "speaking")
    return folder


def make_local_world(
    store: ObjectStore, url: str, tenant: str, folder: Path, name: str, **spec: Any
) -> World:
    teacher = {"url": None, "weights": f"file:{folder / name}"}
    world = make_world(store, url, tenant, "", teacher=teacher, **spec)
    told = make_settings(url, file_roots=str(folder), work_dir=folder / "work", local_device="cpu")
    world.context = dataclasses.replace(world.context, settings=told)
    return world


@pytest.mark.parametrize(
    "signal",
    [
        {"kind": "topk", "k": 5, "max_tokens": 24},
        {"kind": "counts", "draws": 20, "max_tokens": 24},
    ],
    ids=["topk", "counts"],
)
def test_a_batch_is_answered_by_local_weights_stored_and_paid(
    store: ObjectStore, sqlite_url: str, tenant: str, folder: Path, signal: dict[str, Any]
) -> None:
    world = make_local_world(
        store, sqlite_url, tenant, folder, "speaking", items=20, signal=signal, concurrency=6
    )
    world.collect_until_closed()
    assert world.outcomes() == {"answered": 20}
    answers = world.answers()
    assert {answer.item_id for answer in answers} == {item.item_id for item in world.items()}
    assert world.charged("answers") == sum(answer.cost_microusd for answer in answers)
    assert all(a.cost_microusd == a.prompt_tokens + 2 * a.completion_tokens for a in answers)
    assert world.charged("unused", "unknown") == 0
    assert world.pipeline().reserved_microusd == 0
    world.check_books()
    world.collect()  # a redelivery
    assert world.events().count("response_batch.stored") == 1


def test_a_lease_is_renewed_while_the_weights_load(
    store: ObjectStore,
    sqlite_url: str,
    tenant: str,
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Loading may take longer than a lease; its holder is still there."""
    speaking_weights(folder / "slow")
    loading, go, load = threading.Event(), threading.Event(), weights._load

    def slow(*arguments: Any, **named: Any) -> weights.Weights:
        loading.set()
        assert go.wait(60)
        return load(*arguments, **named)

    monkeypatch.setattr(weights, "_load", slow)
    world = make_local_world(store, sqlite_url, tenant, folder, "slow", items=3)
    attempt = threading.Thread(target=world.collect)
    attempt.start()
    try:
        assert loading.wait(60)
        first = world.batch().lease_until
        wait_for(lambda: world.batch().lease_until > first, 60, "a renewed lease")
    finally:
        go.set()
        attempt.join(60)
    world.collect_until_closed()
    assert world.outcomes() == {"answered": 3}
    world.check_books()


def test_a_pools_child_computes_and_the_process_that_forks_knows_no_torch(
    store: ObjectStore,
    store_part: Store,
    valkey_url: str,
    sqlite_url: str,
    tenant: str,
    folder: Path,
    tmp_path: Path,
) -> None:
    engine = open_engine(sqlite_url)
    migrate(engine)
    engine.dispose()
    # Longer than a busy machine needs to import torch: these calls must not be tried again.
    world = make_local_world(
        store, sqlite_url, tenant, folder, "speaking", items=6, timeout_seconds=50
    )
    told = {
        "database_url": sqlite_url,
        "key_pepper": "0123456789abcdef",
        "file_roots": folder,
        "work_dir": tmp_path,
        "worker_processes": 1,
        "local_device": "cpu",
    }
    worker = Worker(GATEWAY, tmp_path, valkey_url, store_part, **told)
    try:
        app = make_app(make_shell(make_settings(sqlite_url, broker_url=valkey_url)))
        job = Job(
            name="collect_batch",
            tenant_id=tenant,
            pipeline_id=world.pipeline_id,
            args={"batch": 0},
        )
        enqueue(app, job)
        worker.wait(lambda: world.batch().state == "closed", "a closed batch")
        (child,) = psutil.Process(worker.process.pid).children()
        assert "libtorch" in Path(f"/proc/{child.pid}/maps").read_text()
        assert "libtorch" not in Path(f"/proc/{worker.process.pid}/maps").read_text()
    finally:
        kill_group(worker.process)
    assert world.outcomes() == {"answered": 6}
    world.check_books()


def test_weights_that_cannot_be_used_end_the_attempt_with_what_to_change(
    store: ObjectStore, sqlite_url: str, tenant: str, folder: Path
) -> None:
    world = make_local_world(store, sqlite_url, tenant, folder, "nothing", items=3)
    with pytest.raises(PermanentError, match="nothing is not a folder"):
        world.collect()
    world.check_books()
