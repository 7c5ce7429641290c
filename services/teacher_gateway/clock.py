"""The clock: what must happen without being asked for, in small duties that can be repeated.

    every tick      outbox to broker; dead leases reaped; due jobs enqueued; dead tranches listed
    every few       re-drive

One clock is active, by a lease row; a second one waits. A duty that meets an error is logged and
done again at the next tick: it never ends the clock. What needs the store is a job, or, for spools
of captured traffic that lie on this machine, done by a thread beside it.
"""

from __future__ import annotations

import random
import secrets
import signal
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from sqlalchemy import Engine, or_, select, update
from sqlalchemy.exc import IntegrityError

from services.teacher_gateway.capture.ship import sweep_until
from services.teacher_gateway.capture.tranches import expire
from services.teacher_gateway.counters import TICK_ERRORS
from services.teacher_gateway.database import now, open_engine, reading, transaction
from services.teacher_gateway.dispatch import (
    find_dead,
    find_due,
    find_flying,
    find_unfinished,
    mark_enqueued,
    reap,
)
from services.teacher_gateway.ledger import changed
from services.teacher_gateway.metrics import StateCollector
from services.teacher_gateway.migrate import check_migrated
from services.teacher_gateway.models import ClockLease, Pipeline
from services.teacher_gateway.outbox import RELAYED_AT_ONCE, relay
from services.teacher_gateway.redrive import redrive
from services.teacher_gateway.settings import TeacherGatewaySettings
from services.teacher_gateway.timeouts import GatewayTimeouts, table
from services.teacher_gateway.worker import make_shell
from stillhouse.chassis import bus, metrics
from stillhouse.chassis.crash import crash_point
from stillhouse.chassis.errors import RetryableError
from stillhouse.chassis.health import Heartbeat
from stillhouse.chassis.jobs import Job, enqueue, make_app
from stillhouse.chassis.logs import logger
from stillhouse.chassis.storage import open_store
from stillhouse.contracts.envelope import Envelope
from stillhouse.contracts.flow import GATEWAY, Service

log = logger(__name__)

LEASE_NAME = "clock"
STALE_AFTER = 60.0


