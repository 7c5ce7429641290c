"""Trainings that hold the teacher's weights and compare whole distributions."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from stillhouse.chassis.storage import ObjectStore
from stillhouse.contracts.spec import ResolvedSpec
from stillhouse.embedded.parts import Store
from tests.support.shards import (
    dataset_sealed,
    make_dataset,
    make_resolved_spec,
    make_train_shards,
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
    state_of,
    tensors_digest,
)

EVERY_STEP = {"save_after_seconds": 0, "save_share": 0}


@pytest.fixture(scope="module")
def roots(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    tiny_student(folder / "tiny", layers=4)
    _sharpen(tiny_student(folder / "teacher", layers=2, hidden=16, seed=1))
    return folder


def _sharpen(folder: Path) -> None:
    """A random model's distributions are nearly even; a teacher's are not."""
    path = folder / "model.safetensors"
    tensors = load_file(path)
    tensors["model.embed_tokens.weight"] *= 30
    save_file(tensors, path, metadata={"format": "pt"})


@pytest.fixture
def bench(store: ObjectStore, store_part: Store, tmp_path: Path, roots: Path) -> Bench:
    return Bench(store, store_part, tmp_path, roots)


def resolved_spec(bench: Bench, tenant: str, reference: str, **training: Any) -> ResolvedSpec:
    return make_resolved_spec(
        student=f"file:{bench.roots / 'tiny'}",
        layers=3,
        reference=f"file:{bench.roots / reference}",
        tenant=tenant,
        train=3,
        training={
            "passes": 3,
            "tokens_per_step": 120,
            "distribution": "weights",
            **training,
        },
    )


def wakes_of(bench: Bench, resolved: ResolvedSpec) -> Any:
    for batch in range(resolved.batches.heldout, resolved.batches.total):
        store_prompts(bench.store, resolved, batch)
    accepted = store_spec(bench.store, resolved)
    shards = make_train_shards(bench.store, resolved)
    return accepted, dataset_sealed(resolved, *make_dataset(bench.store, resolved, shards))


@pytest.mark.parametrize(
    "training",
    [
        {"loss": "forward_kl"},
        {"loss": "reverse_kl"},
        {"loss": "jsd", "beta": 0.5},
        {"loss": "skew_kl"},
        {"loss": "skew_reverse_kl", "alpha": 0.2},
    ],
    ids=lambda training: training["loss"],
)
def test_the_student_comes_nearer_to_the_teachers_weights(
    bench: Bench, tenant: str, training: dict[str, Any]
) -> None:
    resolved = resolved_spec(bench, tenant, "teacher", **training)
    bench.run(*wakes_of(bench, resolved))
    ledger = cursor_of(bench.store, head_of(bench.store, resolved)).ledger
    assert ledger[-1].loss < 0.9 * ledger[0].loss
    assert all(entry.loss >= 0 for entry in ledger)


def test_killed_and_resumed_it_ends_in_the_same_bits(
    bench: Bench, tenant: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    know_dead_holders(monkeypatch)
    straight, killed = (
        resolved_spec(bench, f"{tenant}-{name}", "teacher", loss="reverse_kl") for name in "ab"
    )
    bench.run(*wakes_of(bench, straight))
    wakes = wakes_of(bench, killed)
    with pytest.raises(Killed), killing(monkeypatch, "trainer.backward", 4):
        bench.run(*wakes, **EVERY_STEP)
    bench.run(*wakes, **EVERY_STEP)
    heads = [head_of(bench.store, resolved) for resolved in (straight, killed)]
    assert tensors_digest(heads[0]) == tensors_digest(heads[1])


def test_a_training_whose_teacher_has_no_weights_fails_in_words(bench: Bench, tenant: str) -> None:
    """Acceptance refuses it; a spec.json of elsewhere may say so all the same."""
    resolved = resolved_spec(bench, tenant, "teacher", loss="reverse_kl")
    bench.run(*wakes_of(bench, resolved.model_copy(update={"reference": None})))
    failed = state_of(bench.store, resolved).failed
    assert failed.startswith("teacher_weights_unknown: ")
    assert "`teachers[0].reference`" in failed


def test_a_teacher_of_another_vocabulary_is_refused_by_name(bench: Bench, tenant: str) -> None:
    tiny_student(bench.folder / "models" / "wider", layers=1, vocabulary=1024)
    bench.roots = bench.folder / "models"
    tiny_student(bench.roots / "tiny", layers=4)
    resolved = resolved_spec(bench, tenant, "wider", loss="reverse_kl")
    bench.run(*wakes_of(bench, resolved))
    failed = state_of(bench.store, resolved).failed
    assert failed
    assert "vocabulary of 1024" in failed
