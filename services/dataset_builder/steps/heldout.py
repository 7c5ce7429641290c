"""Held-out check: no train row repeats a held-out prompt or a held-out answer (exact hash)."""

from __future__ import annotations

from services.dataset_builder import reasons
from services.dataset_builder.records import Draft, Recipe, Reject
from stillhouse.contracts.spec import normalised_text

# A short answer ("Paris.") that two prompts share is no leak, and dropping all of its kind would
# bend the train set; a sentence of this many words that comes twice is the same answer. Calls of
# functions are not compared: one call rightly answers many questions.
SHORTEST_LEAK_WORDS = 8


def check_heldout(draft: Draft, recipe: Recipe) -> Draft:
    """Refuse a train item whose normalised prompt, or answer of 8 words and more, is held out."""
    heldout = recipe.heldout
    if heldout is None:
        return draft
    if draft.item.prompt_sha256 in heldout.prompts:
        raise Reject(reasons.HELDOUT_PROMPT, "the normalised prompt is a held-out one")
    if draft.answer_sha256 in heldout.answers:
        words = len(normalised_text(draft.text).split())
        if words >= SHORTEST_LEAK_WORDS:
            raise Reject(reasons.HELDOUT_ANSWER, f"{words} words that are a held-out answer")
    return draft
