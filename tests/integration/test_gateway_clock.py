"""The clock's duties: what is due is enqueued, what does not move is sent again."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import select

from services.teacher_gateway.clock import Clock
from services.teacher_gateway.database import now, transaction
from services.teacher_gateway.dispatch import find_due
from services.teacher_gateway.models import (
    Batch,
    History,
    Item,
    Outbox,
    Pipeline,
    Redrive,
    TeacherEndpoint,
)
from services.teacher_gateway.outbox import emit, record
from services.teacher_gateway.redrive import redrive
from stillhouse.chassis.bus import BrokerUnavailable
from stillhouse.chassis.jobs import Job
from stillhouse.chassis.storage import ObjectStore
from stillhouse.contracts.artifacts import ObjectRef
from stillhouse.contracts.envelope import Envelope, seal
from stillhouse.contracts.events import (
    CheckpointSaved,
    Event,
    HeldoutSealed,
    ResponseBatchStored,
    ShardWritten,
)
from stillhouse.contracts.flow import Service
from tests.support.gateway import FAST, World, make_world

REF = ObjectRef(key="k", size=1, sha256="0" * 64)
LATER = 1e6


@dataclass
class Broker:
    """Takes what the clock sends, until a test breaks it."""

    published: list[Envelope] = field(default_factory=list)
    again: list[tuple[Service, Envelope]] = field(default_factory=list)
    jobs: list[Job] = field(default_factory=list)
    waiting: int = 0
    down: bool = False

    def check(self) -> None:
        if self.down:
            raise BrokerUnavailable("down")

    def publish(self, *envelopes: Envelope) -> None:
        self.check()
        self.published.extend(envelopes)

    def republish(self, envelope: Envelope, to: Service) -> None:
        self.check()
        self.again.append((to, envelope))

    def enqueue(self, job: Job) -> None:
        self.check()
        self.jobs.append(job)


@pytest.fixture
def world(store: ObjectStore, tmp_path: Path, tenant: str) -> Iterator[World]:
    url = f"sqlite:///{tmp_path / 'gateway.sqlite3'}"
    made = make_world(store, url, tenant, "http://127.0.0.1:9/v1", batches=6, items=1)
    yield made
    made.engine.dispose()


def make_clock(world: World, broker: Broker, at_once: int = 99, **more: Any) -> Clock:
    return Clock(
        engine=world.engine,
        times=FAST,
        publish=broker.publish,
        republish=broker.republish,
        waiting_messages=lambda _: broker.waiting,
        enqueue=broker.enqueue,
        window=3,
        at_once=at_once,
        **more,
    )


def tell(world: World, event: Event) -> None:
    with transaction(world.engine) as session:
        pipeline = session.get(Pipeline, world.pipeline_id)
        assert pipeline is not None
        envelope = seal(event, tenant_id=pipeline.tenant_id, pipeline_id=pipeline.pipeline_id)
        record(session, pipeline, envelope)


def stored(batch: int) -> ResponseBatchStored:
    return ResponseBatchStored(batch=batch, manifest=REF, answers=1, rejected=0)


def written(world: World, batch: int) -> ShardWritten:
    return ShardWritten(
        dataset_id=world.resolved.dataset_id,
        batch=batch,
        split="train",
        shard=REF,
        rows=1,
        rejected=0,
        supervised_tokens=1,
    )


def age(world: World, seconds: float = LATER) -> None:
    """Let everything recorded so far have happened long ago."""
    with transaction(world.engine) as session:
        for row in session.execute(select(History)).scalars():
            row.recorded_at -= seconds
        for again in session.execute(select(Redrive)).scalars():
            again.next_at -= seconds
            again.last_at -= seconds


def due(world: World, window: int = 3, at_once: int = 99) -> list[int]:
    with transaction(world.engine) as session:
        return [d.batch for d in find_due(session, FAST, window=window, at_once=at_once)]


def test_held_out_batches_go_first_and_train_batches_wait_for_the_seal(world: World) -> None:
    assert due(world) == [0, 1]
    tell(world, HeldoutSealed(dataset_id=world.resolved.dataset_id, heldout=REF))
    assert due(world) == [0, 1, 2]
    world.set(Batch, batch=0, state="closed")
    world.set(Batch, batch=1, state="closed")
    assert due(world) == [2, 3, 4]
    assert due(world, at_once=2) == [2, 3]


def test_the_window_is_the_pipeline_s_whichever_teachers_its_batches_have(world: World) -> None:
    tell(world, HeldoutSealed(dataset_id=world.resolved.dataset_id, heldout=REF))
    away = "a" * 64
    for number in (0, 2):
        world.set(Batch, batch=number, endpoint=away)
    assert due(world) == [0, 1, 2]
    with transaction(world.engine) as session:
        session.add(TeacherEndpoint(endpoint=away, open_until=9e12))
    # What waits for its teacher keeps its place: the others do not run ahead of it.
    assert due(world) == [1]
    world.set(Batch, batch=1, state="closed")
    assert due(world) == [3]


def test_after_student_waits_for_step_0_but_not_for_ever(
    store: ObjectStore, database_url: str, tenant: str
) -> None:
    world = make_world(
        store,
        database_url,
        tenant,
        "http://127.0.0.1:9/v1",
        batches=3,
        items=1,
        start="after_student",
    )
    world.set(Batch, batch=0, state="closed")
    world.set(Batch, batch=1, state="closed")
    tell(world, HeldoutSealed(dataset_id=world.resolved.dataset_id, heldout=REF))
    assert due(world) == []
    age(world, FAST.student + 1)
    assert due(world) == [2]
    age(world, -FAST.student - 1)
    assert due(world) == []
    saved = CheckpointSaved(
        training_id=world.resolved.training_id,
        step=0,
        epoch=1,
        manifest=REF,
        tokens=0,
        gpu_seconds=1,
    )
    tell(world, saved)
    assert due(world) == [2]
    world.engine.dispose()


def test_two_pipelines_share_the_places(store: ObjectStore, database_url: str, tenant: str) -> None:
    world = make_world(store, database_url, tenant, "http://127.0.0.1:9/v1", batches=3, items=1)
    world.set(Batch, batch=0, state="due", lease_until=9e12)
    other = make_world(
        store, database_url, f"{tenant}b", "http://127.0.0.1:9/v1", batches=3, items=1
    )
    with transaction(world.engine) as session:
        found = find_due(session, FAST, window=3, at_once=3)
    assert [(d.pipeline_id, d.batch) for d in found] == [
        (other.pipeline_id, 0),
        (world.pipeline_id, 1),
    ]
    # All duties once more, on PostgreSQL too.
    tell(world, stored(0))
    age(world)
    broker = Broker()
    clock = make_clock(world, broker)
    for duty in (clock.hold, clock.relay, clock.dispatch, clock.enqueue_waiting, clock.redrive):
        duty()
    assert len(broker.jobs) == 3
    assert {e.type for _, e in broker.again} == {"pipeline.accepted", "response_batch.stored"}
    clock.release()
    other.engine.dispose()
    world.engine.dispose()


def test_a_tick_publishes_enqueues_and_does_not_repeat_itself(world: World) -> None:
    broker = Broker()
    clock = make_clock(world, broker)
    assert clock.tick()
    assert [e.type for e in broker.published] == ["pipeline.accepted"]
    assert [(j.name, j.args["batch"]) for j in broker.jobs] == [
        ("collect_batch", 0),
        ("collect_batch", 1),
    ]
    clock.tick()
    assert len(broker.jobs) == 2
    assert len(broker.published) == 1


def test_the_clock_ticks_faster_while_batches_are_in_flight(world: World) -> None:
    clock = make_clock(world, Broker())
    assert clock.pause == FAST.tick
    assert clock.tick()
    assert clock.pause == FAST.tick_flying < FAST.tick
    for number in range(2):  # the held-out batches; train batches wait for the seal
        world.set(Batch, state="closed", batch=number)
    assert clock.tick()
    assert clock.pause == FAST.tick


def test_a_job_that_nobody_took_is_enqueued_again(world: World) -> None:
    broker = Broker()
    clock = make_clock(world, broker)
    clock.tick()
    world.expire(0)
    clock.tick()
    assert [j.args["batch"] for j in broker.jobs] == [0, 1, 0]


def test_a_dead_lease_is_reaped_and_its_reservation_stays(world: World) -> None:
    broker = Broker()
    clock = make_clock(world, broker)
    world.set(Pipeline, reserved_microusd=10)
    world.set(Batch, batch=0, state="due", lease_until=1.0, reserved_microusd=10, epoch=3)
    world.set(Batch, batch=1, state="due", lease_until=9e12)
    clock.tick()
    assert [j.args["batch"] for j in broker.jobs] == [0]
    assert world.batch(0).reserved_microusd == 10
    assert world.batch(1).state == "due"


def test_acceptance_probe_and_what_was_left_are_enqueued(world: World) -> None:
    broker = Broker()
    clock = make_clock(world, broker)
    for state, collect, name in [
        ("accepting", "waiting", "accept_pipeline"),
        ("running", "waiting", "probe_teacher"),
    ]:
        world.set(Pipeline, state=state, collect=collect)
        clock.tick()
        clock.tick()
        assert [j.name for j in broker.jobs] == [name]
        broker.jobs.clear()
    world.set(Pipeline, next_attempt_at=9e12)
    clock._asked.clear()
    clock.tick()
    assert broker.jobs == []
    world.set(Pipeline, stopping="cancelled", collect="cancelled")
    clock.tick()
    assert [j.name for j in broker.jobs] == ["settle_pipeline"]
    broker.jobs.clear()
    clock._asked.clear()
    world.set(Pipeline, stopping="", collect="running")
    for number in range(6):
        world.set(Batch, batch=number, state="closed")
    clock.tick()
    assert [j.name for j in broker.jobs] == ["settle_pipeline"]


def test_only_one_clock_is_active_and_the_other_takes_over(world: World) -> None:
    first, second = make_clock(world, Broker()), make_clock(world, Broker())
    assert first.tick()
    assert not second.tick()
    assert first.tick()
    first.release()
    assert second.tick()
    assert not first.tick()


def test_a_broker_that_is_down_costs_nothing_and_ends_no_clock(world: World) -> None:
    broker = Broker(down=True)
    clock = make_clock(world, broker)
    assert clock.tick()
    assert world.batch(0).state == "waiting"
    assert world.rows(select(Outbox))
    broker.down = False
    assert clock.tick()
    assert len(broker.jobs) == 2
    assert world.rows(select(Outbox)) == []


# Re-drive


def drive(world: World, broker: Broker) -> list[tuple[str, str, Any]]:
    before = len(broker.again)
    redrive(
        world.engine,
        world.pipeline_id,
        FAST,
        republish=broker.republish,
        waiting_messages=lambda _: broker.waiting,
        rng=random.Random(1),
    )
    return [
        (service, e.type, e.payload.get("batch", e.payload.get("step")))
        for service, e in broker.again[before:]
    ]


def test_a_step_that_does_not_move_gets_its_input_again_verbatim(world: World) -> None:
    broker = Broker()
    with transaction(world.engine) as session:
        pipeline = session.get(Pipeline, world.pipeline_id)
        assert pipeline is not None
        sent = [emit(session, pipeline, stored(batch)) for batch in range(5)]
    assert drive(world, broker) == []  # its deadline has not come
    age(world)
    assert drive(world, broker) == [
        ("dataset_builder", "response_batch.stored", batch) for batch in range(5)
    ] + [("trainer", "pipeline.accepted", None)]
    assert broker.again[0][1].encode() == sent[0].encode()
    assert drive(world, broker) == []  # the pause


def test_a_movement_of_the_stage_restarts_the_deadline(world: World) -> None:
    broker = Broker()
    for batch in range(3):
        tell(world, stored(batch))
    age(world)
    tell(world, written(world, 0))
    assert ("dataset_builder", "response_batch.stored", 1) not in drive(world, broker)
    age(world)
    assert ("dataset_builder", "response_batch.stored", 1) in drive(world, broker)


def test_sealing_is_driven_once_every_held_out_shard_is_there(world: World) -> None:
    broker = Broker()
    for batch in range(2):
        tell(world, stored(batch))
    tell(world, written(world, 0))
    age(world)
    assert [b for _, t, b in drive(world, broker) if t == "response_batch.stored"] == [1]
    tell(world, written(world, 1))
    age(world)
    assert [b for _, t, b in drive(world, broker) if t == "response_batch.stored"] == [0]
    tell(world, HeldoutSealed(dataset_id=world.resolved.dataset_id, heldout=REF))
    age(world)
    assert [b for _, t, b in drive(world, broker) if t == "response_batch.stored"] == []


def test_a_checkpoint_is_not_driven_before_the_held_out_rows_are_frozen(world: World) -> None:
    broker = Broker()
    saved = CheckpointSaved(
        training_id=world.resolved.training_id,
        step=0,
        epoch=1,
        manifest=REF,
        tokens=0,
        gpu_seconds=0,
    )
    tell(world, saved)
    age(world)
    assert drive(world, broker) == []
    tell(world, HeldoutSealed(dataset_id=world.resolved.dataset_id, heldout=REF))
    age(world)
    assert drive(world, broker) == [("evaluator", "checkpoint.saved", 0)]


def test_six_counted_tries_fail_the_pipeline(world: World) -> None:
    broker = Broker()
    tell(world, stored(0))
    for _ in range(6):
        age(world)
        assert ("dataset_builder", "response_batch.stored", 0) in drive(world, broker)
    age(world)
    assert ("dataset_builder", "response_batch.stored", 0) not in drive(world, broker)
    pipeline = world.pipeline()
    assert (pipeline.stopping, pipeline.build) == ("failed", "failed")
    assert "does_not_move" in pipeline.reason
    assert "stage.failed" in world.events()


def test_a_service_that_is_down_is_never_counted_as_failed(world: World) -> None:
    broker = Broker(waiting=1)
    tell(world, stored(0))
    for _ in range(20):
        age(world)
        drive(world, broker)
    assert broker.again == []
    assert world.pipeline().stopping == ""


def test_waiting_for_a_gpu_never_fails(world: World) -> None:
    broker = Broker()
    for _ in range(20):
        age(world)
        drive(world, broker)
    assert {e.type for _, e in broker.again} == {"pipeline.accepted"}
    assert world.pipeline().stopping == ""


def test_the_lowest_eight_missing_items_are_sent(world: World) -> None:
    broker = Broker()
    for batch in range(12):
        tell(world, stored(batch))
    age(world)
    sent = [b for _, t, b in drive(world, broker) if t == "response_batch.stored"]
    assert sent == list(range(8))


def test_the_databases_clock_is_utc(world: World) -> None:
    import time

    with transaction(world.engine) as session:
        assert abs(now(session) - time.time()) < 5
    assert world.rows(select(Item))
