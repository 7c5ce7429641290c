"""Parts become reports, and reports choose the student."""

from __future__ import annotations

import pytest

from services.evaluator.report import (
    RowsPart,
    choose,
    row_figures,
    teacher_stops,
    unmeasured,
)
from services.evaluator.statistics import RowSums
from services.evaluator.suite import Row, Suite, plan_parts
from stillhouse.chassis.errors import PermanentError
from stillhouse.contracts.artifacts import ObjectRef
from stillhouse.contracts.shards import Heldout
from stillhouse.contracts.signals import StoredTopK
from stillhouse.contracts.trainings import Figures, Report
from tests.support.shards import make_resolved_spec

REF = ObjectRef(key="heldout.json", size=1, sha256="a" * 64)
HELDOUT = Heldout(
    tenant_id="t", pipeline_id="p", dataset_id="d", shards=[], prompt_sha256=[], answer_sha256=[]
)
SUITE = Suite(HELDOUT, REF, tuple(plan_parts(5, 1, 2)))


def _parts(subject: str = "model") -> list[RowsPart]:
    return [
        RowsPart(
            subject=subject,
            heldout_sha256=REF.sha256,
            part=part.number,
            split=part.split,
            start=part.start,
            stop=part.stop,
            rows=[
                RowSums(row_id=f"r{n}", prompt_id=f"p{n}", tokens=2, nll=float(n))
                for n in range(part.start, part.stop)
            ],
        )
        for part in SUITE.of_split("validation")
    ]


def _report(step: int, **figures: float) -> Report:
    return Report(
        training_id="t",
        step=step,
        split="validation",
        checkpoint=REF,
        heldout_sha256=REF.sha256,
        teacher=Figures(),
        model=Figures(**figures),
    )


def test_parts_merge_into_means_over_all_rows() -> None:
    found = row_figures(SUITE, "validation", _parts())
    assert (found.rows, found.tokens) == (5, 10)
    assert found.ppl == pytest.approx(2.718281828, rel=1e-6)


def test_parts_of_another_cut_or_model_are_refused() -> None:
    for wrong in (
        _parts()[:-1],
        _parts()[::-1],
        [*_parts()[:-1], _parts("another")[-1]],
        [_parts()[0].model_copy(update={"stop": 3}), *_parts()[1:]],
        [_parts()[0].model_copy(update={"heldout_sha256": "b" * 64}), *_parts()[1:]],
    ):
        with pytest.raises(PermanentError, match="stored parts of a report"):
            row_figures(SUITE, "validation", wrong)


def test_the_full_figure_decides_where_it_is_there() -> None:
    reports = [
        _report(0, kl_full=0.1, kl_top20=0.1),
        _report(4, kl_full=0.5, kl_top20=0.2),
        _report(8, kl_full=0.4, kl_top20=0.3),
    ]
    assert choose(reports).step == 8


def test_step_zero_is_the_student_only_where_nothing_was_trained() -> None:
    assert choose([_report(0, ppl=1), _report(4, ppl=9)]).step == 4
    assert choose([_report(0, ppl=1)]).step == 0


def test_between_equals_the_later_step_is_taken() -> None:
    assert choose([_report(4, ppl=2), _report(8, ppl=2), _report(0, ppl=2)]).step == 8
    assert choose([_report(0), _report(4), _report(8)]).step == 8


def test_the_teacher_stops_within_what_the_student_may_say() -> None:
    def row(finish: str, tokens: int) -> Row:
        return Row("r", "p", "", "", finish, tuple(range(3 + tokens)), 3, None)

    rows = [row("stop", 4), row("stop", 5), row("length", 3)]
    assert teacher_stops(rows) == [True, True, False]
    # Four supervised tokens are three and the end of turn.
    assert teacher_stops(rows, most_tokens=4) == [True, False, False]


TOPK = StoredTopK(1, b"", b"", b"", b"")


def _scored(signal: StoredTopK | None, drawn: bool = False) -> Row:
    return Row("r", "p", "", "", "stop", (1, 2, 3), 1, signal, drawn)


@pytest.mark.parametrize(
    ("weights", "reference", "rows", "said"),
    [
        (["file:/w"], "file:/w", [_scored(TOPK)], {}),
        (["file:/w"], "file:/w", [_scored(TOPK), _scored(None)], {}),
        ([None], None, [_scored(TOPK)], {"kl_full": "no weights of the teacher"}),
        (["file:/w"], None, [_scored(TOPK)], {"kl_full": "tokenizer is not the student's"}),
        (
            ["file:/w", "file:/v"],
            None,
            [_scored(TOPK)],
            {"kl_full": "teachers are not all the same weights"},
        ),
        (
            ["file:/w"],
            "file:/w",
            [_scored(None)],
            {"kl_top20": "text alone"},
        ),
        (
            [None],
            None,
            [_scored(None)],
            {"kl_full": "no weights", "kl_top20": "text alone", "top1": "not known"},
        ),
        (["file:/w"], "file:/w", [_scored(None, drawn=True)], {"kl_top20": "biased"}),
        (
            ["file:/w", "file:/v"],
            None,
            [_scored(None, drawn=True)],
            {"kl_full": "the same weights", "kl_top20": "biased", "top1": "not known"},
        ),
    ],
)
def test_a_report_says_which_figures_it_cannot_have_and_why(
    weights: list[str | None], reference: str | None, rows: list[Row], said: dict[str, str]
) -> None:
    teachers = [
        {
            "name": f"t{number}",
            "url": "http://h/v1",
            "model": "m",
            "terms": "own-weights",
            "usd_per_million": {"input": 0, "output": 0},
            "reference": found,
            "weight": 1,
        }
        for number, found in enumerate(weights)
    ]
    spec = make_resolved_spec(teachers=teachers).model_copy(update={"reference": reference})
    found = unmeasured(spec, rows)
    assert set(found) == set(said)
    assert all(words in found[name] for name, words in said.items())
