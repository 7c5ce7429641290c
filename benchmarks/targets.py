"""How every benchmark ends: figures against targets, one JSON line, and the exit status."""

from __future__ import annotations

import json
from collections.abc import Mapping

# "at most" or "at least", and the bound.
Target = tuple[str, float]


def report(figures: Mapping[str, float], targets: Mapping[str, Target]) -> int:
    """Print what was missed and the JSON line; 1 when a target whose figure is there is missed."""
    judged = {name: target for name, target in targets.items() if name in figures}
    missed = [
        name
        for name, (way, bound) in judged.items()
        if (figures[name] > bound if way == "at most" else figures[name] < bound)
    ]
    for name in missed:
        way, bound = judged[name]
        print(f"missed: {name} is {figures[name]:.3g}, target {way} {bound:g}")
    said = {name: f"{way} {bound:g}" for name, (way, bound) in judged.items()}
    print(json.dumps({"figures": dict(figures), "targets": said, "met": not missed}))
    return 1 if missed else 0
