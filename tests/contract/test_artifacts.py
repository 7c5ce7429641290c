"""Keys of the store: built from checked ids alone, never the same for two things."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stillhouse.contracts import artifacts
from stillhouse.contracts.artifacts import CHECKPOINT_FILES, ObjectRef

ids = st.from_regex(r"[a-z0-9][a-z0-9-]{0,62}", fullmatch=True)
PARTS: dict[str, st.SearchStrategy[Any]] = {
    "tenant": ids,
    "pipeline": ids,
    "dataset": ids,
    "teacher": ids,
    "captured": ids,
    "training": ids,
    "student": ids,
    "batch": st.integers(0, 999_999),
    "attempt": st.integers(0, 9_999),
    "part": st.integers(0, 9_999),
    "step": st.integers(0, 99_999_999),
    "epoch": st.integers(0, 9_999),
    "sha256": st.from_regex(r"[0-9a-f]{64}", fullmatch=True),
}
NAMES = {
    "checkpoint_file_key": st.sampled_from(CHECKPOINT_FILES),
    "student_file_key": st.from_regex(r"[A-Za-z0-9][A-Za-z0-9._-]{0,20}", fullmatch=True),
}
FEW = settings(max_examples=20)
BUILDERS: dict[str, Callable[..., str]] = {
    name: function
    for name, function in vars(artifacts).items()
    if inspect.isfunction(function) and name.endswith(("_key", "_prefix")) and name[0] != "_"
}


def arguments(name: str) -> st.SearchStrategy[dict[str, Any]]:
    parameters = inspect.signature(BUILDERS[name]).parameters
    return st.fixed_dictionaries({p: PARTS[p] if p in PARTS else NAMES[name] for p in parameters})


def test_there_are_builders_to_test() -> None:
    assert len(BUILDERS) >= 20


@pytest.mark.parametrize("name", BUILDERS)
def test_a_key_is_below_its_tenant_and_can_be_referred_to(name: str) -> None:
    @FEW
    @given(chosen=arguments(name))
    def check(chosen: dict[str, Any]) -> None:
        key = BUILDERS[name](**chosen)
        assert key.startswith(f"tenants/{chosen['tenant']}/")
        assert ".." not in key.split("/")
        assert len(key) < 512
        assert ObjectRef(key=key, size=0, sha256="0" * 64).key == key

    check()


@pytest.mark.parametrize("name", BUILDERS)
def test_different_arguments_give_different_keys(name: str) -> None:
    @FEW
    @given(first=arguments(name), second=arguments(name))
    def check(first: dict[str, Any], second: dict[str, Any]) -> None:
        same = BUILDERS[name](**first) == BUILDERS[name](**second)
        assert same == (first == second)

    check()


def test_keys_of_different_builders_differ() -> None:
    chosen = {
        **dict.fromkeys(("tenant", "pipeline", "dataset", "training", "student"), "x"),
        **dict.fromkeys(("teacher", "captured"), "x"),
        **dict.fromkeys(("batch", "attempt", "part", "step", "epoch"), 1),
        "sha256": "0" * 64,
    }
    keys = [
        function(**{p: chosen.get(p, "x.bin") for p in inspect.signature(function).parameters})
        for name, function in BUILDERS.items()
        if name != "checkpoint_file_key"
    ]
    assert len(set(keys)) == len(keys)


@given(hostile=st.text(max_size=80))
def test_a_hostile_id_reaches_no_key(hostile: str) -> None:
    fits = len(hostile) <= 63 and hostile[:1].isalnum() and hostile.isascii()
    fits = fits and all(c.islower() or c.isdigit() or c == "-" for c in hostile)
    try:
        key = artifacts.spec_key("tenant", hostile)
    except ValueError:
        assert not fits
    else:
        assert fits
        assert key == f"tenants/tenant/pipelines/{hostile}/spec.json"


@pytest.mark.parametrize(
    "hostile",
    ["", "..", "a/b", "../x", "A", "-a", "a" * 64, "a\n", "a b", "\u0430bc", "a%2fb", "a\x00"],
)
@pytest.mark.parametrize("place", [0, 1])
def test_typical_hostile_ids_are_refused(hostile: str, place: int) -> None:
    words = ["tenant", "pipeline"]
    words[place] = hostile
    with pytest.raises(ValueError, match="not an id"):
        artifacts.spec_key(*words)


@pytest.mark.parametrize("name", ["", "../model", "a/b", ".hidden", "x" * 200, "a b"])
def test_hostile_file_names_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match="not the name of a file"):
        artifacts.student_file_key("tenant", "student", name)
    with pytest.raises(ValueError, match="not a file of a checkpoint"):
        artifacts.checkpoint_file_key("tenant", "training", 0, 1, name)


@pytest.mark.parametrize("number", [-1, 1_000_000])
def test_numbers_that_do_not_fit_their_width_are_refused(number: int) -> None:
    with pytest.raises(ValueError, match="not a number"):
        artifacts.shard_key("tenant", "dataset", number)


def test_keys_of_batches_sort_by_their_number() -> None:
    keys = [artifacts.shard_key("t", "d", n) for n in (0, 9, 10, 99, 1000, 999_999)]
    assert keys == sorted(keys)


def test_derived_ids_are_stable_over_releases() -> None:
    dataset = artifacts.dataset_id("pl-1", "0" * 64)
    training = artifacts.training_id(dataset, "0" * 64)
    found = (dataset, training, artifacts.student_id(training))
    assert found == (
        "ds-3ec87d288588732363994a74",
        "tr-27aaf574f43a6c75829b03bb",
        "st-894730b3f54eb3555cb42832",
    )
    assert artifacts.training_id(dataset, "0" * 64, "sft") != training
