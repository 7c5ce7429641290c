"""Render and mask: the prompt as ids, and the proof that the teacher saw the same ids.

Everything before the answer is masked: a row's supervised positions begin where its prompt ends.
"""

from __future__ import annotations

from dataclasses import replace

from services.dataset_builder import reasons
from services.dataset_builder.records import Draft, Recipe, Reject
from stillhouse.contracts.chat import Message, TemplateRefused, TurnDiffers


def render(draft: Draft, recipe: Recipe) -> Draft:
    """Encode the conversation with the teacher's template.

    For a signal the count must be what the teacher counted: its log-probabilities hold for its
    own prompt only. Text alone may come from a teacher with another tokenizer.
    """
    try:
        ids = recipe.chat.encode_prompt(draft.item.messages, draft.item.tools)
        turn = _turn(draft, recipe) if draft.calls else ""
    except TemplateRefused as error:
        raise Reject(reasons.TEMPLATE_REFUSED, str(error)) from error
    counted = draft.usage_prompt_tokens
    scored = draft.logprobs != b"null"
    # Text alone, such as an answer given along, may have no usage: it makes a row of text.
    if recipe.signal.kind != "text" and (scored or counted is not None):
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
    return replace(draft, prompt_ids=tuple(ids), turn=turn)


def _turn(draft: Draft, recipe: Recipe) -> str:
    """The assistant's turn with its calls as the template writes it, without what ends it."""
    answer = Message(
        role="assistant",
        content=draft.text if draft.text.strip() else None,
        tool_calls=list(draft.calls),
    )
    try:
        return recipe.chat.render_turn(draft.item.messages, draft.item.tools, answer)
    except TurnDiffers as error:
        raise Reject(reasons.TURN_DIFFERS, str(error)) from error
