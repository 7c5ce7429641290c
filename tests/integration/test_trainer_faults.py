"""What a trainer does when something is wrong: with its data, its weights, its store, its turn."""

from __future__ import annotations

import errno
import json
import shutil
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from services.trainer import checkpoint
from services.trainer.loop import TrainingRun
from stillhouse.chassis.errors import StoreUnavailable
from stillhouse.chassis.storage import ObjectStore
from stillhouse.contracts import artifacts
from stillhouse.contracts.envelope import Envelope
from stillhouse.contracts.events import CheckpointSaved, StageFailed, TrainingCompleted
from stillhouse.contracts.spec import ResolvedSpec
from stillhouse.contracts.trainings import CheckpointManifest
from stillhouse.embedded.parts import Store
from tests.support.shards import (
    dataset_sealed,
    make_dataset,
    make_resolved_spec,
    make_rows,
    make_shard,
    make_train_shards,
    shard_written,
    stop_pipeline,
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


@pytest.fixture(scope="module")
def roots(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    tiny_student(folder / "tiny", layers=2)
    return folder


@pytest.fixture
def bench(store: ObjectStore, store_part: Store, tmp_path: Path, roots: Path) -> Bench:
    return Bench(store, store_part, tmp_path, roots)


def spec_of(bench: Bench, tenant: str, student: str = "tiny", **changed: Any) -> ResolvedSpec:
    training = {"tokens_per_step": 120, **changed.pop("training", {})}
    return make_resolved_spec(
        student=f"file:{bench.roots / student}", tenant=tenant, training=training, **changed
    )


def start(bench: Bench, resolved: ResolvedSpec) -> tuple[Envelope, Envelope]:
    """Everything in the store; the first and the last wake-up."""
    wake = store_spec(bench.store, resolved)
    entries = make_train_shards(bench.store, resolved)
    return wake, dataset_sealed(resolved, *make_dataset(bench.store, resolved, entries))


@pytest.fixture(scope="module")
def undisturbed(
    store: ObjectStore, store_part: Store, tmp_path_factory: pytest.TempPathFactory, roots: Path
) -> CheckpointManifest:
    bench = Bench(store, store_part, tmp_path_factory.mktemp("undisturbed"), roots)
    resolved = spec_of(bench, "t-untroubled")
    bench.run(start(bench, resolved)[0])
    return head_of(store, resolved)


def failure(bench: Bench) -> StageFailed:
    """The one failure that was published, once or again."""
    found: list[StageFailed] = bench.wire.events(StageFailed)
    assert found
    assert all(event == found[0] for event in found)
    assert found[0].fatal
    assert found[0].stage == "train"
    return found[0]


# Pipelines that stopped


def test_a_stopped_pipeline_is_not_trained(bench: Bench, tenant: str) -> None:
    resolved = spec_of(bench, tenant)
    wakes = start(bench, resolved)
    stop_pipeline(bench.store, resolved)
    bench.run(*wakes)
    key = artifacts.training_state_key(tenant, resolved.training_id)
    assert not bench.store.exists(key)
    assert bench.wire.published == []


def test_a_training_ends_at_the_next_segment_when_its_pipeline_stops(
    bench: Bench, tenant: str
) -> None:
    resolved = spec_of(bench, tenant)
    wake, _ = start(bench, resolved)

    def meanwhile() -> None:
        key = artifacts.stopped_key(tenant, resolved.pipeline_id)
        if not bench.store.exists(key):
            stop_pipeline(bench.store, resolved)

    bench.wire.meanwhile = meanwhile
    bench.run(wake, segment_seconds=0.001)
    state = state_of(bench.store, resolved)
    assert not state.done
    assert state.holder == ""
    assert bench.wire.events(TrainingCompleted, StageFailed) == []


# Errors that do not heal


def test_a_damaged_shard_ends_the_training_by_name(bench: Bench, tenant: str) -> None:
    resolved = spec_of(bench, tenant)
    wake = store_spec(bench.store, resolved)
    key = artifacts.shard_key(tenant, resolved.dataset_id, resolved.batches.heldout)
    bench.store.put_new(key, b"PAR1 and then nothing")
    bench.run(wake)
    event = failure(bench)
    assert event.reason == "invalid_shard"
    assert key in event.detail
    assert state_of(bench.store, resolved).failed.startswith("invalid_shard: ")
    # Whoever asks again is told again, and nothing is tried again.
    bench.run(wake)
    assert bench.wire.published[-1].event_id == bench.wire.published[-2].event_id


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"input_ids": [1, 2, 3]}, "do not fit each other"),
        ({"signal_tail": b"\0\0"}, "does not fit itself"),
        ({"signal_slots": 3}, "does not fit itself"),
    ],
)
def test_a_row_that_does_not_fit_itself_ends_the_training(
    bench: Bench, tenant: str, wrong: dict[str, Any], said: str
) -> None:
    resolved = spec_of(bench, tenant)
    first = resolved.batches.heldout
    rows = make_rows(resolved, first)
    rows[5] |= wrong
    make_shard(bench.store, resolved, first, rows)
    bench.run(store_spec(bench.store, resolved))
    event = failure(bench)
    assert said in event.detail
    assert rows[5]["row_id"] in event.detail


