"""What a spec may not ask for, beyond the types of its fields."""

from __future__ import annotations

import pytest
from pydantic import ValidationError

from stillhouse.contracts.spec import MAX_BATCH_TOKENS, Batches, Spec, heldout_split
from tests.support.shards import make_resolved_spec


def changed(part: str, **fields: object) -> Spec:
    spec = make_resolved_spec().spec.model_dump(mode="json", by_alias=True)
    spec[part] |= fields
    return Spec.model_validate(spec)


def test_a_batch_is_no_larger_than_one_job_can_build() -> None:
    most = MAX_BATCH_TOKENS // 100
    assert changed("prompts", batch=100).prompts.batch == 100
    large = changed("prompts", batch=100).model_dump(mode="json", by_alias=True)
    large["signal"]["max_tokens"] = most
    assert Spec.model_validate(large).signal.max_tokens == most
    large["signal"]["max_tokens"] = most + 1
    with pytest.raises(ValidationError, match=r"lower `prompts\.batch`"):
        Spec.model_validate(large)


def test_distributions_need_temperature_one() -> None:
    with pytest.raises(ValidationError, match="must be 1 for `topk`"):
        changed("signal", temperature=0.7)


def test_batches_come_validation_first_then_test_then_train() -> None:
    batches = Batches(validation=1, test=2, train=3)
    assert [batches.split_of(n) for n in range(6)] == [
        "validation",
        *["test"] * 2,
        *["train"] * 3,
    ]
    with pytest.raises(ValueError, match="below 6"):
        batches.split_of(6)


def test_the_held_out_share_is_about_what_was_asked_and_fixed_by_the_prompt() -> None:
    splits = [heldout_split(f"{n:064x}", 0.2, 7) for n in range(5000)]
    assert 0.08 < splits.count("validation") / 5000 < 0.12
    assert 0.08 < splits.count("test") / 5000 < 0.12
    assert splits == [heldout_split(f"{n:064x}", 0.2, 7) for n in range(5000)]
    assert splits != [heldout_split(f"{n:064x}", 0.2, 8) for n in range(5000)]
