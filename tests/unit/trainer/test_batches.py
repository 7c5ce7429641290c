"""From rows to what goes through the student: nothing lost, nothing padded into a result."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from services.trainer.batches import collate
from services.trainer.data import Row, micro_batches
from services.trainer.losses import TokenTargets, TopKTargets
from services.trainer.student import open_folder
from stillhouse.contracts import signals
from tests.support.shards import make_resolved_spec, make_rows, stored_signal, tiny_student

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
    groups = list(micro_batches(rows, limit))
    assert sorted(r.row_id for g in groups for r in g) == sorted(r.row_id for r in rows)
    for group in groups:
        assert len(group) == 1 or len(group) * max(len(r.ids) for r in group) <= limit
    assert groups == list(micro_batches(rows, limit))


def test_each_supervised_token_is_predicted_from_the_ids_before_it() -> None:
    rows = taught_rows()
    batch = collate(rows, "sft", CPU)
    assert isinstance(batch.targets, TokenTargets)
    length = batch.input_ids.shape[1]
    at = 0
    for number, r in enumerate(rows):
        for position in range(r.prompt_tokens, len(r.ids)):
            assert int(batch.predictors[at]) == number * length + position - 1
            assert int(batch.targets.ids[at]) == r.ids[position]
            at += 1
        assert batch.input_ids[number, : len(r.ids) - 1].tolist() == r.ids[:-1].tolist()
    assert at == len(batch.targets)


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


def test_padding_does_not_reach_a_supervised_position(tmp_path: Path) -> None:
    model = open_folder(tiny_student(tmp_path / "tiny"))
    rows = taught_rows()

    def states(group: list[Row]) -> torch.Tensor:
        batch = collate(group, "sft", CPU)
        hidden = model.model(input_ids=batch.input_ids, use_cache=False).last_hidden_state
        return hidden.flatten(0, 1)[batch.predictors]

    alone = torch.cat([states([r]) for r in rows])
    assert len({len(r.ids) for r in rows}) > 1
    torch.testing.assert_close(states(rows), alone, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("limit", [1, 140, 10_000])
def test_a_steps_gradient_does_not_depend_on_its_micro_batches(tmp_path: Path, limit: int) -> None:
    from services.trainer.head import fused_loss

    model = open_folder(tiny_student(tmp_path / "tiny")).double()
    head, rows = model.get_output_embeddings().weight, taught_rows(6)
    tokens = sum(r.supervised for r in rows)

    def gradient(groups: list[list[Row]]) -> torch.Tensor:
        model.zero_grad()
        for group in groups:
            batch = collate(group, "sft", CPU)
            hidden = model.model(input_ids=batch.input_ids, use_cache=False).last_hidden_state
            chosen = hidden.flatten(0, 1)[batch.predictors]
            fused_loss(chosen, head, batch.targets, scale=1 / tokens).backward()
        return torch.cat([p.grad.flatten() for p in model.parameters()])

    whole = gradient([rows])
    parts = gradient(list(micro_batches(rows, limit)))
    torch.testing.assert_close(parts, whole, rtol=1e-9, atol=1e-12)
