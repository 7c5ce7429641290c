"""The trainer as a process, over a real broker and store: killed, stopped, asleep, told to end."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from stillhouse.chassis import bus
from stillhouse.chassis.storage import ObjectStore
from stillhouse.contracts import artifacts
from stillhouse.contracts.envelope import Envelope
from stillhouse.contracts.flow import EVALUATOR, GATEWAY, TRAINER
from stillhouse.contracts.spec import ResolvedSpec
from stillhouse.contracts.trainings import CheckpointManifest
from stillhouse.embedded.parts import Store
from stillhouse.embedded.ports import free_ports, is_free
from stillhouse.embedded.process import base_environment, kill_group, spawn
from tests.support.shards import (
    dataset_sealed,
    make_dataset,
    make_resolved_spec,
    make_train_shards,
    store_spec,
    tiny_student,
)
from tests.support.trainers import Bench, head_of, replay, state_of, tensors_digest
from tests.support.waiting import wait_for

REPOSITORY = Path(__file__).parents[2]
PASSES = 12  # some 100 steps: long enough to be disturbed


@pytest.fixture(scope="module")
def roots(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    tiny_student(folder / "tiny", layers=2)
    return folder


class Processes:
    """Starts trainers on one broker and store."""

    def __init__(self, folder: Path, broker_url: str, part: Store, roots: Path) -> None:
        self._folder, self._broker, self._part, self._roots = folder, broker_url, part, roots
        self._started: list[subprocess.Popen[bytes]] = []
        self.ports: dict[int, int] = {}

    def start(self, **more: str) -> subprocess.Popen[bytes]:
        number = len(self._started)
        port = next(p for p in free_ports() if is_free(p) and p not in self.ports.values())
        told = {
            "BROKER_URL": self._broker,
            "STORE_ENDPOINT_URL": self._part.endpoint_url,
            "STORE_BUCKET": self._part.bucket,
            "STORE_ACCESS_KEY": self._part.access_key,
            "STORE_SECRET_KEY": self._part.secret_key,
            "WORK_DIR": str(self._folder / "work"),
            "PROFILE": "embedded",
            "DEVICE": "cpu",
            "METRICS_PORT": str(port),
            "FILE_ROOTS": str(self._roots),
            "SEGMENT_SECONDS": "0.5",
            "WAIT_SECONDS": "0.2",
            "SAVE_AFTER_SECONDS": "0",
            "SAVE_SHARE": "0",
            "DTYPE": "float32",
            "LEASE_TTL_SECONDS": "6",
            "LEASE_BEAT_SECONDS": "0.5",
            "LEASE_STOP_BEFORE_SECONDS": "2",
            "LEASE_GRACE_SECONDS": "1",
        }
        env = base_environment({"OMP_NUM_THREADS": "1"})
        env |= {f"TRAINER_{name}": value for name, value in told.items()} | more
        process = spawn(
            [sys.executable, "-m", "services.trainer", "worker"],
            env=env,
            log=self.log(number),
            cwd=REPOSITORY,
        )
        self._started.append(process)
        self.ports[process.pid] = port
        return process

    def log(self, number: int) -> Path:
        return self._folder / f"trainer-{number}.log"

    def said(self, number: int = 0) -> str:
        return self.log(number).read_text()

    def get(self, process: subprocess.Popen[bytes], path: str) -> str:
        url = f"http://127.0.0.1:{self.ports[process.pid]}{path}"
        with urllib.request.urlopen(url, timeout=5) as answer:
            return str(answer.read().decode())

    def metric(self, process: subprocess.Popen[bytes], name: str) -> float:
        found = re.search(rf"^{name}(?:{{[^}}]*}})? (\S+)$", self.get(process, "/metrics"), re.M)
        return float(found[1]) if found else 0.0

    def end(self) -> None:
        for process in self._started:
            with contextlib.suppress(ProcessLookupError):
                os.kill(process.pid, signal.SIGCONT)
            kill_group(process)


@pytest.fixture
def processes(
    tmp_path: Path, valkey_url: str, store_part: Store, roots: Path
) -> Iterator[Processes]:
    started = Processes(tmp_path, valkey_url, store_part, roots)
    yield started
    started.end()


def spec_of(roots: Path, tenant: str, passes: int = PASSES) -> ResolvedSpec:
    return make_resolved_spec(
        student=f"file:{roots / 'tiny'}",
        tenant=tenant,
        every_steps=100,
        training={"passes": passes, "tokens_per_step": 60, "learning_rate": 3e-3},
    )


def put(store: ObjectStore, resolved: ResolvedSpec) -> tuple[Envelope, Envelope]:
    wake = store_spec(store, resolved)
    dataset = make_dataset(store, resolved, make_train_shards(store, resolved))
    return wake, dataset_sealed(resolved, *dataset)


@pytest.fixture(scope="module")
def undisturbed(
    store: ObjectStore, store_part: Store, tmp_path_factory: pytest.TempPathFactory, roots: Path
) -> CheckpointManifest:
    bench = Bench(store, store_part, tmp_path_factory.mktemp("undisturbed"), roots)
    resolved = spec_of(roots, "t-quiet")
    bench.run(put(store, resolved)[0])
    return head_of(store, resolved)


def wait_until_done(store: ObjectStore, resolved: ResolvedSpec, seconds: float = 120) -> None:
    wait_for(
        lambda: state_of(store, resolved), seconds, "training done", until=lambda state: state.done
    )


def pulled(service: Any, url: str) -> list[str]:
    found = []
    while (envelope := bus.pull(service, url)) is not None:
        found.append(envelope.type)
    return found


def test_a_process_trains_from_events_and_says_so(
    processes: Processes,
    store: ObjectStore,
    valkey_url: str,
    tenant: str,
    roots: Path,
) -> None:
    resolved = spec_of(roots, tenant, passes=2)
    wakes = put(store, resolved)
    process = processes.start()
    publisher = bus.Publisher(GATEWAY, valkey_url)
    publisher.publish(wakes[0])
    wait_until_done(store, resolved)
    wait_for(
        lambda: processes.metric(process, "stillhouse_trainer_tokens_total"), 10, "tokens counted"
    )
    assert processes.get(process, "/healthz") == "ok\n"
    assert processes.metric(process, "stillhouse_trainer_steps_total") > 3
    assert processes.metric(process, "stillhouse_event_age_seconds") > 0
    wait_for(
        lambda: processes.get(process, "/metrics"),
        10,
        "the gauges of a training gone when it is left",
        until=lambda text: "stillhouse_trainer_loss_nats{" not in text,
    )
    told: list[str] = []

    def listen() -> list[str]:
        told.extend(pulled(EVALUATOR, valkey_url))
        return told

    wait_for(
        listen,
        20,
        "events",
        until=lambda seen: "training.completed" in seen,
    )
    assert told == ["pipeline.accepted", *["checkpoint.saved"] * 2, "training.completed"]
    assert "stage.progressed" in pulled(GATEWAY, valkey_url)
    process.terminate()
    assert process.wait(15) == 0, processes.said()
    assert not list((processes._folder / "work").iterdir())  # its scratch folder is gone


def test_a_killed_process_is_followed_by_another_with_the_same_bits(
    processes: Processes,
    store: ObjectStore,
    valkey_url: str,
    tenant: str,
    roots: Path,
    undisturbed: CheckpointManifest,
) -> None:
    resolved = spec_of(roots, tenant)
    wakes = put(store, resolved)
    replay(store, resolved, undisturbed)
    first = processes.start()
    publisher = bus.Publisher(GATEWAY, valkey_url)
    publisher.publish(wakes[0])
    wait_for(lambda: head_of(store, resolved).step, 90, "some steps", until=lambda n: n >= 5)
    os.killpg(first.pid, signal.SIGKILL)
    first.wait()
    assert not state_of(store, resolved).done
    assert state_of(store, resolved).holder
    processes.start()
    bus.Publisher("dataset_builder", valkey_url).publish(wakes[1])
    wait_until_done(store, resolved)
    assert tensors_digest(head_of(store, resolved)) == tensors_digest(undisturbed)
    assert head_of(store, resolved).epoch >= 2
    assert head_of(store, resolved).bitwise
    # What the dead one left on the disk is gone: one folder, that of the second process.
    assert len(list((processes._folder / "work").iterdir())) == 1


def test_a_holder_that_slept_through_its_lease_writes_nothing_any_more(
    processes: Processes,
    store: ObjectStore,
    valkey_url: str,
    tenant: str,
    roots: Path,
    undisturbed: CheckpointManifest,
) -> None:
    resolved = spec_of(roots, tenant)
    wakes = put(store, resolved)
    replay(store, resolved, undisturbed)
    zombie = processes.start()
    bus.Publisher(GATEWAY, valkey_url).publish(wakes[0])
    wait_for(lambda: head_of(store, resolved).step, 90, "some steps", until=lambda n: n >= 5)
    os.kill(zombie.pid, signal.SIGSTOP)
    slept = state_of(store, resolved).epoch
    processes.start()
    bus.Publisher("dataset_builder", valkey_url).publish(wakes[1])
    wait_for(
        lambda: state_of(store, resolved), 90, "taken over", until=lambda state: state.epoch > slept
    )
    os.kill(zombie.pid, signal.SIGCONT)
    wait_until_done(store, resolved)
    wait_for(
        lambda: processes.metric(zombie, "stillhouse_trainer_leases_lost_total"),
        20,
        "the lost lease noticed",
    )
    state = state_of(store, resolved)
    assert tensors_digest(head_of(store, resolved)) == tensors_digest(undisturbed)
    assert state.head is not None
    assert state.head.epoch > slept
    prefix = artifacts.training_prefix(tenant, resolved.training_id)
    mine = [key for key in store.keys(prefix) if f"epoch-{slept:04d}" in key]
    steps = {re.findall(r"step-(\d+)", key)[0] for key in mine}
    assert max(steps) < f"{state.head.step:08d}"
    assert zombie.poll() is None  # it goes on with other work
    assert processes.get(zombie, "/healthz") == "ok\n"


def test_a_process_told_to_end_saves_releases_and_hands_its_wake_up_on(
    processes: Processes,
    store: ObjectStore,
    valkey_url: str,
    tenant: str,
    roots: Path,
    undisturbed: CheckpointManifest,
) -> None:
    resolved = spec_of(roots, tenant)
    wakes = put(store, resolved)
    replay(store, resolved, undisturbed)
    first = processes.start(TRAINER_SAVE_AFTER_SECONDS="600")
    bus.Publisher(GATEWAY, valkey_url).publish(wakes[0])
    wait_for(
        lambda: processes.metric(first, "stillhouse_trainer_step"),
        90,
        "some steps",
        until=lambda n: n >= 5,
    )
    first.terminate()
    assert first.wait(15) == 0, processes.said()
    state = state_of(store, resolved)
    assert state.holder == ""
    assert state.head is not None
    assert state.head.step >= 5
    assert bus.depth(TRAINER, valkey_url)["trainer.events"] == 1
    processes.start(
        TRAINER_SAVE_AFTER_SECONDS="600"
    )  # nobody sends an event: the handed-on wake-up is enough
    wait_until_done(store, resolved)
    assert tensors_digest(head_of(store, resolved)) == tensors_digest(undisturbed)


def test_a_missing_setting_ends_the_process_in_one_sentence() -> None:
    env = base_environment({"TRAINER_DEVICE": "cpu"})
    ended = subprocess.run(
        [sys.executable, "-m", "services.trainer", "worker"],
        env=env,
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert ended.returncode == 2
    assert "TRAINER_BROKER_URL" in ended.stderr
    assert "Traceback" not in ended.stderr
