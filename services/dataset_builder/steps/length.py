"""Length: rows that no training could hold."""

from __future__ import annotations

from services.dataset_builder import reasons
from services.dataset_builder.records import Draft, Recipe, Reject


def check_length(draft: Draft, recipe: Recipe) -> Draft:
    """Refuse rows of more tokens than the spec allows; they are never cut."""
    tokens, most = len(draft.prompt_ids) + len(draft.answer_ids), recipe.options.max_tokens
    if tokens > most:
        raise Reject(reasons.TOO_LONG, f"{tokens} tokens, and dataset.max_tokens is {most}")
    return draft
