"""Follow a pipeline, its events or a download: a live picture on a terminal, lines elsewhere."""

from __future__ import annotations

import time
from collections.abc import Callable

from stillhouse.cli import views
from stillhouse.cli.client import Client, Json
from stillhouse.cli.screen import Screen
from stillhouse.contracts.events import STAGES


def pipeline(
    client: Client,
    screen: Screen,
    pipeline_id: str,
    *,
    timeout_seconds: float | None = None,
    began: float | None = None,
) -> Json:
    """Show a pipeline until it has ended, and return it. Raises TimeoutError.

    Lines carry the seconds since `began` (of the monotonic clock; now by default).
    """
    look = _lines(screen, time.monotonic() if began is None else began)

    def wait(seen: Callable[[Json], None]) -> Json:
        return client.wait(pipeline_id, timeout_seconds=timeout_seconds, seen=seen)

    if screen.live:
        with screen.showing() as show:

            def picture(found: Json) -> None:
                show(*views.summary_lines(found), views.stages_table(found))

            return wait(picture)
    return wait(look)


def _lines(screen: Screen, began: float) -> Callable[[Json], None]:
    """Return what writes one line for each stage that moved since the last look."""
    before: dict[str, str] = {}

    def look(found: Json) -> None:
        for stage in STAGES:
            line = views.stage_line(found, stage)
            if before.get(stage) != line and found["stages"][stage]["state"] != "waiting":
                screen.progress(f"{time.monotonic() - began:6.1f} s  {line}")
            before[stage] = line

    return look


def fetching(screen: Screen) -> Callable[[str, int, int], None]:
    """Return what tells of each file once it is whole."""

    def tell(name: str, done: int, size: int) -> None:
        if done == size:
            screen.progress(f"{name}: {size} bytes")

    return tell
