"""Waits with a deadline that say what they last saw."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")


def wait_for(
    look: Callable[[], T],
    deadline: float,
    what: str,
    *,
    every: float = 0.05,
    until: Callable[[T], bool] = bool,
) -> T:
    """Look again and again until what is seen satisfies `until`; return it.

    Errors of `look` count as not seen yet. Raises AssertionError at the deadline (seconds).
    """
    end = time.monotonic() + deadline
    while True:
        try:
            seen = look()
            if until(seen):
                return seen
            last = f"last saw {seen!r}"
        except AssertionError:
            raise
        except Exception as error:
            last = f"last met {type(error).__name__}: {error}"
        if time.monotonic() > end:
            raise AssertionError(f"{what}: not within {deadline:g} s; {last}")
        time.sleep(every)
