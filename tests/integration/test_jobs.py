"""Celery workers on real brokers: events become jobs, and neither mistakes nor kills end them."""

from __future__ import annotations

import secrets
from collections.abc import Iterator
from dataclasses import replace

import pytest

from stillhouse.chassis import bus
from stillhouse.contracts import events as e
from stillhouse.contracts.envelope import Envelope
from stillhouse.contracts.flow import BUILDER, GATEWAY
from tests.support.dead_letters import dead_letters, put_raw, wait_for_dead
from tests.support.parts import empty_broker
from tests.support.recording_service import Batch, Worker, recording_worker, stored
from tests.support.waiting import wait_for


@pytest.fixture(
    scope="module",
    params=["_valkey", pytest.param("_rabbitmq", marks=pytest.mark.rabbitmq)],
    ids=lambda name: str(name).strip("_"),
)
def shared_worker(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Worker]:
    """One worker on each broker for all tests that leave it as it was."""
    url = request.getfixturevalue(request.param)
    empty_broker(url)
    with recording_worker(url, tmp_path_factory.mktemp("worker")) as running:
        yield running


@pytest.fixture
def worker(shared_worker: Worker) -> Iterator[Worker]:
    """The shared worker, seen through a pipeline of this test; both dead queues empty."""
    dead_letters(shared_worker.broker_url, BUILDER)
    failures(shared_worker.broker_url)
    yield replace(shared_worker, pipeline=f"pl-{secrets.token_hex(4)}")
    assert shared_worker.alive(), f"the worker ended with {shared_worker.process.returncode}"


def failures(url: str) -> list[e.StageFailed]:
    """What the worker reported to the gateway, taken from its queue."""
    found = []
    while envelope := bus.pull(GATEWAY, url):
        event = envelope.event()
        assert isinstance(event, e.StageFailed)
        found.append(event)
    return found


def test_an_event_becomes_a_job_in_the_pools_child(worker: Worker) -> None:
    worker.publish(7)
    wait_for(lambda: worker.done(7), 20, "the job ran")
    [event], [start] = worker.lines("event", 7), worker.lines("start", 7)
    assert event["pid"] == worker.process.pid
    assert start["pid"] != worker.process.pid
    assert start["context"] == f"made in {start['pid']}"


def test_the_same_event_twice_asks_for_the_job_twice(worker: Worker) -> None:
    worker.publish(7, 7)
    wait_for(lambda: worker.done(7), 20, "both jobs ran", until=lambda done: done == 2)


def test_mistakes_of_handlers_are_buried_and_the_worker_lives_on(worker: Worker) -> None:
    poison = {
        Batch.HANDLER_KEY_ERROR: "KeyError",
        Batch.HANDLER_VALUE_ERROR: "ValueError",
        Batch.HANDLER_OS_ERROR: "OSError",
    }
    worker.publish(*poison, *poison, 1)  # more than the prefetch limit
    wait_for(lambda: worker.done(1), 30, "the event behind the poison was handled")
    letters = wait_for_dead(worker.broker_url, BUILDER, 6)
    seen = {Envelope.decode(body).payload["batch"]: why.split(":")[0] for body, why in letters}
    assert seen == poison


def test_messages_that_do_not_decode_are_buried_with_their_reason(worker: Worker) -> None:
    url, queue = worker.broker_url, "dataset_builder.events"
    unknown = stored(1).encode().replace(b"stored", b"burned")
    put_raw(url, queue, b"not json")
    put_raw(url, queue, unknown)
    put_raw(url, queue, b"not gzip", headers={"compression": "application/x-gzip"})
    # JSON is JSON whatever its label says; nothing but JSON is ever read.
    labelled = stored(2, worker.pipeline).encode()
    put_raw(url, queue, labelled, content_type="application/x-python-serialize")
    worker.publish(3)
    wait_for(lambda: worker.done(3), 20, "the event behind them was handled")
    reasons = dict(wait_for_dead(url, BUILDER, 3))
    assert "Invalid JSON" in reasons[b"not json"]
    assert reasons[unknown].startswith("UnknownEvent: expected one of")
    assert reasons[b"not gzip"]
    assert worker.done(2) == 1


def test_errors_of_jobs_are_reported_or_left_to_redrive(worker: Worker) -> None:
    worker.publish(Batch.RETRYABLE, Batch.PERMANENT, Batch.ERROR, 1)
    wait_for(lambda: worker.done(1), 20, "the job behind them ran")
    found = {(event.reason, event.fatal): event.detail for event in failures(worker.broker_url)}
    assert set(found) == {("bad_manifest", True), ("error", False)}
    assert found["bad_manifest", True] == "the manifest was wrong"
    assert "ZeroDivisionError" in found["error", False]
    for batch in (Batch.RETRYABLE, Batch.PERMANENT, Batch.ERROR):
        assert len(worker.lines("start", batch)) == 1


def test_events_are_taken_while_a_long_job_runs(worker: Worker) -> None:
    long = Batch.SLEEPS + 40
    worker.publish(long)
    wait_for(lambda: worker.lines("start"), 20, "the long job started")
    worker.publish(*range(12))
    wait_for(
        lambda: len(worker.lines("event")), 3.5, "all events were taken", until=lambda n: n == 13
    )
    assert not worker.done(long)
    wait_for(lambda: len(worker.lines("end")), 20, "all jobs ran", until=lambda n: n == 13)


def test_metrics_sum_the_main_process_and_its_child(worker: Worker) -> None:
    def counted(name: str) -> float:
        lines = worker.metrics().splitlines()
        found = [line for line in lines if line.startswith(f'{name}{{service="{BUILDER}"}}')]
        return float(found[0].split()[-1]) if found else 0.0

    events, jobs = "stillhouse_recording_events_total", "stillhouse_recording_jobs_total"
    before = counted(events), counted(jobs)
    worker.publish(1, 2, 3)
    wait_for(
        lambda: (counted(events) - before[0], counted(jobs) - before[1]),
        20,
        "both counters grew by three",
        until=lambda grown: grown == (3, 3),
    )
    taken = f'outcome="taken",service="{BUILDER}",type="response_batch.stored"'
    assert f"stillhouse_events_total{{{taken}}}" in worker.metrics()
    assert worker.healthy()
