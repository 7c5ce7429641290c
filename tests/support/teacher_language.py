"""The small language model that the billing teacher speaks with.

It is a Markov chain over the tokenizer's plain tokens, so its log-probabilities are a true
distribution (they sum to one over the vocabulary) and a tiny student can learn it. An answer
depends on the conversation and the request's `seed` alone (and on the attempt with `vary`), so
`Language.answer` tells a test beforehand what it will say.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import numpy as np

from stillhouse.contracts.canonical import canonical_json, sha256_hex
from stillhouse.contracts.chat import ChatTokenizer, Message
from tests.support.tiny_tokenizer import token_bytes

NO_MASS = -9999.0  # what vLLM writes for the logarithm of zero


def tempered(mass: np.ndarray, temperature: float) -> np.ndarray:
    """The distribution after a temperature."""
    powered = mass ** (1 / temperature)
    return np.asarray(powered / powered.sum())


def nucleus(mass: np.ndarray, top_p: float) -> np.ndarray:
    """The distribution after top-p: the likeliest tokens that hold so much, and no others."""
    order = np.argsort(-mass, kind="stable")
    kept = order[: int(np.searchsorted(np.cumsum(mass[order]), top_p)) + 1]
    result = np.zeros_like(mass)
    result[kept] = mass[kept] / mass[kept].sum()
    return result


@dataclass(frozen=True)
class Spoken:
    """An answer as the teacher means it. `ids` holds the end-of-turn id where it stopped."""

    ids: list[int]
    text: str
    finish_reason: Literal["stop", "length"]
    positions: list[dict[str, Any]]
    prompt_tokens: int

    @property
    def completion_tokens(self) -> int:
        return len(self.ids)


@dataclass(frozen=True)
class Language:
    """A Markov chain over the plain tokens of a tokenizer: what this teacher knows.

    The next token's distribution depends on the last one alone: `CANDIDATES` likely ones in an
    order that the last token decides, the end of turn from `SHORTEST` tokens on, and a floor of
    FLOOR spread over the whole vocabulary.
    """

    chat: ChatTokenizer

    CANDIDATES = 24
    DECAY = 0.35
    FLOOR = 1e-3
    SHORTEST = 8
    END = 0.05

    @cached_property
    def pieces(self) -> list[bytes]:
        return token_bytes(self.chat)

    @cached_property
    def plain(self) -> np.ndarray:
        """Ids whose text is ASCII letters or digits, perhaps behind one space."""
        fits = re.compile(rb"^ ?[A-Za-z0-9]+$")
        return np.array([i for i, piece in enumerate(self.pieces) if fits.match(piece)])

    def probabilities(self, last: int | None, position: int) -> np.ndarray:
        """The distribution over the whole vocabulary after a token; float64 [V], sums to one."""
        order = np.random.default_rng(1_000_003 + (-1 if last is None else last))
        chosen = order.choice(self.plain, min(self.CANDIDATES, len(self.plain)), replace=False)
        weights = np.exp(-self.DECAY * np.arange(len(chosen)))
        end = self.END if position >= self.SHORTEST else 0.0
        result = np.full(self.chat.vocabulary, self.FLOOR / self.chat.vocabulary)
        result[chosen] += (1 - self.FLOOR - end) * weights / weights.sum()
        result[self.chat.eos_id] += end
        return result

    def answer(
        self,
        messages: Sequence[Message],
        *,
        max_tokens: int,
        tools: Sequence[dict[str, Any]] = (),
        top_logprobs: int = 0,
        seed: object = None,
        salt: str = "",
        view: Callable[[np.ndarray], np.ndarray] = lambda mass: mass,
    ) -> Spoken:
        """Say what the teacher will answer. `salt` is the attempt where it varies, `view` what it
        makes of a distribution before it reports it."""
        prompt = digest_of_messages(messages)
        ids: list[int] = []
        positions: list[dict[str, Any]] = []
        finish: Literal["stop", "length"] = "length"
        while len(ids) < max_tokens:
            mass = self.probabilities(ids[-1] if ids else None, len(ids))
            # The floor is never sampled: it may be any bytes, and half a character has no text.
            likely = np.flatnonzero(mass > 2 * self.FLOOR / self.chat.vocabulary)
            drawn = _uniform(prompt, seed, salt, len(ids)) * mass[likely].sum()
            token = int(likely[np.searchsorted(np.cumsum(mass[likely]), drawn)])
            ids.append(token)
            positions.append(self._entry(token, view(mass), top_logprobs))
            if token == self.chat.eos_id:
                finish = "stop"
                break
        text = b"".join(self.pieces[i] for i in ids).decode()
        tokens = len(self.chat.encode_prompt(list(messages), list(tools) or None))
        return Spoken(ids, text, finish, positions, tokens)

    def _entry(self, token: int, mass: np.ndarray, top: int) -> dict[str, Any]:
        # Stable: of equal ones the lowest id first, as servers do.
        best = np.argsort(-mass, kind="stable")[:top]
        return {
            **self._outcome(token, mass),
            "top_logprobs": [self._outcome(int(i), mass) for i in best],
        }

    def _outcome(self, token: int, mass: np.ndarray) -> dict[str, Any]:
        # As llama.cpp writes it: special tokens have an id and no text.
        piece = self.pieces[token]
        return {
            "id": token,
            "token": piece.decode(errors="replace"),
            "bytes": list(piece),
            "logprob": math.log(float(mass[token])) if mass[token] > 0 else NO_MASS,
        }


def digest_of_messages(messages: Sequence[Message]) -> str:
    return sha256_hex(canonical_json([message.as_sent() for message in messages]))


def _uniform(*key: object) -> float:
    data = hashlib.sha256(repr(key).encode()).digest()
    return int.from_bytes(data[:7], "big") / 2**56
