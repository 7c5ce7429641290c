"""Answers of a model to held-out prompts: greedy ones to show, sampled ones to count.

Prompts are answered together, padded on the left; an answer that ended leaves the batch. Draws
come from (seed, row) alone, one number a token, and how long an answer may be from its own prompt.
So an answer depends on who is beside it by rounding alone, which may tip a draw or a tie; the same
prompts in the same batches give the same bits.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from stillhouse.contracts.canonical import digest_of


@dataclass(frozen=True)
class Prompt:
    """Ids to continue. `temperature` 0 takes the likeliest token each time."""

    row_id: str
    ids: tuple[int, ...]
    temperature: float


@dataclass
class Continuation:
    """Sampled ids without the end of turn; `stopped` says whether that came."""

    ids: list[int] = field(default_factory=list)
    stopped: bool = False


def generate(
    model: Any,
    prompts: Sequence[Prompt],
    *,
    eos_id: int,
    max_tokens: int,
    seed: int,
    batch: int,
) -> list[Continuation]:
    """Continue every prompt until its end of turn, `max_tokens`, or the last position that the
    model knows; a prompt that fills those stays without an answer."""
    done: list[Continuation] = []
    for start in range(0, len(prompts), batch):
        done += _batch(model, prompts[start : start + batch], eos_id, max_tokens, seed)
    return done


def _batch(
    model: Any, prompts: Sequence[Prompt], eos_id: int, max_tokens: int, seed: int
) -> list[Continuation]:
    from transformers import DynamicCache

    device = model.device
    answers = [Continuation() for _ in prompts]
    streams = [_stream(seed, prompt) for prompt in prompts]
    known = int(model.config.max_position_embeddings)
    room = [min(max_tokens, known - len(prompt.ids)) for prompt in prompts]
    alive = [n for n, left in enumerate(room) if left > 0]
    longest = max((len(prompts[n].ids) for n in alive), default=0)
    ids = torch.full((len(alive), longest), eos_id, device=device)
    mask = torch.zeros_like(ids)
    for place, n in enumerate(alive):
        start = longest - len(prompts[n].ids)
        ids[place, start:] = torch.tensor(prompts[n].ids, device=device)
        mask[place, start:] = 1
    # Padded positions take part in nothing; their number only has to be a valid one.
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    cache = DynamicCache()
    with torch.inference_mode():
        while alive:
            logits = model(
                ids,
                attention_mask=mask,
                position_ids=positions,
                past_key_values=cache,
                use_cache=True,
                logits_to_keep=1,
            ).logits[:, -1]
            chosen = _choose(logits, [prompts[n].temperature for n in alive], streams, alive)
            staying: list[int] = []
            for place, (n, token) in enumerate(zip(alive, chosen, strict=True)):
                if token == eos_id:
                    answers[n].stopped = True
                    continue
                answers[n].ids.append(token)
                if len(answers[n].ids) < room[n]:
                    staying.append(place)
            if not staying:
                break
            if len(staying) < len(alive):
                places = torch.tensor(staying, device=device)
                cache.batch_select_indices(places)
                mask, positions = mask[places], positions[places]
                alive = [alive[place] for place in staying]
            ids = torch.tensor([[chosen[place]] for place in staying], device=device)
            mask = torch.cat([mask, torch.ones_like(mask[:, :1])], dim=1)
            positions = positions[:, -1:] + 1
    return answers


def _stream(seed: int, prompt: Prompt) -> np.random.Generator:
    key = int(digest_of([seed, prompt.row_id])[:32], 16)
    return np.random.Generator(np.random.Philox(key=key))


def _choose(
    logits: Any, temperatures: list[float], streams: list[np.random.Generator], alive: list[int]
) -> list[int]:
    """Pick one token for each sequence, on the CPU in float64: a sum over the vocabulary in
    order is the same everywhere."""
    values = logits.to(torch.float64).cpu().numpy()
    return [
        int(row.argmax()) if temperature == 0 else _draw(row / temperature, streams[n])
        for row, temperature, n in zip(values, temperatures, alive, strict=True)
    ]


def _draw(logits: npt.NDArray[np.float64], stream: np.random.Generator) -> int:
    mass = np.exp(logits - logits.max()).cumsum()
    return min(int(np.searchsorted(mass, stream.random() * mass[-1], side="right")), len(mass) - 1)
