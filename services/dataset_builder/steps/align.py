"""Align: the answer as the teacher's own token ids, with the outcomes it weighed at each.

Ids that the teacher gave are used as they are and must decode to the text. Without them the
bytes of each token are looked up in the vocabulary: an alternative that is not found goes to the
tail, a sampled token that is not found leaves the row as text. So do tokens that the server does
not list: llama.cpp lists a character of several tokens once, with the id of the last. A row that
keeps no signal says why in `signal_reason`; nothing is trained on ids that do not decode to the
answer.
"""

from __future__ import annotations

import math
from dataclasses import replace

import msgspec

from services.dataset_builder import reasons
from services.dataset_builder.records import Draft, Recipe, Reject
from services.dataset_builder.steps.clean import REPLACEMENT
from services.dataset_builder.vocabulary import Vocabulary
from stillhouse.contracts import signals

# How far the two log-probabilities of a sampled token, its own and the one in the list, may part.
TOLERANCE = 0.05


class Outcome(msgspec.Struct, kw_only=True):
    """A token that the teacher weighed. `id` is the teacher's, where its server gives ids."""

    token: str = ""
    logprob: float
    id: int | None = None
    bytes: list[int] | None = None


class Position(Outcome, kw_only=True):
    """A token that the teacher sampled, with its likeliest alternatives."""

    top_logprobs: list[Outcome] | None = None


class Logprobs(msgspec.Struct):
    content: list[Position] | None = None


_LOGPROBS = msgspec.json.Decoder(Logprobs | None)


class TextOnly(Exception):
    """The signal cannot be used; the row goes on as text. `reason` is of `reasons.TEXT_ROWS`."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


def align(draft: Draft, recipe: Recipe) -> Draft:
    """Fill in the answer's ids and, where the spec asks for it and it can be had, its signal."""
    if recipe.signal.kind != "topk":
        return _as_text(draft, recipe, None)
    try:
        positions = _parse(draft.logprobs)
        sampled = _sampled_ids(positions, draft, recipe.vocabulary)
        answer = _without_end(sampled, draft, recipe)
        text = _check_text(answer, positions, draft, recipe)
    except TextOnly as gone:
        return _as_text(draft, recipe, gone.reason)
    draft = replace(draft, logprobs=b"null")  # parsed: not held beside the row
    ids = [*answer, recipe.chat.eos_id] if draft.finish_reason == "stop" else answer
    aligned = replace(draft, text=text, answer_ids=tuple(ids))
    try:
        outcomes = [
            _outcomes(position, token, recipe)
            for position, token in zip(positions, sampled, strict=True)
        ]
        one_hot: frozenset[int] = frozenset()
        if len(ids) > len(outcomes):
            # The teacher did not score its end of turn: an observed outcome is certain.
            outcomes.append({recipe.chat.eos_id: 0.0})
            one_hot = frozenset({len(ids) - 1})
        stored = signals.encode(
            signals.from_outcomes(outcomes, slots(recipe.signal.k), one_hot=one_hot)
        )
    except TextOnly as gone:
        return replace(aligned, signal_reason=gone.reason)
    except ValueError:
        # No outcome left, or probabilities that sum to more than one.
        return replace(aligned, signal_reason=reasons.LOGPROBS_NOT_RAW)
    return replace(aligned, signal="topk", stored=stored)


def slots(k: int) -> int:
    """Outcomes kept at a position: the k likeliest and the sampled one."""
    return k + 1


def support(kind: str, k: int) -> str:
    """Say in words which outcomes a shard's signals keep, for its header."""
    if kind != "topk":
        return "none: text only"
    return (
        f"the {k} likeliest tokens that the teacher listed, control tokens among them, and the "
        "sampled token; all others are the tail. The end of turn has the teacher's distribution "
        "where it scored it, else probability 1"
    )


def _parse(raw: bytes) -> list[Position]:
    try:
        logprobs: Logprobs | None = _LOGPROBS.decode(raw)
    except (msgspec.DecodeError, RecursionError) as error:
        raise TextOnly(reasons.LOGPROBS_MALFORMED) from error
    if logprobs is None or not logprobs.content:
        raise TextOnly(reasons.NO_LOGPROBS)
    return logprobs.content


