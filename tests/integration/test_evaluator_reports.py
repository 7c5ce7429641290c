"""The evaluator over a real store: reports, the student folder, repeats, other orders."""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from services.evaluator.metrics import StoredFigures
from stillhouse.chassis.errors import PermanentError
from stillhouse.chassis.storage import ObjectStore
from stillhouse.contracts import artifacts
from stillhouse.contracts.events import CheckpointEvaluated, StudentEvaluated
from stillhouse.contracts.trainings import Report, StudentManifest
from stillhouse.embedded.parts import seaweedfs
from tests.support import shards
from tests.support.evaluated import Scene, make_scene
from tests.support.reports import (
    checkpoint_saved,
    store_checkpoint,
    store_state,
    training_completed,
)
from tests.support.tiny_tokenizer import tiny_chat_tokenizer


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ObjectStore]:
    with seaweedfs(tmp_path_factory.mktemp("store")) as part:
        yield shards.store_of(part)


@pytest.fixture(scope="module")
def finished(store: ObjectStore, tmp_path_factory: pytest.TempPathFactory) -> Scene:
    """A scene whose events all came, in their usual order."""
    scene = make_scene(store, tmp_path_factory.mktemp("finished"), "finished")
    scene.take(
        checkpoint_saved(scene.resolved, scene.untrained),
        scene.heldout,
        checkpoint_saved(scene.resolved, scene.trained),
        training_completed(scene.resolved, scene.trained),
    )
    return scene


def test_each_checkpoint_gets_a_report_and_the_nearer_one_has_the_better_figures(
    finished: Scene,
) -> None:
    before, after = finished.report(0), finished.report(8)
    assert after.model.kl_full is not None
    assert before.model.kl_full is not None
    assert after.model.kl_full < before.model.kl_full / 2
    assert before.checkpoint == finished.untrained.manifest
    assert before.model.rows == 8
    assert before.split == "validation"
    assert before.model.tokens == before.teacher.tokens > 0
    assert set(before.model.intervals) == {"kl_top20", "kl_full", "ppl", "top1"}


def test_a_checkpoint_whose_message_was_lost_is_found_by_the_end_of_the_training(
    store: ObjectStore, tmp_path: Path
) -> None:
    scene = make_scene(store, tmp_path, "lost")
    scene.take(checkpoint_saved(scene.resolved, scene.untrained), scene.heldout)
    # Nobody ever says that step 8 was saved; re-drive sends training.completed alone.
    scene.take(training_completed(scene.resolved, scene.trained))
    assert scene.report(8).model.kl_full is not None
    assert any(isinstance(e.event(), StudentEvaluated) for e in scene.envelopes)


def test_the_teachers_own_weights_are_the_noise_floor(finished: Scene) -> None:
    report = finished.report(8)
    assert report.teacher.kl_full == 0.0
    assert report.teacher.kl_top20 is not None
    assert report.teacher == finished.report(0).teacher
    assert report.teacher.stop_rate is not None


def test_the_student_is_the_best_checkpoint_measured_on_test(finished: Scene) -> None:
    report = Report.model_validate_json(finished.student_file("report.json"))
    assert report.split == "test"
    assert report.step == 8
    assert report.checkpoint == finished.trained.manifest
    assert report.untrained is not None
    assert report.model.kl_full is not None
    assert report.untrained.kl_full is not None
    assert report.model.kl_full < report.untrained.kl_full
    for figures in (report.model, report.untrained, report.teacher):
        assert figures.stop_rate is not None
    assert len(report.samples) == 2
    assert report.samples[0].prompt == shards.prompt_text(1, 0)
    assert report.samples[0].untrained is not None
    assert report.samples[0].student is not None


def test_events_name_what_was_written(finished: Scene) -> None:
    events = [envelope.event() for envelope in finished.envelopes]
    evaluated = {e.step: e for e in events if isinstance(e, CheckpointEvaluated)}
    assert set(evaluated) == {0, 8}
    finished.store.get_model(evaluated[8].report, Report)
    student = [e for e in events if isinstance(e, StudentEvaluated)][-1]
    manifest = finished.store.get_model(student.manifest, StudentManifest)
    assert manifest.step == student.step == 8
    assert manifest.files["report.json"] == student.report
    for ref in manifest.files.values():
        finished.store.get(ref)


