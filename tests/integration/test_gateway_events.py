"""What events do to a pipeline: recorded once, in any order, and never backwards."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import select

from services.teacher_gateway.models import Batch, History, Item, Outbox, Pipeline
from services.teacher_gateway.outbox import relay
from services.teacher_gateway.record import record_event
from services.teacher_gateway.stop import cancel_pipeline, finish_stopping
from stillhouse.chassis.errors import PermanentError, RetryableError, StoreUnavailable
from stillhouse.chassis.storage import ObjectStore
from stillhouse.contracts import artifacts
from stillhouse.contracts.artifacts import ObjectRef
from stillhouse.contracts.envelope import Envelope, seal
from stillhouse.contracts.events import (
    CheckpointSaved,
    DatasetSealed,
    Event,
    StageFailed,
    StageProgressed,
    StudentEvaluated,
    TrainingCompleted,
)
from stillhouse.contracts.responses import Stopped
from stillhouse.contracts.shards import ShardEntry
from stillhouse.contracts.trainings import Figures, Release, Report, StudentManifest
from tests.support.gateway import World, make_world
from tests.support.shards import make_rows, make_shard, shard_written, store_of
from tests.support.teacher import running_teacher
from tests.support.waiting import wait_for

REF = ObjectRef(key="k", size=1, sha256="0" * 64)


@pytest.fixture
def world(store: ObjectStore, database_url: str, tenant: str) -> Iterator[World]:
    made = make_world(store, database_url, tenant, "http://127.0.0.1:9/v1", batches=3)
    yield made
    made.engine.dispose()


def tell(world: World, event: Event) -> Envelope:
    envelope = seal(event, tenant_id=world.resolved.tenant_id, pipeline_id=world.pipeline_id)
    record_event(world.context, envelope)
    return envelope


def shard_of(world: World, batch: int) -> ShardEntry:
    world.set(Item, batch=batch, outcome="answered")
    items = [asked.item for asked in world.asked[batch]]
    rows = make_rows(world.resolved, batch)
    for row, item in zip(rows, items, strict=True):
        row["row_id"] = item.item_id
    return make_shard(world.context.store, world.resolved, batch, rows)


def test_a_shard_makes_rows_once(world: World) -> None:
    envelope = shard_written(world.resolved, shard_of(world, 0))
    record_event(world.context, envelope)
    record_event(world.context, envelope)
    assert world.outcomes() == {"row": 8}
    assert world.pipeline().rows == 8
    assert world.pipeline().build == "running"
    assert world.history().count("shard.written") == 1


def test_a_shard_without_a_header_is_refused_by_name(world: World) -> None:
    shard = shard_of(world, 0)
    ref = world.context.store.put_new(f"{shard.shard.key}.other", b"PAR1")
    event = shard_written(world.resolved, shard.model_copy(update={"shard": ref}))
    with pytest.raises(PermanentError, match="expected a shard with a header") as refused:
        record_event(world.context, event)
    assert refused.value.reason == "bad_shard"


def test_two_workers_record_one_event_once(world: World) -> None:
    envelope = shard_written(world.resolved, shard_of(world, 0))
    threads = [
        threading.Thread(target=record_event, args=(world.context, envelope)) for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert world.pipeline().rows == 8
    assert world.history().count("shard.written") == 1


def test_training_figures_only_grow(world: World) -> None:
    training = world.resolved.training_id

    def saved(step: int, seconds: float) -> CheckpointSaved:
        return CheckpointSaved(
            training_id=training,
            step=step,
            epoch=1,
            manifest=REF,
            tokens=100 * step,
            gpu_seconds=seconds,
        )

    tell(world, saved(0, 1.0))
    assert world.pipeline().first_training_step_at is None
    assert world.pipeline().train == "running"
    first = tell(world, StageProgressed(stage="train", figures={"step": 1, "gpu_seconds": 9.0}))
    tell(world, saved(4, 5.0))
    pipeline = world.pipeline()
    assert pipeline.first_training_step_at == first.occurred_at.timestamp()
    assert (pipeline.gpu_seconds, pipeline.trained_tokens) == (9.0, 400)
    done = TrainingCompleted(
        training_id=training, step=4, epoch=1, manifest=REF, tokens=400, gpu_seconds=5.0
    )
    tell(world, done)
    tell(world, saved(5, 1.0))  # late: a done stage stays done
    assert world.pipeline().train == "done"


def test_the_build_is_done_once_sealed_with_every_shard_recorded(world: World) -> None:
    shards = [shard_of(world, batch) for batch in range(3)]
    record_event(world.context, shard_written(world.resolved, shards[0]))
    record_event(world.context, shard_written(world.resolved, shards[2]))
    seal_dataset(world)
    assert world.pipeline().build == "running"
    # The one whose message was lost comes again by re-drive.
    record_event(world.context, shard_written(world.resolved, shards[1]))
    assert world.pipeline().build == "done"


def test_a_student_that_comes_before_a_lost_shard_waits_for_it(world: World) -> None:
    shards = [shard_of(world, batch) for batch in range(3)]
    for shard in shards[:2]:
        record_event(world.context, shard_written(world.resolved, shard))
    seal_dataset(world)
    event = evaluated(world)
    with pytest.raises(RetryableError, match="before all shards"):
        tell(world, event)
    assert "student.evaluated" not in world.history()
    assert world.pipeline().state == "running"
    resolved = world.resolved
    decided = artifacts.release_key(resolved.tenant_id, resolved.student_id)
    assert not world.context.store.exists(decided), "nothing is decided before it can stand"
    record_event(world.context, shard_written(world.resolved, shards[2]))
    tell(world, event)
    assert world.pipeline().state == "released"
    assert world.pipeline().rows == 24


def seal_dataset(world: World) -> None:
    tell(
        world,
        DatasetSealed(dataset_id=world.resolved.dataset_id, dataset=REF, shards=3, rows=24),
    )


def test_an_event_of_another_tenant_changes_nothing(world: World) -> None:
    event = StageFailed(stage="build", reason="x", detail="x", fatal=True)
    envelope = seal(event, tenant_id="somebody-else", pipeline_id=world.pipeline_id)
    record_event(world.context, envelope)
    assert world.pipeline().stopping == ""
    assert "stage.failed" not in world.history()


def evaluated(world: World, *, good: bool = True) -> StudentEvaluated:
    """A student folder and its report in the store."""
    resolved, store = world.resolved, world.context.store
    manifest = store.put_new_model(
        artifacts.student_manifest_key(resolved.tenant_id, resolved.student_id),
        StudentManifest(
            tenant_id=resolved.tenant_id,
            pipeline_id=resolved.pipeline_id,
            student_id=resolved.student_id,
            training_id=resolved.training_id,
            step=4,
            files={},
        ),
    )
    report = store.put_new_model(
        artifacts.report_key(resolved.tenant_id, resolved.training_id, 4),
        Report(
            training_id=resolved.training_id,
            step=4,
            split="test" if good else "validation",
            checkpoint=REF,
            heldout_sha256="0" * 64,
            teacher=Figures(kl_top20=0.0),
            model=Figures(kl_top20=0.5, ppl=3.0),
        ),
    )
    return StudentEvaluated(
        student_id=resolved.student_id,
        training_id=resolved.training_id,
        step=4,
        manifest=manifest,
        report=report,
    )


@pytest.mark.parametrize("good", [True, False])
def test_a_student_is_released_or_withheld_once(world: World, good: bool) -> None:
    resolved, store = world.resolved, world.context.store
    for batch in range(3):
        record_event(world.context, shard_written(resolved, shard_of(world, batch)))
    seal_dataset(world)
    tell(world, evaluated(world, good=good))
    outcome = "released" if good else "withheld"
    assert world.pipeline().state == outcome
    assert world.pipeline().release == "done"
    assert world.pipeline().ended_at is not None
    assert world.events()[-1] == f"student.{outcome}"
    found = store.find_model(
        artifacts.release_key(resolved.tenant_id, resolved.student_id), Release
    )
    assert found is not None
    assert (found[0].outcome, bool(found[0].reasons)) == (outcome, not good)
    # Terminal states absorb.
    tell(world, StageFailed(stage="train", reason="late", detail="late", fatal=True))
    assert cancel_pipeline(world.engine, store, world.pipeline_id, "late") == outcome
    assert world.history()[-1] == "stage.failed"


def test_a_fatal_failure_stops_the_pipeline_and_another_does_not(world: World) -> None:
    tell(world, StageFailed(stage="build", reason="hiccup", detail="once", fatal=False))
    assert world.pipeline().state == "running"
    world.set(Item, batch=1, outcome="answered")  # paid for, and its shard comes too late
    tell(world, StageFailed(stage="train", reason="diverged", detail="loss is nan", fatal=True))
    pipeline = world.pipeline()
    assert (pipeline.state, pipeline.train, pipeline.build) == ("failed", "failed", "failed")
    assert pipeline.reason == "train: diverged: loss is nan"
    assert world.events()[-1] == "pipeline.stopped"
    assert [world.outcomes(n) for n in range(3)] == [{"pipeline_stopped": 8}] * 3
    assert {item.stage for item in world.items(0)} == {"collect"}
    assert {item.stage for item in world.items(1)} == {"build"}
    assert world.batch().state == "closed"


def test_cancelling_waits_for_the_money(world: World) -> None:
    world.set(Pipeline, reserved_microusd=50)
    world.set(Batch, batch=0, reserved_microusd=50, lease_until=9e12, state="due", attempt=1)
    store = world.context.store
    assert cancel_pipeline(world.engine, store, world.pipeline_id, "by its user") == "running"
    key = artifacts.stopped_key(world.resolved.tenant_id, world.pipeline_id)
    found = store.find_model(key, Stopped)
    assert found is not None
    assert (found[0].outcome, found[0].detail) == ("cancelled", "by its user")
    assert world.events()[-1] == "pipeline.stopped"
    assert [world.batch(n).state for n in range(3)] == ["due", "closed", "closed"]
    # The worker died: the next job settles what it left, and asks nothing.
    world.expire(0)
    world.collect(0)
    assert finish_stopping(world.engine, store, world.pipeline_id)
    assert world.pipeline().state == "cancelled"
    assert world.pipeline().reserved_microusd == 0
    assert world.charged("unknown") == 50
    assert world.events().count("pipeline.stopped") == 1


def test_a_running_batch_stops_asking_when_its_pipeline_is_cancelled(
    store: ObjectStore, tmp_path: Path, tenant: str
) -> None:
    with running_teacher(tmp_path / "invoices.jsonl", latency=0.2) as teacher:
        database = f"sqlite:///{tmp_path / 'gateway.sqlite3'}"
        world = make_world(store, database, tenant, teacher.url, items=60, concurrency=2)
        job = threading.Thread(target=world.collect)
        job.start()
        wait_for(lambda: len(teacher.requests) >= 2, 10, "the first calls")
        cancel_pipeline(world.engine, store, world.pipeline_id, "enough")
        job.join(20)
        finish_stopping(world.engine, store, world.pipeline_id)
        assert world.pipeline().state == "cancelled"
        assert len(teacher.requests) < 30
        assert world.charged("answers") == teacher.invoiced_microusd()
        assert "response_batch.stored" not in world.events()
        world.check_books()


def test_a_cancellation_stands_while_the_store_is_down(
    world: World, store_part: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    down = store_of(store_part)

    def refuse(*_: object) -> None:
        raise StoreUnavailable("down")

    monkeypatch.setattr(down, "read", refuse)
    assert cancel_pipeline(world.engine, down, world.pipeline_id, "why") == "running"
    assert world.pipeline().stopping == "cancelled"
    assert finish_stopping(world.engine, world.context.store, world.pipeline_id)
    assert world.pipeline().state == "cancelled"


def test_the_outbox_keeps_what_the_broker_did_not_take(world: World) -> None:
    def refuse(*_: Envelope) -> None:
        raise StoreUnavailable("no broker")

    with pytest.raises(StoreUnavailable):
        relay(world.engine, refuse)
    taken: list[str] = []
    assert relay(world.engine, lambda *e: taken.extend(one.type for one in e)) == 1
    assert taken == ["pipeline.accepted"]
    assert relay(world.engine, refuse) == 0
    assert world.rows(select(Outbox)) == []
    assert len(world.rows(select(History))) == 1
