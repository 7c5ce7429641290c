"""Rows to tensors: what one pass through the student takes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from services.trainer.attention import Documents
from services.trainer.data import Row
from services.trainer.losses import Targets, TokenTargets, TopKTargets
from stillhouse.contracts import signals


@dataclass(frozen=True)
class MicroBatch:
    """Some whole rows, packed one behind the other: nothing is padded.

    input_ids, position_ids: int64 [1, T], each row counted from 0. predictors: int64 [N], where
    in the sequence the hidden states stand that predict the targets.
    """

    input_ids: Tensor
    position_ids: Tensor
    documents: Documents
    predictors: Tensor
    targets: Targets


def collate(rows: Sequence[Row], loss: str, device: torch.device) -> MicroBatch:
    """Put rows behind each other. `loss` is the spec's: `sft` wants tokens, `forward_kl` signals.

    Where the teacher's weights are at hand, their distribution takes the place of the targets.

    A row without a signal is the teacher's text and nothing else: for `forward_kl` its tokens
    count as certain, which is the loss of `sft` (`stillhouse_trainer_rows_total` counts them).
    """
    predictors, start = [], 0
    for row in rows:
        predictors.append(np.arange(start + row.prompt_tokens - 1, start + row.fed))
        start += row.fed
    if loss == "sft":
        tokens = np.concatenate([row.ids[row.prompt_tokens :] for row in rows])
        targets: Targets = TokenTargets(_moved(tokens, device))
    else:
        targets = _topk([_signal(row) for row in rows], device)
    return MicroBatch(
        _moved(np.concatenate([row.ids[:-1] for row in rows])[None], device),
        _moved(np.concatenate([np.arange(row.fed) for row in rows])[None], device),
        Documents.of([row.fed for row in rows], device),
        _moved(np.concatenate(predictors), device),
        targets,
    )


def _moved(
    made: npt.NDArray[Any], device: torch.device, dtype: torch.dtype | None = None
) -> Tensor:
    tensor = torch.from_numpy(made).to(dtype=dtype)
    if device.type == "cuda":  # from pinned memory the copy runs beside the computing
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


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
        _moved(ids, device),
        _moved(logp, device, torch.float32),
        _moved(tail, device, torch.float32),
    )
