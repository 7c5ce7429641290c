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
    length = len(draft.text.strip())
    if not draft.calls:  # a call is an answer, whatever is said beside it
        if length == 0:
            raise Reject(reasons.EMPTY_ANSWER)
        if length < recipe.options.min_characters:
            least = recipe.options.min_characters
            raise Reject(
                reasons.TOO_SHORT,
                f"{length} characters, and dataset.min_characters is {least}",
            )
    if finish == "length" and (recipe.options.drop_cut or draft.calls):
        why = "dataset.drop_cut is set" if recipe.options.drop_cut else "half a call is none"
        raise Reject(reasons.CUT, f"ended by length, and {why}")
    return draft