def test_a_shard_that_is_not_the_sealed_one_ends_the_training(bench: Bench, tenant: str) -> None:
    resolved = spec_of(bench, tenant)
    wake = store_spec(bench.store, resolved)
    entries = make_train_shards(bench.store, resolved)
    bench.run(wake)  # the first pass, then it waits for the sealing
    assert head_of(bench.store, resolved).step > 0
    other = entries[0].shard.model_copy(update={"sha256": "f" * 64})
    entries[0] = entries[0].model_copy(update={"shard": other})
    bench.run(dataset_sealed(resolved, *make_dataset(bench.store, resolved, entries)))
    assert failure(bench).reason == "digest_mismatch"


def test_a_loss_that_is_no_number_ends_the_training_with_batch_and_rows(
    bench: Bench, tenant: str
) -> None:
    import torch
    from safetensors.torch import load_file, save_file

    shutil.copytree(bench.roots / "tiny", bench.roots / "nan", dirs_exist_ok=True)
    path = bench.roots / "nan" / "model.safetensors"
    tensors = load_file(path)
    tensors["model.norm.weight"] = torch.full_like(tensors["model.norm.weight"], torch.nan)
    save_file(tensors, path, metadata={"format": "pt"})
    resolved = spec_of(bench, tenant, "nan")
    bench.run(start(bench, resolved)[0])
    event = failure(bench)
    first = resolved.batches.heldout
    assert event.reason == "loss_not_finite"
    assert f"Batches [{first}]" in event.detail
    assert any(row["row_id"] in event.detail for row in make_rows(resolved, first))
    assert head_of(bench.store, resolved).step == 0  # nothing of it was saved


@pytest.mark.parametrize("damage", ["truncated", "pickle", "missing_tensor", "other_shape"])
def test_weights_that_do_not_load_end_the_training(bench: Bench, tenant: str, damage: str) -> None:
    from safetensors.torch import load_file, save_file

    folder = shutil.copytree(bench.roots / "tiny", bench.roots / damage)
    path = folder / "model.safetensors"
    if damage == "truncated":
        path.write_bytes(path.read_bytes()[:2000])
    elif damage == "pickle":
        path.rename(folder / "pytorch_model.bin")
    elif damage == "missing_tensor":
        tensors = load_file(path)
        del tensors["model.layers.1.mlp.up_proj.weight"]
        save_file(tensors, path, metadata={"format": "pt"})
    else:
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | {"intermediate_size": 48}))
    bench.run(store_spec(bench.store, spec_of(bench, tenant, damage)))
    assert failure(bench).reason in ("weights_unreadable", "model_weights_refused")


def test_weights_outside_the_operators_folders_are_refused(bench: Bench, tenant: str) -> None:
    resolved = make_resolved_spec(student="file:/etc", tenant=tenant)
    bench.run(store_spec(bench.store, resolved))
    assert failure(bench).reason == "model_folder_refused"


def test_a_student_with_a_smaller_vocabulary_is_refused(bench: Bench, tenant: str) -> None:
    tiny_student(bench.roots / "narrow", vocabulary=200)
    bench.run(store_spec(bench.store, spec_of(bench, tenant, "narrow")))
    assert failure(bench).reason == "student_vocabulary_too_small"


