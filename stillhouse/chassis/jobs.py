"""Jobs: work inside one service, on its own Celery queue.

Events cross services, jobs stay inside one. The worker's main process consumes the service's
events in a Celery consumer step: validate, enqueue jobs, acknowledge, in under a second. The
pool's child runs the jobs. A job is idempotent and looks at stored state first; an error of the
world ends it (re-drive sends the input again), an error that cannot heal publishes
`stage.failed`.
"""

from __future__ import annotations

import gc
import os
import secrets
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from celery import Celery, bootsteps, signals
from kombu import Consumer, Exchange, Queue
from pydantic import BaseModel, ConfigDict
from structlog.contextvars import bound_contextvars

from stillhouse.chassis import bus, health, logs, metrics
from stillhouse.chassis.errors import PermanentError, RetryableError
from stillhouse.chassis.settings import ServiceSettings
from stillhouse.contracts.artifacts import Id
from stillhouse.contracts.envelope import Envelope, seal
from stillhouse.contracts.events import Event, Stage, StageFailed
from stillhouse.contracts.flow import Service, consumed_by

log = logs.logger(__name__)

# Seconds until an event is tried again that could not be handed to the job queue.
PUT_BACK_AFTER = 5.0


class Job(BaseModel):
    """A message on a service's own queue: an imperative name and what it is about.

    `caused_by` is the event that asks for it; jobs of a clock have none.
    """

    model_config = ConfigDict(frozen=True, extra="ignore")

    name: str
    tenant_id: Id
    pipeline_id: Id
    args: dict[str, int | str] = {}
    caused_by: Envelope | None = None
    traceparent: str | None = None

    @classmethod
    def of(cls, name: str, envelope: Envelope, **args: int | str) -> Job:
        """The job that an event asks for."""
        return cls(
            name=name,
            tenant_id=envelope.tenant_id,
            pipeline_id=envelope.pipeline_id,
            args=args,
            caused_by=envelope,
            traceparent=envelope.traceparent,
        )

    def seal(self, event: Event) -> Envelope:
        """Put an event that this job produced into its envelope."""
        return seal(
            event,
            tenant_id=self.tenant_id,
            pipeline_id=self.pipeline_id,
            caused_by=self.caused_by,
            traceparent=self.traceparent,
        )


# What a service does with an event: pure, so that it can be tested without a broker.
Handler = Callable[[Envelope, Any], list[Job]]
# What a job does: it gets the job and the service's context.
JobFunction = Callable[[Job, Any], None]


@dataclass(frozen=True)
class Timeouts:
    """Seconds. Checked at start-up against each other; see `docs/operations.md`."""

    job: float
    visibility: float
    consumer: float = 1800  # RabbitMQ's default

    def check(self) -> None:
        if not self.job < self.visibility / 3 <= self.consumer:
            raise PermanentError(
                f"expected job < visibility / 3 <= consumer timeout, found {self}",
                reason="settings",
            )


@dataclass(frozen=True)
class ServiceShell:
    """All that makes a Celery worker of a service: handlers, jobs, time-outs, context."""

    service: Service
    stage: Stage
    settings: ServiceSettings
    handlers: Mapping[type[Event], Handler]
    jobs: Mapping[str, JobFunction]
    timeouts: Timeouts
    # Builds what the jobs need (store, publisher, ...) in the pool's child, after the fork.
    context: Callable[[], Any]
    # Jobs at once in one worker.
    processes: int = 1

    def check(self) -> None:
        """Refuse to start when handlers and the flow table disagree."""
        self.timeouts.check()
        handled, listed = {event.TYPE for event in self.handlers}, consumed_by(self.service)
        if handled != listed:
            raise PermanentError(
                f"{self.service} handles {sorted(handled)}, and contracts/flow.py lets it "
                f"consume {sorted(listed)}",
                reason="not_in_flow",
            )


