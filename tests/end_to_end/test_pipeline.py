"""Pipelines on the whole embedded stack, from the REST API to a student, on one running plant."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from stillhouse.cli.client import StillhouseApiError
from stillhouse.embedded.stack import read_stack
from tests.support import invariants
from tests.support.listed_metrics import listed_metrics
from tests.support.pipelines import TENANT, Plant, running_plant
from tests.support.teacher import Fault
from tests.support.waiting import wait_for

SECONDS = 180


@pytest.fixture(scope="module")
def plant(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Plant]:
    with running_plant(tmp_path_factory.mktemp("plant"), latency=0.05) as running:
        yield running


def released(plant: Plant, pipeline: str) -> dict[str, Any]:
    return plant.wait(pipeline, "release", lambda s: s["state"] == "released", SECONDS)


def check(plant: Plant, pipeline: str, marker: str) -> invariants.Left:
    """All that must hold of a finished pipeline, read from the data."""
    left = invariants.read_all(plant.store, TENANT, pipeline, plant.events(pipeline))
    invoices = [i for i in plant.teacher.invoices() if i.marker.startswith(marker)]
    invariants.check_items(left)
    invariants.check_content(left, invoices)
    charges = plant.client._json("GET", f"/v1/pipelines/{pipeline}/charges")
    invariants.check_money(left, charges, invoices)
    invariants.check_training(plant.store, left)
    return left


def test_a_pipeline_ends_in_a_student_whatever_its_teacher_does_on_the_way(
    plant: Plant, tmp_path: Path
) -> None:
    at_first = ("rate_limited", "status", "truncated_json", "cut_reply", "empty_choices")
    for number, kind in enumerate(at_first):
        plant.teacher.script(Fault(kind, match=f"[faults {number}]", attempts=(1,)))
    for number, kind in ((11, "other_text"), (12, "content_filter")):
        plant.teacher.script(Fault(kind, match=f"[faults {number}]"))
    try:
        pipeline = plant.submit(name="faults", items=40)
        status = released(plant, pipeline)
    finally:
        plant.teacher.forgive()
    left = check(plant, pipeline, "faults ")
    assert len(left.items) == 40
    assert sorted(left.rejected) == sorted(
        rejection["item_id"] for rejection in plant.client.rejections(pipeline)
    )
    assert status["rejections"] == {"ids_differ_from_text": 1, "refused_by_teacher": 1}
    assert status["rows"] == 38

    report = plant.client.report(pipeline)
    assert (report["of"], report["split"]) == ("student", "test")
    for who in ("teacher", "model", "untrained"):
        assert report[who]["kl_full"] >= 0
    assert report["model"]["kl_top20"] < report["untrained"]["kl_top20"]

    folder = tmp_path / "student"
    plant.client.pull(pipeline, folder)
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(folder)
    assert model.num_parameters() > 0
    assert AutoTokenizer.from_pretrained(folder)("abc").input_ids == [97, 98, 99]
    card = (folder / "README.md").read_text()
    assert "smollm2@self-hosted" in card
    assert (folder / "provenance.json").exists()


def test_two_pipelines_at_once_and_one_of_them_cancelled(plant: Plant) -> None:
    kept = plant.submit(name="kept", items=40)
    dropped = plant.submit(name="dropped", items=160)
    plant.wait(dropped, "a closed batch", lambda s: s["batches_closed"] >= 1, SECONDS)
    plant.client.cancel(dropped)
    ended = plant.client.wait(dropped, timeout_seconds=SECONDS)
    assert ended["state"] == "cancelled"
    assert ended["cost"]["reserved_microusd"] == 0
    assert ended["pending"] == 0
    asked = len([r for r in plant.teacher.requests if r["marker"].startswith("dropped ")])
    assert asked < 160

    released(plant, kept)
    check(plant, kept, "kept ")
    # Nothing was asked for, paid or trained for the cancelled one in the meantime.
    later = plant.client.status(dropped)
    assert later["cost"] == ended["cost"]
    assert asked == len([r for r in plant.teacher.requests if r["marker"].startswith("dropped ")])
    invoices = [i for i in plant.teacher.invoices() if i.marker.startswith("dropped ")]
    assert later["cost"]["spent_microusd"] >= sum(invoice.microusd for invoice in invoices)
    with pytest.raises(StillhouseApiError):
        plant.client.student(dropped)


def test_a_teacher_that_gives_no_log_probabilities_fails_the_pipeline_with_advice(
    plant: Plant,
) -> None:
    plant.teacher.script(Fault("missing_logprobs"))
    try:
        pipeline = plant.submit(name="silent", items=40)
        status = plant.client.wait(pipeline, timeout_seconds=SECONDS)
    finally:
        plant.teacher.forgive()
    assert status["state"] == "failed"
    assert "log-probabilities" in status["reason"]
    assert status["cost"]["reserved_microusd"] == 0
    # One question told it: the rest was never asked.
    assert len([r for r in plant.teacher.requests if "silent" in r["marker"]]) <= 3


def test_every_process_serves_metrics_that_are_documented(plant: Plant) -> None:
    entries = listed_metrics()
    listed = {entry.name.removesuffix("_total") for entry in entries}
    shown: set[str] = set()
    processes = read_stack(plant.root).processes
    services = [name for name in processes if "." in name]
    assert len(services) == 6
    for name in services:
        address = processes[name]["address"].removesuffix("/metrics")
        text = httpx.get(f"{address}/metrics", trust_env=False, timeout=10).text
        found = set(re.findall(r"^# TYPE (stillhouse_\w+)", text, re.MULTILINE))
        found = {metric.removesuffix("_total").removesuffix("_created") for metric in found}
        assert found, f"{name} serves no metric of ours"
        assert found <= listed, f"{name} serves {sorted(found - listed)}"
        shown |= found
    # One with labels shows once something was counted.
    always = {entry.name.removesuffix("_total") for entry in entries if not entry.labels}
    assert always <= shown


def test_every_process_is_alive_after_all_that(plant: Plant) -> None:
    processes = read_stack(plant.root).processes
    assert {name: state["restarts"] for name, state in processes.items() if state["restarts"]} == {}
    for name, state in processes.items():
        if name.endswith((".worker", ".clock")):
            address = state["address"].removesuffix("/metrics")
            wait_for(
                lambda url=address: httpx.get(f"{url}/healthz", trust_env=False).status_code == 200,  # type: ignore[misc]
                10,
                f"{name} is healthy",
            )
