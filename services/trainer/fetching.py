"""Tells of weights that are being fetched, and ends that when the trainer has to let go."""

from __future__ import annotations

import time

from services.trainer.hold import Hold, TrainingStopped
from stillhouse.chassis.errors import RetryableError
from stillhouse.contracts.envelope import seal
from stillhouse.contracts.events import StageProgressed


class Fetching:
    """Called about once a second with the bytes so far and in all (0, 0: not known yet).

    Raises what ends a holding: LeaseLost, TrainingStopped, or RetryableError where the process is
    to end.
    """

    def __init__(self, hold: Hold) -> None:
        self._hold = hold
        self._looked_at = time.monotonic()

    def __call__(self, done: int, total: int) -> None:
        hold, tools = self._hold, self._hold.tools
        tools.beat()
        hold.lease.check()
        if tools.stopping.is_set():
            raise RetryableError("the trainer is to end: what was fetched so far is kept")
        pause = tools.settings.progress_seconds
        if time.monotonic() - self._looked_at < pause:
            return
        self._looked_at = time.monotonic()
        if hold.stopped():
            raise TrainingStopped
        if not total:
            return
        event = StageProgressed(
            stage="train",
            figures={"fetched_bytes": float(done), "weights_bytes": float(total)},
        )
        tools.announcer.mention(
            seal(event, tenant_id=hold.tenant, pipeline_id=hold.pipeline, caused_by=hold.wake)
        )