def make_app(shell: ServiceShell) -> Celery:
    """Build the Celery app of a service. Opens no connection."""
    shell.check()
    service, url = shell.service, shell.settings.broker_url
    redis = bus.is_redis(url)
    queue = Queue(
        f"{service}.jobs",
        Exchange(f"{service}.jobs", type="topic", durable=True),
        routing_key="job",
        durable=True,
        queue_arguments=bus.queue_arguments(url, f"{service}.dead"),
    )
    app = Celery(service, broker=url, set_as_current=False)
    app.conf.update(
        task_queues=[queue],
        task_default_queue=queue.name,
        task_default_exchange=queue.exchange.name,
        task_default_exchange_type="topic",
        task_default_routing_key="job",
        task_default_queue_type="classic" if redis else "quorum",
        task_serializer="json",
        accept_content=["json"],
        task_ignore_result=True,
        task_acks_late=True,
        # A job that kills its process comes back at most DELIVERY_LIMIT times on RabbitMQ. Valkey
        # counts nothing, so there the job ends and re-drive, which counts, sends its input again.
        task_reject_on_worker_lost=not redis,
        task_acks_on_failure_or_timeout=True,
        task_time_limit=shell.timeouts.job,
        worker_prefetch_multiplier=1,
        worker_concurrency=shell.processes,
        # Valkey: cancelling loses the job until the visibility timeout; RabbitMQ: not cancelling
        # runs the whole job a second time.
        worker_cancel_long_running_tasks_on_connection_loss=not redis,
        worker_hijack_root_logger=False,
        worker_redirect_stdouts=False,
        worker_enable_remote_control=False,
        worker_send_task_events=False,
        broker_connection_retry_on_startup=True,
        broker_connection_max_retries=None,
        broker_transport_options=bus.transport_options(url, service, shell.timeouts.visibility),
    )
    app.steps["consumer"].add(_event_step(shell, app))
    for name, function in shell.jobs.items():
        app.task(_task(shell, function), name=name)
    return app


def enqueue(app: Celery, job: Job) -> None:
    """Put a job on its service's queue. Raises BrokerUnavailable, in seconds, without a broker."""
    try:
        app.send_task(
            job.name,
            args=[job.model_dump_json(exclude_none=True)],
            # Once more, because the pool may hold a connection that a broker's restart cut.
            retry=True,
            retry_policy={"max_retries": 1, "interval_start": 0.1, "interval_max": 0.1},
            timeout=bus.PUBLISH_TIMEOUT,
            confirm_timeout=bus.PUBLISH_TIMEOUT,
        )
    except bus.transport_errors(app.conf.broker_url) as error:
        raise bus.BrokerUnavailable(f"the broker did not take job {job.name}: {error}") from error


def _event_step(shell: ServiceShell, app: Celery) -> type[bootsteps.ConsumerStep]:
    service, url = shell.service, shell.settings.broker_url

    class EventStep(bootsteps.ConsumerStep):  # type: ignore[misc]
        """Consumes the service's events. Its callbacks never raise: Celery's loop would end the
        worker or, on RabbitMQ, swallow the error and leave the event unacknowledged (measured)."""

        # After Tasks: an event must not arrive before the job queue is declared.
        requires = ("celery.worker.consumer:Tasks",)

        def start(self, c: Any) -> None:
            self._timer = c.timer
            super().start(c)

        def get_consumers(self, channel: Any) -> list[Consumer]:
            bus.declare(channel.connection.client, url)
            return [
                Consumer(
                    channel,
                    queues=[bus.event_queue(service, url)],
                    on_message=self._on_message,
                    on_decode_error=self._refuse,
                    accept=["json"],
                    prefetch_count=4,
                    tag_prefix="events",
                )
            ]

        def _on_message(self, message: Any) -> None:
            started = time.monotonic()
            try:
                envelope = Envelope.decode(message.body)
                event = envelope.event()
                jobs = shell.handlers[type(event)](envelope, event)
            except Exception as error:
                self._refuse(message, error)
                return
            try:
                for job in jobs:
                    enqueue(app, job)
                message.ack()
            except Exception as error:
                self._put_back(message, error)
                return
            metrics.EVENTS.labels(service, envelope.type, "taken").inc()
            metrics.EVENT_AGE.labels(service).set(
                max(0.0, time.time() - envelope.occurred_at.timestamp())
            )
            if time.monotonic() - started > 1:
                log.warning("a handler took over a second", service=service)

        def _refuse(self, message: Any, error: Exception) -> None:
            """Move what cannot be handled to the dead queue, with the reason."""
            log.error("event refused", service=service, exc_info=error)
            metrics.EVENTS.labels(service, "unknown", "refused").inc()
            reason = f"{type(error).__name__}: {error}"
            try:
                # On a channel of its own: a confirm awaited on the consumer's would run the
                # callbacks of other deliveries inside this one.
                with app.producer_or_acquire() as producer:
                    bus.bury(producer.channel, service, url, message, reason)
                message.ack()
            except Exception as failure:
                self._put_back(message, failure)

        def _put_back(self, message: Any, error: Exception) -> None:
            """Have an event delivered again a little later: the broker did not take its jobs."""
            log.warning("event put back", service=service, why=str(error))
            self._timer.call_after(PUT_BACK_AFTER, lambda: self._requeue(message))

        def _requeue(self, message: Any) -> None:
            try:
                message.requeue()
            except Exception as error:
                # Its connection is gone, and with that the broker gives it out again by itself.
                log.info("event not put back by hand", service=service, why=str(error))

    return EventStep


