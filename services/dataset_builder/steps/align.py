"""Align: the answer as the teacher's own token ids, with the outcomes it weighed at each.

Ids that the teacher gave are used as they are and must decode to the text. Without them the
bytes of each token are looked up in the vocabulary: an alternative that is not found goes to the
tail, a sampled token that is not found leaves the row as text. So do tokens that the server does
not list: llama.cpp lists a character of several tokens once, with the id of the last. A row that
keeps no signal says why in `signal_reason`; nothing is trained on ids that do not decode to the
answer.

An answer that calls functions is its whole turn: the teacher's ids where they spell the calls, else
the text that the template writes. Reasoning apart from the answer is not trained on, so where the
ids hold it too the row is text.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

from services.dataset_builder import reasons
from services.dataset_builder.calls import spells_calls
from services.dataset_builder.records import Draft, Recipe, Reject
from services.dataset_builder.scored import (
    Position,
    TextOnly,
    parse_positions,
    sampled_ids,
    text_of,
)
from services.dataset_builder.signals import keep_counts, keep_topk
from services.dataset_builder.steps.clean import REPLACEMENT
from services.dataset_builder.vocabulary import Vocabulary


def align(draft: Draft, recipe: Recipe) -> Draft:
    """Fill in the answer's ids and, where the spec asks for it and it can be had, its signal."""
    if recipe.signal.kind == "text":
        return _as_text(draft, recipe, None)
    try:
        positions = parse_positions(draft.logprobs)
        sampled = sampled_ids(positions, draft, recipe.vocabulary)
        answer, text = _answer_of(sampled, positions, draft, recipe)
    except TextOnly as gone:
        return _as_text(draft, recipe, gone.reason)
    draft = replace(draft, logprobs=b"null")  # parsed: not held beside the row
    ids = [*answer, recipe.chat.eos_id] if draft.finish_reason == "stop" else answer
    aligned = replace(draft, text=text, answer_ids=tuple(ids))
    try:
        if recipe.signal.kind == "counts":
            stored = keep_counts(positions, ids, recipe)
        else:
            stored = keep_topk(positions, sampled, ids, recipe)
    except TextOnly as gone:
        return replace(aligned, signal_reason=gone.reason)
    except ValueError:
        # No outcome left, or probabilities that sum to more than one.
        return replace(aligned, signal_reason=reasons.LOGPROBS_NOT_RAW)
    kind: Literal["topk", "counts"] = "counts" if recipe.signal.kind == "counts" else "topk"
    return replace(aligned, signal=kind, stored=stored)


def _answer_of(
    sampled: list[int], positions: list[Position], draft: Draft, recipe: Recipe
) -> tuple[list[int], str]:
    """The ids of the answer without its end, and their text, which must be what was answered."""
    if draft.calls and any(position.id is None for position in positions):
        raise TextOnly(reasons.CALL_NOT_IN_TOKENS)  # text alone cannot tell which ids spell a call
    try:
        answer = _without_end(sampled, draft, recipe)
        if draft.calls:
            return answer, _check_calls(answer, draft, recipe)
        return answer, _check_text(answer, positions, draft, recipe)
    except Reject:
        if draft.reasoning:
            raise TextOnly(reasons.REASONING_IN_TOKENS) from None
        raise


def _without_end(sampled: list[int], draft: Draft, recipe: Recipe) -> list[int]:
    """The sampled tokens but the one that ended the answer, where the teacher lists it.

    A model may have several end tokens: whichever it sampled, a student learns the one that its
    template uses. Any other control token means that the text is not all that was sampled.
    """
    control = recipe.vocabulary.control
    ended = draft.finish_reason == "stop" and sampled[-1] in control
    answer = sampled[:-1] if ended else sampled
    # The template itself may write a call with control tokens.
    written = frozenset(recipe.chat.encode_text(draft.turn)) if draft.calls else frozenset()
    if any(i in control and (i == recipe.chat.eos_id or i not in written) for i in answer):
        raise Reject(reasons.CONTROL_TOKEN, "the answer holds a control token that is no text")
    return answer


def _check_calls(answer: list[int], draft: Draft, recipe: Recipe) -> str:
    """The text of the ids, which must spell the calls."""
    inside = all(0 <= i < recipe.vocabulary.size for i in answer)
    text = recipe.chat.decode(answer) if inside else ""
    if not spells_calls(text, draft.text, draft.calls):
        raise TextOnly(reasons.CALL_NOT_IN_TOKENS)
    if draft.reasoning and draft.reasoning.strip() in text:
        raise TextOnly(reasons.REASONING_IN_TOKENS)
    return text


def _check_text(answer: list[int], positions: list[Position], draft: Draft, recipe: Recipe) -> str:
    """The text of the ids, which must be the answer's: outer blanks aside, since some servers
    strip them, and half a character at a cut."""
    inside = all(0 <= i < recipe.vocabulary.size for i in answer)
    text = recipe.chat.decode(answer).rstrip(REPLACEMENT) if inside else None
    if text is not None and text.strip() == draft.text.strip():
        return text
    if inside and _lists_last_tokens_only(answer, positions, draft, recipe.vocabulary):
        raise TextOnly(reasons.SAMPLED_TOKENS_MISSING)
    raise Reject(
        reasons.IDS_DIFFER_FROM_TEXT,
        f"the {len(answer)} sampled tokens do not decode to the answer's "
        f"{len(draft.text)} characters: the teacher's tokenizer is another one",
    )


def _lists_last_tokens_only(
    answer: list[int], positions: list[Position], draft: Draft, vocabulary: Vocabulary
) -> bool:
    """Whether the bytes that the server lists are the answer, each entry ending as its token does:
    then the ids are right, and those of the characters' first bytes are missing."""
    listed = [text_of(position) for position in positions[: len(answer)]]
    text = b"".join(listed).decode(errors="replace").rstrip(REPLACEMENT)
    if vocabulary.pieces is None or text.strip() != draft.text.strip():
        return False
    pieces = vocabulary.pieces
    return all(data.endswith(pieces[i]) for i, data in zip(answer, listed, strict=True))


def _as_text(draft: Draft, recipe: Recipe, reason: str | None) -> Draft:
    """Encode the text itself, where the teacher's ids are not known."""
    control = recipe.vocabulary.control
    text = draft.turn if draft.calls else draft.text
    ids = recipe.chat.encode_text(text)
    if draft.calls:
        # The template may write control tokens around a call; what is called may spell none.
        called = [part for c in draft.calls for part in (c.function.name, c.function.arguments)]
        spelled = [i for part in (draft.text, *called) for i in recipe.chat.encode_text(part)]
    else:
        spelled = ids
    if any(i in control for i in spelled) or recipe.chat.eos_id in ids:
        raise Reject(reasons.CONTROL_TOKEN, "the answer's text spells a control token")
    if draft.finish_reason == "stop":
        ids.append(recipe.chat.eos_id)
    return replace(draft, text=text, answer_ids=tuple(ids), signal_reason=reason)
