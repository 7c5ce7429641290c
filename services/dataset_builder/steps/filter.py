"""Filter: answers that are whole but should not be learnt from, by counted reasons."""

from __future__ import annotations

from services.dataset_builder import reasons
from services.dataset_builder.records import Draft, Recipe, Reject


def filter_answer(draft: Draft, recipe: Recipe) -> Draft:
    """Pass answers that ended by `stop` or `length`, and are as long as the spec asks."""
    finish = draft.finish_reason
    if finish == "content_filter":
        raise Reject(reasons.CONTENT_FILTER, "the teacher's provider filtered the answer")
    if finish not in ("stop", "length"):
        found = finish[:40] if finish.isprintable() else "?"
        raise Reject(reasons.UNEXPECTED_FINISH, f"expected stop or length, found {found!r}")
    if draft.refusal:
        raise Reject(reasons.REFUSED, "the answer is marked as a refusal")
    if draft.reasoning:
        raise Reject(
            reasons.REASONING_APART,
            "the reasoning is apart from the answer, so the sampled tokens are not its text: "
            "switch the teacher's reasoning off, or its parser",
        )
    length = len(draft.text.strip())
    if length == 0:
        raise Reject(reasons.EMPTY_ANSWER)
    if length < recipe.options.min_characters:
        raise Reject(
            reasons.TOO_SHORT,
            f"{length} characters, and dataset.min_characters is {recipe.options.min_characters}",
        )
    if finish == "length" and recipe.options.drop_cut:
        raise Reject(reasons.CUT, "ended by length, and dataset.drop_cut is set")
    return draft