def test_a_pipeline_without_rows_fails_in_words(bench: Bench, tenant: str) -> None:
    resolved = spec_of(bench, tenant)
    wake = store_spec(bench.store, resolved)
    batches = range(resolved.batches.heldout, resolved.batches.total)
    entries = [make_shard(bench.store, resolved, batch, []) for batch in batches]
    bench.run(wake, dataset_sealed(resolved, *make_dataset(bench.store, resolved, entries)))
    assert failure(bench).reason == "no_rows"


def test_empty_shards_are_passed_over(bench: Bench, tenant: str) -> None:
    resolved = spec_of(bench, tenant)
    wake = store_spec(bench.store, resolved)
    first, second, third = range(resolved.batches.heldout, resolved.batches.total)
    entries = [
        make_shard(bench.store, resolved, first, []),
        make_shard(bench.store, resolved, second),
        make_shard(bench.store, resolved, third, []),
    ]
    bench.run(wake, dataset_sealed(resolved, *make_dataset(bench.store, resolved, entries)))
    cursor = cursor_of(bench.store, head_of(bench.store, resolved))
    assert sum(e.rows for e in cursor.ledger if e.kind == "stream") == 8
    assert state_of(bench.store, resolved).done


def test_a_dataset_with_fewer_shards_than_planned_ends_the_first_pass(
    bench: Bench, tenant: str
) -> None:
    resolved = spec_of(bench, tenant)
    wake = store_spec(bench.store, resolved)
    entries = [make_shard(bench.store, resolved, resolved.batches.heldout)]
    bench.run(wake, dataset_sealed(resolved, *make_dataset(bench.store, resolved, entries)))
    cursor = cursor_of(bench.store, head_of(bench.store, resolved))
    assert state_of(bench.store, resolved).done
    assert sum(e.rows for e in cursor.ledger if e.kind == "stream") == 8


def test_deleted_rows_are_left_out_of_later_passes(bench: Bench, tenant: str) -> None:
    resolved = spec_of(bench, tenant, training={"passes": 2, "decay": 0.5})
    wake = store_spec(bench.store, resolved)
    entries = make_train_shards(bench.store, resolved)
    rows = make_rows(resolved, resolved.batches.heldout)
    deleted = [row["row_id"] for row in rows[:3]]
    dataset = make_dataset(bench.store, resolved, entries, deleted_rows=deleted)
    bench.run(wake, dataset_sealed(resolved, *dataset))
    ledger = cursor_of(bench.store, head_of(bench.store, resolved)).ledger
    assert sum(e.rows for e in ledger if e.kind == "stream") == 24
    assert sum(e.rows for e in ledger if e.kind == "pass") == 21


def test_a_shard_that_comes_early_waits_for_its_turn(bench: Bench, tenant: str) -> None:
    resolved = spec_of(bench, tenant)
    wake = store_spec(bench.store, resolved)
    first, second = resolved.batches.heldout, resolved.batches.heldout + 1
    late = make_shard(bench.store, resolved, second)
    bench.run(wake, shard_written(resolved, late))
    assert head_of(bench.store, resolved).step == 0
    early = make_shard(bench.store, resolved, first)
    bench.run(shard_written(resolved, early))
    cursor = cursor_of(bench.store, head_of(bench.store, resolved))
    assert [shard.key for shard in cursor.shards] == [early.shard.key, late.shard.key]


def test_rows_without_a_signal_are_trained_as_text(bench: Bench, tenant: str) -> None:
    resolved = spec_of(bench, tenant)
    wake = store_spec(bench.store, resolved)
    batches = range(resolved.batches.heldout, resolved.batches.total)
    entries = [
        make_shard(bench.store, resolved, b, make_rows(resolved, b, text_only=(1, 4)))
        for b in batches
    ]
    bench.run(wake, dataset_sealed(resolved, *make_dataset(bench.store, resolved, entries)))
    cursor = cursor_of(bench.store, head_of(bench.store, resolved))
    assert sum(e.rows for e in cursor.ledger if e.kind == "stream") == 24


