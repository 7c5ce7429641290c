"""One pipeline on the whole embedded stack, with every process killed once on the way."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support import invariants
from tests.support.pipelines import TENANT, Plant, running_plant, train_undisturbed

SECONDS = 240


def closed(count: int) -> Callable[[dict[str, Any]], bool]:
    return lambda status: bool(status["batches_closed"] >= count)


@pytest.fixture(scope="module")
def plant(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Plant]:
    # Slow enough that every kill meets work: 12 batches of 8 answers, two at a time.
    with running_plant(tmp_path_factory.mktemp("plant"), latency=0.25) as running:
        yield running


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_pipeline_whose_every_process_is_killed_once_ends_as_if_undisturbed(
    plant: Plant, tmp_path: Path
) -> None:
    pipeline = plant.submit(name="killed", items=96)

    def kill_after(count: int, name: str) -> None:
        plant.wait(pipeline, f"{count} closed batches", closed(count), SECONDS)
        plant.kill(name)

    kill_after(1, "teacher_gateway.api")
    kill_after(2, "teacher_gateway.worker")
    kill_after(4, "dataset_builder.worker")
    kill_after(5, "valkey")
    plant.wait(
        pipeline,
        "the first training step",
        lambda status: status["first_training_step_at"] is not None,
        SECONDS,
    )
    plant.kill("trainer.worker")
    kill_after(7, "seaweedfs")
    kill_after(8, "teacher_gateway.clock")
    plant.wait(
        pipeline,
        "a checkpoint to evaluate",
        lambda status: status["stages"]["evaluate"]["state"] != "waiting",
        SECONDS,
    )
    plant.kill("evaluator.worker")

    status = plant.wait(pipeline, "release", lambda s: s["state"] == "released", SECONDS)

    events = plant.events(pipeline)
    assert [event["sequence"] for event in events] == list(range(1, len(events) + 1))
    assert len({event["event_id"] for event in events}) == len(events)
    left = invariants.read_all(plant.store, TENANT, pipeline, events)
    assert len(left.items) == 96
    assert status["rows"] + sum(status["rejections"].values()) == status["items"] == 96
    invoices = plant.invoices("killed")
    invariants.check_items(left)
    invariants.check_content(left, invoices)
    invariants.check_money(left, plant.charges(pipeline), invoices)
    killed = invariants.check_training(plant.store, left)
    assert killed.epoch > 1, "the trainer was not holding the training when it was killed"
    undisturbed = train_undisturbed(plant, left.resolved, killed, tmp_path / "again")
    assert undisturbed.step == killed.step
    assert undisturbed.files["model.safetensors"].sha256 == killed.files["model.safetensors"].sha256
    assert invariants.ledger_digest(plant.store, undisturbed) == invariants.ledger_digest(
        plant.store, killed
    )
