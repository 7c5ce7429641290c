"""What whole answers tell beside whether they are fit: do they repeat, do ids and text agree?"""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence

import msgspec

from services.teacher_gateway.fitness import positions_of
from stillhouse.contracts.chat import ChatTokenizer
from stillhouse.contracts.signals import SENTINEL

_LEAST_PROBABILITY = 1e-9
_REPLACEMENT = "\N{REPLACEMENT CHARACTER}"  # half a character, where an answer was cut

# The first token's list, whose distribution depends on the prompt alone, asked for several times


def first_list(body: str, k: int) -> dict[Hashable, float]:
    """The first token's `k` likeliest alternatives by what names them. Raises ValueError.

    A list may also hold the sampled token, which is another one each time.
    """
    positions = positions_of(body)
    if not positions or not positions[0].top_logprobs:
        raise ValueError("the first token has no alternatives")
    listed = [one for one in positions[0].top_logprobs if one.logprob > SENTINEL]
    listed.sort(key=lambda one: -one.logprob)
    return {one.key: one.logprob for one in listed[:k]}


def disagreement(lists: Sequence[dict[Hashable, float]]) -> float:
    """How far lists of the same question are apart at least: the largest divergence from the first,
    in nats (KL over the tokens of both and one outcome for the rest)."""
    return max((_divergence(lists[0], other) for other in lists[1:]), default=0.0)


def _divergence(base: dict[Hashable, float], other: dict[Hashable, float]) -> float:
    if not base or not other:
        return 0.0 if base == other else math.inf
    least = min(base.values()), min(other.values())
    pairs = []
    for key in base.keys() | other.keys():
        # A token that a list lacks is as likely as its last one at most.
        p = base[key] if key in base else min(other[key], least[0])
        q = other[key] if key in other else min(base[key], least[1])
        pairs.append((math.exp(p), math.exp(q)))
    rest = [max(1 - sum(pair[side] for pair in pairs), 0.0) for side in (0, 1)]
    pairs.append((rest[0], rest[1]))
    found = 0.0
    for p, q in pairs:
        if p > 0:
            found += p * math.log(max(p, _LEAST_PROBABILITY) / max(q, _LEAST_PROBABILITY))
    return max(found, 0.0)


def largest_change(base: dict[Hashable, float], other: dict[Hashable, float]) -> float:
    """The largest difference of a token's log-probability between two lists, in nats.

    A token that the other list lacks counts only where it would not just have been pushed out by
    a close one.
    """
    if not other or len(other) < len(base):
        return math.inf
    least = min(other.values())
    found = 0.0
    for key, logprob in base.items():
        found = max(found, abs(logprob - other[key]) if key in other else logprob - least)
    return found


# Whole answers


class _AnsweredChoice(msgspec.Struct):
    finish_reason: str
    message: dict[str, object]


class _AnsweredCompletion(msgspec.Struct):
    choices: list[_AnsweredChoice]


def ended_by_itself(body: str) -> bool:
    """Whether an answer ended before `signal.max_tokens`."""
    completion = msgspec.json.decode(body, type=_AnsweredCompletion)
    return completion.choices[0].finish_reason != "length"


def length_of(body: str, chat: ChatTokenizer) -> int:
    """The tokens of an answer's text, where nobody counted them."""
    text = msgspec.json.decode(body, type=_AnsweredCompletion).choices[0].message.get("content")
    return len(chat.encode_text(text)) if isinstance(text, str) else 0


def ids_match(body: str, chat: ChatTokenizer) -> bool | None:
    """Whether an answer's token ids decode to its text; None where it has no ids, or is no plain
    text (a call of a tool, reasoning apart from the answer)."""
    choice = msgspec.json.decode(body, type=_AnsweredCompletion).choices[0]
    text = choice.message.get("content")
    apart = ("tool_calls", "reasoning_content", "reasoning")
    if not isinstance(text, str) or any(choice.message.get(name) for name in apart):
        return None
    ids = [position.id for position in positions_of(body)]
    if not ids or None in ids:
        return None
    known = [i for i in ids if i is not None]
    if choice.finish_reason == "stop" and _is_control(known[-1], chat):
        known.pop()
    if not all(0 <= i < chat.vocabulary for i in known):
        return False
    return chat.decode(known).rstrip(_REPLACEMENT).strip() == text.rstrip(_REPLACEMENT).strip()


def lists_characters(body: str) -> bool:
    """Whether the bytes of the listed tokens are the answer's text, whatever their ids decode to:
    llama.cpp lists a character of several tokens once, with the id of the last."""
    text = msgspec.json.decode(body, type=_AnsweredCompletion).choices[0].message.get("content")
    listed = b"".join(bytes(position.bytes or ()) for position in positions_of(body))
    said = listed.decode(errors="replace").strip()
    return isinstance(text, str) and said.startswith(text.rstrip(_REPLACEMENT).strip())


def _is_control(token: int, chat: ChatTokenizer) -> bool:
    added = chat.tokenizer.get_added_tokens_decoder().get(token)
    return token == chat.eos_id or (added is not None and added.special)
