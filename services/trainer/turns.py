"""Whose turn it is: takes a wake-up when idle, takes its training, trains, lets go.

No message waits for a training: a wake-up is acknowledged when it is pulled, and what is to be
done is read from the store. A wake-up for a training that someone else holds is dropped, since
its holder looks once more before it goes; should the holder turn out dead, this process takes
over when the lease has run out.
"""

from __future__ import annotations

import os
import random
import secrets
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from services.trainer import announce, metrics
from services.trainer.checkpoint import resumable
from services.trainer.data import Missing, TrainData
from services.trainer.hold import Hold, Tools
from services.trainer.loop import Outcome, TrainingRun
from services.trainer.plan import environment, set_up_torch
from services.trainer.session import Session
from services.trainer.settings import TrainerSettings
from stillhouse.chassis import bus, leases
from stillhouse.chassis.errors import PermanentError, RetryableError
from stillhouse.chassis.logs import logger
from stillhouse.chassis.references import sources_of
from stillhouse.chassis.storage import ObjectStore
from stillhouse.contracts import artifacts
from stillhouse.contracts.envelope import Envelope, seal
from stillhouse.contracts.events import PipelineAccepted, PipelineStopped, ShardWritten, StageFailed
from stillhouse.contracts.spec import ResolvedSpec
from stillhouse.contracts.trainings import Environment, TrainingState

log = logger(__name__)


@dataclass(frozen=True)
class Work:
    """A wake-up whose training can go on."""

    wake: Envelope
    resolved: ResolvedSpec
    state: TrainingState | None


@dataclass
class Again:
    """A wake-up to look at once more: its training is held, or the world was in the way."""

    due: float
    wake: Envelope
    seen: tuple[int, int] | None  # epoch and beat of the holder


