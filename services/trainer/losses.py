"""What a student is taught with: each loss as its formula and the code that computes it.

Every function takes the logits of some supervised positions, returns the loss of each position,
and *overwrites the logits with the gradient* of `scale x sum of losses`: the formula's gradient is
cheap where its parts are at hand, and nobody then needs a second [positions, vocabulary] array.
All are generic in dtype; tests hold them to autograd of the formulas below in float64.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class TopKTargets:
    """The teacher's kept outcomes and their tail (`stillhouse.contracts.signals.TopK`).

    ids: int64 [N, S]; logp: [N, S], -inf where a slot holds no outcome (the first always does);
    tail: [N], log of the mass of everything else.
    """

    ids: Tensor
    logp: Tensor
    tail: Tensor

    def __len__(self) -> int:
        return int(self.ids.shape[0])

    def part(self, start: int, end: int) -> TopKTargets:
        return TopKTargets(self.ids[start:end], self.logp[start:end], self.tail[start:end])


@dataclass(frozen=True)
class TokenTargets:
    """The tokens themselves. ids: int64 [N]."""

    ids: Tensor

    def __len__(self) -> int:
        return int(self.ids.shape[0])

    def part(self, start: int, end: int) -> TokenTargets:
        return TokenTargets(self.ids[start:end])


Targets = TopKTargets | TokenTargets


def loss_(logits: Tensor, targets: Targets, scale: float) -> Tensor:
    """Apply the loss that the kind of target stands for; see there."""
    if isinstance(targets, TokenTargets):
        return cross_entropy_(logits, targets, scale)
    return forward_kl_(logits, targets, scale)


def cross_entropy_(logits: Tensor, targets: TokenTargets, scale: float) -> Tensor:
    """SFT. With z the logits [N, V] and y the token:

    L = log sum_v exp(z_v) - z_y          dL/dz_v = q_v - [v = y],  q = softmax(z)
    """
    wanted = targets.ids[:, None]
    chosen = logits.gather(1, wanted)
    top = logits.amax(1, keepdim=True)
    total = logits.sub_(top).exp_().sum(1, keepdim=True)
    loss = (top + total.log() - chosen).squeeze(1)
    logits.mul_(scale / total)
    logits.scatter_add_(1, wanted, torch.full_like(chosen, -scale))
    return loss


def forward_kl_(logits: Tensor, targets: TopKTargets, scale: float) -> Tensor:
    """Forward KL over the kept outcomes and one outcome for all the others, the tail.

    With z the logits [N, V], q = softmax(z), K the set of kept ids, P_v the teacher's mass of id
    v (summed over the slots that name it) and P_t the mass of the tail:

        L = sum_{v in K} P_v (log P_v - log q_v) + P_t (log P_t - log q_t)
        log q_t = log sum_{v not in K} exp(z_v) - log sum_v exp(z_v)
        dL/dz_v = M q_v - P_v           for v in K,  M = sum_{v in K} P_v + P_t
        dL/dz_v = M q_v - P_t r_v       otherwise,   r = softmax of z over v not in K

    The student's tail is a log-sum-exp over what is not kept: 1 - sum(q) cancels in float32. Where
    every id is kept there is no tail, and its term is left out.
    """
    present = torch.isfinite(targets.logp)
    # An empty slot must not take its id (0) out of the tail: it repeats the first one at no mass.
    ids = torch.where(present, targets.ids, targets.ids[:, :1])
    p, p_tail = targets.logp.exp(), targets.tail.exp()
    same = ids[:, :, None] == ids[:, None, :]
    mass = (same * p[:, None, :]).sum(2)
    first = ~torch.tril(same, diagonal=-1).any(2)

    kept = logits.gather(1, ids)
    rest = logits.scatter_(1, ids, -torch.inf)
    # Finite also where nothing is left, so that -inf - top stays -inf.
    top = rest.amax(1, keepdim=True).clamp_min_(torch.finfo(rest.dtype).min)
    left = rest.sub_(top).exp_().sum(1)
    log_rest = top.squeeze(1) + left.log()
    log_kept = kept.masked_fill(~first, -torch.inf).logsumexp(1)
    log_all = torch.logaddexp(log_rest, log_kept)
    log_q = kept - log_all[:, None]

    exists = left > 0
    p_tail = torch.where(exists, p_tail, torch.zeros_like(p_tail))
    total = p.sum(1) + p_tail
    entropy = torch.xlogy(p, mass).sum(1) + torch.xlogy(p_tail, p_tail)
    tail_term = torch.where(exists, p_tail * (log_rest - log_all), torch.zeros_like(p_tail))
    loss = entropy - (p * log_q).sum(1) - tail_term

    # `rest` holds exp(z - top) for what is not kept, and 0 for what is.
    share = torch.where(
        exists, (total * (log_rest - log_all).exp() - p_tail) / left, torch.zeros_like(left)
    )
    rest.mul_(share[:, None] * scale)
    rest.scatter_(1, ids, total[:, None] * log_q.exp() * scale)
    rest.scatter_add_(1, ids, -p * scale)
    return loss
