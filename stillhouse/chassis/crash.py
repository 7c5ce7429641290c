"""Named points at which a test may kill a process, so that each crash can be tried on purpose.

STILLHOUSE_CRASH_AT=name[:n] ends the process, as kill -9 would, at the n-th time (default 1)
that it reaches the point of this name. Without the variable a point does nothing.
"""

from __future__ import annotations

import os

EXIT_STATUS = 137  # what a shell reports for kill -9
_reached: dict[str, int] = {}


def crash_point(name: str) -> None:
    """Die here when the environment asks for it."""
    wanted = os.environ.get("STILLHOUSE_CRASH_AT")
    if not wanted:
        return
    point, _, count = wanted.partition(":")
    if point != name:
        return
    _reached[name] = _reached.get(name, 0) + 1
    if _reached[name] >= int(count or 1):
        os._exit(EXIT_STATUS)
