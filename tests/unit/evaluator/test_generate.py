"""Answers: greedy equals the library's, draws depend on the row alone and follow the model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from services.evaluator import generate as g
from services.evaluator.models import open_folder
from tests.support.shards import tiny_student
from tests.support.tiny_tokenizer import END_ID


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder: Path = tmp_path_factory.mktemp("model")
    return open_folder(tiny_student(folder, seed=3), "cpu")


def _prompts(temperature: float) -> list[g.Prompt]:
    return [g.Prompt(f"row-{n}", tuple(range(10 + n, 14 + 3 * n)), temperature) for n in range(5)]


def _generate(model: Any, prompts: list[g.Prompt], **changes: Any) -> list[g.Continuation]:
    told = {"eos_id": END_ID, "max_tokens": 8, "seed": 1, "batch": 32} | changes
    return g.generate(model, prompts, **told)


def test_greedy_answers_equal_those_of_transformers(model: Any) -> None:
    for prompt, found in zip(_prompts(0), _generate(model, _prompts(0)), strict=True):
        with torch.inference_mode():
            out = model.generate(
                torch.tensor([prompt.ids]),
                attention_mask=torch.ones(1, len(prompt.ids), dtype=torch.long),
                max_new_tokens=8,
                do_sample=False,
                pad_token_id=END_ID,
            )[0]
        assert found.ids == [i for i in out[len(prompt.ids) :].tolist() if i != END_ID]


def test_draws_are_repeatable_and_do_not_depend_on_the_batch(model: Any) -> None:
    together = _generate(model, _prompts(1))
    assert together == _generate(model, _prompts(1))
    assert together == _generate(model, _prompts(1), batch=2)
    assert together == _generate(model, _prompts(1)[::-1])[::-1]
    assert together != _generate(model, _prompts(1), seed=2)


def test_an_answer_ends_at_the_end_of_turn_and_leaves_the_batch(model: Any) -> None:
    """Take what one greedy answer says second for the end: it stops there, others go on."""
    free = _generate(model, _prompts(0))
    stop = free[2].ids[1]
    for before, after in zip(free, _generate(model, _prompts(0), eos_id=stop), strict=True):
        cut = before.ids.index(stop) if stop in before.ids else None
        assert after.ids == before.ids[:cut]
        assert after.stopped == (cut is not None)


def test_a_long_prompt_takes_no_room_from_the_answers_beside_it(model: Any) -> None:
    """How long an answer may be follows from its own prompt; the context has 512 positions."""
    short, long = g.Prompt("short", (20, 21), 0.0), g.Prompt("long", (7,) * 507, 0.0)
    alone = [_generate(model, [prompt], eos_id=END_ID)[0] for prompt in (short, long)]
    assert [len(answer.ids) for answer in alone] == [8, 5]
    assert _generate(model, [short, long], eos_id=END_ID) == alone


def test_a_prompt_that_fills_the_context_gets_no_answer(model: Any) -> None:
    full = g.Prompt("row", (7,) * 512, 0.0)
    assert _generate(model, [full]) == [g.Continuation([], False)]
    beside = _prompts(0)
    assert _generate(model, [full, *beside]) == [
        g.Continuation([], False),
        *_generate(model, beside),
    ]


def test_draws_follow_the_models_probabilities() -> None:
    stream = np.random.Generator(np.random.Philox(key=1))
    logits = np.log(np.array([0.1, 0.0001, 0.6, 0.2999]))
    drawn = np.bincount([g._draw(logits, stream) for _ in range(4000)], minlength=4) / 4000
    assert drawn == pytest.approx([0.1, 0.0, 0.6, 0.3], abs=0.03)
