"""Parts tile the held-out rows, in one order for everybody; malformed rows are named."""

from __future__ import annotations

from typing import Any

import pytest

from services.evaluator.suite import first_of_each_prompt, plan_parts, read_shard
from stillhouse.chassis.errors import PermanentError
from tests.support.shards import make_resolved_spec, make_rows, prompt_text, shard_bytes

RESOLVED = make_resolved_spec()


@pytest.mark.parametrize(("validation", "test"), [(1, 1), (16, 16), (17, 5), (0, 3), (0, 0)])
def test_parts_tile_both_splits(validation: int, test: int) -> None:
    parts = plan_parts(validation, test, 16)
    assert [part.number for part in parts] == list(range(len(parts)))
    for split, count in (("validation", validation), ("test", test)):
        covered = [
            n
            for part in parts
            if part.split == split and part.kind == "rows"
            for n in range(part.start, part.stop)
        ]
        assert covered == list(range(count))
    assert [part.kind for part in parts].count("answers") == 1


def test_rows_are_read_as_the_builder_wrote_them() -> None:
    written = make_rows(RESOLVED, 0, 3, text_only=[1])
    rows = read_shard(shard_bytes(RESOLVED, 0, written), "key")
    assert [row.row_id for row in rows] == [row["row_id"] for row in written]
    assert [row.signal is None for row in rows] == [False, True, False]
    assert list(rows[0].ids) == written[0]["input_ids"]
    assert rows[0].prompt == prompt_text(0, 0)
    assert rows[0].supervised == written[0]["supervised_tokens"]


@pytest.mark.parametrize(
    "change",
    [{"supervised_tokens": 1}, {"prompt_tokens": 0}, {"prompt_tokens": 10_000}],
)
def test_a_row_that_does_not_add_up_is_named(change: dict[str, Any]) -> None:
    bad = make_rows(RESOLVED, 0, 1)[0] | change
    with pytest.raises(PermanentError, match=bad["row_id"]):
        read_shard(shard_bytes(RESOLVED, 0, [bad]), "key")


def test_several_answers_to_one_prompt_are_asked_once() -> None:
    written = make_rows(RESOLVED, 0, 3)
    written[1] |= {"prompt_id": written[0]["prompt_id"]}
    rows = read_shard(shard_bytes(RESOLVED, 0, written), "key")
    assert first_of_each_prompt(rows, 5) == [rows[0], rows[2]]
    assert first_of_each_prompt(rows, 1) == [rows[0]]
    assert first_of_each_prompt(rows, 0) == []
