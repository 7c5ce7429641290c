"""Losses and head against autograd of the formulas in their docstrings, in float64."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from services.trainer.head import SLICE, learn_head
from services.trainer.losses import (
    Divergence,
    Targets,
    TokenTargets,
    TopKTargets,
    WholeTargets,
    cross_entropy_,
    forward_kl_,
)

V = 23


def formula_kl(z: Tensor, targets: TopKTargets) -> Tensor:
    """The docstring's formula, position by position, with dictionaries."""
    losses = []
    for row, ids, logp, tail in zip(z, targets.ids, targets.logp, targets.tail, strict=True):
        mass: dict[int, float] = {}
        for i, lp in zip(ids.tolist(), logp.tolist(), strict=True):
            if math.isfinite(lp):
                mass[i] = mass.get(i, 0.0) + math.exp(lp)
        log_q = row.log_softmax(0)
        loss = sum(m * (math.log(m) - log_q[i]) for i, m in mass.items())
        others = [v for v in range(len(row)) if v not in mass]
        if others:
            p = math.exp(tail)
            loss = loss + p * (math.log(p) - (row[others].logsumexp(0) - row.logsumexp(0)))
        losses.append(loss)
    return torch.stack(losses)


def random_targets(n: int, slots: int, generator: torch.Generator) -> TopKTargets:
    p = torch.rand(n, slots + 1, generator=generator, dtype=torch.float64).softmax(1).log()
    ids = torch.stack([torch.randperm(V, generator=generator)[:slots] for _ in range(n)])
    return TopKTargets(ids, p[:, :-1].clone(), p[:, -1].clone())


def case(name: str) -> TopKTargets:
    generator = torch.Generator().manual_seed(3)
    targets = random_targets(5, 4, generator)
    if name == "every id kept":
        return random_targets(5, V, generator)
    if name == "all mass in the tail":
        return TopKTargets(targets.ids, targets.logp * 0 - 80, torch.zeros(5, dtype=torch.float64))
    if name == "one-hot":
        logp = torch.full((5, 4), -torch.inf, dtype=torch.float64)
        logp[:, 0] = 0
        return TopKTargets(targets.ids * 0 + 7, logp, torch.full((5,), -60.0).double())
    if name == "repeated ids":
        ids = targets.ids.clone()
        ids[:, 2] = ids[:, 0]
        ids[0] = ids[0, 0]
        return TopKTargets(ids, targets.logp, targets.tail)
    if name == "empty slots":
        logp, ids = targets.logp.clone(), targets.ids.clone()
        logp[:, 2:], ids[:, 2:] = -torch.inf, 0
        ids[:, :2] += ids[:, :2].eq(0).int() * 9  # 0 is not kept, so it must stay in the tail
        return TopKTargets(ids, logp, targets.tail)
    return targets


CASES = (
    "random",
    "every id kept",
    "all mass in the tail",
    "one-hot",
    "repeated ids",
    "empty slots",
)


