"""From sums of rows to figures: means over supervised positions, with intervals over prompts.

Positions of one answer and answers to one prompt are not independent, so intervals come from
drawing prompts. Draws are seeded by the rows themselves: the same rows give the same interval.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
from pydantic import Field

from stillhouse.contracts.canonical import digest_of
from stillhouse.contracts.responses import Record
from stillhouse.contracts.trainings import Figures

DRAWS = 2000
FEWEST_PROMPTS = 5  # fewer say nothing about the spread

Array = npt.NDArray[np.float64]


class RowSums(Record):
    """Sums over the supervised positions of one row; `scored` counts those with a signal, `ranked`
    those of which the teacher's likeliest token is known."""

    row_id: str
    prompt_id: str
    tokens: int
    scored: int = 0
    ranked: int = 0
    nll: float = 0.0
    top1: int = 0
    kl_top20: float = 0.0
    kl_full: float | None = Field(None, description="None without the teacher's weights")

    def plus(
        self,
        *,
        nll: float,
        top1: float = 0,
        scored: float = 0,
        ranked: float = 0,
        kl_top20: float = 0.0,
        kl_full: float | None = None,
    ) -> RowSums:
        """Add the sums of more positions of this row."""
        return self.model_copy(
            update={
                "nll": self.nll + nll,
                "top1": self.top1 + int(top1),
                "scored": self.scored + int(scored),
                "ranked": self.ranked + int(ranked),
                "kl_top20": self.kl_top20 + kl_top20,
                "kl_full": None if kl_full is None else (self.kl_full or 0.0) + kl_full,
            }
        )


def figures(rows: Sequence[RowSums]) -> Figures:
    """Means over all supervised positions of the rows; None where the sums lack a figure."""
    tokens = sum(row.tokens for row in rows)
    scored, ranked = sum(row.scored for row in rows), sum(row.ranked for row in rows)
    if not tokens:
        return Figures(rows=len(rows))
    full = [row.kl_full for row in rows if row.kl_full is not None]
    loss = math.fsum(row.nll for row in rows) / tokens
    found = Figures(
        kl_top20=math.fsum(row.kl_top20 for row in rows) / scored if scored else None,
        kl_full=math.fsum(full) / tokens if len(full) == len(rows) else None,
        ppl=_exp(loss),
        top1=sum(row.top1 for row in rows) / ranked if ranked else None,
        rows=len(rows),
        tokens=tokens,
    )
    return found.model_copy(update={"intervals": _intervals(rows, found)})


def stop_figures(stopped: Sequence[bool]) -> tuple[float | None, tuple[float, float] | None]:
    """Share of answers that ended by themselves, with its 95 % interval (Wilson)."""
    count = len(stopped)
    if not count:
        return None, None
    share, z = sum(stopped) / count, 1.959963984540054
    middle = (share + z * z / (2 * count)) / (1 + z * z / count)
    half = z / (1 + z * z / count)
    half *= math.sqrt(share * (1 - share) / count + z * z / (4 * count * count))
    # Exact at the ends, where rounding leaves 1e-17.
    low = 0.0 if share == 0 else middle - half
    high = 1.0 if share == 1 else middle + half
    return share, (low, high)


def _exp(loss: float) -> float:
    """exp, held below what JSON can carry."""
    return math.exp(min(loss, 700.0))


def _intervals(rows: Sequence[RowSums], found: Figures) -> dict[str, tuple[float, float]]:
    prompts: dict[str, list[RowSums]] = {}
    for row in rows:
        prompts.setdefault(row.prompt_id, []).append(row)
    if len(prompts) < FEWEST_PROMPTS:
        return {}
    groups = list(prompts.values())

    def column(name: str) -> Array:
        return np.array(
            [sum(float(getattr(row, name) or 0) for row in group) for group in groups], np.float64
        )

    wanted = {
        "kl_top20": (column("kl_top20"), column("scored")),
        "kl_full": (column("kl_full"), column("tokens")),
        "ppl": (column("nll"), column("tokens")),
        "top1": (column("top1"), column("ranked")),
    }
    seed = int(digest_of([row.row_id for row in rows])[:16], 16)
    means = _draw({k: v for k, v in wanted.items() if getattr(found, k) is not None}, seed)
    bounds: dict[str, tuple[float, float]] = {}
    for name, values in means.items():
        low, high = np.quantile(values, [0.025, 0.975])
        if name == "ppl":
            low, high = _exp(float(low)), _exp(float(high))
        bounds[name] = (float(low), float(high))
    return bounds


def _draw(columns: dict[str, tuple[Array, Array]], seed: int) -> dict[str, Array]:
    """Ratios of sums over prompts drawn with replacement, DRAWS times."""
    count = len(next(iter(columns.values()))[0])
    generator = np.random.Generator(np.random.PCG64(seed))
    found: dict[str, list[Array]] = {name: [] for name in columns}
    even = np.full(count, 1 / count)
    for start in range(0, DRAWS, 250):  # bounds the memory: 250 x prompts counts
        weights = generator.multinomial(count, even, size=min(250, DRAWS - start))
        weights = weights.astype(np.float64)
        for name, (numerator, denominator) in columns.items():
            below = weights @ denominator
            above = weights @ numerator
            found[name].append(above[below > 0] / below[below > 0])
    return {name: np.concatenate(values) for name, values in found.items()}
