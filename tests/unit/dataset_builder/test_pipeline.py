"""Every item of a batch ends as exactly one row or one rejection, whatever happened to it."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from services.dataset_builder import pipeline, reasons
from services.dataset_builder.pipeline import STEP_NAMES, run_steps
from services.dataset_builder.records import Draft, Recipe
from stillhouse.chassis.errors import StoreUnavailable
from stillhouse.contracts.responses import Rejection
from tests.support.answers import make_answer, make_body, make_items
from tests.support.shards import make_resolved_spec
from tests.support.steps import honest, make_recipe, outcome, question

ITEMS = make_items(make_resolved_spec(), 2, 6)


def test_the_steps_are_a_list_in_the_order_in_which_they_run() -> None:
    assert STEP_NAMES == ["parse", "clean", "filter", "heldout", "render", "align", "length"]


def test_each_item_is_one_row_or_one_rejection_in_the_order_of_the_items() -> None:
    answers = {i.item_id: make_answer(i, make_body(i.messages)) for i in ITEMS}
    answers[ITEMS[1].item_id] = make_answer(ITEMS[1], "garbage")
    del answers[ITEMS[3].item_id]
    earlier = Rejection(item_id=ITEMS[4].item_id, stage="collect", reason="teacher_refused")
    rows, rejections = run_steps(ITEMS, answers, [earlier], make_recipe())
    assert [row.item.item_id for row in rows] == [ITEMS[n].item_id for n in (0, 2, 5)]
    assert [(r.item_id, r.stage, r.reason) for r in rejections] == [
        (ITEMS[1].item_id, "build", reasons.MALFORMED_JSON),
        (ITEMS[3].item_id, "build", reasons.NO_ANSWER),
        (ITEMS[4].item_id, "collect", "teacher_refused"),
    ]


def test_an_answer_to_an_item_of_another_batch_is_not_looked_at() -> None:
    stranger = question("not asked here")
    answers = {stranger.item_id: make_answer(stranger, honest())}
    rows, rejections = run_steps(ITEMS[:1], answers, [], make_recipe())
    assert (rows, [r.reason for r in rejections]) == ([], [reasons.NO_ANSWER])


def failing(error: Exception) -> Callable[[Draft, Recipe], Draft]:
    def step(draft: Draft, recipe: Recipe) -> Draft:
        if draft.item is ITEMS[1]:
            raise error
        return draft

    return step


def test_a_step_that_fails_costs_one_item(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pipeline, "STEPS", (("clean", failing(KeyError("secret answer"))),))
    answers = {i.item_id: make_answer(i, "") for i in ITEMS}
    rows, rejections = run_steps(ITEMS, answers, [], make_recipe())
    assert (len(rows), [r.reason for r in rejections]) == (5, [reasons.STEP_FAILED])
    assert "KeyError" in rejections[0].detail
    assert "secret" not in rejections[0].detail


@pytest.mark.parametrize("error", [StoreUnavailable("away"), MemoryError()])
def test_what_is_not_the_items_fault_ends_the_batch(
    monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    monkeypatch.setattr(pipeline, "STEPS", (("clean", failing(error)),))
    answers = {i.item_id: make_answer(i, "") for i in ITEMS}
    with pytest.raises(type(error)):
        run_steps(ITEMS, answers, [], make_recipe())


json_values = st.recursive(
    st.none() | st.booleans() | st.floats(allow_nan=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=8,
)


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    found = [path]
    if isinstance(value, dict):
        for key, inner in value.items():
            found += places(inner, (*path, key))
    if isinstance(value, list):
        for number, inner in enumerate(value[:3]):
            found += places(inner, (*path, number))
    return found


BODY = json.loads(honest(k=2, max_tokens=4))
PLACES = [path for path in places(BODY) if path]


@settings(deadline=None)
@given(path=st.sampled_from(PLACES), value=json_values)
def test_no_single_field_of_an_answer_can_break_a_step(path: tuple[Any, ...], value: Any) -> None:
    body = json.loads(json.dumps(BODY))
    inner = body
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = value
    found = outcome(json.dumps(body))
    if isinstance(found, Rejection):
        assert found.reason in reasons.REJECTIONS - {reasons.STEP_FAILED}, found
    else:
        assert found.signal_reason in reasons.TEXT_ROWS | {None}
        assert (found.stored is None) == (found.signal == "text")


@settings(deadline=None)
@given(body=st.text(max_size=60) | json_values.map(json.dumps))
def test_no_body_can_break_a_step(body: str) -> None:
    found = outcome(body)
    assert isinstance(found, Rejection)
    assert found.reason != reasons.STEP_FAILED, found
