"""Which events a training's state stands for.

They are made from `state.json` alone, so that whoever finds an output already there publishes the
same event, with the same id, again.
"""

from __future__ import annotations

import threading
from collections import deque

from stillhouse.chassis.bus import BrokerUnavailable, Publisher
from stillhouse.chassis.logs import logger
from stillhouse.contracts.envelope import Envelope, seal
from stillhouse.contracts.events import CheckpointSaved, Event, StageFailed, TrainingCompleted
from stillhouse.contracts.spec import ResolvedSpec
from stillhouse.contracts.trainings import Published, TrainingState

log = logger(__name__)


def checkpoint_saved(
    resolved: ResolvedSpec, entry: Published, caused_by: Envelope | None
) -> Envelope:
    event = CheckpointSaved(
        training_id=resolved.training_id,
        step=entry.step,
        epoch=entry.epoch,
        manifest=entry.manifest,
        tokens=entry.tokens,
        gpu_seconds=entry.gpu_seconds,
        final=entry.final,
    )
    return _seal(resolved, event, caused_by)


def newest(
    resolved: ResolvedSpec, state: TrainingState, caused_by: Envelope | None
) -> list[Envelope]:
    """The last published checkpoint, and that the training is completed where it is."""
    if not state.published:
        return []
    entry = state.published[-1]
    found = [checkpoint_saved(resolved, entry, caused_by)]
    if state.done:
        event = TrainingCompleted(
            training_id=resolved.training_id,
            step=entry.step,
            epoch=entry.epoch,
            manifest=entry.manifest,
            tokens=entry.tokens,
            gpu_seconds=entry.gpu_seconds,
        )
        found.append(_seal(resolved, event, caused_by))
    return found


def failure(resolved: ResolvedSpec, state: TrainingState, caused_by: Envelope | None) -> Envelope:
    """The error that a training ended with."""
    reason, _, detail = state.failed.partition(": ")
    event = StageFailed(stage="train", reason=reason[:64], detail=detail[:1000], fatal=True)
    return _seal(resolved, event, caused_by)


def _seal(resolved: ResolvedSpec, event: Event, caused_by: Envelope | None) -> Envelope:
    return seal(
        event,
        tenant_id=resolved.tenant_id,
        pipeline_id=resolved.pipeline_id,
        caused_by=caused_by,
    )


class Announcer:
    """Publishes on a thread of its own: a broker that is away must not stop a training.

    What is still unsaid when the process dies is said again by whoever takes the training up.
    """

    def __init__(self, publisher: Publisher, retry_seconds: float) -> None:
        self._publisher = publisher
        self._retry = retry_seconds
        self._said: deque[Envelope] = deque()
        self._mentioned: Envelope | None = None
        self._changed = threading.Condition()
        self._closing = False
        self._busy = False
        self._thread = threading.Thread(target=self._run, name="announcer", daemon=True)
        self._thread.start()

    def say(self, *envelopes: Envelope) -> None:
        """Publish in order, again and again until the broker took them."""
        with self._changed:
            self._said.extend(envelopes)
            self._changed.notify_all()

    def mention(self, envelope: Envelope) -> None:
        """Publish once, unless the broker is away or a newer one comes."""
        with self._changed:
            self._mentioned = envelope
            self._changed.notify_all()

    def flush(self, timeout: float) -> bool:
        """Wait until all is said; False when it was not by then."""
        with self._changed:
            return self._changed.wait_for(
                lambda: not self._said and self._mentioned is None and not self._busy, timeout
            )

    def close(self, timeout: float) -> None:
        if not self.flush(timeout):
            log.warning("events left unsaid; re-drive repairs it", events=len(self._said))
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        self._thread.join(timeout)

    def _run(self) -> None:
        while True:
            with self._changed:
                self._busy = False
                self._changed.notify_all()
                self._changed.wait_for(lambda: self._said or self._mentioned or self._closing)
                if self._closing:
                    return
                said, mentioned = list(self._said), self._mentioned
                self._mentioned, self._busy = None, True
            try:
                self._publisher.publish(*said, *([mentioned] if mentioned else []))
            except BrokerUnavailable as error:
                log.warning("events not published yet", events=len(said), why=str(error))
                with self._changed:
                    self._changed.wait_for(lambda: self._closing, self._retry)
                continue
            with self._changed:
                for _ in said:
                    self._said.popleft()
