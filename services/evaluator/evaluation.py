"""What the evaluator does with a checkpoint and with a finished training.

Stored state decides: every function looks at what is in the store, does what is missing, and
returns the events to publish and the jobs to enqueue. So each may be called twice, late, or
after a crash in the middle of itself.

    heldout.sealed     -> evaluate_training   -> evaluate_checkpoint for all that are published
    checkpoint.saved   -> evaluate_checkpoint -> evaluate_part for each part of the validation rows
    last part there    -> report.json, checkpoint.evaluated, and evaluate_student
    training.completed -> evaluate_student    -> evaluate_part for the test rows, when all reports
                          of a finished training are in; then the student folder
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import TypeVar

from pydantic import BaseModel

from services.evaluator.fidelity import hidden_states, score_rows, stored_sums
from services.evaluator.generate import Prompt, generate
from services.evaluator.models import Models, RowCache, StateCache, weights_of
from services.evaluator.report import (
    AnswersPart,
    GeneratedAnswer,
    RowsPart,
    choose,
    test_report,
    validation_report,
)
from services.evaluator.settings import EvaluatorSettings
from services.evaluator.statistics import RowSums
from services.evaluator.student_folder import StudentInputs, write_student
from services.evaluator.suite import Part, Row, Suite, first_of_each_prompt
from services.evaluator.written import WriteOnce
from stillhouse.chassis.errors import MissingObject
from stillhouse.chassis.storage import AlreadyExists, ObjectStore
from stillhouse.contracts import artifacts
from stillhouse.contracts.artifacts import ObjectRef
from stillhouse.contracts.canonical import canonical_json
from stillhouse.contracts.chat import ChatTokenizer
from stillhouse.contracts.events import (
    CheckpointEvaluated,
    Event,
    Split,
    StageProgressed,
    StudentEvaluated,
)
from stillhouse.contracts.shards import Heldout
from stillhouse.contracts.spec import ResolvedSpec
from stillhouse.contracts.trainings import (
    CheckpointManifest,
    Published,
    Report,
    StudentManifest,
    TrainingState,
)

M = TypeVar("M", bound=BaseModel)
Arguments = dict[str, int | str]
Watching = Callable[[int, int], None]


@dataclass
class Next:
    """What follows from a job: events to publish, then jobs of this service to enqueue."""

    events: list[Event] = field(default_factory=list)
    jobs: list[tuple[str, Arguments]] = field(default_factory=list)
    written: str = ""  # report or student, where this very call wrote one
    rows: int = 0  # rows measured by this very call

    @classmethod
    def nothing(cls) -> Next:
        return cls()


@dataclass(frozen=True)
class Bench:
    """One pipeline's inputs, as far as they exist: spec, suite, training."""

    spec: ResolvedSpec
    suite: Suite
    state: TrainingState

    @property
    def tenant(self) -> str:
        return self.spec.tenant_id

    def published(self, step: int) -> Published | None:
        """The checkpoint that counts for a step: the first that its training published."""
        return next((entry for entry in self.state.published if entry.step == step), None)


