"""A trainer in the test's own process: real store and leases, a queue and events in memory."""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from services.trainer.announce import Announcer
from services.trainer.settings import TrainerSettings
from services.trainer.turns import Trainer
from stillhouse.chassis import leases
from stillhouse.chassis.storage import ObjectStore
from stillhouse.contracts import artifacts
from stillhouse.contracts.artifacts import ObjectRef
from stillhouse.contracts.envelope import Envelope
from stillhouse.contracts.events import Event
from stillhouse.contracts.spec import ResolvedSpec
from stillhouse.contracts.trainings import CheckpointManifest, Cursor, Plan, TrainingState
from stillhouse.embedded.parts import Store
from tests.support.shards import store_of


class Killed(BaseException):
    """A crash point was reached: nothing after it happens."""


@dataclass
class Wire:
    """The trainer's queue, and what it published, in order."""

    queue: deque[Envelope] = field(default_factory=deque)
    published: list[Envelope] = field(default_factory=list)
    # Asked for one when the queue is empty: how a test lets things happen meanwhile.
    meanwhile: Callable[[], Envelope | None] = lambda: None

    def publish(self, *envelopes: Envelope) -> None:
        self.published.extend(envelopes)

    def pull(self) -> Envelope | None:
        return self.queue.popleft() if self.queue else self.meanwhile()

    def events(self, *kinds: type[Event]) -> list[Any]:
        names = {kind.TYPE for kind in kinds}
        return [e.event() for e in self.published if not names or e.type in names]


@dataclass
class Bench:
    """Makes trainers over one store."""

    store: ObjectStore
    part: Store
    folder: Path
    roots: Path
    wire: Wire = field(default_factory=Wire)
    _numbers: Iterator[int] = field(default_factory=itertools.count)

    def settings(self, **changed: Any) -> TrainerSettings:
        return TrainerSettings(
            broker_url="memory://",
            profile="embedded",
            device="cpu",
            file_roots=str(self.roots),
            # What a probe would choose may differ from training to training on a busy machine.
            **{"wait_seconds": 0, "progress_seconds": 0, "dtype": "float32", **changed},
        )

    def trainer(self, **changed: Any) -> Trainer:
        scratch = self.folder / f"trainer-{next(self._numbers)}"
        scratch.mkdir()
        return Trainer(
            self.settings(**changed),
            self.store,
            store_of(self.part, connect_timeout=2, read_timeout=3, attempts=1),
            Announcer(self.wire, 0.01),  # type: ignore[arg-type]
            pull=self.wire.pull,
            hand_on=self.wire.queue.append,
            scratch=scratch,
        )

    def drain(self, trainer: Trainer) -> None:
        """Let it work until its queue is empty and all is published."""
        try:
            while trainer.turn():
                pass
        finally:
            assert trainer._announcer.flush(10)

    def run(self, *wakes: Envelope, **changed: Any) -> Trainer:
        """A fresh trainer that works off these wake-ups."""
        self.wire.queue.extend(wakes)
        trainer = self.trainer(**changed)
        try:
            self.drain(trainer)
        except Killed:
            trainer._announcer.close(1)  # its thread would outlive it here
            raise
        return trainer


@contextmanager
def killing(monkeypatch: pytest.MonkeyPatch, point: str, at: int = 1) -> Iterator[None]:
    """Raise Killed at the n-th time that a crash point of the trainer is reached; its lease stays
    held, as that of a process that died."""
    seen = itertools.count(1)

    def crash_point(name: str) -> None:
        if name == point and next(seen) == at:
            raise Killed(point)

    with monkeypatch.context() as patched:
        for module in ("loop", "gradients", "saver", "session", "checkpoint"):
            patched.setattr(f"services.trainer.{module}.crash_point", crash_point)
        patched.setattr(leases.Lease, "release", leases.Lease._stop_beating)
        yield


def replay(store: ObjectStore, resolved: ResolvedSpec, other: CheckpointManifest) -> None:
    """Give a training the plan of another one before it begins: two probes in two processes may
    choose otherwise, and bits are compared over one plan."""
    key = artifacts.plan_key(other.tenant_id, other.training_id)
    found = store.find_model(key, Plan)
    assert found is not None
    plan = found[0].model_copy(update={"training_id": resolved.training_id})
    store.put_new_model(artifacts.plan_key(resolved.tenant_id, resolved.training_id), plan)


def know_dead_holders(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let leases of dead holders be taken at once: the waiting itself has tests of its own."""
    monkeypatch.setattr(leases, "_free", lambda *_: True)


def state_of(store: ObjectStore, resolved: ResolvedSpec) -> TrainingState:
    key = artifacts.training_state_key(resolved.tenant_id, resolved.training_id)
    found = store.find_model(key, TrainingState)
    if found is None:
        raise LookupError(f"{key} is not there")
    return found[0]


def head_of(store: ObjectStore, resolved: ResolvedSpec) -> CheckpointManifest:
    head = state_of(store, resolved).head
    if head is None:
        raise LookupError("the training has no HEAD")
    return store.get_model(head.manifest, CheckpointManifest)


def cursor_of(store: ObjectStore, manifest: CheckpointManifest) -> Cursor:
    return store.get_model(manifest.files["cursor.json"], Cursor)


def lineage_of(store: ObjectStore, resolved: ResolvedSpec) -> list[CheckpointManifest]:
    """HEAD and what it came from, back to step 0."""
    found = [head_of(store, resolved)]
    while (parent := found[-1].parent) is not None:
        found.append(store.get_model(parent, CheckpointManifest))
    return found


def tensors_digest(manifest: CheckpointManifest) -> tuple[str, ...]:
    """What two trainings with the same bits have in common."""
    ref: ObjectRef = manifest.files["model.safetensors"]
    return ref.sha256, str(manifest.tokens), str(manifest.rows), repr(manifest.loss)
