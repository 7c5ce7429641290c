"""Which outcomes of a teacher a row keeps, and how its shard says so.

An alternative that the vocabulary does not have goes to the tail. Counts come from local weights,
which draw from their whole distribution.
"""

from __future__ import annotations

import math

from services.dataset_builder import reasons
from services.dataset_builder.records import Recipe
from services.dataset_builder.scored import Outcome, Position, TextOnly, look_up
from services.dataset_builder.vocabulary import Vocabulary
from stillhouse.contracts import signals
from stillhouse.contracts.signals import StoredTopK
from stillhouse.contracts.spec import Signal

# How far the two log-probabilities of a sampled token, its own and the one in the list, may part.
TOLERANCE = 0.05


def slots(signal: Signal) -> int:
    """Outcomes kept at a position at most: the k likeliest and the sampled one, or the draws."""
    return {"topk": signal.k + 1, "counts": signal.draws}.get(signal.kind, 0)


def support(signal: Signal) -> str:
    """Say in words which outcomes a shard's signals keep, for its header."""
    if signal.kind == "counts":
        return (
            f"{signal.draws} ids drawn from the teacher's whole distribution with replacement, and "
            "how often each came: count / draws is its probability in expectation. The end of turn "
            "has probability 1 where the teacher did not score it"
        )
    if signal.kind != "topk":
        return "none: text only"
    return (
        f"the {signal.k} likeliest tokens that the teacher listed, control tokens among them, and "
        "the sampled token; all others are the tail. The end of turn has the teacher's "
        "distribution where it scored it, else probability 1"
    )


def keep_topk(
    positions: list[Position], sampled: list[int], ids: list[int], recipe: Recipe
) -> StoredTopK:
    """The outcomes that the teacher listed. Raises TextOnly or ValueError where they are not raw
    log-probabilities."""
    outcomes = [
        _outcomes(position, token, recipe)
        for position, token in zip(positions, sampled, strict=True)
    ]
    one_hot: frozenset[int] = frozenset()
    if len(ids) > len(outcomes):
        # The teacher did not score its end of turn: an observed outcome is certain.
        outcomes.append({recipe.chat.eos_id: 0.0})
        one_hot = frozenset({len(ids) - 1})
    topk = signals.from_outcomes(outcomes, slots(recipe.signal), one_hot=one_hot)
    return signals.encode(topk)


def keep_counts(positions: list[Position], ids: list[int], recipe: Recipe) -> StoredTopK:
    """The ids drawn at each position. Raises TextOnly where one has none, or other than the spec
    asked for: a position with fewer draws would count as much as one with all."""
    size, draws = recipe.vocabulary.size, recipe.signal.draws
    drawn = []
    for position in positions:
        if not position.counts:
            raise TextOnly(reasons.NO_COUNTS)
        known = all(0 <= i < size for i in position.counts)
        if not known or min(position.counts.values()) < 1 or sum(position.counts.values()) != draws:
            raise TextOnly(reasons.COUNTS_MALFORMED)
        drawn.append(position.counts)
    if len(ids) > len(drawn):
        drawn.append({recipe.chat.eos_id: draws})
    return signals.encode_counts(drawn)


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
    return look_up(outcome, vocabulary) if vocabulary.by_bytes is not None else None
