"""Render and mask: the prompt as ids, and the proof that the teacher saw the same ids.

Everything before the answer is masked: a row's supervised positions begin where its prompt ends.
"""

from __future__ import annotations

from dataclasses import replace

from services.dataset_builder import reasons
from services.dataset_builder.records import Draft, Recipe, Reject
from stillhouse.contracts.chat import TemplateRefused


def render(draft: Draft, recipe: Recipe) -> Draft:
    """Encode the conversation with the teacher's template.

    For a signal the count must be what the teacher counted: its log-probabilities hold for its
    own prompt only. Text alone may come from a teacher with another tokenizer.
    """
    try:
        ids = recipe.chat.encode_prompt(draft.item.messages)
    except TemplateRefused as error:
        raise Reject(reasons.TEMPLATE_REFUSED, str(error)) from error
    if recipe.signal.kind != "text":
        counted = draft.usage_prompt_tokens
        if counted is None:
            raise Reject(
                reasons.USAGE_MISSING,
                "expected usage.prompt_tokens, by which tokenizer and template are checked",
            )
        if counted != len(ids):
            raise Reject(
                reasons.PROMPT_TOKENS_DIFFER,
                f"our rendering has {len(ids)} tokens and the teacher counted {counted}: its "
                "tokenizer or chat template is another one",
            )
    return replace(draft, prompt_ids=tuple(ids))
