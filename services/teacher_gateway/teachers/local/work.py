"""What is to be written or scored by local weights, and what came of it. Knows no torch."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future, InvalidStateError
from dataclasses import dataclass, field
from typing import Any, Literal

import msgspec
import numpy as np
import numpy.typing as npt

from services.teacher_gateway.teachers.outcomes import Reject
from stillhouse.contracts.canonical import sha256_hex
from stillhouse.contracts.chat import ChatTokenizer
from stillhouse.contracts.signals import SENTINEL

Finish = Literal["stop", "length"]


@dataclass(frozen=True)
class Position:
    """A token, and what the model's own distribution says in its place.

    `ids` and `logp` are the likeliest tokens; `counts` those drawn from the whole distribution.
    """

    id: int
    logprob: float
    ids: npt.NDArray[np.int64] | None = None
    logp: npt.NDArray[np.float32] | None = None
    counts: dict[int, int] | None = None


@dataclass(frozen=True)
class Spoken:
    """An answer: all its positions, the end of turn among them where it came."""

    positions: Sequence[Position]
    finish: Finish


class Numbers:
    """The random numbers of one item. They depend on its name alone: not on who is beside it,
    and those for its tokens not on whether anything else is drawn."""

    def __init__(self, seed_of: str) -> None:
        self._tokens, self._draws = (
            np.random.Generator(np.random.Philox(key=int(sha256_hex(name.encode())[:32], 16)))
            for name in (seed_of, f"{seed_of}:draws")
        )

    def take(self, positions: int, draws: int) -> npt.NDArray[np.float64]:
        """Uniform numbers of [0, 1) for the next positions: [positions, 1 + draws]."""
        tokens = self._tokens.random((positions, 1))
        return np.concatenate([tokens, self._draws.random((positions, draws))], axis=1)


@dataclass(frozen=True, eq=False)
class Work:
    """A prompt to answer, or with `answer` a text to score. Whoever waits for it may cancel
    `future`; it is then dropped at the next step."""

    prompt: list[int]
    seed_of: str
    max_tokens: int
    answer: list[int] | None = None
    finish: Finish = "stop"
    future: Future[Spoken | Reject] = field(default_factory=Future)

    @property
    def size(self) -> int:
        """Tokens that it may come to."""
        return len(self.prompt) + (self.max_tokens if self.answer is None else len(self.answer))

    @property
    def abandoned(self) -> bool:
        return self.future.cancelled()

    def numbers(self) -> Numbers:
        return Numbers(self.seed_of)

    def end(self, outcome: Spoken | Reject | Exception) -> None:
        """Hand over what came of it, unless nobody waits any more."""
        try:
            if isinstance(outcome, Exception):
                self.future.set_exception(outcome)
            else:
                self.future.set_result(outcome)
        except InvalidStateError:
            return


def completion(
    spoken: Spoken,
    work: Work,
    *,
    chat: ChatTokenizer,
    model: str,
    ends: frozenset[int],
    signal: str,
    given: dict[str, Any] | None = None,
) -> str:
    """Write an answer as an OpenAI chat completion, with ids and, for `counts`, the draws.

    Alternatives are named by their ids alone: their texts would double the size, and nobody reads
    them. `given` are message and finish reason of a given answer that was scored.
    """
    ids = [position.id for position in spoken.positions]
    if given is None:
        ended = spoken.finish == "stop" and ids[-1] in ends
        said = {"role": "assistant", "content": chat.decode(ids[:-1] if ended else ids)}
        given = {"message": said, "finish_reason": spoken.finish}
    choice: dict[str, Any] = {"index": 0, **given}
    if signal != "text":
        content = ",".join(_entry(position, chat) for position in spoken.positions)
        choice["logprobs"] = {"content": msgspec.Raw(f"[{content}]".encode())}
    body = {
        "object": "chat.completion",
        "model": model,
        "choices": [choice],
        "usage": {
            "prompt_tokens": len(work.prompt),
            "completion_tokens": len(ids),
            "total_tokens": len(work.prompt) + len(ids),
        },
    }
    return msgspec.json.encode(body).decode()


def _entry(position: Position, chat: ChatTokenizer) -> str:
    token = msgspec.json.encode(chat.decode([position.id])).decode()
    # Seven digits are what float32 holds.
    said = f'{{"token":{token},"id":{position.id},"logprob":{_logprob(position.logprob)}'
    if position.ids is not None and position.logp is not None:
        pairs = zip(position.ids.tolist(), position.logp.tolist(), strict=True)
        listed = ",".join(f'{{"token":"","id":{i},"logprob":{_logprob(lp)}}}' for i, lp in pairs)
        said += f',"top_logprobs":[{listed}]'
    if position.counts is not None:
        drawn = ",".join(f'"{i}":{count}' for i, count in position.counts.items())
        said += f',"counts":{{{drawn}}}'
    return said + "}"


def _logprob(value: float) -> str:
    """A number that JSON knows: no probability at all is OpenAI's -9999."""
    return f"{value:.7g}" if value > SENTINEL else "-9999"
