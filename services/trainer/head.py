"""The output layer and its loss in one, in chunks, so that [tokens, vocabulary] never exists.

A student of a few hundred million parameters has a vocabulary of 50,000 to 150,000: the logits of
one step would be larger than the model. The gradients are made in the forward pass instead, chunk
by chunk: a chunk's logits are computed, turned into their own gradient in place (`losses`), and
multiplied into the gradients of hidden states and weights at once.

Memory beside the inputs: chunk x V for a chunk's logits, N x H for the gradient of the hidden
states, V x H for that of the weights (none when they are frozen), and the targets.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from services.trainer.losses import Targets, loss_

CHUNK = 128


class _FusedHead(torch.autograd.Function):  # type: ignore[misc]
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, targets: Targets, scale: float, chunk: int
    ) -> Tensor:
        count = hidden.shape[0]
        d_hidden = torch.empty_like(hidden)
        d_weight = torch.zeros_like(weight) if ctx.needs_input_grad[1] else None
        total = torch.zeros((), dtype=torch.float64, device=hidden.device)
        logits = hidden.new_empty(min(chunk, count), weight.shape[0])
        for start in range(0, count, chunk):
            end = min(start + chunk, count)
            part, gradient = hidden[start:end], logits[: end - start]
            torch.mm(part, weight.t(), out=gradient)
            total += loss_(gradient, targets.part(start, end), scale).sum(dtype=torch.float64)
            torch.mm(gradient, weight, out=d_hidden[start:end])
            if d_weight is not None:
                d_weight.addmm_(gradient.t(), part)
        ctx.save_for_backward(d_hidden, d_weight)
        return total * scale

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, outer: Tensor) -> tuple[Tensor | None, ...]:
        d_hidden, d_weight = ctx.saved_tensors
        factor = outer.to(d_hidden.dtype)
        d_weight = None if d_weight is None else d_weight.mul_(factor)
        return d_hidden.mul_(factor), d_weight, None, None, None


def fused_loss(
    hidden: Tensor, weight: Tensor, targets: Targets, *, scale: float, chunk: int = CHUNK
) -> Tensor:
    """Return `scale x sum of the losses` of N supervised positions, as a float64 scalar.

    hidden: [N, H], the last hidden states that predict the targets; weight: [V, H], the output
    layer (the embedding itself where they are tied). Backward may run once.
    """
    if hidden.shape[0] != len(targets):
        raise ValueError(f"{hidden.shape[0]} hidden states for {len(targets)} targets")
    result: Tensor = _FusedHead.apply(hidden, weight, targets, scale, chunk)
    return result
