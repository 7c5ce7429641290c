"""What a service's shell refuses before it starts, and what becomes of a job's error."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from stillhouse.chassis import bus, jobs
from stillhouse.chassis.errors import PermanentError, RetryableError
from stillhouse.chassis.jobs import Job, ServiceShell, Timeouts
from stillhouse.contracts.envelope import Envelope
from stillhouse.contracts.events import ShardWritten, StageFailed
from tests.support.recording_service import Settings, make_shell, stored

URL = "redis+socket:///nowhere/vk.sock"


@pytest.fixture
def shell() -> ServiceShell:
    return make_shell(Settings(broker_url=URL), Path("records"), Timeouts(job=10, visibility=40))


@pytest.fixture
def published(monkeypatch: pytest.MonkeyPatch) -> list[Envelope]:
    found: list[Envelope] = []
    monkeypatch.setattr(bus.Publisher, "publish", lambda self, *envelopes: found.extend(envelopes))
    return found


@pytest.mark.parametrize("change", ["missing", "unlisted"])
def test_handlers_that_do_not_fit_the_flow_are_refused(shell: ServiceShell, change: str) -> None:
    handlers = dict(shell.handlers)
    if change == "missing":
        handlers.popitem()
    else:
        handlers[ShardWritten] = lambda envelope, event: []
    with pytest.raises(PermanentError, match=r"contracts/flow\.py lets it consume"):
        jobs.make_app(replace(shell, handlers=handlers))


@pytest.mark.parametrize(
    "timeouts",
    [Timeouts(job=20, visibility=40), Timeouts(job=10, visibility=9000), Timeouts(10, 30)],
)
def test_times_that_contradict_each_other_are_refused(
    shell: ServiceShell, timeouts: Timeouts
) -> None:
    with pytest.raises(PermanentError, match="expected job < visibility / 3 <= consumer"):
        jobs.make_app(replace(shell, timeouts=timeouts))


def test_an_app_reads_json_alone_and_acknowledges_late(shell: ServiceShell) -> None:
    conf = jobs.make_app(shell).conf
    assert conf.accept_content == ["json"]
    assert conf.task_serializer == "json"
    assert conf.task_acks_late
    assert conf.task_ignore_result
    assert not conf.worker_enable_remote_control
    assert conf.task_time_limit == 10
    assert conf.broker_transport_options["visibility_timeout"] == 40
    assert conf.broker_transport_options["unacked_key"] == "unacked.dataset_builder"


def test_rabbitmq_gets_quorum_queues_with_dead_letters_and_confirms(shell: ServiceShell) -> None:
    settings = Settings(broker_url="amqp://guest:guest@127.0.0.1//")
    app = jobs.make_app(replace(shell, settings=settings))
    [queue] = app.conf.task_queues
    assert queue.queue_arguments["x-queue-type"] == "quorum"
    assert queue.queue_arguments["x-delivery-limit"] == bus.DELIVERY_LIMIT
    assert queue.queue_arguments["x-dead-letter-routing-key"] == "dataset_builder.dead"
    assert queue.queue_arguments["x-dead-letter-strategy"] == "at-least-once"
    assert app.conf.broker_transport_options["confirm_publish"] is True
    assert app.conf.worker_cancel_long_running_tasks_on_connection_loss


def test_a_job_carries_what_asked_for_it() -> None:
    envelope = stored(3)
    job = Job.of("build_shard", envelope, batch=3)
    again = Job.model_validate_json(job.model_dump_json(exclude_none=True))
    assert again == job
    event = StageFailed(stage="build", reason="error", detail="x", fatal=False)
    assert again.seal(event).caused_by == envelope.event_id
    assert again.seal(event).pipeline_id == envelope.pipeline_id


def run(shell: ServiceShell, function: Callable[[Job, Any], None]) -> None:
    jobs.run_job(shell, function, Job.of("record", stored(3), batch=3), context="made")


def test_a_job_gets_its_context_and_reports_nothing(
    shell: ServiceShell, published: list[Envelope]
) -> None:
    seen: list[Any] = []
    run(shell, lambda job, context: seen.append((job.args["batch"], context)))
    assert seen == [(3, "made")]
    assert published == []


def test_a_retryable_error_ends_the_job_quietly(
    shell: ServiceShell, published: list[Envelope]
) -> None:
    def job(*_: Any) -> None:
        raise RetryableError("the store is away")

    run(shell, job)
    assert published == []


@pytest.mark.parametrize(
    ("error", "reason", "fatal"),
    [
        (PermanentError("no such row", reason="missing_object"), "missing_object", True),
        (ValueError("a mistake"), "error", False),
        (ValueError("\u00e9" * 5000 + "\ud800"), "error", False),
    ],
)
def test_other_errors_are_reported(
    shell: ServiceShell,
    published: list[Envelope],
    error: Exception,
    reason: str,
    fatal: bool,
) -> None:
    def job(*_: Any) -> None:
        raise error

    run(shell, job)
    [envelope] = published
    event = Envelope.decode(envelope.encode()).event()
    assert isinstance(event, StageFailed)
    assert (event.stage, event.reason, event.fatal) == ("build", reason, fatal)
    assert envelope.caused_by == stored(3).event_id


def test_the_end_of_the_process_is_not_swallowed(shell: ServiceShell) -> None:
    def job(*_: Any) -> None:
        raise SystemExit(1)

    with pytest.raises(SystemExit):
        run(shell, job)


def test_a_job_without_a_broker_to_report_to_still_ends(shell: ServiceShell) -> None:
    def job(*_: Any) -> None:
        raise PermanentError("no such row")

    run(shell, job)


def test_enqueuing_without_a_broker_is_an_error_within_seconds(shell: ServiceShell) -> None:
    with pytest.raises(bus.BrokerUnavailable, match="did not take job record"):
        jobs.enqueue(jobs.make_app(shell), Job.of("record", stored(3), batch=3))
