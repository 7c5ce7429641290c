"""The evaluator over a real store: reports, the student folder, repeats, other orders."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from services.evaluator.evaluation import Evaluation
from services.evaluator.handlers import HANDLERS
from services.evaluator.jobs import JOBS, EvaluatorContext
from services.evaluator.metrics import StoredFigures
from services.evaluator.models import Models, prepare_torch
from services.evaluator.settings import EvaluatorSettings
from stillhouse.chassis.errors import PermanentError
from stillhouse.chassis.jobs import Job
from stillhouse.chassis.storage import ObjectStore
from stillhouse.contracts import artifacts
from stillhouse.contracts.envelope import Envelope
from stillhouse.contracts.events import CheckpointEvaluated, StudentEvaluated
from stillhouse.contracts.spec import ResolvedSpec
from stillhouse.contracts.trainings import Published, Report, StudentManifest
from stillhouse.embedded.parts import seaweedfs
from tests.support import shards
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


@dataclass
class Scene:
    """One pipeline whose training has two checkpoints; step 8 is nearer to the reference."""

    store: ObjectStore
    resolved: ResolvedSpec
    settings: EvaluatorSettings
    published: list[Published]
    heldout: Envelope
    envelopes: list[Envelope] = field(default_factory=list)

    @property
    def untrained(self) -> Published:
        return self.published[0]

    @property
    def trained(self) -> Published:
        return self.published[1]

    def context(self, queue: deque[Job]) -> EvaluatorContext:
        prepare_torch(1)
        models = Models(
            self.store, work_dir=self.settings.work_dir, roots=self.settings.roots, device="cpu"
        )
        return EvaluatorContext(
            evaluation=Evaluation(self.store, models, self.settings),
            publish=lambda *envelopes: self.envelopes.extend(envelopes),
            enqueue=queue.append,
        )

    def take(
        self, *events: Envelope, pop: Callable[[deque[Job]], Job] = deque.popleft
    ) -> list[Envelope]:
        """Handle events as the worker does, until no job is left; return what was published."""
        queue: deque[Job] = deque()
        context, before = self.context(queue), len(self.envelopes)
        for envelope in events:
            event = envelope.event()
            queue.extend(HANDLERS[type(event)](envelope, event))
        while queue:
            job = pop(queue)
            JOBS[job.name](job, context)
        return self.envelopes[before:]

    def report(self, step: int) -> Report:
        key = artifacts.report_key(self.resolved.tenant_id, self.resolved.training_id, step)
        found = self.store.find_model(key, Report)
        assert found is not None, f"no report of step {step}"
        return found[0]

    def student_file(self, name: str) -> bytes:
        stored = self.store.read(
            artifacts.student_file_key(self.resolved.tenant_id, self.resolved.student_id, name)
        )
        assert stored is not None, f"no {name}"
        return stored.data

    def written(self) -> dict[str, bytes]:
        """Everything that the evaluator wrote, by key."""
        tenant, found = self.resolved.tenant_id, {}
        prefixes = (
            f"{artifacts.training_prefix(tenant, self.resolved.training_id)}/reports/",
            f"{artifacts.dataset_prefix(tenant, self.resolved.dataset_id)}/reference/",
            f"{artifacts.student_prefix(tenant, self.resolved.student_id)}/",
        )
        for prefix in prefixes:
            for key in self.store.keys(prefix):
                stored = self.store.read(key)
                assert stored is not None
                found[key] = stored.data
        return found


def make_scene(
    store: ObjectStore, folder: Path, name: str, *, reference: bool = True, rows: int = 8
) -> Scene:
    """`name` makes the pipeline's id, so that scenes share one store."""
    teacher = shards.tiny_student(folder / "teacher", layers=3, seed=1)
    weak = shards.tiny_student(folder / "weak", layers=3, seed=2)
    near = folder / "near"
    _average(teacher, weak, near)
    resolved = shards.make_resolved_spec(
        pipeline=f"pl-{name}",
        student=f"file:{weak}",
        reference=f"file:{teacher}" if reference else None,
        signal={"kind": "topk", "k": 8, "max_tokens": 24},
    )
    shards.store_spec(store, resolved)
    heldout = shards.make_heldout(store, resolved, rows)
    entries = shards.make_train_shards(store, resolved)
    shards.make_dataset(store, resolved, entries, heldout=heldout)
    untrained = store_checkpoint(store, resolved, weak, step=0)
    trained = store_checkpoint(
        store,
        resolved,
        near,
        step=8,
        final=True,
        parent=untrained.manifest,
        shards=[entry.shard for entry in entries],
    )
    store_state(store, resolved, [untrained, trained], done=True)
    settings = EvaluatorSettings(
        broker_url="redis://nowhere",
        file_roots=str(folder),
        work_dir=folder / "work",
        rows_per_part=3,
        generate_tokens=12,
        stop_rate_prompts=4,
        metrics_refresh_seconds=1,
    )
    settings.work_dir.mkdir()
    envelope = shards.heldout_sealed(resolved, heldout[1])
    return Scene(store, resolved, settings, [untrained, trained], envelope)


