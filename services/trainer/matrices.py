"""Which library multiplies float32 matrices on a CPU.

torch asks MKL, which on processors of other makers leaves half of what they can do unused; oneDNN,
which torch carries too, does not. torch hands float32 products to oneDNN where bfloat16 inside them
is allowed; processors without matrix tiles have no use for that freedom, and compute in float32 all
the same. So oneDNN is taken where its products are as exact as MKL's, checked here, and clearly
faster, measured here. The plan of a training names the one that it uses: bits depend on it.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

import torch
from torch import Tensor

NATIVE, ONEDNN = "native", "onednn"

# How much faster than MKL: both are the same code each time, and the next run must choose alike.
CLEARLY = 1.25
# Of the largest element; float32 gives 1e-6 at these sizes, bfloat16 1e-3.
_EXACT = 1e-5
_SHAPES = ((1, 64, 64), (37, 129, 255), (256, 512, 1024), (128, 256, 8192))


def use(name: str) -> None:
    """Let this process multiply with the library of a plan, where it can."""
    found = ONEDNN if name == ONEDNN and usable() else NATIVE
    torch.backends.mkldnn.matmul.fp32_precision = "bf16" if found == ONEDNN else "ieee"


def here() -> str:
    """The library that is exact and fastest on this machine; measured once."""
    return ONEDNN if usable() and _gain() > CLEARLY else NATIVE


@cache
def usable() -> bool:
    """Whether oneDNN multiplies in float32 here and not in something narrower."""
    if not torch.backends.mkldnn.is_available() or torch.cpu._is_amx_tile_supported():
        return False
    generator = torch.Generator().manual_seed(7)
    for m, k, n in _SHAPES:
        one = torch.randn(m, k, generator=generator)
        other = torch.randn(n, k, generator=generator)
        wanted = one.double() @ other.double().t()
        with _through(ONEDNN):
            found = _products(one, other)
        worst = max(float((each.double() - wanted).abs().max()) for each in found)
        if worst > _EXACT * float(wanted.abs().max()):
            return False
    return True


def _products(one: Tensor, other: Tensor) -> list[Tensor]:
    """one x other^T by each of the ways that a training takes."""
    sums = torch.zeros(one.shape[0], other.shape[0])
    return [
        torch.mm(one, other.t()),
        torch.mm(one, other.t().contiguous()),
        torch.mm(other, one.t()).t(),
        torch.nn.functional.linear(one[None], other)[0],
        sums.addmm_(one, other.t()),
    ]


@cache
def _gain() -> float:
    """Speed of oneDNN as a multiple of MKL's."""
    one, other = torch.randn(512, 512), torch.randn(1024, 512)

    def seconds() -> float:
        started = time.process_time()
        torch.mm(one, other.t())
        return time.process_time() - started

    taken = {}
    for name in (NATIVE, ONEDNN):
        with _through(name):
            taken[name] = min(seconds() for _ in range(7))
    return taken[NATIVE] / taken[ONEDNN]


@contextmanager
def _through(name: str) -> Iterator[None]:
    before = torch.backends.mkldnn.matmul.fp32_precision
    torch.backends.mkldnn.matmul.fp32_precision = "bf16" if name == ONEDNN else "ieee"
    try:
        yield
    finally:
        torch.backends.mkldnn.matmul.fp32_precision = before
