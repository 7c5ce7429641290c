"""What local weights say of a position: raw log-probabilities, and draws that follow them."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from services.teacher_gateway.teachers.local.signals import look
from services.teacher_gateway.teachers.local.work import Numbers
from stillhouse.contracts.signals import from_outcomes
from stillhouse.contracts.spec import Signal

VOCABULARY = 40


def logits(rows: int = 3, width: int = VOCABULARY) -> torch.Tensor:
    return torch.randn((rows, width), generator=torch.Generator().manual_seed(1)) * 3


def uniforms(rows: int = 3, draws: int = 0) -> np.ndarray:
    return np.concatenate([Numbers(f"item-{n}").take(1, draws) for n in range(rows)])


def grid(count: int) -> np.ndarray:
    """Numbers at even distances: what is drawn with them is the expectation itself."""
    return ((np.arange(count) + 0.5) / count)[None]


def test_log_probabilities_are_raw_and_sum_to_one_with_the_tail() -> None:
    signal = Signal(kind="topk", k=7, temperature=0.5)
    exact = torch.log_softmax(logits().double(), -1)
    for n, found in enumerate(look(logits(), uniforms(), signal, VOCABULARY)):
        assert found.logprob == pytest.approx(float(exact[n, found.id]), abs=1e-5)
        assert found.ids is not None
        assert found.logp is not None
        listed = dict(zip(found.ids.tolist(), found.logp.tolist(), strict=True))
        assert list(listed) == exact[n].argsort(descending=True)[:7].tolist()
        for i, logp in listed.items():
            assert logp == pytest.approx(float(exact[n, i]), abs=1e-5)
        kept = from_outcomes([listed | {found.id: found.logprob}], 8)
        total = np.exp(kept.logp[0]).sum() + np.exp(kept.tail[0])
        assert total == pytest.approx(1.0, abs=1e-6)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 1.7])
def test_draws_are_unbiased_to_the_last_token(temperature: float) -> None:
    """Each id comes as often as its probability says, whatever the sampling temperature."""
    count = 255
    signal = Signal(kind="counts", draws=count, temperature=temperature)
    numbers = np.concatenate([np.full((1, 1), 0.5), grid(count)], axis=1)
    (found,) = look(logits(1), numbers, signal, VOCABULARY)
    assert found.counts is not None
    assert sum(found.counts.values()) == count
    expected = torch.softmax(logits(1)[0].double(), -1) * count
    for i in range(VOCABULARY):
        assert abs(found.counts.get(i, 0) - float(expected[i])) <= 1


@pytest.mark.parametrize("temperature", [0.5, 1.0, 1.7])
def test_tokens_are_sampled_at_the_temperature(temperature: float) -> None:
    count = 4000
    rows = logits(1).expand(count, -1)
    found = look(rows, grid(count).T, Signal(kind="text", temperature=temperature), VOCABULARY)
    seen = np.bincount([position.id for position in found], minlength=VOCABULARY)
    expected = torch.softmax(logits(1)[0].double() / temperature, -1).numpy() * count
    assert np.abs(seen - expected).max() <= 1


def test_items_draw_as_the_distribution_does() -> None:
    """Chi-square over the draws of many items; their numbers come from their names."""
    items, draws = 200, 50
    rows = logits(1).expand(items, -1)
    signal = Signal(kind="counts", draws=draws)
    seen = np.zeros(VOCABULARY)
    for found in look(rows, uniforms(items, draws), signal, VOCABULARY):
        assert found.counts is not None
        for i, count in found.counts.items():
            seen[i] += count
    expected = torch.softmax(logits(1)[0].double(), -1).numpy() * items * draws
    many = expected >= 5
    few = ~many
    pairs = [*zip(seen[many], expected[many], strict=True), (seen[few].sum(), expected[few].sum())]
    chi = sum((s - e) ** 2 / e for s, e in pairs)
    assert chi < 2 * len(pairs)  # its mean is their number less one


def test_temperature_zero_takes_the_likeliest() -> None:
    found = look(logits(), uniforms(), Signal(kind="text", temperature=0), VOCABULARY)
    assert [position.id for position in found] == logits().argmax(-1).tolist()


def test_padding_beyond_the_tokenizer_is_tail_and_never_a_token() -> None:
    padded = logits(1, VOCABULARY + 8)
    padded[:, VOCABULARY:] += 2
    exact = torch.log_softmax(padded[0].double(), -1)
    count = 255
    numbers = np.concatenate([np.full((1, 1), 1 - 2**-53), grid(count)], axis=1)
    (found,) = look(padded, numbers, Signal(kind="counts", draws=count), VOCABULARY)
    assert found.counts is not None
    assert max(found.id, *found.counts) < VOCABULARY
    assert found.logprob == pytest.approx(float(exact[found.id]), abs=1e-5)
    (listed,) = look(padded, numbers[:, :1], Signal(kind="topk", k=VOCABULARY), VOCABULARY)
    assert listed.logp is not None
    left = 1 - float(np.exp(listed.logp.astype(np.float64)).sum())
    assert left == pytest.approx(float(exact[VOCABULARY:].exp().sum()), abs=1e-5)


def test_given_tokens_are_looked_at_as_if_they_had_been_sampled() -> None:
    signal = Signal(kind="counts", draws=9)
    sampled = look(logits(), uniforms(draws=9), signal, VOCABULARY)
    given = [position.id for position in sampled]
    assert look(logits(), uniforms(draws=9), signal, VOCABULARY, given) == sampled
    others = look(logits(), uniforms(draws=9), signal, VOCABULARY, [0, 1, 2])
    assert [position.id for position in others] == [0, 1, 2]
    assert [p.counts for p in others] == [p.counts for p in sampled]


def test_the_numbers_of_an_item_are_its_own_and_come_in_order() -> None:
    whole = Numbers("item").take(6, 3)
    parts = Numbers("item")
    assert np.array_equal(whole, np.concatenate([parts.take(n, 3) for n in (1, 2, 3)]))
    assert np.array_equal(whole[:, :1], Numbers("item").take(6, 0))
    assert not np.array_equal(whole, Numbers("another").take(6, 3))
    assert ((whole >= 0) & (whole < 1)).all()
