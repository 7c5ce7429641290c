"""What comes of jobs whose worker, process or broker dies. Each test has a worker of its own."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path
from urllib.parse import urlsplit, urlunsplit

import pytest

from stillhouse.chassis import bus
from stillhouse.contracts.flow import BUILDER
from tests.support.dead_letters import wait_for_dead
from tests.support.parts import RestartableValkey
from tests.support.proxy import proxy
from tests.support.recording_service import Batch, recording_worker
from tests.support.waiting import wait_for


def test_a_job_over_its_time_is_ended_and_acknowledged(broker_url: str, tmp_path: Path) -> None:
    hangs = Batch.SLEEPS + 300
    with recording_worker(broker_url, tmp_path, job=1.0, visibility=3.5) as worker:
        worker.publish(hangs, 1)
        wait_for(lambda: worker.done(1), 60, "the job behind it ran")
        time.sleep(6)  # past Valkey's visibility timeout and its sweep
        assert len(worker.lines("start", hangs)) == 1
        assert worker.alive()


def test_a_job_that_kills_its_process_does_not_come_back_for_ever(
    broker_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bus, "DELIVERY_LIMIT", 2)  # Celery takes seconds to notice each death
    dies = Batch.KILLS_ITS_PROCESS
    with recording_worker(broker_url, tmp_path) as worker:
        worker.publish(dies, 1)
        wait_for(lambda: worker.done(1), 60, "the job behind it ran")
        starts = 1
        if not bus.is_redis(broker_url):
            starts = bus.DELIVERY_LIMIT + 1
            wait_for_dead(broker_url, BUILDER, 1, deadline=120)
        assert len(worker.lines("start", dies)) == starts
        assert set(bus.depth(BUILDER, broker_url).values()) == {0}
        assert worker.alive()


def test_the_job_of_a_killed_worker_comes_back(broker_url: str, tmp_path: Path) -> None:
    batch = Batch.SLEEPS + 15
    times = {"job": 2.0, "visibility": 7.0}
    with recording_worker(broker_url, tmp_path, name="first", **times) as worker:
        worker.publish(batch)
        wait_for(lambda: worker.lines("start", batch), 20, "the job started")
        worker.kill()
    with recording_worker(broker_url, tmp_path, name="second", **times) as worker:
        wait_for(lambda: worker.done(batch), 40, "the job ran elsewhere")
        assert len({line["pid"] for line in worker.lines("start", batch)}) == 2


def test_a_worker_works_again_after_its_valkey_was_killed_twice(tmp_path: Path) -> None:
    broker = RestartableValkey(tmp_path / "broker")
    try:
        with recording_worker(broker.url, tmp_path) as worker:
            for round_ in (1, 2):
                before, during, after = round_, Batch.SLEEPS + 20 + round_, round_ + 10
                worker.publish(before, during)
                wait_for(lambda b=during: worker.lines("start", b), 20, "a job runs")  # type: ignore[misc]
                broker.kill()
                time.sleep(1)
                broker.start()
                worker.publish(after)
                wait_for(lambda b=after: worker.done(b), 40, "a later event was handled")  # type: ignore[misc]
                # The job went on through the outage and was acknowledged afterwards.
                assert worker.done(during) == len(worker.lines("start", during)) == 1
            assert worker.alive()
            assert worker.healthy()
    finally:
        broker.close()


@pytest.mark.rabbitmq
def test_a_worker_works_again_after_its_connections_to_rabbitmq_were_cut(
    rabbitmq_url: str, tmp_path: Path
) -> None:
    parts = urlsplit(rabbitmq_url)
    with proxy(parts.hostname or "", parts.port or 5672) as edge:
        behind = urlunsplit(parts._replace(netloc=f"guest:guest@127.0.0.1:{edge.port}"))
        with recording_worker(behind, tmp_path) as running:
            worker = replace(running, broker_url=rabbitmq_url)
            for round_ in (1, 2, 3):
                worker.publish(round_)
                wait_for(lambda b=round_: worker.done(b), 30, "the job ran")  # type: ignore[misc]
                edge.reset_all()
                worker.publish(round_ + 10)
                wait_for(lambda b=round_ + 10: worker.done(b), 60, "an event after the cut")  # type: ignore[misc]
            assert worker.alive()
        edge.mode = "refuse"
        edge.reset_all()