class Trainer:
    """One process that trains one student at a time.

    `lease_store` is the same store with short time-outs, so that a hanging call cannot eat a
    lease. `pull` takes the next wake-up off the queue, `hand_on` puts one back.
    """

    def __init__(
        self,
        settings: TrainerSettings,
        store: ObjectStore,
        lease_store: ObjectStore,
        announcer: announce.Announcer,
        *,
        pull: Callable[[], Envelope | None],
        hand_on: Callable[[Envelope], None],
        scratch: Path,
        beat: Callable[[], None] = lambda: None,
        stopping: threading.Event | None = None,
    ) -> None:
        self._settings = settings
        self._times = settings.times
        self._times.check()
        self._store = store
        self._lease_store = lease_store
        self._announcer = announcer
        self._pull = pull
        self._hand_on = hand_on
        self.stopping = stopping or threading.Event()
        self._holder = f"{socket.gethostname()}-{os.getpid()}-{secrets.token_hex(4)}"
        self._again: dict[tuple[str, str], Again] = {}
        self._warm: Session | None = None
        device = set_up_torch(settings)
        self._tools = Tools(
            settings=settings,
            store=store,
            announcer=announcer,
            rival=self._rival,
            beat=beat,
            stopping=self.stopping,
            device=device,
            here=environment(device, settings),
            scratch=scratch,
            sources=sources_of(settings),
        )

    @property
    def environment(self) -> Environment:
        return self._tools.here

    def run(self) -> None:
        """Work until `stopping` is set; what is left over goes back to the queue."""
        while not self.stopping.is_set():
            self._tools.beat()
            if not self.turn():
                self.stopping.wait(random.uniform(*self._times.poll))  # noqa: S311
        for again in self._again.values():
            self._give_back(again.wake)

    def turn(self) -> bool:
        """Look at one wake-up; False when there was none."""
        wake = self._due() or self._next_wake()
        if wake is None:
            return False
        while wake is not None and not self.stopping.is_set():
            wake = self.handle(wake)
        if wake is not None:
            self._give_back(wake)
        return True

    def handle(self, wake: Envelope) -> Envelope | None:
        """Do what a wake-up asks for; return another one to do next, after a hand-over."""
        earlier = self._again.pop(_pipeline(wake), None)
        try:
            work = self.triage(wake)
            return None if work is None else self._train(work, earlier)
        except RetryableError as error:
            log.warning("wake-up put off", type=wake.type, why=str(error))
            self._look_again(wake, self._times.retry)
            return None

    # Which wake-ups are work

    def triage(self, wake: Envelope) -> Work | None:
        """The work that a wake-up stands for. None where there is none now: it is dropped, after
        publishing again what its sender may have missed."""
        judged = self._judge(wake)
        if isinstance(judged, Work):
            return judged
        metrics.WAKE_UPS.labels(judged).inc()
        log.info("wake-up dropped", type=wake.type, pipeline=wake.pipeline_id, why=judged)
        return None

    def _judge(self, wake: Envelope, *, sent: bool = True) -> Work | str:
        """`sent`: the wake-up came from the queue just now, perhaps for the second time."""
        event = wake.event()
        if isinstance(event, PipelineStopped):
            return "stopped"
        if isinstance(event, ShardWritten) and event.split != "train":
            return "held_out"
        tenant, pipeline = wake.tenant_id, wake.pipeline_id
        if self._store.exists(artifacts.stopped_key(tenant, pipeline)):
            return "stopped"
        try:
            found = self._store.find_model(artifacts.spec_key(tenant, pipeline), ResolvedSpec)
        except ValueError as error:  # pydantic's
            return self._refuse(wake, f"spec.json does not fit this version: {error}")
        if found is None:
            return self._refuse(wake, "spec.json is missing")
        resolved = found[0]
        stored = self._store.read(artifacts.training_state_key(tenant, resolved.training_id))
        if stored is None:
            return Work(wake, resolved, None)
        state = TrainingState.model_validate_json(stored.data)
        if sent and not isinstance(event, ShardWritten):
            self._say_again(wake, resolved, state)
        if state.failed or state.done:
            return "failed" if state.failed else "done"
        if state.head is not None and not self._can_go_on(resolved, state):
            return "waits_for_data"
        return Work(wake, resolved, state)

    def _say_again(self, wake: Envelope, resolved: ResolvedSpec, state: TrainingState) -> None:
        """Publish outputs that are there already: whoever sends an input again misses one."""
        if state.failed:
            self._announcer.say(announce.failure(resolved, state, wake))
        elif isinstance(wake.event(), PipelineAccepted) and state.published:
            first = announce.checkpoint_saved(resolved, state.published[0], wake)
            self._announcer.say(first)
        if state.done:
            self._announcer.say(*announce.newest(resolved, state, wake))

    def _can_go_on(self, resolved: ResolvedSpec, state: TrainingState) -> bool:
        """Whether what comes next is in the store; read without a lease."""
        assert state.head is not None
        for found in resumable(self._store, state.head.manifest):
            try:
                step = TrainData(self._store, resolved).next_step(found.cursor)
            except PermanentError:
                return True  # whoever holds the lease meets it again, and stores it
            return not isinstance(step, Missing)
        return True

    def _refuse(self, wake: Envelope, detail: str) -> str:
        event = StageFailed(
            stage="train", reason="spec_unreadable", detail=detail[:1000], fatal=True
        )
        self._announcer.say(
            seal(event, tenant_id=wake.tenant_id, pipeline_id=wake.pipeline_id, caused_by=wake)
        )
        return "refused"

    def _rival(self, mine: tuple[str, str]) -> Envelope | None:
        """Empty the queue up to a wake-up that is work of another pipeline than `mine`."""
        while (wake := self._due(mine) or self._next_wake()) is not None:
            if _pipeline(wake) == mine:
                metrics.WAKE_UPS.labels("own").inc()
                continue
            earlier = self._again.pop(_pipeline(wake), None)
            try:
                work = self.triage(wake)
            except RetryableError as error:
                log.warning("wake-up put off", type=wake.type, why=str(error))
                self._look_again(wake, self._times.retry)
                return None
            if work is None:
                continue
            if work.state is not None and work.state.holder:
                self._wait_for_holder(work, earlier)
                continue
            return wake
        return None

    # Holding

    def _train(self, work: Work, earlier: Again | None) -> Envelope | None:
        resolved, before = work.resolved, work.state
        lease = leases.acquire(
            self._lease_store,
            artifacts.training_state_key(resolved.tenant_id, resolved.training_id),
            self._holder,
            model=TrainingState,
            initial=lambda: TrainingState(training_id=resolved.training_id, epoch=1, write_id=""),
            times=self._times.lease,
            may_take=lambda state: not state.done and not state.failed,
        )
        if lease is None:
            self._wait_for_holder(work, earlier)
            return None
        metrics.WAKE_UPS.labels("taken").inc()
        warm, self._warm = self._warm, None
        if warm is not None and warm.training_id != resolved.training_id:
            warm = None
        hold = Hold(self._tools, resolved, lease, work.wake)
        run = TrainingRun(hold, warm, after_crash=before is not None and before.holder != "")
        del warm  # the run alone decides how long it is kept
        with lease:
            outcome = run.run()
        self._warm = run.session
        log.info("let go", training=resolved.training_id, outcome=outcome.value)
        if outcome is Outcome.STARVED:
            # A wake-up that was dropped while the lease was held may have been the last one.
            return work.wake if isinstance(self._judge(work.wake, sent=False), Work) else None
        if outcome in (Outcome.TERMINATED, Outcome.HANDED_OVER):
            self._give_back(work.wake)
        elif outcome is Outcome.RETRY:
            self._look_again(work.wake, self._times.retry)
        elif outcome is Outcome.LOST:
            self._look_again(work.wake, self._expiry)
        return run.rival

    @property
    def _expiry(self) -> float:
        return self._times.lease.ttl + self._times.lease.grace + 1

    def _wait_for_holder(self, work: Work, earlier: Again | None) -> None:
        """Look again when the holder's lease has run out, unless it is seen to live: then it
        looks itself before it goes."""
        seen = (work.state.epoch, work.state.beat) if work.state else None
        if earlier is not None and earlier.seen is not None and earlier.seen != seen:
            metrics.WAKE_UPS.labels("held").inc()
        else:
            self._look_again(work.wake, self._expiry, seen)

    def _look_again(
        self, wake: Envelope, pause: float, seen: tuple[int, int] | None = None
    ) -> None:
        self._again[_pipeline(wake)] = Again(time.monotonic() + pause, wake, seen)

    def _due(self, mine: tuple[str, str] = ("", "")) -> Envelope | None:
        for pipeline, again in self._again.items():
            if pipeline != mine and again.due <= time.monotonic():
                return again.wake
        return None

    def _next_wake(self) -> Envelope | None:
        try:
            return self._pull()
        except bus.BrokerUnavailable as error:
            log.warning("no wake-up can be taken", why=str(error))
            return None

    def _give_back(self, wake: Envelope) -> None:
        """Put a wake-up back for another trainer, or for this one's next turn."""
        try:
            self._hand_on(wake)
        except bus.BrokerUnavailable as error:
            log.warning("a wake-up is lost; re-drive repairs it", type=wake.type, why=str(error))


def _pipeline(wake: Envelope) -> tuple[str, str]:
    return wake.tenant_id, wake.pipeline_id
