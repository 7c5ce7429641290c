"""The figures of a row equal their formulas, computed plainly in float64."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from services.evaluator.fidelity import hidden_states, score_rows, stored_sums
from services.evaluator.models import open_folder
from services.evaluator.statistics import RowSums
from services.evaluator.suite import Row
from stillhouse.chassis.errors import PermanentError
from stillhouse.contracts.signals import TopK, decode, encode, from_outcomes
from tests.support.shards import tiny_student
from tests.support.tiny_tokenizer import VOCABULARY


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any]:
    folder = tmp_path_factory.mktemp("models")
    return tuple(open_folder(tiny_student(folder / str(seed), seed=seed), "cpu") for seed in (0, 1))


def _rows(count: int = 4, slots: int = 9) -> list[Row]:
    random = np.random.default_rng(5)
    rows = []
    for n in range(count):
        prompt, answer = [256, 10, 11, *random.integers(0, 200, n + 1)], random.integers(0, 200, 7)
        positions: list[dict[int, float]] = []
        for token in answer:
            p = random.dirichlet(np.full(VOCABULARY, 0.05))
            p = 0.999 * p + 0.001 / VOCABULARY
            kept = {int(i) for i in np.argsort(-p)[: slots - 1]} | {int(token)}
            positions.append({i: float(np.log(p[i])) for i in kept})
        ids = tuple(int(i) for i in (*prompt, *answer))
        rows.append(
            Row(
                row_id=f"row-{n}",
                prompt_id=f"prompt-{n}",
                prompt="",
                answer="",
                finish_reason="stop",
                ids=ids,
                prompt_tokens=len(prompt),
                signal=encode(from_outcomes(positions, slots)),
            )
        )
    return rows


def _logits(model: Any, row: Row) -> torch.Tensor:
    """[T, V] float64 of the supervised positions, by a forward of the row alone."""
    with torch.inference_mode():
        out: torch.Tensor = model(torch.tensor([row.ids])).logits[0]
    return out[row.prompt_tokens - 1 : -1].to(torch.float64)


def _plain(model: Any, reference: Any, row: Row) -> dict[str, float]:
    assert row.signal is not None
    signal, logq = decode(row.signal), _logits(model, row).log_softmax(-1).numpy()
    logp = _logits(reference, row).log_softmax(-1).numpy()
    kl = 0.0
    for t in range(row.supervised):
        kept = [
            (i, lp) for i, lp in zip(signal.ids[t], signal.logp[t], strict=True) if lp > -np.inf
        ]
        kl += sum(np.exp(lp) * (lp - logq[t, i]) for i, lp in kept)
        others = np.delete(logq[t], [i for i, _ in kept])
        kl += np.exp(signal.tail[t]) * (signal.tail[t] - np.log(np.exp(others).sum()))
    answer = row.ids[row.prompt_tokens :]
    return {
        "kl_top20": kl,
        "kl_full": float((np.exp(logp) * (logp - logq)).sum()),
        "nll": -sum(logq[t, token] for t, token in enumerate(answer)),
        "top1": float(sum(logq.argmax(-1) == signal.ids[:, 0])),
    }


def _score(model: Any, reference: Any, rows: Sequence[Row], chunk: int = 64) -> list[RowSums]:
    return score_rows(
        model.lm_head,
        hidden_states(model, rows),
        rows,
        reference_head=None if reference is None else reference.lm_head,
        reference_states=None if reference is None else hidden_states(reference, rows),
        vocabulary=VOCABULARY,
        chunk=chunk,
    )


def test_every_figure_equals_its_formula(models: tuple[Any, Any]) -> None:
    model, reference = models
    rows = _rows()
    for row, found in zip(rows, _score(model, reference, rows), strict=True):
        expected = _plain(model, reference, row)
        assert found.kl_full == pytest.approx(expected["kl_full"], rel=1e-4, abs=1e-5)
        assert found.kl_top20 == pytest.approx(expected["kl_top20"], rel=1e-5, abs=1e-5)
        assert found.nll == pytest.approx(expected["nll"], rel=1e-5)
        assert found.top1 == expected["top1"]
        assert found.tokens == found.scored == row.supervised == 7


@pytest.mark.parametrize("chunk", [1, 3])
def test_chunks_change_nothing(models: tuple[Any, Any], chunk: int) -> None:
    model, reference = models
    whole, cut = _score(model, reference, _rows()), _score(model, reference, _rows(), chunk)
    # A product of other shape may run in another kernel, which sums in another order.
    for one, other in zip(whole, cut, strict=True):
        assert one.kl_full == pytest.approx(other.kl_full, rel=1e-4, abs=1e-5)
        assert one.kl_top20 == pytest.approx(other.kl_top20, rel=1e-5, abs=1e-5)
        assert one.nll == pytest.approx(other.nll, rel=1e-5)


def test_a_model_is_no_distance_from_itself(models: tuple[Any, Any]) -> None:
    reference = models[1]
    assert all(row.kl_full == 0.0 for row in _score(reference, reference, _rows()))


def test_the_stored_figure_is_zero_for_the_model_that_was_stored(models: tuple[Any, Any]) -> None:
    """Within what quantising costs; and it never exceeds the full figure for another model."""
    teacher, model = models
    rows = []
    for row in _rows():
        logp = _logits(teacher, row).log_softmax(-1)
        top = logp.topk(8)
        ids, values = top.indices.numpy(), top.values.numpy()
        tail = np.log1p(-np.exp(values).sum(-1))
        rows.append(replace(row, signal=encode(TopK(ids, values, tail))))
    for found in _score(teacher, teacher, rows):
        assert 0 <= found.kl_top20 < 0.01 * found.tokens
        assert found.top1 == found.tokens
    for found in _score(model, teacher, rows):
        assert found.kl_full is not None
        assert found.kl_top20 < found.kl_full + 0.01 * found.tokens


def test_a_shared_beginning_is_computed_once_and_changes_nothing(
    models: tuple[Any, Any],
) -> None:
    model = models[0]
    rows = _rows()
    assert len({row.ids[:3] for row in rows}) == 1
    for row, states in zip(rows, hidden_states(model, rows), strict=True):
        alone = hidden_states(model, [row])[0]
        assert torch.allclose(states, alone, atol=1e-5)
        with torch.inference_mode():
            assert torch.allclose(model.lm_head(states).double(), _logits(model, row), atol=1e-4)


def test_text_rows_have_what_the_teachers_weights_tell(models: tuple[Any, Any]) -> None:
    model, reference = models
    row = _rows(1)[0]
    with_signal, text = _score(model, reference, [row, replace(row, signal=None)])
    assert text.scored == text.kl_top20 == 0
    assert text.nll == with_signal.nll
    assert text.kl_full == with_signal.kl_full
    assert (text.top1, text.ranked) == (_plain_full(model, reference, row)["top1"], row.supervised)
    (itself,) = _score(reference, reference, [replace(row, signal=None)])
    assert itself.top1 == itself.ranked == row.supervised


def test_text_rows_count_for_the_loss_alone_where_no_weights_are_known(
    models: tuple[Any, Any],
) -> None:
    (text,) = _score(models[0], None, [replace(_rows(1)[0], signal=None)])
    assert text.scored == text.ranked == text.top1 == text.kl_top20 == 0
    assert text.kl_full is None
    assert text.nll > 0


def test_every_outcome_stored_leaves_no_tail(models: tuple[Any, Any]) -> None:
    """k = V: the tail holds nothing, on either side."""
    model = models[0]
    row = _rows(1)[0]
    everything = [dict(enumerate(np.log(np.full(VOCABULARY, 1 / VOCABULARY)))) for _ in range(7)]
    row = replace(row, signal=encode(from_outcomes(everything, VOCABULARY)))
    found = _score(model, None, [row])[0]
    assert found.kl_full is None
    assert 0 < found.kl_top20 < 10 * row.supervised


def test_tokens_beyond_the_model_are_refused(models: tuple[Any, Any]) -> None:
    model, row = models[0], _rows(1)[0]
    states = hidden_states(model, [row])
    with pytest.raises(PermanentError, match="share one tokenizer"):
        score_rows(model.lm_head, states, [row], vocabulary=VOCABULARY + 50, chunk=8)
    beyond = [{VOCABULARY + 1: -0.1} for _ in range(row.supervised)]
    bad = replace(row, signal=encode(from_outcomes(beyond, 2)))
    with pytest.raises(PermanentError, match=str(VOCABULARY + 1)):
        score_rows(model.lm_head, states, [bad], vocabulary=VOCABULARY, chunk=8)


def test_heads_padded_to_different_sizes_are_compared_over_the_tokenizer(
    models: tuple[Any, Any], tmp_path: Path
) -> None:
    model = models[0]
    padded = open_folder(tiny_student(tmp_path / "padded", vocabulary=VOCABULARY + 6), "cpu")
    with torch.inference_mode():  # the same model but for its padding
        for name, value in model.state_dict().items():
            padded.state_dict()[name][: len(value)].copy_(value)
    for row in _score(padded, model, _rows()):
        assert row.kl_full == pytest.approx(0.0, abs=1e-5)


def test_a_stored_signal_tells_the_teachers_loss() -> None:
    rows = _rows(2)
    assert rows[0].signal is not None
    signal = decode(rows[0].signal)
    answer = rows[0].ids[rows[0].prompt_tokens :]
    expected = -sum(
        signal.logp[t][list(signal.ids[t]).index(token)] for t, token in enumerate(answer)
    )
    found = stored_sums([rows[0], replace(rows[1], signal=None)])
    assert len(found) == 1
    assert found[0].nll == pytest.approx(expected)
    assert found[0].tokens == 7


def test_rows_of_drawn_ids_are_measured_by_the_teachers_weights_alone(
    models: tuple[Any, Any],
) -> None:
    """A divergence from counts is biased, and their most frequent id is the likeliest by luck."""
    model, reference = models
    rows = [replace(row, signal=None, drawn=True) for row in _rows()]
    for row, found in zip(rows, _score(model, reference, rows), strict=True):
        expected = _plain_full(model, reference, row)
        assert found.kl_full == pytest.approx(expected["kl_full"], rel=1e-4, abs=1e-5)
        assert found.nll == pytest.approx(expected["nll"], rel=1e-5)
        assert (found.top1, found.ranked) == (expected["top1"], row.supervised)
        assert (found.scored, found.kl_top20) == (0, 0.0)
    for found in _score(model, None, rows):
        assert (found.ranked, found.scored, found.kl_full) == (0, 0, None)
    assert stored_sums(rows) == []


def _plain_full(model: Any, reference: Any, row: Row) -> dict[str, float]:
    logq = _logits(model, row).log_softmax(-1).numpy()
    logp = _logits(reference, row).log_softmax(-1).numpy()
    return {
        "kl_full": float((np.exp(logp) * (logp - logq)).sum()),
        "nll": -sum(logq[t, token] for t, token in enumerate(row.ids[row.prompt_tokens :])),
        "top1": float(sum(logq.argmax(-1) == logp.argmax(-1))),
    }
