"""Rows of drawn ids train by cross-entropy against their counts (RS-KD)."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import pytest
import torch

from services.trainer.batches import collate
from services.trainer.data import Row
from services.trainer.losses import TopKTargets, loss_
from stillhouse.contracts.signals import encode_counts

V = 29
DRAWS = 50
CPU = torch.device("cpu")


def drawn_row(positions: Sequence[dict[int, int]], prompt: int = 2) -> Row:
    ids = np.array([1] * prompt + [min(drawn) for drawn in positions], np.int64)
    return Row("row", 0, ids, prompt, encode_counts(list(positions)))


def draw(seed: int, count: int = 6, draws: int = DRAWS) -> list[dict[int, int]]:
    random = np.random.default_rng(seed)
    found = []
    for _ in range(count):
        ids = random.choice(V, draws, p=random.dirichlet(np.full(V, 0.3)))
        found.append(counted(ids))
    return found


def counted(ids: npt.NDArray[np.int64]) -> dict[int, int]:
    return dict(Counter(ids.tolist()))


@pytest.mark.parametrize(
    "positions",
    [
        draw(1),
        draw(2, draws=255),
        [{7: 50}],
        [{0: 1, 28: 49}],
        [dict.fromkeys(range(V), 1)],
        [{7: 50}, dict.fromkeys(range(V), 1), {0: 25, 3: 25}],
    ],
    ids=["random", "most draws", "one id", "rare id", "every id", "ragged"],
)
def test_loss_and_gradient_are_those_of_cross_entropy_against_the_counts(
    positions: list[dict[int, int]],
) -> None:
    """L = -sum_i (c_i / N) log q_i, beside the entropy of the counts, which no student changes."""
    targets = collate([drawn_row(positions)], "forward_kl", CPU).targets
    assert isinstance(targets, TopKTargets)
    targets = TopKTargets(targets.ids, targets.logp.double(), targets.tail.double())
    generator = torch.Generator().manual_seed(3)
    z = torch.randn(len(positions), V, generator=generator, dtype=torch.float64).mul_(3)
    z.requires_grad_()
    share = torch.zeros(len(positions), V, dtype=torch.float64)
    for t, drawn in enumerate(positions):
        for i, count in drawn.items():
            share[t, i] = count / sum(drawn.values())
    expected = -(share * z.log_softmax(1)).sum(1)
    expected.sum().backward()
    entropy = [-sum(p * math.log(p) for p in row if p > 0) for row in share.tolist()]

    overwritten = z.detach().clone()
    loss = loss_(overwritten, targets, 1.0)
    assert z.grad is not None
    # float32 holds the targets.
    torch.testing.assert_close(
        loss + torch.tensor(entropy, dtype=torch.float64), expected.detach(), rtol=1e-6, atol=1e-6
    )
    torch.testing.assert_close(overwritten, z.grad, rtol=1e-6, atol=1e-6)


def test_the_mean_gradient_over_draws_is_that_of_the_whole_distribution() -> None:
    """Which a list of the likeliest ids would not give: what is cut off would be missing."""
    random = np.random.default_rng(11)
    p = random.dirichlet(np.full(V, 0.5))
    z = torch.from_numpy(random.normal(size=V)).repeat(4000, 1)
    ids = random.choice(V, (4000, 20), p=p)
    positions = [counted(drawn) for drawn in ids]
    targets = collate([drawn_row(positions)], "forward_kl", CPU).targets
    assert isinstance(targets, TopKTargets)
    targets = TopKTargets(targets.ids, targets.logp.double(), targets.tail.double())
    gradient = z.clone()
    loss_(gradient, targets, 1.0)
    whole = z[0].softmax(0) - torch.from_numpy(p)
    spread = float(gradient.std(0).max()) / math.sqrt(4000)
    assert float((gradient.mean(0) - whole).abs().max()) < 5 * spread
