"""Trainer and evaluator open weights that lie in a bucket or on the hub."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from services.evaluator.models import Models, prepare_torch
from services.trainer.fetching import Fetching
from services.trainer.hold import TrainingStopped
from stillhouse.chassis.references import pin_of
from stillhouse.chassis.storage import ObjectStore
from stillhouse.contracts import artifacts
from stillhouse.contracts.events import CheckpointSaved, StageFailed, StageProgressed
from stillhouse.contracts.spec import ResolvedSpec
from stillhouse.embedded.parts import Store
from tests.support.hub import REFERENCE, serving_hub
from tests.support.references import Bucket, make_sources, weights_bucket
from tests.support.shards import make_resolved_spec, stop_pipeline, store_spec, tiny_student
from tests.support.trainers import Bench, state_of


@pytest.fixture
def bucket(store_part: Store, tmp_path: Path) -> Iterator[Bucket]:
    with weights_bucket(store_part, tmp_path / "cache") as found:
        found.put_folder(tiny_student(tmp_path / "student", layers=2))
        yield found


@pytest.fixture
def bench(store: ObjectStore, store_part: Store, tmp_path: Path) -> Bench:
    return Bench(store, store_part, tmp_path, tmp_path / "nothing")


def spec_of(bucket: Bucket, tenant: str) -> ResolvedSpec:
    resolved = make_resolved_spec(student=bucket.reference, tenant=tenant)
    pin = pin_of(bucket.reference, bucket.sources())
    return resolved.model_copy(update={"pinned": {bucket.reference: pin}})


def test_a_student_is_fetched_from_a_bucket_and_saved_as_step_0(
    bench: Bench, bucket: Bucket, tenant: str
) -> None:
    bench.run(store_spec(bench.store, spec_of(bucket, tenant)), **bucket.settings())
    assert [saved.step for saved in bench.wire.events(CheckpointSaved)] == [0]
    told = [event.figures for event in bench.wire.events(StageProgressed)]
    size = (bucket.cache.parent / "student" / "model.safetensors").stat().st_size
    assert told[-1]["fetched_bytes"] == told[-1]["weights_bytes"] > size


def test_a_student_that_was_replaced_since_it_was_accepted_is_refused(
    bench: Bench, bucket: Bucket, tenant: str, tmp_path: Path
) -> None:
    resolved = spec_of(bucket, tenant)
    bucket.put_folder(tiny_student(tmp_path / "another", layers=2, seed=5))
    bench.run(store_spec(bench.store, resolved), **bucket.settings())
    (failed,) = bench.wire.events(StageFailed)
    assert (failed.reason, failed.fatal) == ("reference_changed", True)


def test_a_fetch_ends_when_its_pipeline_stops(
    bench: Bench, tenant: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tiny_student(tmp_path / "student", layers=2)
    resolved = make_resolved_spec(student=REFERENCE, tenant=tenant)
    look = Fetching.__call__
    with serving_hub({path.name: path.read_bytes() for path in folder.iterdir()}) as hub:
        held = hub.held["model.safetensors"] = threading.Event()
        monkeypatch.setenv("HF_ENDPOINT", hub.url)

        def looking(self: Fetching, done: int, total: int) -> None:
            stopped = artifacts.stopped_key(tenant, resolved.pipeline_id)
            if total and not bench.store.exists(stopped):
                stop_pipeline(bench.store, resolved)
            try:
                look(self, done, total)
            except TrainingStopped:
                held.set()  # its thread waits for the next bytes
                raise

        monkeypatch.setattr(Fetching, "__call__", looking)
        told = {"cache_dir": tmp_path / "cache", "allow_hub": True}
        bench.run(store_spec(bench.store, resolved), **told)
        assert hub.times("model.safetensors") == 1
    assert held.is_set()
    state = state_of(bench.store, resolved)
    assert (state.head, state.holder, state.failed) == (None, "", "")
    assert bench.wire.events(CheckpointSaved, StageFailed) == []


def test_a_reference_is_fetched_from_the_hub_and_measured_with(
    store: ObjectStore, tmp_path: Path
) -> None:
    prepare_torch(1)
    folder = tiny_student(tmp_path / "teacher", layers=2)
    files = {path.name: path.read_bytes() for path in folder.iterdir()}
    with serving_hub(files) as hub:
        sources = make_sources(
            {"HF_ENDPOINT": hub.url}, cache_dir=tmp_path / "cache", allow_hub=True
        )
        models = Models(store, work_dir=tmp_path / "work", sources=sources, device="cpu")
        told: list[Any] = []
        model = models.reference(REFERENCE, None, lambda *bytes_: told.append(bytes_))
        assert models.reference(REFERENCE, None, lambda *_: None) is model
    assert told
    tensors = load_file(folder / "model.safetensors")
    assert torch.equal(model.model.norm.weight, tensors["model.norm.weight"])
