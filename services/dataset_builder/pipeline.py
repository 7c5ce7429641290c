"""The steps as a list, and the rule that every item of a batch ends as one row or one rejection."""

from __future__ import annotations

import traceback
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

from services.dataset_builder import reasons
from services.dataset_builder.records import Draft, Recipe, Reject
from services.dataset_builder.steps.align import align
from services.dataset_builder.steps.clean import clean
from services.dataset_builder.steps.filter import filter_answer
from services.dataset_builder.steps.heldout import check_heldout
from services.dataset_builder.steps.length import check_length
from services.dataset_builder.steps.parse import parse
from services.dataset_builder.steps.render import render
from stillhouse.chassis.errors import StillhouseError
from stillhouse.chassis.logs import logger
from stillhouse.contracts.responses import Answer, Item, Rejection

log = logger(__name__)

Step = Callable[[Draft, Recipe], Draft]

# The names stand in every shard's header: a step that changes what it does gets a new one.
STEPS: tuple[tuple[str, Step], ...] = (
    ("parse", parse),
    ("clean", clean),
    ("filter", filter_answer),
    ("heldout", check_heldout),
    ("render", render),
    ("align", align),
    ("length", check_length),
)
STEP_NAMES: list[str] = [name for name, _ in STEPS]


def run_steps(
    items: Iterable[Item],
    answers: Mapping[str, Answer],
    rejected: Iterable[Rejection],
    recipe: Recipe,
) -> tuple[list[Draft], list[Rejection]]:
    """Make rows of a batch's answers; both lists are in the order of the items.

    `rejected` are the rejections of earlier stages; an item that has one keeps it. An error of a
    step itself costs the one item (`step_failed`), not the other rows of its batch.
    """
    rows: list[Draft] = []
    rejections: list[Rejection] = []
    earlier = {rejection.item_id: rejection for rejection in rejected}
    for item in items:
        outcome = earlier.get(item.item_id) or _run(item, answers.get(item.item_id), recipe)
        if isinstance(outcome, Rejection):
            rejections.append(outcome)
        else:
            rows.append(outcome)
    return rows, rejections


def rejection(item_id: str, reason: str, detail: str = "") -> Rejection:
    return Rejection(item_id=item_id, stage="build", reason=reason, detail=detail[:500])


def _run(item: Item, answer: Answer | None, recipe: Recipe) -> Draft | Rejection:
    if answer is None:
        detail = "the batch closed without an answer or a rejection of this item"
        return rejection(item.item_id, reasons.NO_ANSWER, detail)
    draft = Draft(item=item, body=answer.body)
    running = ""
    try:
        for name, step in STEPS:
            running = name
            draft = step(draft, recipe)
    except Reject as refused:
        return rejection(item.item_id, refused.reason, refused.detail)
    except (StillhouseError, MemoryError):
        raise
    except Exception as error:
        # Kind and place alone: the text of an error may quote an answer.
        kind, place = type(error).__name__, traceback.extract_tb(error.__traceback__)[-1]
        where = f"{Path(place.filename).name}:{place.lineno}"
        log.error("a step failed", step=running, item=item.item_id, error=kind, where=where)
        detail = f"step {running} failed: {kind} at {where}"
        return rejection(item.item_id, reasons.STEP_FAILED, detail)
    return draft
