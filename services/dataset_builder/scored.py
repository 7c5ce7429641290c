"""What a teacher says of the tokens that it sampled: their ids, and what it weighed beside them.

Ids that it gave are used as they are. Without them the bytes of each token are looked up in the
vocabulary.
"""

from __future__ import annotations

import msgspec

from services.dataset_builder import reasons
from services.dataset_builder.records import Draft
from services.dataset_builder.vocabulary import Vocabulary


class Outcome(msgspec.Struct, kw_only=True):
    """A token that the teacher weighed. `id` is the teacher's, where its server gives ids."""

    token: str = ""
    logprob: float
    id: int | None = None
    bytes: list[int] | None = None


class Position(Outcome, kw_only=True):
    """A token that the teacher sampled, with its likeliest alternatives, or with the ids that were
    drawn beside it and how often (from local weights)."""

    top_logprobs: list[Outcome] | None = None
    counts: dict[int, int] | None = None


class Logprobs(msgspec.Struct):
    content: list[Position] | None = None


_LOGPROBS = msgspec.json.Decoder(Logprobs | None)


class TextOnly(Exception):
    """The signal cannot be used; the row goes on as text. `reason` is of `reasons.TEXT_ROWS`."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


def parse_positions(raw: bytes) -> list[Position]:
    try:
        logprobs: Logprobs | None = _LOGPROBS.decode(raw)
    except (msgspec.DecodeError, RecursionError) as error:
        raise TextOnly(reasons.LOGPROBS_MALFORMED) from error
    if logprobs is None or not logprobs.content:
        raise TextOnly(reasons.NO_LOGPROBS)
    return logprobs.content


def sampled_ids(positions: list[Position], draft: Draft, vocabulary: Vocabulary) -> list[int]:
    """One id for each position, the teacher's own or looked up."""
    given = [position.id for position in positions]
    if None not in given:
        return [i for i in given if i is not None]
    if vocabulary.by_bytes is None:
        raise TextOnly(reasons.TOKENIZER_WITHOUT_BYTES)
    found = [look_up(position, vocabulary) for position in positions]
    if found[-1] is None and draft.finish_reason == "stop" and not text_of(positions[-1]):
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


def look_up(outcome: Outcome, vocabulary: Vocabulary) -> int | None:
    """The id of a token by its name (control tokens) or its bytes; None where there is none."""
    control = vocabulary.control_by_text.get(outcome.token)
    if control is not None:
        return control
    assert vocabulary.by_bytes is not None
    data = text_of(outcome)
    return vocabulary.by_bytes.get(data) if data else None


def text_of(outcome: Outcome) -> bytes:
    if outcome.bytes is None:
        return outcome.token.encode(errors="replace")
    try:
        return bytes(outcome.bytes)
    except ValueError as error:
        raise TextOnly(reasons.LOGPROBS_MALFORMED) from error
