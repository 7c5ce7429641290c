"""What one answer tells about its teacher: is it fit for what the spec asks, and if not, why?

The pipeline's probe, a check's preflight and `signal: auto` judge by the same rules.
"""

from __future__ import annotations

import math
from collections.abc import Hashable
from dataclasses import dataclass

import msgspec

from services.teacher_gateway import reasons
from services.teacher_gateway.teachers.outcomes import Answered, Outcome, Reject, Retry
from stillhouse.contracts.chat import ChatTokenizer
from stillhouse.contracts.spec import Signal, Teacher

TOKENIZER_MISMATCH = "tokenizer_mismatch"
TOO_FEW_LOGPROBS = "too_few_logprobs"
LOGPROBS_NOT_RAW = "logprobs_not_raw"
LOGPROBS_WITHOUT_TOKENS = "logprobs_without_tokens"

TEXT_INSTEAD = "use `signal.kind: text` with `training.loss: sft`"
# Sums of probabilities are those of rounded numbers.
MOST_MASS = 1.001


@dataclass(frozen=True)
class Unfit:
    """Why a teacher cannot be asked as the spec asks, and what to change. `depth`: how many
    log-probabilities it gives, where that is why."""

    reason: str
    detail: str
    field: str = "teachers[0]"
    depth: int = 0


class Listed(msgspec.Struct):
    """A token that a teacher weighed."""

    logprob: float
    token: str = ""
    id: int | None = None
    bytes: list[int] | None = None

    @property
    def key(self) -> Hashable:
        """What tells it from the others of its list."""
        if self.id is not None:
            return self.id
        return tuple(self.bytes) if self.bytes is not None else self.token


class Position(Listed):
    """A token that it sampled."""

    top_logprobs: list[Listed] = []


class _Logprobs(msgspec.Struct):
    content: list[Position]


class _Choice(msgspec.Struct):
    logprobs: _Logprobs


class _Completion(msgspec.Struct):
    choices: list[_Choice]


def positions_of(body: str) -> list[Position]:
    """The tokens of an answer as its teacher weighed them. Raises ValueError for another form."""
    try:
        return msgspec.json.decode(body, type=_Completion).choices[0].logprobs.content
    except (msgspec.DecodeError, RecursionError, IndexError) as error:
        raise ValueError(str(error)) from error


def judge(
    outcome: Outcome,
    teacher: Teacher,
    signal: Signal,
    chat: ChatTokenizer,
    expected: int,
    *,
    field: str = "teachers[0]",
) -> Unfit | None:
    """Say why a teacher is unfit; None when it is fit, or when only time can tell.

    `expected`: the tokens of the prompt in our rendering.
    """
    name = teacher.name
    if isinstance(outcome, Retry):
        return None
    if isinstance(outcome, Reject):
        if outcome.reason == reasons.MISSING_LOGPROBS:
            return without_logprobs(name, field)
        if outcome.reason == reasons.STILL_REASONING and signal.kind == "text":
            return None  # a short question's few tokens are not enough for it
        detail = f"teacher {name!r} cannot be asked: {outcome.detail}"
        return Unfit(outcome.reason, detail, field)
    if signal.kind == "text":
        return None  # text alone may come from a teacher with another tokenizer
    if outcome.usage.prompt_tokens != expected:
        return other_tokenizer(
            name,
            field,
            f"counted {outcome.usage.prompt_tokens} tokens in a prompt that our tokenizer and "
            f"chat template render to {expected}",
        )
    if signal.kind == "topk":
        return _judge_logprobs(outcome, name, signal.k, chat, field)
    return None


def did_not_answer(name: str, place: str, outcome: Retry, when: str = "") -> Unfit:
    """Why a teacher is given up that might have answered another time."""
    refused = any(f"status {status}" in outcome.detail for status in (401, 403))
    field = f"{place}.api_key" if refused else f"{place}.url"
    check = f"check `{field}`" if refused else f"check `{field}`, and that it is up"
    said = f"teacher {name!r} did not answer{when} ({outcome.detail}): {check}"
    return Unfit(outcome.reason, said, field)


def without_logprobs(name: str, field: str, said: str = "") -> Unfit:
    return Unfit(
        reasons.MISSING_LOGPROBS,
        f"teacher {name!r} gave no log-probabilities{said and f' ({said})'}, which "
        f"`signal.kind: topk` needs: use a server that gives them, or {TEXT_INSTEAD}",
        field,
    )


def other_tokenizer(name: str, field: str, found: str) -> Unfit:
    return Unfit(
        TOKENIZER_MISMATCH,
        f"teacher {name!r} {found}: name the teacher's own weights in `{field}.reference` (or "
        "`student.of`), of the same revision as it serves",
        f"{field}.reference",
    )


def too_few(name: str, asked: int, found: int, said: str = "") -> Unfit:
    return Unfit(
        TOO_FEW_LOGPROBS,
        f"teacher {name!r} gave {found} log-probabilities for a token where `signal.k` asks for "
        f"{asked}{said and f' ({said})'}: set `signal.k: {found}`",
        "signal.k",
        found,
    )


def _judge_logprobs(
    answered: Answered, name: str, k: int, chat: ChatTokenizer, field: str
) -> Unfit | None:
    try:
        positions = positions_of(answered.body)
    except ValueError as error:
        return Unfit(
            reasons.MISSING_LOGPROBS,
            f"teacher {name!r} gave log-probabilities in a form that is not OpenAI's ({error}): "
            f"use a server that does, or {TEXT_INSTEAD}",
            field,
        )
    if not any(position.top_logprobs for position in positions):
        return Unfit(
            TOO_FEW_LOGPROBS,
            f"teacher {name!r} gave no alternatives (`top_logprobs`): use a server that does, or "
            f"{TEXT_INSTEAD}",
            field,
        )
    for position in positions:
        listed = [position, *position.top_logprobs]
        ids = [one.id for one in listed if one.id is not None]
        if any(not 0 <= found < chat.vocabulary for found in ids):
            return Unfit(
                TOKENIZER_MISMATCH,
                f"teacher {name!r} gave token ids outside our tokenizer's vocabulary of "
                f"{chat.vocabulary}: name the teacher's own weights in `{field}.reference`",
                f"{field}.reference",
            )
        if any(one.id is None and one.bytes is None for one in listed):
            return Unfit(
                LOGPROBS_WITHOUT_TOKENS,
                f"teacher {name!r} names its alternatives neither by `id` nor by `bytes`: use a "
                f"server that does, or {TEXT_INSTEAD}",
                field,
            )
        mass = sum(math.exp(min(one.logprob, 1.0)) for one in position.top_logprobs)
        if mass > MOST_MASS:
            return Unfit(
                LOGPROBS_NOT_RAW,
                f"teacher {name!r} gave probabilities that sum to {mass:.3f}: they are not the "
                f"model's own; use a server that gives raw ones, or {TEXT_INSTEAD}",
                field,
            )
    depth = max(len(position.top_logprobs) for position in positions)
    return too_few(name, k, depth) if depth < k else None
