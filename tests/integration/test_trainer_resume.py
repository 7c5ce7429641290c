"""The trainer's main promise: over the same shards it ends in the same bits, however it got there,
and its ledger says exactly which rows it trained on."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from services.trainer import matrices, probe
from services.trainer.data import TrainData
from services.trainer.plan import decay_steps
from stillhouse.chassis.storage import ObjectStore
from stillhouse.contracts import artifacts
from stillhouse.contracts.canonical import digest_of
from stillhouse.contracts.envelope import Envelope
from stillhouse.contracts.events import CheckpointSaved, StageProgressed, TrainingCompleted
from stillhouse.contracts.spec import ResolvedSpec
from stillhouse.contracts.trainings import CheckpointManifest, Cursor, Plan
from stillhouse.embedded.parts import Store
from tests.support.shards import (
    dataset_sealed,
    make_dataset,
    make_resolved_spec,
    make_shard,
    make_train_shards,
    shard_written,
    store_prompts,
    store_spec,
    tiny_student,
)
from tests.support.trainers import (
    Bench,
    Killed,
    cursor_of,
    head_of,
    killing,
    know_dead_holders,
    lineage_of,
    state_of,
    tensors_digest,
)

EVERY_STEP = {"save_after_seconds": 0, "save_share": 0}
POINTS = (
    "trainer.planned",
    "trainer.forward",
    "trainer.backward",
    "trainer.optimizer",
    "trainer.uploaded.model.safetensors",
    "trainer.uploaded.optimizer.safetensors",
    "trainer.manifest_written",
    "trainer.head_moved",
    "trainer.collecting",
)


@pytest.fixture(scope="module")
def roots(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    tiny_student(folder / "tiny", layers=4)
    return folder


@pytest.fixture
def bench(store: ObjectStore, store_part: Store, tmp_path: Path, roots: Path) -> Bench:
    return Bench(store, store_part, tmp_path, roots)


def resolved_spec(bench: Bench, tenant: str) -> ResolvedSpec:
    return make_resolved_spec(
        student=f"file:{bench.roots / 'tiny'}",
        layers=3,
        tenant=tenant,
        train=3,
        training={"passes": 2, "decay": 0.3, "tokens_per_step": 120},
    )


def accepted(bench: Bench, resolved: ResolvedSpec) -> Envelope:
    for batch in range(resolved.batches.heldout, resolved.batches.total):
        store_prompts(bench.store, resolved, batch)
    return store_spec(bench.store, resolved)


def sealed(bench: Bench, resolved: ResolvedSpec) -> Envelope:
    """Write all train shards and the dataset; return the last wake-up."""
    return dataset_sealed(
        resolved, *make_dataset(bench.store, resolved, make_train_shards(bench.store, resolved))
    )


@pytest.fixture(scope="module")
def undisturbed(
    store: ObjectStore, store_part: Store, tmp_path_factory: pytest.TempPathFactory, roots: Path
) -> tuple[CheckpointManifest, Cursor]:
    """HEAD of a training that nothing disturbed."""
    bench = Bench(store, store_part, tmp_path_factory.mktemp("undisturbed"), roots)
    resolved = resolved_spec(bench, "t-undisturbed")
    wakes = accepted(bench, resolved), sealed(bench, resolved)
    bench.run(*wakes)
    head = head_of(store, resolved)
    assert head.final
    return head, cursor_of(store, head)


def assert_same(
    bench: Bench, resolved: ResolvedSpec, undisturbed: tuple[CheckpointManifest, Cursor]
) -> None:
    head = head_of(bench.store, resolved)
    assert state_of(bench.store, resolved).done
    assert head.final
    assert head.bitwise
    assert tensors_digest(head) == tensors_digest(undisturbed[0])
    found = cursor_of(bench.store, head)
    assert found.ledger == undisturbed[1].ledger


def test_the_ledger_is_an_exact_partition_of_what_was_trained_on(bench: Bench, tenant: str) -> None:
    resolved = resolved_spec(bench, tenant)
    bench.run(accepted(bench, resolved), sealed(bench, resolved))
    cursor = cursor_of(bench.store, head_of(bench.store, resolved))
    data = TrainData(bench.store, resolved)
    start = Cursor(step=0, phase="stream")
    rows_of_pass = [
        [row for batch in range(3) for row in data.order(number, batch, start)]
        for number in range(2)
    ]
    planned = {"stream": rows_of_pass[0], "pass": rows_of_pass[1]}
    for kind, rows in planned.items():
        assert len({row.row_id for row in rows}) == len(rows) == 24
        at = 0
        for entry in (e for e in cursor.ledger if e.kind == kind):
            taken = rows[at : at + entry.rows]
            assert entry.rows_sha256 == digest_of([row.row_id for row in taken])
            assert entry.tokens == sum(row.supervised for row in taken)
            at += entry.rows
        assert at == len(rows)
    decayed = [e for e in cursor.ledger if e.kind == "decay"]
    before = len(cursor.ledger) - len(decayed)
    assert len(decayed) == decay_steps(resolved.spec.training, before)
    assert [e.step for e in cursor.ledger] == list(range(1, cursor.step + 1))
    assert cursor.tokens == sum(e.tokens for e in cursor.ledger)
    full = [e.tokens >= 120 for e in cursor.ledger]
    assert full.count(False) <= 2  # only the end of a pass takes fewer
    assert decayed[-1].learning_rate < decayed[0].learning_rate
    assert cursor.ledger[-1].loss < cursor.ledger[0].loss


def test_events_tell_step_zero_the_named_steps_and_the_last_one(bench: Bench, tenant: str) -> None:
    resolved = resolved_spec(bench, tenant)
    wakes = accepted(bench, resolved), sealed(bench, resolved)
    bench.run(wakes[0])
    saved = bench.wire.events(CheckpointSaved)
    last = state_of(bench.store, resolved).published[-1].step
    assert [e.step for e in saved] == [*range(0, last, 4), last]
    assert [e.final for e in saved] == [False] * (len(saved) - 1) + [True]
    (completed,) = bench.wire.events(TrainingCompleted)
    assert (completed.step, completed.manifest) == (last, saved[-1].manifest)
    for event in saved:
        manifest = bench.store.get_model(event.manifest, CheckpointManifest)
        assert (manifest.step, manifest.tokens) == (event.step, event.tokens)
        bench.store.get(manifest.files["model.safetensors"])
    figures = [e.figures for e in bench.wire.events(StageProgressed)]
    assert figures
    assert figures[0]["step"] == 1
    assert set(figures[0]) == {"step", "loss", "tokens", "gpu_seconds", "learning_rate"}
    before = len(bench.wire.published)
    bench.run(wakes[1])  # a wake-up that finds it done says both again, as they were
    again = bench.wire.published[before:]
    told = {e.event_id for e in bench.wire.published[:before]}
    assert [e.type for e in again] == ["checkpoint.saved", "training.completed"]
    assert {e.event_id for e in again} <= told


def test_a_training_whose_shards_come_late_ends_in_the_same_bits(
    bench: Bench, tenant: str, undisturbed: tuple[CheckpointManifest, Cursor]
) -> None:
    resolved = resolved_spec(bench, tenant)
    entries = []

    def late() -> Iterator[Envelope | None]:
        for batch in range(resolved.batches.heldout, resolved.batches.total):
            yield None  # nothing happens: the trainer lets go
            yield None
            entries.append(make_shard(bench.store, resolved, batch))
            yield shard_written(resolved, entries[-1])
        yield None
        yield dataset_sealed(resolved, *make_dataset(bench.store, resolved, entries))

    arriving = late()
    bench.wire.meanwhile = lambda: next(arriving, None)
    trainer = bench.run(accepted(bench, resolved))
    for _ in range(40):  # `turn` is False whenever nothing is in the queue
        bench.drain(trainer)
    assert_same(bench, resolved, undisturbed)


def test_a_training_killed_at_every_step_ends_in_the_same_bits(
    bench: Bench,
    tenant: str,
    monkeypatch: pytest.MonkeyPatch,
    undisturbed: tuple[CheckpointManifest, Cursor],
) -> None:
    know_dead_holders(monkeypatch)
    resolved = resolved_spec(bench, tenant)
    wakes = accepted(bench, resolved), sealed(bench, resolved)
    kills = 0
    while not kills or not state_of(bench.store, resolved).done:
        try:
            # Dies in the step after the next one, so each life gets one step further.
            with killing(monkeypatch, "trainer.optimizer", 2):
                bench.run(*wakes, **EVERY_STEP)
        except Killed:
            kills += 1
        assert not state_of(bench.store, resolved).failed
    assert kills >= len(undisturbed[1].ledger) - 2
    assert_same(bench, resolved, undisturbed)
    lineage = lineage_of(bench.store, resolved)
    assert [m.step for m in lineage] == sorted((m.step for m in lineage), reverse=True)
    assert [m.epoch for m in lineage] == sorted((m.epoch for m in lineage), reverse=True)
    assert lineage[-1].step == 0


@pytest.mark.parametrize("point", POINTS)
def test_a_training_killed_at_a_named_point_ends_in_the_same_bits(
    bench: Bench,
    tenant: str,
    monkeypatch: pytest.MonkeyPatch,
    undisturbed: tuple[CheckpointManifest, Cursor],
    point: str,
) -> None:
    resolved = resolved_spec(bench, tenant)
    wakes = accepted(bench, resolved), sealed(bench, resolved)
    know_dead_holders(monkeypatch)
    times = 1 if point in ("trainer.planned", "trainer.collecting") else 3
    with pytest.raises(Killed), killing(monkeypatch, point, times):
        bench.run(*wakes, **EVERY_STEP)
    bench.run(*wakes, **EVERY_STEP)
    assert_same(bench, resolved, undisturbed)
    saved = bench.wire.events(CheckpointSaved)
    assert {e.step for e in saved} == {e.step for e in state_of(bench.store, resolved).published}


def test_what_was_found_before_step_0_is_not_found_again(
    bench: Bench,
    tenant: str,
    monkeypatch: pytest.MonkeyPatch,
    undisturbed: tuple[CheckpointManifest, Cursor],
) -> None:
    """dtype, micro-batch and library of matrices stand in the plan, whoever goes on and whatever a
    probe would find there."""
    know_dead_holders(monkeypatch)
    resolved = resolved_spec(bench, tenant)
    wakes = accepted(bench, resolved), sealed(bench, resolved)
    with pytest.raises(Killed), killing(monkeypatch, "trainer.planned"):
        bench.run(*wakes)
    key = artifacts.plan_key(tenant, resolved.training_id)
    planned = bench.store.find_model(key, Plan)
    assert planned is not None
    here = planned[0].environment.matrices
    other = matrices.NATIVE if here == matrices.ONEDNN else matrices.ONEDNN
    monkeypatch.setattr(matrices, "here", lambda: other)
    used, use = set[str](), matrices.use
    monkeypatch.setattr(matrices, "use", lambda name: (used.add(name), use(name)))
    monkeypatch.delattr(probe, "suited")
    otherwise = {"dtype": "bfloat16", "micro_batch_tokens": 7, **EVERY_STEP}
    for step in (1, 2):  # from the plan alone, then from a checkpoint
        with pytest.raises(Killed), killing(monkeypatch, "trainer.optimizer", 2 * step):
            bench.run(*wakes, **otherwise)
    bench.run(*wakes, **otherwise)
    assert used == {here}
    assert bench.store.find_model(key, Plan) == planned
    assert head_of(bench.store, resolved).environment == planned[0].environment
    assert_same(bench, resolved, undisturbed)


def test_a_training_in_bfloat16_stays_in_it_and_ends_in_the_same_bits(
    bench: Bench,
    tenant: str,
    monkeypatch: pytest.MonkeyPatch,
    undisturbed: tuple[CheckpointManifest, Cursor],
) -> None:
    know_dead_holders(monkeypatch)
    straight, killed = (resolved_spec(bench, f"{tenant}-{name}") for name in ("a", "b"))
    bench.run(accepted(bench, straight), sealed(bench, straight), dtype="bfloat16")
    wakes = accepted(bench, killed), sealed(bench, killed)
    with pytest.raises(Killed), killing(monkeypatch, "trainer.backward", 9):
        bench.run(*wakes, dtype="bfloat16", **EVERY_STEP)
    bench.run(*wakes, dtype="float32")  # the plan decides, not who goes on with it
    heads = [head_of(bench.store, resolved) for resolved in (straight, killed)]
    assert tensors_digest(heads[0]) == tensors_digest(heads[1])
    assert heads[1].bitwise
    assert heads[1].environment.dtype == "bfloat16"
    assert tensors_digest(heads[0]) != tensors_digest(undisturbed[0])
    assert heads[0].loss == pytest.approx(undisturbed[0].loss, rel=0.2)
