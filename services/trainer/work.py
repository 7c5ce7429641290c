"""How much a step computes, and how that compares with what the device can do."""

from __future__ import annotations

import time
from collections.abc import Sequence
from functools import cache
from typing import Any

import torch

from services.trainer import student
from services.trainer.data import Row

# A matrix product of this size is near the best that a device does.
_PEAK_SIZE = {"cpu": 768, "cuda": 4096}


def step_flops(model: Any, rows: Sequence[Row], teacher: Any = None) -> float:
    """Floating-point operations of the matrices in a step over these rows: two a weight and token
    forward, four backward; the output layer only where something is predicted. What is computed a
    second time to save memory does not count."""
    found = 3 * _forward(model, rows)
    return found + (_forward(teacher, rows) if teacher is not None else 0)


def _forward(model: Any, rows: Sequence[Row]) -> float:
    layers = student.decoder_layers(model)
    weights = sum(p.numel() for p in layers.parameters() if p.ndim == 2)
    attention = layers[0].self_attn
    wide = attention.head_dim * model.config.num_attention_heads
    fed = sum(row.fed for row in rows)
    # Scores and their sum of values: L^2 / 2 pairs each, two operations a pair and number.
    pairs = sum(row.fed**2 for row in rows)
    head: int = student.output_layer(model).weight.numel() * sum(row.supervised for row in rows)
    found: float = 2.0 * (weights * fed + len(layers) * pairs * wide + head)
    return found


@cache
def peak_flops(device: torch.device, dtype: str, _matrices: str) -> float:
    """Operations a second that one large matrix product reaches here, in the dtype of the layers
    and through the library in use."""
    size = _PEAK_SIZE[device.type]
    one = torch.ones(size, size, device=device, dtype=getattr(torch, dtype))
    taken = []
    for _ in range(6):
        started = time.perf_counter()
        torch.mm(one, one)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        taken.append(time.perf_counter() - started)
    return float(2 * size**3 / min(taken))