_contexts: dict[int, Any] = {}


def _task(shell: ServiceShell, function: JobFunction) -> Callable[[str], None]:
    def run(encoded: str) -> None:
        job = Job.model_validate_json(encoded)
        context = _contexts.get(os.getpid())
        if context is None:
            context = _contexts[os.getpid()] = shell.context()
        run_job(shell, function, job, context)

    return run


def run_job(shell: ServiceShell, function: JobFunction, job: Job, context: Any) -> None:
    """Run one job and decide what its error means. Raises only what is not an Exception."""
    started = time.monotonic()
    outcome = "done"
    with bound_contextvars(pipeline=job.pipeline_id, job=job.name):
        try:
            function(job, context)
        except RetryableError as error:
            outcome = "retryable"
            log.warning("job put off; re-drive sends its input again", why=str(error))
        except PermanentError as error:
            outcome = "permanent"
            log.error("job failed for good", why=str(error))
            _report(shell, job, error.reason, str(error), fatal=True)
        except Exception as error:
            outcome = "error"
            log.exception("job failed")
            _report(shell, job, "error", f"{type(error).__name__}: {error}", fatal=False)
        finally:
            metrics.JOBS.labels(shell.service, job.name, outcome).inc()
            metrics.JOB_SECONDS.labels(shell.service, job.name).observe(time.monotonic() - started)


def _report(shell: ServiceShell, job: Job, reason: str, detail: str, *, fatal: bool) -> None:
    event = StageFailed(stage=shell.stage, reason=reason, detail=detail[:1000], fatal=fatal)
    try:
        bus.Publisher(shell.service, shell.settings.broker_url).publish(job.seal(event))
    except RetryableError as error:
        log.warning("stage.failed not published; the next try will", why=str(error))


def run_worker(shell: ServiceShell, *, collectors: list[Any] | None = None) -> None:
    """Run the worker until a signal. Its main process serves /metrics and /healthz."""
    app = make_app(shell)
    beat = health.Heartbeat(stale_after=60)

    def on_ready(**_: Any) -> None:
        metrics.serve(shell.settings, health=beat.healthy, collectors=collectors or [])

    # A beat on the worker's own timer: it stops when the consumer's loop does, and so tells a
    # worker that is alive from one that is deaf.
    class BeatStep(bootsteps.StartStopStep):  # type: ignore[misc]
        requires = ("celery.worker.components:Timer",)

        def start(self, parent: Any) -> None:
            parent.timer.call_repeatedly(5, beat.beat)

    app.steps["worker"].add(BeatStep)
    signals.worker_ready.connect(on_ready, weak=False)
    signals.worker_process_shutdown.connect(metrics.on_child_exit, weak=False)
    # What is imported by now is never garbage: the pool's children need not look through it, nor
    # copy its pages to do so.
    gc.freeze()
    app.worker_main(
        [
            "worker",
            "--without-gossip",
            "--without-mingle",
            "--loglevel",
            shell.settings.log_level,
            "--hostname",
            f"{shell.service}-{secrets.token_hex(4)}@%h",
        ]
    )