def logits(spread: float = 3.0, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return (spread * torch.randn(5, V, generator=generator, dtype=torch.float64)).to(dtype)


@pytest.mark.parametrize("spread", [0.0, 3.0, 200.0])
@pytest.mark.parametrize("name", CASES)
def test_forward_kl_equals_autograd_of_its_formula(name: str, spread: float) -> None:
    targets, z = case(name), logits(spread).requires_grad_()
    expected = formula_kl(z, targets)
    (gradient,) = torch.autograd.grad(0.37 * expected.sum(), z)
    overwritten = z.detach().clone()
    loss = forward_kl_(overwritten, targets, 0.37)
    torch.testing.assert_close(loss, expected.detach(), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(overwritten, gradient, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("spread", [0.0, 3.0, 200.0])
def test_cross_entropy_equals_autograd_of_its_formula(spread: float) -> None:
    z, tokens = logits(spread).requires_grad_(), torch.tensor([0, 5, 5, V - 1, 9])
    expected = torch.nn.functional.cross_entropy(z, tokens, reduction="none")
    (gradient,) = torch.autograd.grad(0.5 * expected.sum(), z)
    overwritten = z.detach().clone()
    loss = cross_entropy_(overwritten, TokenTargets(tokens), 0.5)
    torch.testing.assert_close(loss, expected.detach(), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(overwritten, gradient, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", CASES)
def test_float32_is_close_to_float64_even_for_a_certain_student(name: str) -> None:
    targets, z = case(name), logits(200.0)
    single = TopKTargets(targets.ids, targets.logp.float(), targets.tail.float())
    exact, rounded = z.clone(), z.float()
    loss, loss32 = forward_kl_(exact, targets, 1.0), forward_kl_(rounded, single, 1.0)
    assert torch.isfinite(rounded).all()
    torch.testing.assert_close(loss32.double(), loss, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(rounded.double(), exact, rtol=1e-4, atol=1e-6)


def test_a_student_that_says_what_the_teacher_says_has_no_loss_and_no_gradient() -> None:
    z = logits()
    log_q = z.log_softmax(1)
    ids = z.topk(4).indices
    logp = log_q.gather(1, ids)
    tail = torch.log1p(-logp.exp().sum(1))
    loss = forward_kl_(z, TopKTargets(ids, logp, tail), 1.0)
    assert loss.abs().max() < 1e-12
    assert z.abs().max() < 1e-12


def test_the_loss_is_never_above_the_divergence_over_the_whole_vocabulary() -> None:
    z, teacher = logits(), logits(1.0).flip(0).log_softmax(1)
    full = (teacher.exp() * (teacher - z.log_softmax(1))).sum(1)
    ids = teacher.topk(6).indices
    logp = teacher.gather(1, ids)
    coarse = forward_kl_(z, TopKTargets(ids, logp, torch.log1p(-logp.exp().sum(1))), 1.0)
    assert (coarse > 0).all()
    assert (coarse <= full + 1e-12).all()


@pytest.mark.parametrize("chunk", [1, 2, 5, 64])
@pytest.mark.parametrize("kind", ["topk", "tokens"])
def test_the_head_equals_a_plain_linear_layer(chunk: int, kind: str) -> None:
    generator = torch.Generator().manual_seed(2)
    hidden = torch.randn(5, 6, generator=generator, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(V, 6, generator=generator, dtype=torch.float64, requires_grad=True)
    tokens = torch.tensor([1, 2, 3, 4, 22])
    targets = case("random") if kind == "topk" else TokenTargets(tokens)
    z = hidden @ weight.t()
    if kind == "topk":
        plain = formula_kl(z, case("random")).sum() / 5
    else:
        plain = torch.nn.functional.cross_entropy(z, tokens, reduction="mean")
    expected = torch.autograd.grad(plain, (hidden, weight))
    weight.grad = torch.ones_like(weight)
    loss, d_hidden = learn_head(hidden, weight, targets, scale=1 / 5, chunk=chunk)
    torch.testing.assert_close(loss, plain.detach(), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(d_hidden, expected[0], rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(weight.grad, expected[1] + 1, rtol=1e-9, atol=1e-9)


def test_a_frozen_head_gets_no_gradient() -> None:
    hidden, weight = torch.randn(3, 6), torch.randn(V, 6)
    targets = TokenTargets(torch.tensor([1, 2, 3]))
    _, d_hidden = learn_head(hidden, weight, targets, scale=1.0)
    assert weight.grad is None
    _, beside = learn_head(hidden, weight.clone().requires_grad_(), targets, scale=1.0)
    assert torch.equal(d_hidden, beside)


@pytest.mark.parametrize("kind", ["topk", "whole"])
def test_the_head_never_holds_all_logits(kind: str) -> None:
    """Peak <= c x chunk x V + V x H + N x (H + 4k) numbers and a few slices, whatever N is: c is 1
    for stored outcomes, and 2 for whole distributions."""
    n, h, v, slots, chunk = 2048, 8, 4096, 4, 256
    hidden = torch.randn(n, h)
    weight = torch.randn(v, h, requires_grad=True)
    targets: Targets
    if kind == "topk":
        logp, tail = torch.full((n, slots), -2.0), torch.full((n,), -1.0)
        targets = TopKTargets(torch.randint(v, (n, slots)), logp, tail)
    else:
        targets = WholeTargets(hidden, torch.randn(v, h), Divergence("jsd"))
    with torch.profiler.profile(profile_memory=True) as profile:
        learn_head(hidden, weight, targets, scale=1.0, chunk=chunk)
    held = peak = 0
    for event in profile.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            peak = max(peak, held)
    times = 1 if kind == "topk" else 2
    bound = 4 * (times * chunk * v + v * h + n * (h + 4 * slots) + 4 * SLICE)
    assert 4 * chunk * v < peak <= bound < 4 * n * v
