"""Split and order: decided by hash and seed alone."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from services.teacher_gateway.prompts.file import Prompt, PromptsRefused
from services.teacher_gateway.prompts.lines import LineRefused, PromptLine
from services.teacher_gateway.prompts.split import MAX_BATCH_BYTES, Plan, plan, teacher_of
from stillhouse.contracts.canonical import digest_of, sha256_hex
from stillhouse.contracts.chat import Message
from stillhouse.contracts.spec import Spec, heldout_split


def spec(
    heldout: float = 0.3,
    samples: int = 1,
    batch: int = 8,
    seed: int = 7,
    teachers: dict[str, dict[str, Any]] | None = None,
) -> Spec:
    posted: dict[str, Any] = {
        "version": 1,
        "name": "t",
        "teachers": [
            {
                "name": name,
                "model": "m",
                "terms": "x",
                "usd_per_million": {"input": 0, "output": 0},
                **({} if "answers" in fields else {"url": "http://h/v1"}),
                **fields,
            }
            for name, fields in (teachers or {"t": {}}).items()
        ],
        "prompts": {"from": "file:/p", "heldout": heldout, "samples": samples, "batch": batch},
        "student": {"from": "file:/w"},
        "training": {"seed": seed},
        "budget": {"teacher_usd": 1},
    }
    return Spec.model_validate(posted)


def prompts(count: int) -> list[Prompt]:
    return [Prompt(n + 1, 0, 0, sha256_hex(str(n).encode()), 1, "t") for n in range(count)]


def shared(count: int, asked: Spec) -> list[Prompt]:
    """Prompts that were given to the teachers of a spec by their shares."""
    choose, line = teacher_of(asked), PromptLine([Message(role="user", content="x")])
    return [replace(prompt, teacher=choose(line, prompt.sha256)) for prompt in prompts(count)]


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


def test_a_batch_that_no_worker_could_hold_is_refused() -> None:
    large = [replace(prompt, length=MAX_BATCH_BYTES // 8) for prompt in prompts(60)]
    assert plan(large, spec(batch=8)).items == 60
    with pytest.raises(PromptsRefused, match=r"lower `prompts\.batch`"):
        plan(large, spec(batch=9))


def test_with_one_teacher_the_plan_is_what_it_always_was() -> None:
    planned = plan(prompts(60), spec(samples=2))
    assert digest_of(keys(planned)) == (
        "39413497248da5bb9d6ea9594a368286ff436309fc17bec9185c44b6e2ed624b"
    )
    assert set(planned.teachers) == {"t"}


# Several teachers

THREE: dict[str, dict[str, Any]] = {"a": {"weight": 2}, "b": {"weight": 1}, "c": {"weight": 1}}


def chosen(asked: Spec, tags: Any = None, sha256: str = "0" * 64, **fields: Any) -> str:
    line = PromptLine([Message(role="user", content="x")], tags=tags, **fields)
    return teacher_of(asked)(line, sha256)


def test_weights_share_the_prompts_out_and_others_change_nothing() -> None:
    asked = spec(teachers=THREE)
    found = Counter(prompt.teacher for prompt in shared(4000, asked))
    assert found["a"] == pytest.approx(2000, abs=150)
    assert found["b"] == pytest.approx(1000, abs=150)
    few, many = shared(50, asked), shared(500, asked)
    assert [p.teacher for p in few] == [p.teacher for p in many[:50]]
    reseeded = shared(500, spec(teachers=THREE, seed=8))
    assert [p.teacher for p in reseeded] != [p.teacher for p in many]


def test_shares_whose_sum_is_no_round_number_leave_nobody_out() -> None:
    teachers = {name: {"weight": 0.1} for name in "abcdefghijk"}
    assert chosen(spec(teachers=teachers), sha256="x") in teachers
    assert len({p.teacher for p in shared(500, spec(teachers=teachers))}) == 11


def test_the_first_teacher_whose_tags_are_all_there_answers() -> None:
    teachers: dict[str, dict[str, Any]] = {
        "law": {"tags": {"topic": "law", "lang": "de"}},
        "german": {"tags": {"lang": "de"}},
        "rest": {},
    }
    asked = spec(teachers=teachers)
    assert chosen(asked, {"lang": "de", "topic": "law", "more": "x"}) == "law"
    assert chosen(asked, {"lang": "de"}) == "german"
    assert chosen(asked, {"topic": "law"}) == chosen(asked) == "rest"


def test_tags_come_before_weights() -> None:
    teachers: dict[str, dict[str, Any]] = {
        "a": {"weight": 1},
        "german": {"tags": {"lang": "de"}},
    }
    asked = spec(teachers=teachers)
    assert (chosen(asked, {"lang": "de"}), chosen(asked, {"lang": "fr"})) == ("german", "a")


def test_a_prompt_that_nobody_takes_is_refused_with_its_tags() -> None:
    asked = spec(teachers={"german": {"tags": {"lang": "de"}}})
    for tags, said in (({"lang": "fr"}, "lang=fr"), (None, "none")):
        with pytest.raises(LineRefused, match=f"which are {said}") as caught:
            chosen(asked, tags)
        assert caught.value.reason == "no_teacher"


def test_tags_are_read_only_where_a_teacher_has_some() -> None:
    assert chosen(spec(), ["not", "an", "object"]) == "t"
    with pytest.raises(LineRefused, match="not an object of texts"):
        chosen(spec(teachers={"german": {"tags": {"lang": "de"}}}), ["de"])


def test_a_given_answer_must_be_there() -> None:
    asked = spec(teachers={"given": {"answers": "given"}})
    assert chosen(asked, answer="A lake.") == "given"
    with pytest.raises(LineRefused) as caught:
        chosen(asked)
    assert caught.value.reason == "answer_missing"
    assert chosen(spec(), answer=["ignored"]) == "t"


@pytest.mark.parametrize("samples", [1, 3])
def test_a_batch_is_of_one_teacher_and_any_stretch_is_a_mixture(samples: int) -> None:
    asked = spec(teachers=THREE, batch=4, samples=samples)
    given_prompts = shared(600, asked)
    planned = plan(given_prompts, asked)
    assert planned.items == 600 * samples
    for batch, teacher in zip(planned.batches, planned.teachers, strict=True):
        assert {slot.prompt.teacher for slot in batch} == {teacher}
        assert len({slot.prompt.sha256 for slot in batch}) == len(batch)
    train = planned.teachers[planned.numbers.heldout :]
    whole = Counter(train)
    for start in range(0, len(train) - 20, 7):
        window = Counter(train[start : start + 20])
        for teacher, count in whole.items():
            assert window[teacher] == pytest.approx(20 * count / len(train), abs=2)


def test_a_teacher_without_a_prompt_has_no_batch() -> None:
    teachers: dict[str, dict[str, Any]] = {"german": {"tags": {"lang": "de"}}, "rest": {}}
    asked = spec(teachers=teachers)
    assert set(plan(shared(60, asked), asked).teachers) == {"rest"}
