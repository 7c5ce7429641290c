"""A pipeline in a store, ready to be evaluated, and the evaluator's jobs without a broker.

scene = make_scene(store, tmp_path, "name")
scene.take(scene.heldout, training_completed(scene.resolved, scene.trained))
scene.report(8); scene.student_file("README.md"); scene.written()
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from services.evaluator.evaluation import Evaluation
from services.evaluator.handlers import HANDLERS
from services.evaluator.jobs import JOBS, EvaluatorContext
from services.evaluator.models import Models, prepare_torch
from services.evaluator.settings import EvaluatorSettings
from stillhouse.chassis.jobs import Job
from stillhouse.chassis.references import sources_of
from stillhouse.chassis.storage import ObjectStore
from stillhouse.contracts import artifacts
from stillhouse.contracts.envelope import Envelope
from stillhouse.contracts.spec import ResolvedSpec
from stillhouse.contracts.trainings import Published, Report
from tests.support import shards
from tests.support.reports import store_checkpoint, store_state


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
            self.store,
            work_dir=self.settings.work_dir,
            sources=sources_of(self.settings),
            device="cpu",
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
