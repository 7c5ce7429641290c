"""A training while this process holds it: prepare the student, step, save, let go.

Everything that decides stands in the store: HEAD says where to go on, the shards what comes next.
So this loop may end at any line, and another one, here or elsewhere, ends in the same bits. It
works in segments; between two of them it looks whether the pipeline was stopped and whether
another training waits for its turn.
"""

from __future__ import annotations

import errno
import math
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from enum import StrEnum

import torch

from services.trainer import announce, memory, metrics, plan, student, work
from services.trainer.data import INVALID_SHARD, End, Missing, StepRows, TrainData
from services.trainer.gradients import Passes
from services.trainer.hold import Hold, TrainingStopped
from services.trainer.saver import Saver
from services.trainer.session import Session, head_cursor, prepare, resume
from stillhouse.chassis.crash import crash_point
from stillhouse.chassis.errors import PermanentError, RetryableError
from stillhouse.chassis.leases import LeaseLost
from stillhouse.chassis.logs import logger
from stillhouse.contracts.envelope import Envelope, seal
from stillhouse.contracts.events import StageProgressed
from stillhouse.contracts.trainings import Cursor, LedgerEntry

log = logger(__name__)

MAX_CRASHES = 20  # holders in a row that died without moving HEAD: then the training is the cause
MAX_FAULTS = 3  # the same for holders that met an error which nobody foresaw
_NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
LOOK_AGAIN = 0.5  # seconds between two looks for a missing shard


class Outcome(StrEnum):
    """Why a held training was let go."""

    DONE = "done"
    FAILED = "failed"
    STOPPED = "stopped"
    STARVED = "starved"
    HANDED_OVER = "handed_over"
    TERMINATED = "terminated"
    LOST = "lost"
    RETRY = "retry"


