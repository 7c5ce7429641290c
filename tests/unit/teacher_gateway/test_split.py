"""Split and order: decided by hash and seed alone."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from services.teacher_gateway.prompts import Prompt, PromptsRefused
from services.teacher_gateway.split import Plan, plan
from stillhouse.contracts.canonical import sha256_hex
from stillhouse.contracts.spec import Spec, heldout_split


def spec(heldout: float = 0.3, samples: int = 1, batch: int = 8, seed: int = 7) -> Spec:
    posted: dict[str, Any] = {
        "version": 1,
        "name": "t",
        "teachers": [
            {
                "name": "t",
                "url": "http://h/v1",
                "model": "m",
                "terms": "x",
                "usd_per_million": {"input": 0, "output": 0},
            }
        ],
        "prompts": {"from": "file:/p", "heldout": heldout, "samples": samples, "batch": batch},
        "student": {"from": "file:/w"},
        "training": {"seed": seed},
        "budget": {"teacher_usd": 1},
    }
    return Spec.model_validate(posted)


def prompts(count: int) -> list[Prompt]:
    return [Prompt(n + 1, 0, 0, sha256_hex(str(n).encode()), 1) for n in range(count)]


def keys(planned: Plan) -> list[list[tuple[str, int]]]:
    return [[(slot.prompt.sha256, slot.sample) for slot in batch] for batch in planned.batches]


@settings(max_examples=60, deadline=None)
@given(
    count=st.integers(40, 90),
    samples=st.integers(1, 5),
    batch=st.integers(1, 30),
    seed=st.integers(0, 5),
)
def test_every_sample_of_every_prompt_is_in_one_batch_of_its_split(
    count: int, samples: int, batch: int, seed: int
) -> None:
    asked, given_prompts = spec(0.5, samples, batch, seed), prompts(count)
    planned = plan(given_prompts, asked)
    everything = [key for one in keys(planned) for key in one]
    assert len(everything) == len(set(everything)) == count * samples == planned.items
    for number, one in enumerate(planned.batches):
        assert 1 <= len(one) <= batch
        assert len({slot.prompt.sha256 for slot in one}) == len(one), "two samples in one batch"
        for slot in one:
            side = heldout_split(slot.prompt.sha256, 0.5, seed)
            assert planned.numbers.split_of(number) == side
    assert planned.numbers.total == len(planned.batches)


def test_the_order_of_the_file_does_not_matter_and_the_seed_does() -> None:
    given_prompts = prompts(60)
    assert keys(plan(given_prompts, spec())) == keys(plan(given_prompts[::-1], spec()))
    assert keys(plan(given_prompts, spec())) != keys(plan(given_prompts, spec(seed=8)))


def test_a_prompt_stays_on_its_side_when_others_come() -> None:
    def sides(count: int) -> dict[str, str]:
        planned = plan(prompts(count), spec())
        return {
            slot.prompt.sha256: planned.numbers.split_of(number)
            for number, batch in enumerate(planned.batches)
            for slot in batch
        }

    few, many = sides(60), sides(200)
    assert all(many[digest] == side for digest, side in few.items())


def test_an_empty_split_is_refused_with_what_to_change() -> None:
    with pytest.raises(PromptsRefused, match=r"raise `prompts\.heldout`") as caught:
        plan(prompts(3), spec(heldout=0.05))
    assert "of 3 prompts none falls to validation and none to test" in str(caught.value)
    assert caught.value.reason == "split_empty"