@dataclass
class Clock:
    """The duties, with all that they touch given from outside."""

    engine: Engine
    times: GatewayTimeouts
    publish: Callable[..., None]
    republish: Callable[[Envelope, Service], None]
    waiting_messages: Callable[[Service], int]
    enqueue: Callable[[Job], None]
    window: int
    at_once: int
    holder: str = field(default_factory=lambda: secrets.token_hex(8))
    rng: random.Random = field(default_factory=random.Random)
    # When a job without a row of its own was put on the queue, so that each tick does not again.
    _asked: dict[tuple[str, str], float] = field(default_factory=dict)
    _redriven_at: float = 0.0
    _held_at: float = float("-inf")
    _flying: bool = False

    @property
    def pause(self) -> float:
        """Seconds to the next tick: fewer while batches are in flight, since each that ends makes
        room for another."""
        return self.times.tick_flying if self._flying else self.times.tick

    def tick(self) -> bool:
        """Do all duties once; False when another clock is active."""
        active: list[bool] = []
        self._duty("lease", lambda: active.append(self.hold()))
        if not any(active):
            return False
        self._duty("relay", self.relay)
        self._duty("dispatch", self.dispatch)
        self._duty("enqueue", self.enqueue_waiting)
        self._duty("tranches", lambda: expire(self.engine))
        if time.monotonic() - self._redriven_at >= self.times.redrive / 10:
            self._redriven_at = time.monotonic()
            self._duty("redrive", self.redrive)
        return True

    def _duty(self, name: str, duty: Callable[[], object]) -> None:
        try:
            duty()
        except RetryableError as error:
            TICK_ERRORS.labels(name).inc()
            log.warning("a duty of the clock is put off", duty=name, why=str(error))
        except Exception:
            # A defect in one duty must not stop the others: they are what repairs everything.
            TICK_ERRORS.labels(name).inc()
            log.exception("a duty of the clock failed", duty=name)

    def hold(self) -> bool:
        """Take or renew the lease of the one active clock."""
        sent = time.monotonic()
        if sent - self._held_at < self.times.clock_ttl / 3:
            return True
        held = self._hold()
        self._held_at = sent if held else float("-inf")
        return held

    def _hold(self) -> bool:
        try:
            with transaction(self.engine) as session:
                clock = now(session)
                taken = changed(
                    session,
                    update(ClockLease)
                    .where(
                        ClockLease.name == LEASE_NAME,
                        or_(ClockLease.holder == self.holder, ClockLease.until <= clock),
                    )
                    .values(holder=self.holder, until=clock + self.times.clock_ttl),
                )
                if taken:
                    return True
                if session.get(ClockLease, LEASE_NAME) is not None:
                    return False
                session.add(
                    ClockLease(
                        name=LEASE_NAME,
                        holder=self.holder,
                        until=clock + self.times.clock_ttl,
                    )
                )
                return True
        except IntegrityError:
            return False  # another clock inserted the row first

    def release(self) -> None:
        """Let another clock begin at once."""
        self._held_at = float("-inf")
        with transaction(self.engine) as session:
            changed(
                session,
                update(ClockLease)
                .where(ClockLease.name == LEASE_NAME, ClockLease.holder == self.holder)
                .values(until=0.0),
            )

    def relay(self) -> None:
        """Publish the outbox, a hundred events at a time."""
        while relay(self.engine, self.publish) == RELAYED_AT_ONCE:
            continue

    def dispatch(self) -> None:
        """Reap dead leases and put the jobs of due batches on the queue."""
        with reading(self.engine) as session:
            dead = find_dead(session)
        if dead:
            with transaction(self.engine) as session:
                reap(session)
        with reading(self.engine) as session:
            due = find_due(session, self.times, window=self.window, at_once=self.at_once)
        for batch in due:
            job = Job(
                name="collect_batch",
                tenant_id=batch.tenant_id,
                pipeline_id=batch.pipeline_id,
                args={"batch": batch.batch},
            )
            self.enqueue(job)
            crash_point("job_enqueued")
            # After: were it before, a lost message would cost `enqueue_again`.
            with transaction(self.engine) as session:
                mark_enqueued(session, batch, self.times)
        with reading(self.engine) as session:
            self._flying = find_flying(session)

    def enqueue_waiting(self) -> None:
        """Put the jobs of whole pipelines on the queue: acceptance, probe, what is unfinished."""
        with reading(self.engine) as session:
            clock = now(session)
            is_due = or_(Pipeline.next_attempt_at.is_(None), Pipeline.next_attempt_at <= clock)
            accepting = session.execute(
                select(Pipeline).where(
                    Pipeline.state == "accepting", Pipeline.stopping == "", is_due
                )
            ).scalars()
            wanted = [("accept_pipeline", pipeline) for pipeline in accepting]
            probing = session.execute(
                select(Pipeline).where(
                    Pipeline.state == "running",
                    Pipeline.stopping == "",
                    Pipeline.collect == "waiting",
                    is_due,
                )
            ).scalars()
            wanted += [("probe_teacher", pipeline) for pipeline in probing]
            wanted += [("settle_pipeline", pipeline) for pipeline in find_unfinished(session)]
        at = time.monotonic()
        self._asked = {
            key: then for key, then in self._asked.items() if at - then < self.times.enqueue_again
        }
        for name, pipeline in wanted:
            # A job that planned its own next attempt is due again as soon as that comes.
            key = (f"{name}:{pipeline.attempts}", pipeline.pipeline_id)
            if key in self._asked:
                continue
            self.enqueue(
                Job(
                    name=name,
                    tenant_id=pipeline.tenant_id,
                    pipeline_id=pipeline.pipeline_id,
                    traceparent=pipeline.traceparent or None,
                )
            )
            self._asked[key] = at

    def redrive(self) -> None:
        """Send again what does not move; see `redrive`."""
        with reading(self.engine) as session:
            running = list(
                session.execute(
                    select(Pipeline.pipeline_id).where(
                        Pipeline.state == "running", Pipeline.stopping == ""
                    )
                ).scalars()
            )
        for pipeline_id in running:
            redrive(
                self.engine,
                pipeline_id,
                self.times,
                republish=self.republish,
                waiting_messages=self.waiting_messages,
                rng=self.rng,
            )


def make_clock(settings: TeacherGatewaySettings, engine: Engine) -> Clock:
    """Put the clock together. Opens no connection."""
    times = table(settings.profile)
    publisher = bus.Publisher(GATEWAY, settings.broker_url)
    app = make_app(make_shell(settings))

    def waiting_messages(service: Service) -> int:
        found = bus.depth(service, settings.broker_url)
        return sum(count for name, count in found.items() if not name.endswith(".dead"))

    return Clock(
        engine=engine,
        times=times,
        publish=publisher.publish,
        republish=publisher.republish,
        waiting_messages=waiting_messages,
        enqueue=lambda job: enqueue(app, job),
        window=settings.collect_window,
        at_once=settings.collect_jobs or max(1, settings.worker_processes - 1),
    )


def run(settings: TeacherGatewaySettings) -> None:
    """Tick until SIGTERM or SIGINT, and serve the metrics of the stored state."""
    engine = open_engine(settings.database_url)
    check_migrated(engine)
    clock = make_clock(settings, engine)
    beat = Heartbeat(stale_after=STALE_AFTER)
    ended = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: ended.set())
    metrics.serve(settings, health=beat.healthy, collectors=[StateCollector(engine, settings)])
    store = open_store(settings, connect_timeout=2, read_timeout=20, attempts=1)
    sweep = (ended, settings.captured_folder, engine, store)
    threading.Thread(target=sweep_until, args=sweep, name="capture-sweep", daemon=True).start()
    try:
        while not ended.wait(clock.pause):
            clock.tick()
            beat.beat()
    finally:
        try:
            clock.release()
        except RetryableError as error:
            log.warning("the clock's lease runs out by itself", why=str(error))
        engine.dispose()