class TrainingRun:
    """One holding of one training.

    After `run`, `rival` is the other training's wake-up where it was handed over, and `session`
    the student where it is as saved and may be used again.
    """

    def __init__(
        self, hold: Hold, warm: Session | None = None, *, after_crash: bool = False
    ) -> None:
        self._hold = hold
        self._after_crash = after_crash
        self._tools = hold.tools
        self._warm = warm
        self._spec = hold.resolved.spec
        self._saver = Saver(hold)
        self._progress_at = -math.inf
        self.session: Session | None = None
        self.rival: Envelope | None = None

    def run(self) -> Outcome:
        """Train until there is a reason to let go. An error that cannot heal is stored and
        published; after a lost lease nothing is written."""
        try:
            try:
                outcome = self._run()
            finally:
                self._saver.close()
        except TrainingStopped:
            outcome = Outcome.STOPPED
        except LeaseLost as error:
            metrics.LEASES_LOST.inc()
            log.warning("lease lost; the training is left as it is", why=str(error))
            outcome = Outcome.LOST
        except RetryableError as error:
            log.warning("training given up for now", why=str(error))
            outcome = Outcome.RETRY
        except PermanentError as error:
            outcome = self._fail(error.reason, str(error))
        except (MemoryError, torch.OutOfMemoryError) as error:
            advice = "lower TRAINER_MICRO_BATCH_TOKENS and start the pipeline again"
            outcome = self._fail("out_of_memory", f"{error}; {advice}")
        except Exception as error:
            if isinstance(error, OSError) and error.errno in _NO_SPACE:
                log.error("no space left for a checkpoint", folder=str(self._tools.scratch))
                outcome = Outcome.RETRY
            else:
                log.exception("training broken off")
                outcome = self._break_off(error)
        kept = outcome in (Outcome.STARVED, Outcome.HANDED_OVER)
        if not kept or self.session is None or not self.session.saved:
            self.session = None
            memory.give_back()
        metrics.leave()
        metrics.RUNS.labels(outcome.value).inc()
        return outcome

    def _run(self) -> Outcome:
        state = self._hold.lease.state
        metrics.EPOCH.labels(self._hold.pipeline).set(state.epoch)
        if self._after_crash:
            state = self._hold.persist(lambda: self._hold.lease.update(crashes=state.crashes + 1))
            # It may have died between moving HEAD and telling.
            self._tools.announcer.say(*announce.newest(self._hold.resolved, state, self._hold.wake))
        if state.crashes > MAX_CRASHES:
            raise PermanentError(
                f"{state.crashes} trainers in a row died at step "
                f"{state.head.step if state.head else 0} (most likely killed for memory): lower "
                "TRAINER_MICRO_BATCH_TOKENS and start the pipeline again",
                reason="crashed_repeatedly",
            )
        if state.head is None:
            started = time.monotonic()
            self.session = prepare(self._hold)
            self._saver.gpu_seconds += time.monotonic() - started
            self._saver.save(self.session, "start")
            self._saver.finish()
        data = TrainData(self._tools.store, self._hold.resolved)
        cursor = self.session.cursor if self.session else head_cursor(self._hold)
        outcome = None
        while outcome is None:
            outcome, cursor = self._segment(data, cursor)
            outcome = outcome or self._between()
        return outcome

    def _segment(self, data: TrainData, cursor: Cursor) -> tuple[Outcome | None, Cursor]:
        """Train for a while; no outcome means that there is more to do."""
        end = time.monotonic() + self._tools.times.segment
        while time.monotonic() < end:
            self._tools.beat()
            self._hold.lease.check()
            self._saver.reap()
            if self._tools.stopping.is_set():
                self._saver.save_unsaved(self.session)
                return Outcome.TERMINATED, cursor
            step = self._next(data, cursor)
            if isinstance(step, Missing):
                outcome = self._wait(data, cursor, step)
                if outcome is not None:
                    return outcome, cursor
                continue
            if self.session is None:
                self.session = self._open()
                cursor = self.session.cursor  # an earlier one, where HEAD is damaged
                # Opening does not count: two trainings that take turns must both get on.
                end = time.monotonic() + self._tools.times.segment
                continue
            if isinstance(step, End):
                self._complete(self.session, step)
                return Outcome.DONE, step.cursor
            with self._reading_ahead(data, step.cursor):
                self._step(self.session, step)
            cursor = self.session.cursor
            if isinstance(self._next(data, cursor), End):
                continue  # it is saved as the last one
            if cursor.step % self._spec.evaluation.every_steps == 0:
                self._saver.save(self.session, "named")
            elif self._saver.due():
                self._saver.save(self.session, "resume")
        return None, cursor

    def _next(self, data: TrainData, cursor: Cursor) -> StepRows | Missing | End:
        with metrics.waiting_for_data():
            return self._hold.persist(lambda: data.next_step(cursor))

    @contextmanager
    def _reading_ahead(self, data: TrainData, cursor: Cursor) -> Iterator[None]:
        """Read what the next step needs while this one computes. What goes wrong with it is met
        again, and told, where the next step asks for its rows."""
        with ThreadPoolExecutor(1, thread_name_prefix="read-ahead") as beside:
            beside.submit(data.next_step, cursor)
            yield

    def _between(self) -> Outcome | None:
        """Between two segments: write down what was computed, and look around."""
        self._hold.persist(lambda: self._hold.lease.update(gpu_seconds=self._saver.gpu_seconds))
        return self._look_around()

    def _look_around(self) -> Outcome | None:
        """Was the pipeline stopped? Is it another training's turn?"""
        if self._hold.stopped():
            return Outcome.STOPPED
        self.rival = self._tools.rival((self._hold.tenant, self._hold.pipeline))
        if self.rival is None:
            return None
        self._saver.save_unsaved(self.session)
        return Outcome.HANDED_OVER

    def _wait(self, data: TrainData, cursor: Cursor, missing: Missing) -> Outcome | None:
        """Wait a little for what is missing; None when it came. Letting go costs a save and then
        a load, so patience grows with what a save takes."""
        patience = max(self._tools.times.wait, 2 * self._saver.seconds)
        end = time.monotonic() + patience
        while time.monotonic() < end:
            self._tools.beat()
            self._hold.lease.check()
            self._saver.reap()
            with metrics.waiting_for_data():
                stopping = self._tools.stopping.wait(min(LOOK_AGAIN, patience))
            if stopping:
                self._saver.save_unsaved(self.session)
                return Outcome.TERMINATED
            if not isinstance(self._next(data, cursor), Missing):
                return None
            outcome = self._look_around()
            if outcome is not None:
                return outcome
        log.info("what comes next is not there yet; letting go", key=missing.key)
        self._saver.save_unsaved(self.session)
        return Outcome.STARVED

    def _open(self) -> Session:
        """The student in memory: warm from the last time, or from HEAD."""
        head = self._hold.lease.state.head
        assert head is not None
        warm, self._warm = self._warm, None
        if warm is not None and warm.ref == head.manifest:
            return warm
        del warm  # frees its memory before HEAD is opened
        return resume(self._hold)

    def _step(self, session: Session, step: StepRows) -> None:
        """One optimiser step over whole rows."""
        started = time.monotonic()
        if step.vocabulary > student.vocabulary(session.model):
            raise PermanentError(
                f"rows with a vocabulary of {step.vocabulary} for a student of "
                f"{student.vocabulary(session.model)}",
                reason=INVALID_SHARD,
            )
        loss, gradient = self._gradients(session, step)
        if not math.isfinite(loss) or not math.isfinite(gradient):
            first = self._hold.resolved.batches.heldout
            batches = sorted({first + row.batch for row in step.rows})
            raise PermanentError(
                f"step {step.cursor.step}: loss {loss}, gradient norm {gradient}; lower "
                f"`training.learning_rate`, or look at the rows. Batches {batches}, rows "
                f"{', '.join(row.row_id for row in step.rows)}",
                reason="loss_not_finite",
            )
        rate = plan.learning_rate(self._spec.training, step.cursor.step, step.cursor.decay_from)
        session.optimizer.step(rate)
        crash_point("trainer.optimizer")
        entry = LedgerEntry(
            step=step.cursor.step,
            kind=step.kind,
            rows=len(step.rows),
            tokens=step.tokens,
            rows_sha256=step.rows_sha256,
            loss=loss,
            learning_rate=rate,
        )
        session.cursor = step.cursor.model_copy(update={"ledger": [*step.cursor.ledger, entry]})
        session.loss = loss
        seconds = time.monotonic() - started
        self._saver.gpu_seconds += seconds
        metrics.stepped(self._hold.resolved, step, entry, gradient, seconds)
        self._measure(session, step, seconds)
        log.info("step", **entry.model_dump(exclude={"rows_sha256"}), seconds=round(seconds, 3))
        self._progress(entry, session.cursor)

    def _gradients(self, session: Session, step: StepRows) -> tuple[float, float]:
        """Mean loss of the step, and the norm of its gradient, which is clipped and in place."""
        passes = Passes(
            self._spec.training,
            self._tools.device,
            session.plan,
            teacher=session.teacher,
        )
        loss = passes.gradient(session.model, step.rows, between=self._hold.lease.check)
        return loss, session.optimizer.clip()

    def _measure(self, session: Session, step: StepRows, seconds: float) -> None:
        here, device = session.plan.environment, self._tools.device
        done = work.step_flops(session.model, step.rows, session.teacher) / seconds
        best = work.peak_flops(device, here.dtype, here.matrices)
        metrics.worked(sum(row.fed for row in step.rows) / seconds, done, done / best)
        if device.type == "cuda":
            metrics.DEVICE_MEMORY.set(torch.cuda.max_memory_allocated(device))

    def _progress(self, entry: LedgerEntry, cursor: Cursor) -> None:
        if time.monotonic() - self._progress_at < self._tools.settings.progress_seconds:
            return
        self._progress_at = time.monotonic()
        event = StageProgressed(
            stage="train",
            figures={
                "step": float(entry.step),
                "loss": entry.loss,
                "tokens": float(cursor.tokens),
                "gpu_seconds": round(self._saver.gpu_seconds, 3),
                "learning_rate": entry.learning_rate,
            },
        )
        self._tools.announcer.mention(
            seal(
                event,
                tenant_id=self._hold.tenant,
                pipeline_id=self._hold.pipeline,
                caused_by=self._hold.wake,
            )
        )

    def _complete(self, session: Session, end: End) -> None:
        if end.cursor.rows == 0:
            raise PermanentError(
                "every item was rejected, so there is no row to train on: see the pipeline's "
                "rejections",
                reason="no_rows",
            )
        session.cursor = end.cursor
        self._saver.save(session, "final")
        self._saver.finish()

    def _break_off(self, error: Exception) -> Outcome:
        """A fault of the program or of this machine: the next holder may get past it. One that
        MAX_FAULTS holders in a row met is the training's."""
        hold = self._hold
        crashes = hold.lease.state.crashes + 1
        if crashes >= MAX_FAULTS:
            return self._fail("trainer_error", f"{type(error).__name__}: {error}")
        try:
            hold.persist(lambda: hold.lease.update(crashes=crashes))
        except (LeaseLost, RetryableError) as failure:
            log.warning("the fault is not counted", why=str(failure))
            return Outcome.LOST
        return Outcome.RETRY

    def _fail(self, reason: str, detail: str) -> Outcome:
        """Store and publish an error that will not heal."""
        log.error("training failed", reason=reason, detail=detail)
        hold, failed = self._hold, f"{reason}: {detail}"[:1000]
        try:
            state = hold.persist(lambda: hold.lease.update(failed=failed))
        except (LeaseLost, RetryableError) as error:
            log.warning("the failure is not stored; the next holder meets it", why=str(error))
            return Outcome.LOST
        self._tools.announcer.say(announce.failure(hold.resolved, state, hold.wake))
        return Outcome.FAILED
