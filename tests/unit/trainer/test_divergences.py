"""Losses over the whole vocabulary against autograd of the formulas in their docstring."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from services.trainer.head import learn_head
from services.trainer.losses import Divergence, WholeTargets, divergence_

V = 29


def kl(log_a: Tensor, log_b: Tensor) -> Tensor:
    return (log_a.exp() * (log_a - log_b)).sum(1)


def formula(z: Tensor, t: Tensor, divergence: Divergence) -> Tensor:
    log_q, log_p = z.log_softmax(1), t.log_softmax(1)
    p, q, a, b = log_p.exp(), log_q.exp(), divergence.alpha, divergence.beta
    if divergence.name == "forward_kl" or (divergence.name == "jsd" and b == 0):
        return kl(log_p, log_q)
    if divergence.name == "reverse_kl" or (divergence.name == "jsd" and b == 1):
        return kl(log_q, log_p)
    if divergence.name == "jsd":
        mixed = (b * p + (1 - b) * q).log()
        return (b * kl(log_p, mixed) + (1 - b) * kl(log_q, mixed)) / (b * (1 - b))
    if divergence.name == "skew_kl":
        return kl(log_p, (a * p + (1 - a) * q).log())
    return kl(log_q, ((1 - a) * p + a * q.detach()).log())


DIVERGENCES = [
    Divergence("forward_kl"),
    Divergence("reverse_kl"),
    *(Divergence("jsd", beta=beta) for beta in (0.0, 0.1, 0.5, 0.9, 1.0)),
    *(Divergence("skew_kl", alpha=alpha) for alpha in (0.0, 0.1, 0.9)),
    *(Divergence("skew_reverse_kl", alpha=alpha) for alpha in (0.0, 0.1, 0.9)),
]


def pair(spread: float, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(5)
    made = torch.randn(2, 7, V, generator=generator, dtype=torch.float64) * spread
    return made[0].to(dtype), made[1].to(dtype)


@pytest.mark.parametrize("divergence", DIVERGENCES, ids=str)
@pytest.mark.parametrize("spread", [0.5, 6.0])
def test_loss_and_gradient_are_those_of_the_formula(divergence: Divergence, spread: float) -> None:
    z, t = pair(spread)
    wanted_z = z.clone().requires_grad_()
    wanted = formula(wanted_z, t, divergence)
    (wanted.sum() * 0.25).backward()
    loss = divergence_(z, t.clone(), divergence, 0.25)
    torch.testing.assert_close(loss, wanted.detach(), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(z, wanted_z.grad, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("divergence", DIVERGENCES, ids=str)
def test_float32_stays_near_float64_where_mass_is_far_apart(divergence: Divergence) -> None:
    z, t = pair(12.0)
    narrow_z, narrow_t = z.float(), t.float()
    loss = divergence_(z, t, divergence, 1.0)
    narrow = divergence_(narrow_z, narrow_t, divergence, 1.0)
    torch.testing.assert_close(narrow.double(), loss, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(narrow_z.double(), z, rtol=1e-3, atol=1e-4)
    assert torch.isfinite(narrow_z).all()


def test_jsd_goes_over_into_its_limits() -> None:
    for edge, near in ((0.0, 1e-7), (1.0, 1 - 1e-7)):
        found: list[Any] = []
        for beta in (edge, near):
            z, t = pair(2.0)
            found.append((divergence_(z, t, Divergence("jsd", beta=beta), 1.0), z))
        torch.testing.assert_close(found[0][0], found[1][0], rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(found[0][1], found[1][1], rtol=1e-3, atol=1e-4)


def test_equal_distributions_cost_nothing_and_pull_nowhere() -> None:
    for divergence in DIVERGENCES:
        _, t = pair(3.0)
        z = t.clone() + 1.5  # a constant changes no distribution
        loss = divergence_(z, t, divergence, 1.0)
        torch.testing.assert_close(loss, torch.zeros_like(loss), rtol=0, atol=1e-9)
        torch.testing.assert_close(z, torch.zeros_like(z), rtol=0, atol=1e-9)


def test_the_head_gives_what_whole_logits_give_whatever_the_chunk() -> None:
    generator = torch.Generator().manual_seed(2)
    hidden = torch.randn(11, 6, generator=generator, dtype=torch.float64)
    weight = torch.randn(V, 6, generator=generator, dtype=torch.float64)
    teacher = torch.randn(11, 9, generator=generator, dtype=torch.float64)
    teacher_weight = torch.randn(V, 9, generator=generator, dtype=torch.float64)
    divergence = Divergence("skew_kl")
    leaves = [hidden.clone().requires_grad_(), weight.clone().requires_grad_()]
    whole = formula(leaves[0] @ leaves[1].t(), teacher @ teacher_weight.t(), divergence).sum() / 11
    whole.backward()
    for chunk in (1, 4, 64):
        again = weight.clone().requires_grad_()
        targets = WholeTargets(teacher, teacher_weight, divergence)
        loss, d_hidden = learn_head(hidden, again, targets, scale=1 / 11, chunk=chunk)
        torch.testing.assert_close(loss, whole.detach(), rtol=1e-9, atol=1e-9)
        for found, wanted in ((d_hidden, leaves[0].grad), (again.grad, leaves[1].grad)):
            torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-9)
