"""The output layer and its loss in one, in chunks, so that [tokens, vocabulary] never exists.

A student of a few hundred million parameters has a vocabulary of 50,000 to 150,000: the logits of
one step would be larger than the model. So a chunk's logits are computed, turned into their own
gradient in place (`losses`), and multiplied into the gradients of hidden states and weights at
once, before the next chunk's take their place. Autograd has no part in it: between micro-batches
nothing of the size of the weights is made, cleared or added.

The elementwise work goes over a few rows at a time, which stay in the cache.

Memory beside the inputs: c x chunk x V, where c is 1 for stored outcomes and tokens and 2 where the
teacher's whole distribution stands beside them, and at most 4 x SLICE for what a loss makes on its
way; N x H for the gradient of the hidden states; V x H for that of the weights, which stays (none
when they are frozen); and the targets.
"""

from __future__ import annotations

import torch
from torch import Tensor

from services.trainer.losses import LossTargets, Targets, WholeTargets, loss_

# Larger ones read and write the weights' gradient less often, and are faster up to about here.
CHUNK = 256
# Logits that one pass of a loss takes on a CPU: 1 MB of float32.
SLICE = 1 << 18


def learn_head(
    hidden: Tensor, weight: Tensor, targets: Targets, *, scale: float, chunk: int = CHUNK
) -> tuple[Tensor, Tensor]:
    """Return `scale x sum of the losses` of N supervised positions, as a float64 scalar, and its
    gradient in the hidden states; add that in the weights to `weight.grad`.

    hidden: [N, H], the last hidden states that predict the targets; weight: [V, H], the output
    layer (the embedding itself where they are tied).
    """
    if hidden.shape[0] != len(targets):
        raise ValueError(f"{hidden.shape[0]} hidden states for {len(targets)} targets")
    with torch.no_grad():
        hidden, count = hidden.detach(), hidden.shape[0]
        d_hidden = torch.empty_like(hidden)
        if weight.requires_grad and weight.grad is None:
            weight.grad = torch.zeros_like(weight)
        total = torch.zeros((), dtype=torch.float64, device=hidden.device)
        logits = hidden.new_empty(min(chunk, count), weight.shape[0])
        other = torch.empty_like(logits) if isinstance(targets, WholeTargets) else None
        rows = max(1, SLICE // weight.shape[0]) if hidden.device.type == "cpu" else chunk
        for start in range(0, count, chunk):
            end = min(start + chunk, count)
            part, gradient = hidden[start:end], logits[: end - start]
            torch.mm(part, weight.t(), out=gradient)
            of_chunk = targets.part(start, end)
            if isinstance(of_chunk, WholeTargets):
                assert other is not None
                wanted: LossTargets = of_chunk.spread(other[: end - start])
            else:
                wanted = of_chunk
            for first in range(0, end - start, rows):
                last = min(first + rows, end - start)
                losses = loss_(gradient[first:last], wanted.part(first, last), scale)
                total += losses.sum(dtype=torch.float64)
            torch.mm(gradient, weight, out=d_hidden[start:end])
            if weight.grad is not None:
                weight.grad.addmm_(gradient.t(), part)
    return total * scale, d_hidden