def _sampled_ids(positions: list[Position], draft: Draft, vocabulary: Vocabulary) -> list[int]:
    """One id for each position, the teacher's own or looked up."""
    given = [position.id for position in positions]
    if None not in given:
        return [i for i in given if i is not None]
    if vocabulary.by_bytes is None:
        raise TextOnly(reasons.TOKENIZER_WITHOUT_BYTES)
    found = [_look_up(position, vocabulary) for position in positions]
    if found[-1] is None and draft.finish_reason == "stop" and not _text_of(positions[-1]):
        # The only token without text that can stand here is the one that ended the answer.
        found[-1] = vocabulary.eos_id
    if None in found:
        raise TextOnly(reasons.SAMPLED_TOKEN_UNMAPPED)
    # Bytes of two tokens may be those of a third, so the text alone proves nothing here.
    unlisted = (draft.usage_completion_tokens or 0) - len(found)
    end_is_apart = draft.finish_reason == "stop" and found[-1] not in vocabulary.control
    if unlisted > int(end_is_apart):
        raise TextOnly(reasons.SAMPLED_TOKENS_MISSING)
    return [i for i in found if i is not None]


def _look_up(outcome: Outcome, vocabulary: Vocabulary) -> int | None:
    """The id of a token by its name (control tokens) or its bytes; None where there is none."""
    control = vocabulary.control_by_text.get(outcome.token)
    if control is not None:
        return control
    assert vocabulary.by_bytes is not None
    data = _text_of(outcome)
    return vocabulary.by_bytes.get(data) if data else None


def _text_of(outcome: Outcome) -> bytes:
    if outcome.bytes is None:
        return outcome.token.encode(errors="replace")
    try:
        return bytes(outcome.bytes)
    except ValueError as error:
        raise TextOnly(reasons.LOGPROBS_MALFORMED) from error


def _without_end(sampled: list[int], draft: Draft, recipe: Recipe) -> list[int]:
    """The sampled tokens but the one that ended the answer, where the teacher lists it.

    A model may have several end tokens: whichever it sampled, a student learns the one that its
    template uses. Any other control token means that the text is not all that was sampled.
    """
    control = recipe.vocabulary.control
    ended = draft.finish_reason == "stop" and sampled[-1] in control
    answer = sampled[:-1] if ended else sampled
    if any(i in control for i in answer):
        raise Reject(reasons.CONTROL_TOKEN, "the answer holds a control token that is no text")
    return answer


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
    listed = [_text_of(position) for position in positions[: len(answer)]]
    text = b"".join(listed).decode(errors="replace").rstrip(REPLACEMENT)
    if vocabulary.pieces is None or text.strip() != draft.text.strip():
        return False
    pieces = vocabulary.pieces
    return all(data.endswith(pieces[i]) for i, data in zip(answer, listed, strict=True))


def _outcomes(position: Position, sampled: int, recipe: Recipe) -> dict[int, float]:
    """The k likeliest listed outcomes and the sampled one, each id once."""
    _check_raw(position)
    found: dict[int, float] = {}
    listed = sorted(position.top_logprobs or [], key=lambda outcome: -outcome.logprob)
    for outcome in listed[: recipe.signal.k]:
        _check_raw(outcome)
        i = sampled if _same(outcome, position) else _id_of(outcome, recipe.vocabulary)
        if i is not None and 0 <= i < recipe.vocabulary.size:
            found.setdefault(i, outcome.logprob)
    own = position.logprob
    if own > signals.SENTINEL and abs(found.setdefault(sampled, own) - own) > TOLERANCE:
        raise TextOnly(reasons.LOGPROBS_NOT_RAW)
    return found


def _check_raw(outcome: Outcome) -> None:
    if math.isnan(outcome.logprob) or outcome.logprob > 1e-3:
        raise TextOnly(reasons.LOGPROBS_NOT_RAW)


def _same(outcome: Outcome, position: Position) -> bool:
    """Whether a listed outcome is the sampled token itself."""
    if outcome.id is not None and position.id is not None:
        return outcome.id == position.id
    # Several control tokens have no text; their log-probability tells which one was sampled.
    return (
        outcome.token == position.token
        and outcome.bytes == position.bytes
        and abs(outcome.logprob - position.logprob) < 1e-6
    )


def _id_of(outcome: Outcome, vocabulary: Vocabulary) -> int | None:
    if outcome.id is not None:
        return outcome.id
    return _look_up(outcome, vocabulary) if vocabulary.by_bytes is not None else None


def _as_text(draft: Draft, recipe: Recipe, reason: str | None) -> Draft:
    """Encode the text itself, where the teacher's ids are not known."""
    ids = recipe.chat.encode_text(draft.text)
    if any(i in recipe.vocabulary.control for i in ids):
        raise Reject(reasons.CONTROL_TOKEN, "the answer's text spells a control token")
    if draft.finish_reason == "stop":
        ids.append(recipe.chat.eos_id)
    return replace(draft, answer_ids=tuple(ids), signal_reason=reason)
