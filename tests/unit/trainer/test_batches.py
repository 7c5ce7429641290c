"""From rows to what goes through the student: nothing lost, nothing padded."""

from __future__ import annotations

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from services.trainer.batches import collate
from services.trainer.data import Row, micro_batches
from services.trainer.losses import TokenTargets, TopKTargets
from stillhouse.contracts import signals
from tests.support.shards import make_resolved_spec, make_rows, stored_signal

CPU = torch.device("cpu")


def row(length: int, prompt: int = 1, number: int = 0) -> Row:
    return Row(f"row-{number}", 0, np.arange(length) % 200, prompt, None)


def taught_rows(count: int = 5, text_only: tuple[int, ...] = ()) -> list[Row]:
    resolved = make_resolved_spec()
    return [
        Row(
            made["row_id"],
            0,
            np.array(made["input_ids"], np.int64),
            made["prompt_tokens"],
            None if made["signal"] == "text" else stored_signal(made),
        )
        for made in make_rows(resolved, 2, count, text_only=text_only)
    ]


@given(st.lists(st.integers(2, 300), min_size=1, max_size=40), st.integers(1, 1000))
def test_micro_batches_lose_no_row_and_keep_to_their_size(lengths: list[int], limit: int) -> None:
    rows = [row(length, number=number) for number, length in enumerate(lengths)]
    groups = micro_batches(rows, limit)
    assert sorted(r.row_id for g in groups for r in g) == sorted(r.row_id for r in rows)
    sizes = [sum(r.fed for r in group) for group in groups]
    assert all(len(g) == 1 or size <= limit for g, size in zip(groups, sizes, strict=True))
    # Two that would fit into one pass are never two passes.
    assert all(a + b > limit for n, a in enumerate(sizes) for b in sizes[n + 1 :])
    assert groups == micro_batches(rows, limit)


def test_each_supervised_token_is_predicted_from_the_ids_before_it() -> None:
    rows = taught_rows()
    batch = collate(rows, "sft", CPU)
    assert isinstance(batch.targets, TokenTargets)
    at = start = 0
    for r in rows:
        for position in range(r.prompt_tokens, len(r.ids)):
            assert int(batch.predictors[at]) == start + position - 1
            assert int(batch.targets.ids[at]) == r.ids[position]
            at += 1
        end = start + len(r.ids) - 1
        assert batch.input_ids[0, start:end].tolist() == r.ids[:-1].tolist()
        assert batch.position_ids[0, start:end].tolist() == list(range(end - start))
        start = end
    assert at == len(batch.targets)
    assert batch.input_ids.shape == batch.position_ids.shape == (1, start)  # nothing is padded


def test_a_signal_stays_with_its_position() -> None:
    rows = taught_rows()
    batch = collate(rows, "forward_kl", CPU)
    assert isinstance(batch.targets, TopKTargets)
    at = 0
    for r in rows:
        assert r.signal is not None
        decoded = signals.decode(r.signal)
        part = batch.targets.part(at, at + decoded.positions)
        np.testing.assert_array_equal(part.ids[:, : decoded.slots], decoded.ids)
        np.testing.assert_allclose(part.logp[:, : decoded.slots], decoded.logp, atol=1e-6)
        np.testing.assert_allclose(part.tail, decoded.tail, atol=1e-5)
        at += decoded.positions


def test_a_row_without_a_signal_has_its_tokens_as_certain_outcomes() -> None:
    rows = taught_rows(text_only=(1,))
    batch = collate(rows, "forward_kl", CPU)
    assert isinstance(batch.targets, TopKTargets)
    start = rows[0].supervised
    part = batch.targets.part(start, start + rows[1].supervised)
    assert part.ids[:, 0].tolist() == rows[1].ids[rows[1].prompt_tokens :].tolist()
    assert part.logp[:, 0].tolist() == [0.0] * rows[1].supervised
    assert torch.isinf(part.logp[:, 1:]).all()