def _average(one: Path, other: Path, folder: Path) -> None:
    """A model near `one`: nine parts of it and one of `other`."""
    from safetensors.torch import load_file, save_file

    folder.mkdir()
    a, b = load_file(one / "model.safetensors"), load_file(other / "model.safetensors")
    mixed = {name: 0.9 * a[name] + 0.1 * b[name] for name in a}
    save_file(mixed, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_bytes((one / "config.json").read_bytes())


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


def test_parts_in_another_order_and_process_give_the_same_bytes(
    store: ObjectStore, finished: Scene, tmp_path: Path
) -> None:
    """What a kill leaves is done by another process, in whatever order its jobs come."""
    before = finished.written()
    parts = [key for key in before if "/part-" in key]
    assert len(parts) == 3 * 2 + 3 * 2 + 2 + 6  # rows of both splits, answers, reference
    # Lose most of it, as if a worker had died in the middle. A report's part is written after
    # the reference's part over the same rows.
    for key in before:
        if not key.endswith(("part-0001.json", "part-0004.json")):
            store.delete(key)
    job = tmp_path / "again.py"
    job.write_text(
        "import json, sys\n"
        "from collections import deque\n"
        "from pathlib import Path\n"
        "from tests.integration.test_evaluator_reports import Scene\n"
        "from services.evaluator.settings import EvaluatorSettings\n"
        "from stillhouse.chassis.storage import ObjectStore\n"
        "from stillhouse.contracts.envelope import Envelope\n"
        "from stillhouse.contracts.spec import ResolvedSpec\n"
        "told = json.load(sys.stdin)\n"
        "scene = Scene(ObjectStore(**told['store']), ResolvedSpec(**told['resolved']),\n"
        "              EvaluatorSettings(**told['settings']), [], None)\n"
        "scene.take(*map(Envelope.decode, told['events']), pop=deque.pop)\n"
    )
    events = [
        training_completed(finished.resolved, finished.trained),
        checkpoint_saved(finished.resolved, finished.trained),
        finished.heldout,
    ]
    client: Any = store._client
    credentials = client._request_signer._credentials
    told = {
        "store": {
            "bucket": store.bucket,
            "endpoint_url": client.meta.endpoint_url,
            "access_key": credentials.access_key,
            "secret_key": credentials.secret_key,
        },
        "resolved": finished.resolved.model_dump(mode="json", by_alias=True),
        "settings": finished.settings.model_dump(mode="json")
        | {"work_dir": str(tmp_path), "generate_batch": 32},
        "events": [envelope.encode().decode() for envelope in events],
    }
    subprocess.run(
        [sys.executable, str(job)],
        input=json.dumps(told),
        text=True,
        check=True,
        timeout=120,
        env={"PYTHONPATH": ".", "PATH": "", "OMP_NUM_THREADS": "1"},
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