def test_sft_trains_on_the_tokens_alone(bench: Bench, tenant: str) -> None:
    resolved = spec_of(bench, tenant, training={"loss": "sft", "passes": 3, "learning_rate": 3e-3})
    bench.run(start(bench, resolved)[0])
    ledger = cursor_of(bench.store, head_of(bench.store, resolved)).ledger
    assert ledger[-1].loss < ledger[0].loss


# Damage and trouble that heal


def test_a_damaged_head_is_passed_over_for_its_parent(
    bench: Bench, tenant: str, monkeypatch: pytest.MonkeyPatch, undisturbed: CheckpointManifest
) -> None:
    know_dead_holders(monkeypatch)
    resolved = spec_of(bench, tenant)
    wake, _ = start(bench, resolved)
    with pytest.raises(Killed), killing(monkeypatch, "trainer.head_moved", 3):
        bench.run(wake, **EVERY_STEP)
    damaged = head_of(bench.store, resolved)
    assert damaged.step >= 2
    key = damaged.files["optimizer.safetensors"].key
    bench.store.delete(key)
    bench.store.put_new(key, b"rot")
    bench.run(wake)
    assert tensors_digest(head_of(bench.store, resolved)) == tensors_digest(undisturbed)
    lineage = [(m.step, m.epoch) for m in lineage_of(bench.store, resolved)]
    assert (damaged.step, damaged.epoch) not in lineage


def test_a_training_without_a_readable_checkpoint_ends_in_words(bench: Bench, tenant: str) -> None:
    resolved = spec_of(bench, tenant)
    wake = store_spec(bench.store, resolved)
    bench.run(wake)
    bench.store.delete(head_of(bench.store, resolved).files["model.safetensors"].key)
    make_train_shards(bench.store, resolved)
    bench.run(wake)
    assert failure(bench).reason == "checkpoint_unreadable"


def test_a_store_that_does_not_answer_for_a_while_costs_no_bits(
    bench: Bench, tenant: str, monkeypatch: pytest.MonkeyPatch, undisturbed: CheckpointManifest
) -> None:
    resolved = spec_of(bench, tenant)
    wake, _ = start(bench, resolved)
    put, left = bench.store.put_new_file, [2]

    def sometimes(key: str, path: Path) -> Any:
        if "step-00000004" in key and left[0]:
            left[0] -= 1
            raise StoreUnavailable(key)
        return put(key, path)

    monkeypatch.setattr(bench.store, "put_new_file", sometimes)
    bench.run(wake)
    assert left == [0]
    assert tensors_digest(head_of(bench.store, resolved)) == tensors_digest(undisturbed)


def test_a_full_disk_costs_no_bits(
    bench: Bench, tenant: str, monkeypatch: pytest.MonkeyPatch, undisturbed: CheckpointManifest
) -> None:
    resolved = spec_of(bench, tenant)
    wake, _ = start(bench, resolved)
    write, full = checkpoint.write_snapshot, [True]

    def no_space(*given: Any, **named: Any) -> checkpoint.Snapshot:
        if full[0] and given[3].step == 4:
            full[0] = False
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(*given, **named)

    monkeypatch.setattr(checkpoint, "write_snapshot", no_space)
    trainer = bench.run(wake)
    assert not state_of(bench.store, resolved).done
    trainer.stopping.wait(trainer._times.retry)
    bench.drain(trainer)  # it looks again by itself
    assert tensors_digest(head_of(bench.store, resolved)) == tensors_digest(undisturbed)


def test_an_error_that_nobody_foresaw_is_tried_again_and_ends_a_training_at_the_third_time(
    bench: Bench, tenant: str, monkeypatch: pytest.MonkeyPatch, undisturbed: CheckpointManifest
) -> None:
    resolved = spec_of(bench, tenant)
    wake, _ = start(bench, resolved)
    step, left = TrainingRun._step, [2]

    def shaky(self: TrainingRun, *given: Any) -> None:
        if left[0]:
            left[0] -= 1
            raise RuntimeError("the device hiccuped")
        step(self, *given)

    monkeypatch.setattr(TrainingRun, "_step", shaky)
    trainer = bench.run(wake)
    for _ in range(2):
        trainer.stopping.wait(trainer._times.retry)
        bench.drain(trainer)
    assert tensors_digest(head_of(bench.store, resolved)) == tensors_digest(undisturbed)
    other = spec_of(bench, f"{tenant}-b")
    wake, _ = start(bench, other)
    left[0] = 100
    trainer = bench.run(wake)
    for _ in range(2):
        trainer.stopping.wait(trainer._times.retry)
        bench.drain(trainer)
    assert state_of(bench.store, other).failed.startswith("trainer_error: RuntimeError")