def test_the_student_folder_loads_and_talks(finished: Scene, tmp_path: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    manifest = StudentManifest.model_validate_json(finished.student_file("manifest.json"))
    for name, ref in manifest.files.items():
        finished.store.get_file(ref, tmp_path / name)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, use_safetensors=True)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    chat = tiny_chat_tokenizer()
    messages = [{"role": "user", "content": shards.prompt_text(1, 0)}]
    inputs = tokenizer.apply_chat_template(
        messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    row = shards.make_rows(finished.resolved, 1, 1)[0]
    assert inputs["input_ids"][0].tolist() == row["input_ids"][: row["prompt_tokens"]]
    assert model.generation_config.eos_token_id == chat.eos_id
    with torch.inference_mode():
        out = model.generate(**inputs, max_new_tokens=12, do_sample=False)[0]
    answer = tokenizer.decode(out[inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    report = Report.model_validate_json(finished.student_file("report.json"))
    assert answer.strip() == report.samples[0].student


def test_the_papers_name_teacher_terms_rows_and_lineage(finished: Scene) -> None:
    papers: dict[str, Any] = json.loads(finished.student_file("provenance.json"))
    resolved = finished.resolved
    assert papers["spec"]["sha256"] == resolved.spec_sha256
    assert papers["verdicts"][0]["id"] == "ve-test"
    assert papers["dataset"]["dataset_id"] == resolved.dataset_id
    assert len(papers["trained_on"]["shards"]) == resolved.batches.train
    assert [step["step"] for step in papers["trained_on"]["steps"]] == list(range(1, 9))
    assert [entry["step"] for entry in papers["lineage"]] == [8, 0]
    assert papers["student"]["layers_kept"] == [0, 2]
    card = finished.student_file("README.md").decode()
    assert "# tiny" in card
    assert "billing-teacher" in card
    assert "`kl_full`" in card


def test_an_event_that_comes_again_publishes_again_and_writes_nothing(finished: Scene) -> None:
    before = finished.written()
    again = finished.take(
        checkpoint_saved(finished.resolved, finished.untrained),
        training_completed(finished.resolved, finished.trained),
    )
    kinds = {type(envelope.event()) for envelope in again}
    assert kinds == {CheckpointEvaluated, StudentEvaluated}
    assert {e.event_id for e in again} <= {e.event_id for e in finished.envelopes}
    assert finished.written() == before


def test_parts_measured_in_another_order_give_the_same_bytes(
    store: ObjectStore, finished: Scene
) -> None:
    """What a lost worker leaves is done by another one, in whatever order its jobs come."""
    before = finished.written()
    parts = [key for key in before if "/part-" in key]
    assert len(parts) == 3 * 2 + 3 * 2 + 2 + 6  # rows of both splits, answers, reference
    # Lose most of it, as if a worker had died in the middle. A report's part is written after
    # the reference's part over the same rows.
    for key in before:
        if not key.endswith(("part-0001.json", "part-0004.json")):
            store.delete(key)
    finished.take(
        training_completed(finished.resolved, finished.trained),
        checkpoint_saved(finished.resolved, finished.trained),
        finished.heldout,
        pop=deque.pop,
    )
    assert finished.written() == before


def test_a_checkpoint_before_the_heldout_rows_waits_for_them(
    store: ObjectStore, tmp_path: Path
) -> None:
    scene = make_scene(store, tmp_path, "waits", rows=3)
    key = artifacts.heldout_key(scene.resolved.tenant_id, scene.resolved.dataset_id)
    stored = store.read(key)
    assert stored is not None
    store.delete(key)
    assert scene.take(checkpoint_saved(scene.resolved, scene.untrained)) == []
    assert scene.written() == {}
    store.put_new(key, stored.data)
    published = scene.take(scene.heldout)
    assert {e.event().step for e in published if e.type == "checkpoint.evaluated"} == {0, 8}  # type: ignore[attr-defined]


def test_no_student_before_the_training_is_done(store: ObjectStore, tmp_path: Path) -> None:
    scene = make_scene(store, tmp_path, "undone", rows=3)
    store_state(store, scene.resolved, scene.published, done=False)
    kinds = {envelope.type for envelope in scene.take(scene.heldout)}
    assert "checkpoint.evaluated" in kinds
    assert "student.evaluated" not in kinds
    store_state(store, scene.resolved, scene.published, done=True)
    again = scene.take(training_completed(scene.resolved, scene.trained))
    assert [envelope.type for envelope in again][-1] == "student.evaluated"


def test_a_stopped_pipeline_is_dropped(store: ObjectStore, tmp_path: Path) -> None:
    scene = make_scene(store, tmp_path, "stopped", rows=3)
    shards.stop_pipeline(store, scene.resolved)
    assert scene.take(scene.heldout, training_completed(scene.resolved, scene.trained)) == []
    assert scene.written() == {}


def test_without_reference_weights_only_the_full_figure_is_missing(
    store: ObjectStore, tmp_path: Path
) -> None:
    scene = make_scene(store, tmp_path, "unreferenced", reference=False, rows=5)
    scene.take(scene.heldout)
    report = Report.model_validate_json(scene.student_file("report.json"))
    assert report.model.kl_full is None
    assert report.model.kl_top20 is not None
    assert report.teacher.kl_top20 is None
    assert report.teacher.ppl is not None
    assert report.teacher.ppl < (report.model.ppl or 0)


def test_a_heldout_set_without_rows_still_gives_a_student(
    store: ObjectStore, tmp_path: Path
) -> None:
    scene = make_scene(store, tmp_path, "empty", rows=0)
    scene.take(scene.heldout)
    report = Report.model_validate_json(scene.student_file("report.json"))
    assert report.step == 8
    assert report.model.rows == 0
    assert report.model.ppl is None


def test_rows_per_part_that_changed_in_between_is_named(store: ObjectStore, tmp_path: Path) -> None:
    scene = make_scene(store, tmp_path, "changed", rows=4)
    store_state(store, scene.resolved, scene.published[:1], done=False)
    scene.take(scene.heldout)
    store.delete(artifacts.report_key(scene.resolved.tenant_id, scene.resolved.training_id, 0))
    scene.settings = scene.settings.model_copy(update={"rows_per_part": 2})
    with pytest.raises(PermanentError, match="EVALUATOR_ROWS_PER_PART"):
        scene.take(scene.heldout)


def test_reference_weights_outside_the_operators_folders_are_refused(
    store: ObjectStore, tmp_path: Path
) -> None:
    scene = make_scene(store, tmp_path, "refused", rows=2)
    scene.settings = scene.settings.model_copy(update={"file_roots": (tmp_path / "other",)})
    with pytest.raises(PermanentError) as refused:
        scene.take(scene.heldout)
    assert refused.value.reason == "model_folder_refused"
    assert scene.written() == {}


def test_weights_that_do_not_fit_their_config_are_refused(
    store: ObjectStore, tmp_path: Path
) -> None:
    """A layer left random would look like a bad student."""
    scene = make_scene(store, tmp_path, "misfit", rows=2)
    folder = tmp_path / "weak"
    config = json.loads((folder / "config.json").read_text()) | {"num_hidden_layers": 4}
    (folder / "config.json").write_text(json.dumps(config))
    published = store_checkpoint(store, scene.resolved, folder, step=4)
    store_state(store, scene.resolved, [published])
    with pytest.raises(PermanentError, match="do not fit each other"):
        scene.take(checkpoint_saved(scene.resolved, published))


def test_figures_are_rendered_from_the_store(finished: Scene, store: ObjectStore) -> None:
    """As a worker that was just started does: nothing was counted in this process."""
    scrape = StoredFigures(lambda: store, most=10, refresh_seconds=60)
    families = {family.name: family for family in scrape.collect()}
    family = families["stillhouse_evaluator_kl_full_nats"]
    shown = {tuple(s.labels.values()): s.value for s in family.samples}
    report = finished.report(8)
    assert shown["pl-finished", "student"] == report.model.kl_full
    assert shown["pl-finished", "teacher"] == 0.0
    step = families["stillhouse_evaluator_step_count"].samples
    assert {s.labels["pipeline"]: s.value for s in step}["pl-finished"] == 8
