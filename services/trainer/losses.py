"""What a student is taught with: each loss as its formula and the code that computes it.

Every function takes the logits of some supervised positions, returns the loss of each position,
and *overwrites the logits with the gradient* of `scale x sum of losses`: the formula's gradient is
cheap where its parts are at hand, and nobody then needs a second [positions, vocabulary] array.
All are generic in dtype; tests hold them to autograd of the formulas below in float64.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

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


@dataclass(frozen=True)
class Divergence:
    """Which loss over the whole vocabulary, by its name in the spec, with its one parameter.

    `beta` is that of `jsd`, `alpha` that of `skew_kl` and `skew_reverse_kl`.
    """

    name: Literal["forward_kl", "reverse_kl", "jsd", "skew_kl", "skew_reverse_kl"]
    beta: float = 0.5
    alpha: float = 0.1


@dataclass(frozen=True)
class WholeTargets:
    """The teacher's whole distribution, as what makes its logits: hidden [N, H], weight [V, H]."""

    hidden: Tensor
    weight: Tensor
    divergence: Divergence

    def __len__(self) -> int:
        return int(self.hidden.shape[0])

    def part(self, start: int, end: int) -> WholeTargets:
        return WholeTargets(self.hidden[start:end], self.weight, self.divergence)

    def spread(self, out: Tensor) -> LogitTargets:
        """Compute the teacher's logits into `out` [N, V]."""
        return LogitTargets(torch.mm(self.hidden, self.weight.t(), out=out), self.divergence)


@dataclass(frozen=True)
class LogitTargets:
    """The same, as the teacher's logits [N, V], which the loss overwrites."""

    logits: Tensor
    divergence: Divergence

    def __len__(self) -> int:
        return int(self.logits.shape[0])

    def part(self, start: int, end: int) -> LogitTargets:
        return LogitTargets(self.logits[start:end], self.divergence)


Targets = TopKTargets | TokenTargets | WholeTargets
LossTargets = TopKTargets | TokenTargets | LogitTargets


def loss_(logits: Tensor, targets: LossTargets, scale: float) -> Tensor:
    """Apply the loss that the kind of target stands for; see there."""
    if isinstance(targets, TokenTargets):
        return cross_entropy_(logits, targets, scale)
    if isinstance(targets, TopKTargets):
        return forward_kl_(logits, targets, scale)
    return divergence_(logits, targets.logits, targets.divergence, scale)


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


def divergence_(logits: Tensor, teacher: Tensor, divergence: Divergence, scale: float) -> Tensor:
    """A divergence between teacher p = softmax(teacher) and student q = softmax(logits), over the
    whole vocabulary; `teacher` [N, V] is overwritten too. With M the mixture named below:

        forward_kl       KL(p || q)                                           dL/dz = q - p
        reverse_kl       KL(q || p)                       dL/dz = q (log q - log p - L)
        jsd              [b KL(p || M) + (1 - b) KL(q || M)] / (b (1 - b)),   M = b p + (1 - b) q
                                      dL/dz = q (log(q / M) - KL(q || M)) / b
        skew_kl          KL(p || M),  M = a p + (1 - a) q  dL/dz = q (g - sum q g), g = -(1-a) p/M
        skew_reverse_kl  KL(q || M),  M = (1 - a) p + a q, no gradient through M:
                                      dL/dz = q (log(q / M) - L)

    Generalised JSD is that of GKD (Agarwal et al., ICLR 2024), divided by b (1 - b): without that
    its size, and so the meaning of a learning rate, would change with b; at b = 0 and b = 1 it is
    its limit, forward and reverse KL. The skew forms are DistiLLM's (Ko et al., ICML 2024); that
    the mixture of the reverse one passes no gradient is as in DistiLLM-2's code.
    """
    name, beta, alpha = divergence.name, divergence.beta, divergence.alpha
    if name == "jsd" and beta in (0.0, 1.0):
        name = "forward_kl" if beta == 0.0 else "reverse_kl"
    if name == "forward_kl":
        return _forward_kl_(logits, teacher, scale)
    log_q = _log_softmax_(logits)
    log_p = _log_softmax_(teacher)
    if name == "reverse_kl":
        loss = _toward_student_(log_q, log_p)
    elif name == "skew_reverse_kl":
        mixed = torch.logaddexp(log_p + _log(1 - alpha), log_q + _log(alpha))
        loss = _toward_student_(log_q, mixed)
    elif name == "skew_kl":
        mixed = torch.logaddexp(log_p + _log(alpha), log_q + _log(1 - alpha))
        loss = (log_p.exp() * (log_p - mixed)).sum(1)
        # q g = -(1 - a) p q / M: at most 1 in size, also where q and M are tiny.
        pull = mixed.neg_().add_(log_p).add_(log_q).add_(_log(1 - alpha)).exp_().neg_()
        logits.exp_().mul_(-pull.sum(1, keepdim=True)).add_(pull)
    else:
        mixed = torch.logaddexp(log_p + _log(beta), log_q + _log(1 - beta))
        forward = (log_p.exp() * (log_p - mixed)).sum(1)
        backward = _toward_student_(log_q, mixed)
        loss = (beta * forward + (1 - beta) * backward) / (beta * (1 - beta))
        logits.div_(beta)
    logits.mul_(scale)
    return loss


def _forward_kl_(logits: Tensor, teacher: Tensor, scale: float) -> Tensor:
    """KL(p || q) as E_p[difference of the logits] and the two log-sum-exps: each exponential is
    taken once."""
    logits.sub_(logits.amax(1, keepdim=True))
    teacher.sub_(teacher.amax(1, keepdim=True))
    apart = teacher - logits
    p_total = teacher.exp_().sum(1, keepdim=True)
    q_total = logits.exp_().sum(1, keepdim=True)
    expected = torch.linalg.vecdot(apart, teacher)[:, None] / p_total
    logits.mul_(scale / q_total).addcmul_(teacher, -scale / p_total)
    return (expected + q_total.log() - p_total.log()).squeeze(1)


def _log_softmax_(logits: Tensor) -> Tensor:
    return logits.sub_(logits.logsumexp(1, keepdim=True))


def _toward_student_(log_q: Tensor, log_m: Tensor) -> Tensor:
    """KL(q || M) with M held; `log_q` becomes its gradient q (log(q / M) - KL)."""
    ratio = log_q - log_m
    q = log_q.exp_()
    loss = (q * ratio).sum(1)
    q.mul_(ratio.sub_(loss[:, None]))
    return loss


def _log(value: float) -> float:
    return math.log(value) if value > 0 else -math.inf
