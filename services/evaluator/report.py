"""The parts of a report, and how they become one.

A part is what one job measured: the sums of a range of rows, or answers to prompts. It is
write-once, so a job that dies is repeated and a repeated one changes nothing. Reports are made
from the parts in the order of their numbers, whoever computed them.
"""

from __future__ import annotations

from collections.abc import Sequence

from pydantic import Field

from services.evaluator.reasons import REPORT_PARTS_DISAGREE
from services.evaluator.statistics import RowSums, figures, stop_figures
from services.evaluator.suite import Row, Suite
from stillhouse.chassis.errors import PermanentError
from stillhouse.contracts.artifacts import Id, ObjectRef, Sha256
from stillhouse.contracts.events import Split
from stillhouse.contracts.responses import Record
from stillhouse.contracts.spec import ResolvedSpec
from stillhouse.contracts.trainings import Figures, Report, SamplePair


class RowsPart(Record):
    """What one model scored on a range of rows. `subject` is the digest of the checkpoint's
    weights, or the reference as the spec names it."""

    subject: str
    heldout_sha256: Sha256
    part: int
    split: Split
    start: int
    stop: int
    rows: list[RowSums]


class GeneratedAnswer(Record):
    row_id: str
    tokens: int
    stopped: bool
    text: str


class AnswersPart(Record):
    """A checkpoint's answers to test prompts: greedy ones to show, sampled ones to count."""

    training_id: Id
    step: int
    subject: str
    heldout_sha256: Sha256
    part: int
    max_tokens: int
    temperature: float = Field(description="of the sampled answers")
    greedy: list[GeneratedAnswer]
    sampled: list[GeneratedAnswer]


def row_figures(suite: Suite, split: Split, parts: Sequence[RowsPart]) -> Figures:
    """Merge all row parts of a split. Raises PermanentError where they are not its exact cut."""
    planned = [part for part in suite.of_split(split) if part.kind == "rows"]
    found = [(part.part, part.start, part.stop, part.heldout_sha256) for part in parts]
    expected = [(p.number, p.start, p.stop, suite.heldout_ref.sha256) for p in planned]
    if len({part.subject for part in parts}) > 1:
        raise PermanentError(
            "the stored parts of a report are of several models: a step was saved again with "
            "other bits; post the pipeline anew",
            reason=REPORT_PARTS_DISAGREE,
        )
    if found != expected:
        raise PermanentError(
            f"the stored parts of a report are {found[:3]}..., expected {expected[:3]}...: "
            "EVALUATOR_ROWS_PER_PART must stay what it was when the dataset's evaluation "
            "began",
            reason=REPORT_PARTS_DISAGREE,
        )
    return figures([row for part in parts for row in part.rows])


def with_stops(model: Figures, stopped: Sequence[bool]) -> Figures:
    """Add the share of answers that ended by themselves."""
    share, bounds = stop_figures(stopped)
    if share is None or bounds is None:
        return model
    return model.model_copy(
        update={"stop_rate": share, "intervals": {**model.intervals, "stop_rate": bounds}}
    )


def teacher_stops(rows: Sequence[Row], most_tokens: int | None = None) -> list[bool]:
    """Whether the teacher's stored answers ended, within as many tokens as the student had."""
    return [
        # The end of turn is one of the supervised tokens.
        row.finish_reason == "stop" and (most_tokens is None or row.supervised - 1 < most_tokens)
        for row in rows
    ]


def unmeasured(spec: ResolvedSpec, rows: Sequence[Row]) -> dict[str, str]:
    """Say which figures cannot be had for these rows, and why."""
    found: dict[str, str] = {}
    if spec.reference is None:
        weights = {teacher.known_weights for teacher in spec.spec.teachers}
        if weights == {None}:
            why = "no weights of the teacher are known (`teachers.reference`)"
        elif len(weights) > 1:
            why = "the teachers are not all the same weights, so there is no one distribution"
        else:
            why = "the teacher's tokenizer is not the student's"
        found["kl_full"] = why
    if rows and all(row.signal is None for row in rows):
        why = "the teacher gave text alone"
        if any(row.drawn for row in rows):
            why = "counts of drawn ids are unbiased to learn from, and biased in a divergence"
        found["kl_top20"] = why
        if spec.reference is None:
            found["top1"] = "the teacher's likeliest tokens are not known"
    return found


def validation_report(
    suite: Suite,
    spec: ResolvedSpec,
    rows: Sequence[Row],
    *,
    training_id: str,
    step: int,
    checkpoint: ObjectRef,
    model: Sequence[RowsPart],
    teacher: Sequence[RowsPart],
) -> Report:
    return Report(
        training_id=training_id,
        step=step,
        split="validation",
        checkpoint=checkpoint,
        heldout_sha256=suite.heldout_ref.sha256,
        teacher=with_stops(row_figures(suite, "validation", teacher), teacher_stops(rows)),
        model=row_figures(suite, "validation", model),
        unmeasured=unmeasured(spec, rows),
    )


def test_report(
    suite: Suite,
    spec: ResolvedSpec,
    rows: Sequence[Row],
    *,
    training_id: str,
    step: int,
    checkpoint: ObjectRef,
    teacher: Sequence[RowsPart],
    model: Sequence[RowsPart],
    answers: AnswersPart,
    untrained: Sequence[RowsPart] | None,
    untrained_answers: AnswersPart | None,
) -> Report:
    """The report of a student: test rows, teacher and untrained student beside it, answers."""
    by_id = {row.row_id: row for row in rows}
    sampled = [by_id[answer.row_id] for answer in answers.sampled]
    before = None
    if untrained is not None and untrained_answers is not None:
        before = with_stops(row_figures(suite, "test", untrained), _stops(untrained_answers))
    return Report(
        training_id=training_id,
        step=step,
        split="test",
        checkpoint=checkpoint,
        heldout_sha256=suite.heldout_ref.sha256,
        teacher=with_stops(
            row_figures(suite, "test", teacher), teacher_stops(sampled, answers.max_tokens)
        ),
        model=with_stops(row_figures(suite, "test", model), _stops(answers)),
        untrained=before,
        samples=_samples(by_id, answers, untrained_answers),
        unmeasured=unmeasured(spec, rows),
    )


def _stops(answers: AnswersPart) -> list[bool]:
    return [answer.stopped for answer in answers.sampled]


def _samples(
    rows: dict[str, Row], answers: AnswersPart, untrained: AnswersPart | None
) -> list[SamplePair]:
    before = {a.row_id: a.text for a in untrained.greedy} if untrained else {}
    return [
        SamplePair(
            prompt=rows[answer.row_id].prompt,
            teacher=rows[answer.row_id].answer,
            untrained=before.get(answer.row_id),
            student=answer.text,
        )
        for answer in answers.greedy
    ]


def selection_value(report: Report) -> tuple[int, float]:
    """Sort key of a checkpoint: smaller is better. Figures are compared within one kind only."""
    model = report.model
    for rank, value in enumerate((model.kl_full, model.kl_top20, model.ppl)):
        if value is not None:
            return rank, value
    return 3, 0.0


def choose(reports: Sequence[Report]) -> Report:
    """Choose the student by its validation figures; step 0 only where nothing else is.

    Without any figure, or between equals, the later step is taken.
    """
    trained = [report for report in reports if report.step > 0] or list(reports)
    return min(trained, key=lambda report: (*selection_value(report), -report.step))