class Evaluation:
    """The evaluator's work, over a store and the models that this process keeps open."""

    def __init__(self, store: ObjectStore, models: Models, settings: EvaluatorSettings) -> None:
        self._store = store
        self._models = models
        self._settings = settings
        self._states = StateCache(settings.reference_cache_mib << 20)
        self._rows = RowCache()
        self._written = WriteOnce(store)

    # Jobs

    def evaluate_training(self, tenant: str, pipeline: str) -> Next:
        """The held-out rows are frozen: evaluate every checkpoint that is there already."""
        bench = self._bench(tenant, pipeline)
        if bench is None:
            return Next.nothing()
        steps = sorted({entry.step for entry in bench.state.published})
        return Next(jobs=[("evaluate_checkpoint", {"step": step}) for step in steps])

    def evaluate_checkpoint(self, tenant: str, pipeline: str, step: int) -> Next:
        """Ask for the missing parts of a checkpoint's report, or publish the report again."""
        found = self._published(tenant, pipeline, step)
        if found is None:
            return Next.nothing()
        bench, entry = found
        missing = self._missing(bench, step, "validation")
        if missing:
            return Next(jobs=_part_jobs(step, missing))
        return self._finish_validation(bench, entry)

    def evaluate_part(
        self, tenant: str, pipeline: str, step: int, number: int, watching: Watching
    ) -> Next:
        """Measure one part; whoever sees that it was the last goes on from there. `watching` is
        told how far the reference's weights are fetched."""
        found = self._published(tenant, pipeline, step)
        if found is None:
            return Next.nothing()
        bench, entry = found
        part = bench.suite.part(number)
        measured = 0
        if not self._written.exists(self._part_key(bench, step, part)):
            if part.kind == "rows":
                measured = self._measure_rows(bench, entry, part, watching)
            else:
                measured = self._measure_answers(bench, entry, part)
        if self._missing(bench, step, part.split, first_only=True):
            progress = StageProgressed(
                stage="evaluate",
                figures={"step": step, "part": number, "parts": len(bench.suite.parts)},
            )
            return Next(events=[progress] if measured else [], rows=measured)
        if part.split == "validation":
            following = self._finish_validation(bench, entry)
        else:
            following = Next(jobs=[("evaluate_student", {})])
        following.rows = measured
        return following

    def evaluate_student(self, tenant: str, pipeline: str) -> Next:
        """Read test and write the student folder, when the training and its reports are done."""
        bench = self._bench(tenant, pipeline)
        if bench is None or not bench.state.done:
            return Next.nothing()
        reports, unreported = self._validation_reports(bench)
        if unreported:
            # The message of a checkpoint in between may be lost for ever: the state still names it.
            return Next(jobs=[("evaluate_checkpoint", {"step": step}) for step in unreported])
        spec = bench.spec
        manifest_key = artifacts.student_manifest_key(tenant, spec.student_id)
        if stored := self._store.find_model(manifest_key, StudentManifest):
            return Next(events=[_student_evaluated(*stored)])
        chosen = choose(reports)
        entry = bench.published(chosen.step)
        if entry is None:
            return Next.nothing()
        steps = sorted({0, chosen.step} & {entry.step for entry in bench.state.published})
        jobs: list[tuple[str, Arguments]] = []
        for step in steps:
            jobs += _part_jobs(step, self._missing(bench, step, "test"))
        if jobs:
            return Next(jobs=jobs)
        inputs = StudentInputs(
            spec=spec,
            heldout=bench.suite.heldout,
            heldout_ref=bench.suite.heldout_ref,
            tokenizer=self._tokenizer(spec),
            checkpoint=entry.manifest,
            report=self._test_report(bench, entry),
            validation=reports,
        )
        manifest, ref = write_student(self._store, inputs, self._models.fetch(entry.manifest))
        return Next(events=[_student_evaluated(manifest, ref)], written="student")

    # Measuring

    def _measure_rows(self, bench: Bench, entry: Published, part: Part, watching: Watching) -> int:
        spec, reference = bench.spec, bench.spec.reference
        rows = self._load_rows(bench, part.split)[part.start : part.stop]
        vocabulary, chunk = self._tokenizer(spec).vocabulary, self._settings.chunk_positions
        head, states, known = None, None, None
        if reference is not None:
            # Opened before the checkpoint: its states may be in memory, its head is needed anyhow.
            pin = spec.pinned.get(reference)
            teacher = self._models.reference(reference, pin, watching)
            head = teacher.lm_head
            key = (bench.suite.heldout_ref.sha256, reference, part.number)
            states = self._states.get(key)
            if states is None:
                states = hidden_states(teacher, rows)
                self._states.put(key, states)
        floor_key = artifacts.reference_part_key(bench.tenant, spec.dataset_id, part.number)
        if not self._written.exists(floor_key):
            if head is None or states is None:
                known = stored_sums(rows)
            else:
                known = score_rows(
                    head,
                    states,
                    rows,
                    reference_head=head,
                    reference_states=states,
                    vocabulary=vocabulary,
                    chunk=chunk,
                )
            # Before the checkpoint's own part, which so implies that the floor is there.
            self._keep(floor_key, self._rows_part(bench, reference or "stored", part, known))
        model = self._models.checkpoint(entry.manifest)
        sums = score_rows(
            model.lm_head,
            hidden_states(model, rows),
            rows,
            reference_head=head,
            reference_states=states,
            vocabulary=vocabulary,
            chunk=chunk,
        )
        self._keep(
            self._part_key(bench, entry.step, part),
            self._rows_part(bench, self._weights(entry), part, sums),
        )
        return len(rows)

    def _rows_part(self, bench: Bench, subject: str, part: Part, sums: list[RowSums]) -> RowsPart:
        return RowsPart(
            subject=subject,
            heldout_sha256=bench.suite.heldout_ref.sha256,
            part=part.number,
            split=part.split,
            start=part.start,
            stop=part.stop,
            rows=sums,
        )

    def _measure_answers(self, bench: Bench, entry: Published, part: Part) -> int:
        spec, chat = bench.spec.spec, self._tokenizer(bench.spec)
        rows = self._load_rows(bench, part.split)
        shown = first_of_each_prompt(rows, spec.evaluation.samples)
        counted = first_of_each_prompt(rows, self._settings.stop_rate_prompts)
        most = min(spec.signal.max_tokens, self._settings.generate_tokens)
        prompts = [_prompt(row, 0.0) for row in shown]
        prompts += [_prompt(row, spec.signal.temperature) for row in counted]
        answers: list[GeneratedAnswer] = []
        if prompts:
            continuations = generate(
                self._models.checkpoint(entry.manifest),
                prompts,
                eos_id=chat.eos_id,
                max_tokens=most,
                seed=spec.training.seed,
                batch=self._settings.generate_batch,
            )
            answers = [
                GeneratedAnswer(
                    row_id=prompt.row_id,
                    tokens=len(found.ids),
                    stopped=found.stopped,
                    text=chat.decode(found.ids).strip(),
                )
                for prompt, found in zip(prompts, continuations, strict=True)
            ]
        stored = AnswersPart(
            training_id=bench.spec.training_id,
            step=entry.step,
            subject=self._weights(entry),
            heldout_sha256=bench.suite.heldout_ref.sha256,
            part=part.number,
            max_tokens=most,
            temperature=spec.signal.temperature,
            greedy=answers[: len(shown)],
            sampled=answers[len(shown) :],
        )
        self._keep(self._part_key(bench, entry.step, part), stored)
        return len(prompts)

    # Reports

    def _finish_validation(self, bench: Bench, entry: Published) -> Next:
        key = artifacts.report_key(bench.tenant, bench.spec.training_id, entry.step)
        stored = self._written.find(key, Report)
        written = ""
        if stored is None:
            report = validation_report(
                bench.suite,
                bench.spec,
                self._load_rows(bench, "validation"),
                training_id=bench.spec.training_id,
                step=entry.step,
                checkpoint=entry.manifest,
                model=self._rows_parts(bench, entry.step, "validation"),
                teacher=self._reference_parts(bench, "validation"),
            )
            stored, written = self._keep(key, report), "report"
        report, ref = stored
        training = bench.spec.training_id
        events: list[Event] = [
            CheckpointEvaluated(training_id=training, step=entry.step, report=ref)
        ]
        if written:
            events.append(StageProgressed(stage="evaluate", figures=_figures(report)))
        return Next(events=events, jobs=[("evaluate_student", {})], written=written)

    def _validation_reports(self, bench: Bench) -> tuple[list[Report], list[int]]:
        """The reports of the published steps, and the steps that have none yet."""
        reports, unreported = [], []
        for step in sorted({entry.step for entry in bench.state.published}):
            key = artifacts.report_key(bench.tenant, bench.spec.training_id, step)
            stored = self._written.find(key, Report)
            if stored is None:
                unreported.append(step)
            else:
                reports.append(stored[0])
        return reports, unreported

    def _test_report(self, bench: Bench, chosen: Published) -> Report:
        untrained = bench.published(0) if chosen.step else None
        return test_report(
            bench.suite,
            bench.spec,
            self._load_rows(bench, "test"),
            training_id=bench.spec.training_id,
            step=chosen.step,
            checkpoint=chosen.manifest,
            teacher=self._reference_parts(bench, "test"),
            model=self._rows_parts(bench, chosen.step, "test"),
            answers=self._answers_part(bench, chosen.step),
            untrained=self._rows_parts(bench, 0, "test") if untrained else None,
            untrained_answers=self._answers_part(bench, 0) if untrained else None,
        )

    def _rows_parts(self, bench: Bench, step: int, split: Split) -> list[RowsPart]:
        return self._all(
            RowsPart, (self._part_key(bench, step, part) for part in _rows_of(bench, split))
        )

    def _reference_parts(self, bench: Bench, split: Split) -> list[RowsPart]:
        tenant, dataset = bench.tenant, bench.spec.dataset_id
        keys = (
            artifacts.reference_part_key(tenant, dataset, p.number) for p in _rows_of(bench, split)
        )
        return self._all(RowsPart, keys)

    def _answers_part(self, bench: Bench, step: int) -> AnswersPart:
        part = next(part for part in bench.suite.of_split("test") if part.kind == "answers")
        return self._all(AnswersPart, [self._part_key(bench, step, part)])[0]

    # The store

    def _bench(self, tenant: str, pipeline: str) -> Bench | None:
        """Everything that evaluating needs; None while some of it is missing, or no longer
        wanted. The event that brings the missing part comes by itself."""
        if self._written.exists(artifacts.stopped_key(tenant, pipeline)):
            return None
        found = self._written.find(artifacts.spec_key(tenant, pipeline), ResolvedSpec)
        if found is None:
            return None
        spec = found[0]
        heldout = self._written.find(artifacts.heldout_key(tenant, spec.dataset_id), Heldout)
        state = self._store.find_model(
            artifacts.training_state_key(tenant, spec.training_id), TrainingState
        )
        if heldout is None or state is None:
            return None
        return Bench(spec, Suite.of(*heldout, self._settings.rows_per_part), state[0])

    def _published(self, tenant: str, pipeline: str, step: int) -> tuple[Bench, Published] | None:
        bench = self._bench(tenant, pipeline)
        entry = None if bench is None else bench.published(step)
        return None if bench is None or entry is None else (bench, entry)

    def _load_rows(self, bench: Bench, split: Split) -> list[Row]:
        key = (bench.suite.heldout_ref.sha256, split)
        rows = self._rows.get(key)
        if rows is None:
            rows = bench.suite.load_rows(self._store, split)
            self._rows.put(key, rows)
        return rows

    def _tokenizer(self, spec: ResolvedSpec) -> ChatTokenizer:
        return self._written.get(spec.tokenizer, ChatTokenizer)

    def _weights(self, entry: Published) -> str:
        """The digest of a checkpoint's weights: a step that was saved again after damage has
        another manifest and the same bits."""
        manifest = self._written.get(entry.manifest, CheckpointManifest)
        return weights_of(manifest).sha256

    def _part_key(self, bench: Bench, step: int, part: Part) -> str:
        return artifacts.report_part_key(bench.tenant, bench.spec.training_id, step, part.number)

    def _missing(
        self, bench: Bench, step: int, split: Split, *, first_only: bool = False
    ) -> list[Part]:
        missing = []
        # The last parts are done last: looking from the end mostly takes one look.
        for part in reversed(bench.suite.of_split(split)):
            if not self._written.exists(self._part_key(bench, step, part)):
                missing.append(part)
                if first_only:
                    break
        return missing[::-1]

    def _all(self, model: type[M], keys: Iterable[str]) -> list[M]:
        found = []
        for key in keys:
            stored = self._store.find_model(key, model)
            if stored is None:
                raise MissingObject(f"{key} was there and is not any more")
            found.append(stored[0])
        return found

    def _keep(self, key: str, value: M) -> tuple[M, ObjectRef]:
        """Write once; where another process was first, its object counts."""
        try:
            ref = self._store.put_new(key, canonical_json(value.model_dump(mode="json")))
        except AlreadyExists:
            stored = self._store.find_model(key, type(value))
            if stored is None:
                raise MissingObject(f"{key} was there and is not any more") from None
            return stored
        return value, ref


def _rows_of(bench: Bench, split: Split) -> list[Part]:
    return [part for part in bench.suite.of_split(split) if part.kind == "rows"]


def _part_jobs(step: int, parts: list[Part]) -> list[tuple[str, Arguments]]:
    return [("evaluate_part", {"step": step, "part": part.number}) for part in parts]


def _prompt(row: Row, temperature: float) -> Prompt:
    return Prompt(row.row_id, row.ids[: row.prompt_tokens], temperature)


def _figures(report: Report) -> dict[str, float]:
    model = report.model
    named = {
        "kl_top20": model.kl_top20,
        "kl_full": model.kl_full,
        "ppl": model.ppl,
        "top1": model.top1,
    }
    return {"step": float(report.step)} | {k: v for k, v in named.items() if v is not None}


def _student_evaluated(manifest: StudentManifest, ref: ObjectRef) -> StudentEvaluated:
    return StudentEvaluated(
        student_id=manifest.student_id,
        training_id=manifest.training_id,
        step=manifest.step,
        manifest=ref,
        report=manifest.files["report.json"],
    )
