"""From logits to tokens and signals: all from the model's whole, raw distribution.

Log-probabilities are at temperature 1 over everything that the model scores. What is sampled,
listed or drawn is a token of the tokenizer: where weights are padded beyond it, the padding's mass
counts as tail. Sums over the vocabulary are made in float64, so that a draw follows the
distribution to the last token.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from services.teacher_gateway.teachers.local.work import Position
from stillhouse.contracts.spec import Signal


def draws_each(signal: Signal) -> int:
    """Ids that are drawn at a position beside its token."""
    return signal.draws if signal.kind == "counts" else 0


def look(
    logits: Any,
    uniforms: npt.NDArray[np.float64],
    signal: Signal,
    vocabulary: int,
    given: list[int] | None = None,
) -> list[Position]:
    """Choose a token for each row of logits, or take the given ones, with their signals.

    logits: float32 [N, V]; uniforms: [N, 1 + draws], each row its item's own.
    """
    logp = torch.log_softmax(logits, dim=-1)
    tokens = logp[:, :vocabulary]
    numbers = torch.from_numpy(uniforms).to(logp.device)
    mass = None
    if signal.kind == "counts" or (given is None and signal.temperature == 1):
        mass = tokens.double().exp().cumsum(-1)
    if given is not None:
        chosen = torch.tensor(given, device=logp.device)
    elif signal.temperature == 0:
        chosen = tokens.argmax(-1)
    else:
        at = mass if mass is not None and signal.temperature == 1 else _tempered(tokens, signal)
        chosen = _draw(at, numbers[:, :1])[:, 0]
    own = logp.gather(1, chosen[:, None])[:, 0].tolist()
    ids = chosen.tolist()
    if signal.kind == "topk":
        listed, which = tokens.topk(min(signal.k, vocabulary))
        all_ids, all_logp = which.cpu().numpy(), listed.cpu().numpy()
        return [
            Position(i, lp, all_ids[n].copy(), all_logp[n].copy())
            for n, (i, lp) in enumerate(zip(ids, own, strict=True))
        ]
    if signal.kind == "counts":
        drawn = _draw(mass, numbers[:, 1:]).cpu().numpy()
        return [
            Position(i, lp, counts=_counts(row)) for i, lp, row in zip(ids, own, drawn, strict=True)
        ]
    return [Position(i, lp) for i, lp in zip(ids, own, strict=True)]


def _tempered(logp: Any, signal: Signal) -> Any:
    return torch.softmax(logp.double() / signal.temperature, dim=-1).cumsum(-1)


def _draw(mass: Any, numbers: Any) -> Any:
    """Ids at uniform numbers of [0, 1): [N, D] from cumulated mass [N, V]."""
    at = numbers * mass[:, -1:]
    return torch.searchsorted(mass, at, right=True).clamp(max=mass.shape[1] - 1)


def _counts(drawn: npt.NDArray[np.int64]) -> dict[int, int]:
    ids, counts = np.unique(drawn, return_counts=True)
    return dict(zip(ids.tolist(), counts.tolist(), strict=True))
