"""Faults of what the gateway's processes share: the outbox, leases of batches, their clocks."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
from sqlalchemy import select

from services.teacher_gateway.claims import Claim, claim_batch
from services.teacher_gateway.models import Outbox
from services.teacher_gateway.outbox import relay
from stillhouse.chassis import bus
from stillhouse.chassis.bus import Publisher
from stillhouse.chassis.storage import ObjectStore
from stillhouse.contracts.envelope import Envelope
from stillhouse.contracts.flow import BUILDER, GATEWAY
from tests.support.gateway import FAST, World, make_context, make_world
from tests.support.teacher import Fault, Teacher, running_teacher
from tests.support.waiting import wait_for


@pytest.fixture
def teacher(tmp_path: Path) -> Iterator[Teacher]:
    with running_teacher(tmp_path / "invoices.jsonl") as found:
        yield found


@pytest.fixture
def world(store: ObjectStore, database_url: str, tenant: str, teacher: Teacher) -> Iterator[World]:
    made = make_world(store, database_url, tenant, teacher.url, items=6, concurrency=2)
    yield made
    made.engine.dispose()


# G3: the relay is killed

RELAY = """
import os, sys
from services.teacher_gateway.database import open_engine
from services.teacher_gateway.outbox import relay
from stillhouse.chassis.bus import Publisher
from stillhouse.contracts.flow import GATEWAY
url, broker, killed = sys.argv[1:]
publish = Publisher(GATEWAY, broker).publish
relay(open_engine(url), publish if killed == "after" else lambda *_: os._exit(137))
"""


@pytest.mark.parametrize(("killed", "copies"), [("before", 1), ("after", 2)])
def test_an_event_survives_a_relay_that_is_killed_before_or_after_it_published(
    killed: str, copies: int, world: World, database_url: str, valkey_url: str
) -> None:
    environ = {**os.environ, "STILLHOUSE_CRASH_AT": "outbox_published"}
    told = [sys.executable, "-c", RELAY, database_url, valkey_url, killed]
    assert subprocess.run(told, env=environ, timeout=120).returncode == 137
    assert len(world.rows(select(Outbox))) == 1
    assert relay(world.engine, Publisher(GATEWAY, valkey_url).publish) == 1
    assert world.rows(select(Outbox)) == []
    found: list[Envelope] = []
    while (envelope := bus.pull(BUILDER, valkey_url)) is not None:
        found.append(envelope)
    assert [envelope.type for envelope in found] == ["pipeline.accepted"] * copies
    assert len({envelope.event_id for envelope in found}) == 1, "by which a consumer knows it"


# G15: clocks


@pytest.mark.parametrize("hours", [-1, 1])
def test_a_wrong_clock_of_a_process_takes_no_lease_and_delays_none(
    hours: int, world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert claim_batch(world.context, world.pipeline_id, 0, None) is not None
    until, clock = world.batch().lease_until, time.time
    monkeypatch.setattr(time, "time", lambda: clock() + hours * 3600)
    assert claim_batch(world.context, world.pipeline_id, 0, None) is None, "the lease is held"
    world.expire()
    assert claim_batch(world.context, world.pipeline_id, 0, None) is not None
    assert abs(world.batch().lease_until - until) < 600


@pytest.mark.parametrize("hours", [-1, 1])
def test_a_clock_that_jumps_during_an_attempt_ends_nothing(
    hours: int, world: World, teacher: Teacher, monkeypatch: pytest.MonkeyPatch
) -> None:
    teacher.latency = 0.2
    attempt = threading.Thread(target=world.collect)
    attempt.start()
    wait_for(lambda: teacher.requests, 20, "the first call")
    clock = time.time
    monkeypatch.setattr(time, "time", lambda: clock() + hours * 3600)
    attempt.join(60)
    assert not attempt.is_alive()
    assert world.outcomes() == {"answered": 6}
    assert (world.batch().attempt, len(teacher.requests)) == (1, 6)


# G16: replicas race


def test_of_eight_workers_one_takes_a_batch(world: World, store: ObjectStore) -> None:
    url = world.context.settings.database_url
    contexts = [make_context(store, url) for _ in range(8)]
    together = threading.Barrier(8)

    def claim(number: int) -> Claim | None:
        together.wait(60)
        return claim_batch(contexts[number], world.pipeline_id, 0, None)

    with ThreadPoolExecutor(8) as pool:
        claims = [found for found in pool.map(claim, range(8)) if found is not None]
    for context in contexts:
        context.engine.dispose()
    assert [(found.epoch, found.attempt) for found in claims] == [(1, 1)]
    row = world.batch()
    assert (row.epoch, row.attempt, row.crashes) == (1, 1, 0)


def test_a_late_worker_s_rejections_count_no_more(
    store: ObjectStore, database_url: str, tenant: str, teacher: Teacher
) -> None:
    teacher.latency = 0.5
    teacher.script(Fault("status", status=400))
    # No renewal within the test: it would rightly win the lease back.
    paused = replace(FAST, lease_ttl=90, beat=30)
    fields = {"items": 6, "concurrency": 6, "times": paused}
    world = make_world(store, database_url, tenant, teacher.url, **fields)
    late = threading.Thread(target=world.collect)
    late.start()
    wait_for(lambda: len(teacher.requests) == 6, 20, "all calls of the first attempt")
    world.expire()  # as if its worker had been paused beyond its lease
    world.collect()
    late.join(60)
    assert not late.is_alive()
    assert world.outcomes() == {"refused_by_teacher": 6}
    assert {item.attempts for item in world.items()} == {1}
    assert (world.batch().attempt, world.pipeline().reserved_microusd) == (2, 0)
    assert world.events().count("response_batch.stored") == 1
    world.check_books()
    world.engine.dispose()
