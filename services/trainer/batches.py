"""Rows to tensors: what one pass through the student takes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from services.trainer.data import Row
from services.trainer.losses import Targets, TokenTargets, TopKTargets
from stillhouse.contracts import signals


@dataclass(frozen=True)
class MicroBatch:
    """Some whole rows.

    input_ids: int64 [B, L], padded on the right: under a causal mask no token sees the padding, so
    no attention mask is needed. predictors: int64 [N], where in the flattened [B x L] the hidden
    states stand that predict the targets.
    """

    input_ids: Tensor
    predictors: Tensor
    targets: Targets


def collate(rows: Sequence[Row], loss: str, device: torch.device) -> MicroBatch:
    """Put rows side by side. `loss` is the spec's: `sft` wants tokens, `forward_kl` signals.

    A row without a signal is the teacher's text and nothing else: for `forward_kl` its tokens
    count as certain, which is the loss of `sft` (`stillhouse_trainer_rows_total` counts them).
    """
    length = max(len(row.ids) for row in rows) - 1  # nothing is predicted from the last id
    input_ids = np.zeros((len(rows), length), np.int64)
    predictors = []
    for number, row in enumerate(rows):
        input_ids[number, : len(row.ids) - 1] = row.ids[:-1]
        predictors.append(np.arange(row.prompt_tokens - 1, len(row.ids) - 1) + number * length)
    if loss == "sft":
        tokens = np.concatenate([row.ids[row.prompt_tokens :] for row in rows])
        targets: Targets = TokenTargets(torch.from_numpy(tokens).to(device))
    else:
        targets = _topk([_signal(row) for row in rows], device)
    return MicroBatch(
        torch.from_numpy(input_ids).to(device),
        torch.from_numpy(np.concatenate(predictors)).to(device),
        targets,
    )


def _signal(row: Row) -> signals.TopK:
    if row.signal is not None:
        return signals.decode(row.signal)
    tokens = row.ids[row.prompt_tokens :, None]
    certain = np.zeros(tokens.shape)
    return signals.TopK(tokens, certain, np.full(len(tokens), signals.FLOOR))


def _topk(found: Sequence[signals.TopK], device: torch.device) -> TopKTargets:
    slots = max(signal.slots for signal in found)
    count = sum(signal.positions for signal in found)
    ids = np.zeros((count, slots), np.int64)
    logp = np.full((count, slots), -np.inf)
    start = 0
    for signal in found:
        end = start + signal.positions
        ids[start:end, : signal.slots] = signal.ids
        logp[start:end, : signal.slots] = signal.logp
        start = end
    tail = np.concatenate([signal.tail for signal in found])
    return TopKTargets(
        torch.from_numpy(ids).to(device),
        torch.from_numpy(logp).to(device, torch.float32),
        torch.from_numpy(tail).to(device, torch.float32),
    )
