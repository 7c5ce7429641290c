"""Answers being written side by side, and given answers being scored.

A row joins and leaves while the others go on. Keys and values stand in one cache, padded on the
left, so a step is one forward of one token a row; the padding takes part in nothing. Which rows
are beside an item changes its log-probabilities by rounding alone, and its random numbers are its
own.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from transformers import DynamicCache

from services.teacher_gateway import reasons
from services.teacher_gateway.teachers.local.signals import draws_each, look
from services.teacher_gateway.teachers.local.weights import Weights
from services.teacher_gateway.teachers.local.work import Finish, Numbers, Position, Spoken, Work
from services.teacher_gateway.teachers.outcomes import Reject
from stillhouse.contracts.spec import Signal

# Positions whose whole vocabulary is held at once while answers are scored.
_SCORED_AT_ONCE = 64


@dataclass
class _Row:
    work: Work
    numbers: Numbers
    length: int = 0  # tokens in the cache
    said: list[Position] = field(default_factory=list)


class Rows:
    """The answers that one model writes at a time."""

    def __init__(self, weights: Weights, signal: Signal) -> None:
        self._weights = weights
        self._signal = signal
        self._rows: list[_Row] = []
        self._cache = DynamicCache()

    def __len__(self) -> int:
        return len(self._rows)

    @property
    def works(self) -> list[Work]:
        return [row.work for row in self._rows]

    def clear(self) -> list[Work]:
        """Forget all rows, and return what they were about."""
        left = self.works
        self._rows, self._cache = [], DynamicCache()
        return left

    @torch.inference_mode()  # type: ignore[untyped-decorator]
    def drop_abandoned(self) -> None:
        self._keep([n for n, row in enumerate(self._rows) if not row.work.abandoned])

    @torch.inference_mode()  # type: ignore[untyped-decorator]
    def join(self, works: Sequence[Work]) -> None:
        """Read new prompts in one forward, and write the first token of each."""
        fresh = [_Row(work, work.numbers()) for work in works]
        beside = Rows(self._weights, self._signal)
        beside._rows = fresh
        beside._advance([row.work.prompt for row in fresh])
        if beside._rows:
            self._merge(beside)

    @torch.inference_mode()  # type: ignore[untyped-decorator]
    def step(self) -> None:
        """Write one more token of each."""
        self._advance([[row.said[-1].id] for row in self._rows])

    def _advance(self, pieces: list[list[int]]) -> None:
        """Put new tokens of every row through the model, and choose the next one of each."""
        weights, rows = self._weights, self._rows
        device = weights.model.device
        past, width = self._cache.get_seq_length(), max(map(len, pieces))
        ids = torch.zeros((len(rows), width), dtype=torch.long)
        for n, (row, piece) in enumerate(zip(rows, pieces, strict=True)):
            ids[n, width - len(piece) :] = torch.tensor(piece)
            row.length += len(piece)
        lengths = torch.tensor([row.length for row in rows])[:, None]
        mask = torch.arange(past + width)[None] >= past + width - lengths
        # Padded positions take part in nothing; their number only has to be a valid one.
        positions = (torch.arange(width)[None] + lengths - width).clamp(min=0)
        states = weights.model.model(
            ids.to(device),
            attention_mask=mask.long().to(device),
            position_ids=positions.to(device),
            past_key_values=self._cache,
            use_cache=True,
        ).last_hidden_state[:, -1]
        draws = draws_each(self._signal)
        uniforms = np.concatenate([row.numbers.take(1, draws) for row in rows])
        found = look(weights.logits(states), uniforms, self._signal, weights.vocabulary)
        going = []
        for n, (row, position) in enumerate(zip(rows, found, strict=True)):
            row.said.append(position)
            outcome = self._outcome(row)
            if outcome is None:
                going.append(n)
            else:
                row.work.end(outcome)
        self._keep(going)

    def _outcome(self, row: _Row) -> Spoken | Reject | None:
        """What a row came to with its last token; None while it goes on."""
        if not math.isfinite(row.said[-1].logprob):
            return not_numbers(len(row.said))
        finish: Finish | None = None
        if row.said[-1].id in self._weights.ends:
            finish = "stop"
        elif len(row.said) == row.work.max_tokens or row.length == self._weights.positions:
            finish = "length"
        return Spoken(row.said, finish) if finish else None

    def _keep(self, going: list[int]) -> None:
        """Let the other rows go, with the padding that nobody needs any more."""
        if len(going) == len(self._rows):
            return
        self._rows = [self._rows[n] for n in going]
        if not going:
            self._cache = DynamicCache()
            return
        longest = max(row.length for row in self._rows)
        which = torch.tensor(going, device=self._weights.model.device)
        for layer in self._cache.layers:
            layer.keys = layer.keys[which, :, -longest:]
            layer.values = layer.values[which, :, -longest:]

    def _merge(self, other: Rows) -> None:
        if not self._rows:
            self._rows, self._cache = other._rows, other._cache
            return
        longest = max(self._cache.get_seq_length(), other._cache.get_seq_length())
        for mine, theirs in zip(self._cache.layers, other._cache.layers, strict=True):
            mine.keys = _joined(mine.keys, theirs.keys, longest)
            mine.values = _joined(mine.values, theirs.values, longest)
        self._rows += other._rows


def _joined(one: torch.Tensor, other: torch.Tensor, length: int) -> torch.Tensor:
    """Two caches [B, H, T, D] as one, each padded on the left."""
    padded = [
        torch.nn.functional.pad(part, (0, 0, length - part.shape[2], 0)) for part in (one, other)
    ]
    return torch.cat(padded)


@torch.inference_mode()  # type: ignore[untyped-decorator]
def score(weights: Weights, signal: Signal, works: Sequence[Work]) -> None:
    """Look at the tokens of given answers in one forward, as if they had been sampled."""
    model = weights.model
    answers = [work.answer or [] for work in works]
    # The last token predicts nothing that is asked for.
    texts = [(w.prompt + answer)[:-1] for w, answer in zip(works, answers, strict=True)]
    ids = torch.zeros((len(works), max(map(len, texts))), dtype=torch.long)
    mask = torch.zeros_like(ids)
    for n, text in enumerate(texts):
        ids[n, : len(text)] = torch.tensor(text)
        mask[n, : len(text)] = 1
    hidden = model.model(
        ids.to(model.device), attention_mask=mask.to(model.device), use_cache=False
    ).last_hidden_state
    states = torch.cat(
        [
            hidden[n, len(work.prompt) - 1 : len(text)]
            for n, (work, text) in enumerate(zip(works, texts, strict=True))
        ]
    )
    del hidden
    given = [i for answer in answers for i in answer]
    draws = draws_each(signal)
    uniforms = np.concatenate(
        [w.numbers().take(len(answer), draws) for w, answer in zip(works, answers, strict=True)]
    )
    found: list[Position] = []
    for start in range(0, len(given), _SCORED_AT_ONCE):
        span = slice(start, start + _SCORED_AT_ONCE)
        logits = weights.logits(states[span])
        found += look(logits, uniforms[span], signal, weights.vocabulary, given[span])
    start = 0
    for work, answer in zip(works, answers, strict=True):
        said = found[start : start + len(answer)]
        start += len(answer)
        bad = next((n for n, p in enumerate(said, 1) if not math.isfinite(p.logprob)), None)
        work.end(not_numbers(bad) if bad else Spoken(said, work.finish))


def not_numbers(place: int) -> Reject:
    return Reject(
        reasons.TEACHER_INVALID,
        f"the weights give no numbers at token {place} of the answer: they are damaged, or need a "
        "wider type than this device's",
    )
