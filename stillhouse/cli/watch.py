"""Follow a pipeline, its events or a download: a live picture on a terminal, lines elsewhere."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator

from stillhouse.cli import views
from stillhouse.cli.client import ENDED, Client, Json
from stillhouse.cli.screen import Screen
from stillhouse.contracts.events import STAGES

POLL_SECONDS = 1.0


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
        return client.wait(
            pipeline_id, timeout_seconds=timeout_seconds, poll_seconds=POLL_SECONDS, seen=seen
        )

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


def events(client: Client, pipeline_id: str, *, after: int = 0) -> Iterator[Json]:
    """Yield stored events as they come, until the pipeline has ended."""
    while True:
        # Looked at before the events: what comes between the two is then still yielded.
        ended = client.status(pipeline_id)["state"] in ENDED
        for event in client.events(pipeline_id, after=after):
            after = event["sequence"]
            yield event
        if ended:
            return
        time.sleep(POLL_SECONDS)


def fetching(screen: Screen) -> Callable[[str, int, int], None]:
    """Return what tells of each file once it is whole."""

    def tell(name: str, done: int, size: int) -> None:
        if done == size:
            screen.progress(f"{name}: {size} bytes")

    return tell
