"""Saving beside the training: a snapshot to disk, then upload and HEAD on another thread.

One upload at a time. Only what is published is told to others; saves for resume are between this
training and its next holder.
"""

from __future__ import annotations

import shutil
import time
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Literal

from services.trainer import announce, checkpoint, metrics, plan
from services.trainer.hold import Hold
from services.trainer.session import Session
from stillhouse.chassis.crash import crash_point
from stillhouse.chassis.logs import logger
from stillhouse.contracts.trainings import Head, Published

log = logger(__name__)

# step 0, a step that the spec names, for resume only, the last step
Kind = Literal["start", "named", "resume", "final"]


class Saver:
    """Saves the checkpoints of one holding. Call all methods from the training's thread."""

    def __init__(self, hold: Hold) -> None:
        self._hold = hold
        self._settings = hold.tools.settings
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="upload")
        self._upload: Future[None] | None = None
        self._saved_at = time.monotonic()
        self.seconds = 0.0
        # Computing time of the training so far, all holders together.
        self.gpu_seconds = hold.lease.state.gpu_seconds

    def due(self) -> bool:
        """Whether the last checkpoint is too old: a crash now would cost too much."""
        age = time.monotonic() - self._saved_at
        least = max(self._settings.save_after_seconds, self._settings.save_share * self.seconds)
        return age > least and self._upload is None

    def save(self, session: Session, kind: Kind) -> None:
        """Write a snapshot to disk; it is sent while training goes on. Errors of the save before
        come out here: LeaseLost, or StoreUnavailable."""
        self.finish()
        self._hold.lease.check()
        started = time.monotonic()
        if kind == "final" and session.saved:
            # These bits are in the store already: HEAD becomes the last checkpoint.
            head = self._hold.lease.state.head
            assert head is not None
            self._upload = self._thread.submit(
                self._publish, session, head, kind, session.cursor.tokens, self.gpu_seconds
            )
            return
        snapshot = checkpoint.write_snapshot(
            self._hold.tools.scratch / "save",
            session.model,
            session.optimizer.state(),
            session.cursor,
            parent=session.ref,
            loss=session.loss,
            final=kind == "final",
            bitwise=session.bitwise,
            environment=plan.as_planned(self._hold.tools.here, session.plan),
        )
        self._upload = self._thread.submit(
            self._send, session, snapshot, kind, self.gpu_seconds, started
        )

    def save_unsaved(self, session: Session | None) -> None:
        """Save before letting go, and see it through."""
        self.finish()
        if session is not None and not session.saved:
            self.save(session, "resume")
            self.finish()

    def finish(self) -> None:
        """Wait for the upload that is under way; its errors come out here."""
        while self._upload is not None:
            self._hold.tools.beat()
            upload, self._upload = self._upload, None
            try:
                upload.result(timeout=5)
            except TimeoutError:
                if upload.done():
                    raise
                self._upload = upload

    def reap(self) -> None:
        """Notice early that an upload failed."""
        if self._upload is not None and self._upload.done():
            self.finish()

    def close(self) -> None:
        """See the upload out, whatever comes of it: the training is being left."""
        upload, self._upload = self._upload, None
        error = None if upload is None else upload.exception()
        if error is not None:
            log.warning("a checkpoint was not saved", why=str(error))
        self._thread.shutdown(wait=True)

    # On the upload thread

    def _send(
        self,
        session: Session,
        snapshot: checkpoint.Snapshot,
        kind: Kind,
        gpu_seconds: float,
        started: float,
    ) -> None:
        hold = self._hold
        epoch = hold.lease.state.epoch
        head = hold.persist(
            lambda: checkpoint.upload(
                hold.tools.store, hold.resolved, hold.training, epoch, snapshot
            )
        )
        shutil.rmtree(snapshot.folder, ignore_errors=True)
        self._publish(session, head, kind, snapshot.cursor.tokens, gpu_seconds)
        self._saved_at, self.seconds = time.monotonic(), time.monotonic() - started
        metrics.saved(hold.pipeline, kind, self.seconds)
        log.info("saved", step=head.step, kind=kind, seconds=round(self.seconds, 2))

    def _publish(
        self, session: Session, head: Head, kind: Kind, tokens: int, gpu_seconds: float
    ) -> None:
        """Move HEAD; tell, where others are to know; collect what nobody needs any more.

        The session is steps ahead by now: of it only `ref` and `saved_step` are touched.
        """
        hold, store = self._hold, self._hold.tools.store
        seconds = round(gpu_seconds, 3)
        published = [e for e in hold.lease.state.published if e.step < head.step]
        if kind != "resume":
            published.append(
                Published(
                    step=head.step,
                    epoch=head.epoch,
                    manifest=head.manifest,
                    final=kind == "final",
                    tokens=tokens,
                    gpu_seconds=seconds,
                )
            )
        state = hold.persist(
            lambda: hold.lease.update(
                head=head,
                published=published,
                tokens=tokens,
                gpu_seconds=seconds,
                crashes=0,
                done=kind == "final",
            )
        )
        session.ref, session.saved_step = head.manifest, head.step
        crash_point("trainer.head_moved")
        if kind != "resume":
            hold.tools.announcer.say(*announce.newest(hold.resolved, state, hold.wake))
        if kind == "final":
            checkpoint.sweep(store, hold.tenant, hold.training, state.published)
        else:
            checkpoint.collect(store, head, state.published)
