"""Who may make how many of a teacher's calls: equal parts for tenants, in them for pipelines.

Nobody gets more than it can use, and what one leaves goes to the others in equal parts. Where it
does not come out even, the rest goes round: each turn to the next ones, so that nobody waits for
ever, even where one call at once is all there is.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

# A turn by the database's clock, which all workers share.
TURN_SECONDS = 10.0


@dataclass(frozen=True)
class Wish:
    """What one holder can use."""

    holder: str
    tenant_id: str
    pipeline_id: str
    calls: int
    most: int | None = None  # what its spec allows all of its tenant; None for no bound


def fair_shares(total: int, wishes: Iterable[Wish], clock: float) -> dict[str, int]:
    """Divide calls at once among holders; by the holder's name."""
    tenants: dict[str, dict[str, dict[str, int]]] = {}
    of_tenants: dict[str, int] = {}
    bounds: dict[str, int] = {}
    for wish in wishes:
        pipelines = tenants.setdefault(wish.tenant_id, {})
        pipelines.setdefault(wish.pipeline_id, {})[wish.holder] = wish.calls
        of_tenants[wish.tenant_id] = of_tenants.get(wish.tenant_id, 0) + wish.calls
        if wish.most is not None:
            bounds[wish.tenant_id] = min(bounds.get(wish.tenant_id, wish.most), wish.most)
    of_tenants |= {name: min(of_tenants[name], most) for name, most in bounds.items()}
    shares: dict[str, int] = {}
    turn = int(clock // TURN_SECONDS)
    for tenant, calls in divide(total, of_tenants, turn).items():
        # Another digit of the turn at each level: the same one would always meet the same ones.
        later = turn // len(tenants)
        pipelines = tenants[tenant]
        of_pipelines = {name: sum(holders.values()) for name, holders in pipelines.items()}
        for pipeline, part in divide(calls, of_pipelines, later).items():
            shares |= divide(part, pipelines[pipeline], later // len(pipelines))
    return shares


def divide(total: int, wanted: Mapping[str, int], turn: int) -> dict[str, int]:
    """Divide a whole number: equal parts, none above what is wanted, the rest in turn."""
    names = sorted(wanted)
    start = turn % len(names) if names else 0
    names = names[start:] + names[:start]
    given = dict.fromkeys(names, 0)
    hungry = [name for name in names if wanted[name] > 0]
    while hungry and total > 0:
        each = min(total // len(hungry), min(wanted[name] - given[name] for name in hungry))
        lucky = hungry if each else hungry[:total]
        for name in lucky:
            given[name] += each or 1
        total -= (each or 1) * len(lucky)
        hungry = [name for name in hungry if given[name] < wanted[name]]
    return given