def test_a_training_whose_holders_keep_dying_is_given_up(
    bench: Bench, tenant: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    know_dead_holders(monkeypatch)
    monkeypatch.setattr("services.trainer.loop.MAX_CRASHES", 2)
    resolved = spec_of(bench, tenant)
    wake, _ = start(bench, resolved)
    for _ in range(3):
        with pytest.raises(Killed), killing(monkeypatch, "trainer.backward"):
            bench.run(wake)
    bench.run(wake)
    assert failure(bench).reason == "crashed_repeatedly"


# Turns, retention, events that are sent again


def test_two_trainings_take_turns_and_end_in_their_own_bits(
    bench: Bench, tenant: str, undisturbed: CheckpointManifest
) -> None:
    specs = [spec_of(bench, f"{tenant}-{name}") for name in "ab"]
    wakes = [start(bench, resolved)[0] for resolved in specs]
    bench.run(*wakes, segment_seconds=0.001)
    for resolved in specs:
        assert tensors_digest(head_of(bench.store, resolved)) == tensors_digest(undisturbed)
    turns = [e.tenant_id for e in bench.wire.published if e.type == "stage.progressed"]
    changes = sum(a != b for a, b in pairwise(turns))
    assert changes >= 4


def test_only_the_last_two_optimiser_states_and_what_was_published_stay(
    bench: Bench, tenant: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    know_dead_holders(monkeypatch)
    resolved = spec_of(bench, tenant, every_steps=3)
    wake, _ = start(bench, resolved)
    prefix = artifacts.training_prefix(tenant, resolved.training_id)

    def files(name: str) -> list[str]:
        return sorted(key for key in bench.store.keys(prefix) if key.endswith(name))

    with pytest.raises(Killed), killing(monkeypatch, "trainer.optimizer", 5):
        bench.run(wake, **EVERY_STEP)
    assert len(files("optimizer.safetensors")) <= 3  # the last two, and one not collected yet
    bench.run(wake)
    published = state_of(bench.store, resolved).published
    expected = [
        bench.store.get_model(entry.manifest, CheckpointManifest).files["model.safetensors"].key
        for entry in published
    ]
    assert files("model.safetensors") == sorted(expected)
    assert files("optimizer.safetensors") == []
    assert [m.step for m in lineage_of(bench.store, resolved)][-1] == 0  # manifests stay


def test_an_acceptance_sent_again_says_step_zero_again(bench: Bench, tenant: str) -> None:
    resolved = spec_of(bench, tenant)
    wake = store_spec(bench.store, resolved)
    bench.run(wake)
    bench.run(wake)
    first, again = bench.wire.events(CheckpointSaved)
    assert first == again
    assert first.step == 0
    ids = [e.event_id for e in bench.wire.published]
    assert ids[0] == ids[1]


def test_duplicate_shard_events_train_once(
    bench: Bench, tenant: str, undisturbed: CheckpointManifest
) -> None:
    resolved = spec_of(bench, tenant)
    wake = store_spec(bench.store, resolved)
    entries = []

    def twice() -> Iterator[Envelope]:
        for batch in range(resolved.batches.heldout, resolved.batches.total):
            entries.append(make_shard(bench.store, resolved, batch))
            yield shard_written(resolved, entries[-1])
            yield shard_written(resolved, entries[-1])
        sealed = dataset_sealed(resolved, *make_dataset(bench.store, resolved, entries))
        yield sealed
        yield sealed

    arriving = twice()
    bench.wire.meanwhile = lambda: next(arriving, None)
    bench.run(wake)
    assert tensors_digest(head_of(bench.store, resolved)) == tensors_digest(undisturbed)
