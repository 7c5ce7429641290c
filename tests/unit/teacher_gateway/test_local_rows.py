"""What local weights answer or score, taken through the builder's steps: rows with their signal."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pydantic import SecretStr

from services.dataset_builder.pipeline import run_steps
from services.dataset_builder.records import Draft, Recipe
from services.dataset_builder.vocabulary import Vocabulary
from services.teacher_gateway.settings import TeacherGatewaySettings
from services.teacher_gateway.teachers.local.client import open_local
from services.teacher_gateway.teachers.outcomes import Answered, Call
from stillhouse.contracts.responses import Item
from stillhouse.contracts.signals import decode
from stillhouse.contracts.spec import DatasetOptions, Signal, Teacher
from tests.support.answers import make_answer, make_item
from tests.support.local_weights import speaking_weights
from tests.support.shards import make_resolved_spec
from tests.support.tiny_tokenizer import END_ID, tiny_chat_tokenizer

SIGNALS = [
    Signal(kind="topk", k=6, max_tokens=24),
    Signal(kind="counts", draws=30, max_tokens=24),
    Signal(kind="text", max_tokens=24),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder: Path = tmp_path_factory.mktemp("local")
    speaking_weights(folder / "speaking")
    return folder


def bodies(folder: Path, signal: Signal, items: list[Item], **teacher: Any) -> list[str]:
    settings = TeacherGatewaySettings(
        broker_url="memory://",
        database_url="sqlite:////nowhere",
        key_pepper=SecretStr("0123456789abcdef"),
        profile="embedded",
        file_roots=(folder,),
        work_dir=folder / "work",
        local_device="cpu",
    )
    local = Teacher.model_validate(
        {
            "name": "local",
            "weights": f"file:{folder / 'speaking'}",
            "model": "tiny",
            "terms": "own-weights",
            "usd_per_million": {"input": 1, "output": 2},
            **teacher,
        }
    )

    async def ask() -> list[str]:
        async with open_local(local, signal, settings) as client:
            calls = [Call(i.messages, i.item_id, given=i.answer) for i in items]
            found = await asyncio.gather(*(client.ask(call, deadline=60) for call in calls))
            assert all(isinstance(outcome, Answered) for outcome in found), found
            return [outcome.body for outcome in found if isinstance(outcome, Answered)]

    return asyncio.run(ask())


def rows(items: list[Item], said: list[str], signal: Signal) -> list[Draft]:
    chat = tiny_chat_tokenizer()
    recipe = Recipe(
        split="validation",
        options=DatasetOptions(),
        signal=signal,
        chat=chat,
        vocabulary=Vocabulary(chat),
        heldout=None,
    )
    answers = {i.item_id: make_answer(i, body) for i, body in zip(items, said, strict=True)}
    found, rejections = run_steps(items, answers, [], recipe)
    # Only an answer that ends at once, without a word, is no row.
    assert {rejection.reason for rejection in rejections} <= {"empty_answer"}
    return found


def questions(count: int = 8) -> list[Item]:
    return [make_item(make_resolved_spec(), f"[{n}] Say something.") for n in range(count)]


def entries(body: str) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads(body)["choices"][0]["logprobs"]["content"]
    return found


@pytest.mark.parametrize("signal", SIGNALS, ids=lambda signal: signal.kind)
def test_answers_of_local_weights_become_rows_of_their_signal(folder: Path, signal: Signal) -> None:
    items = questions()
    said = bodies(folder, signal, items)
    found = rows(items, said, signal)
    assert len(found) > 4
    by_item = dict(zip((item.item_id for item in items), said, strict=True))
    for row in found:
        assert (row.signal, row.signal_reason) == (signal.kind, None)
        choice = json.loads(by_item[row.item.item_id])["choices"][0]
        assert row.text == choice["message"]["content"]
        if signal.kind != "text":
            # Trained on the very ids that were sampled.
            sampled = [entry["id"] for entry in choice["logprobs"]["content"]]
            assert list(row.answer_ids) == sampled
            assert row.stored is not None
            assert decode(row.stored).positions == len(sampled)


def test_a_row_of_counts_holds_what_was_drawn(folder: Path) -> None:
    items, signal = questions(1), SIGNALS[1]
    (body,) = bodies(folder, signal, items)
    (row,) = rows(items, [body], signal)
    assert row.stored is not None
    kept = decode(row.stored)
    for t, entry in enumerate(entries(body)):
        drawn = {int(i): count / signal.draws for i, count in entry["counts"].items()}
        stored = {
            int(i): float(np.exp(lp))
            for i, lp in zip(kept.ids[t], kept.logp[t], strict=True)
            if lp > -np.inf
        }
        assert stored == pytest.approx(drawn)


@pytest.mark.parametrize("signal", SIGNALS[:2], ids=lambda signal: signal.kind)
def test_given_answers_that_were_scored_become_rows_of_their_signal(
    folder: Path, signal: Signal
) -> None:
    def given(text: str) -> str:
        message = {"role": "assistant", "content": text}
        return json.dumps({"choices": [{"message": message, "finish_reason": "stop"}]})

    texts = ["A lake is water.", "\u00dcber sieben Br\u00fccken"]
    items = [
        item.model_copy(update={"answer": given(text)})
        for item, text in zip(questions(len(texts)), texts, strict=True)
    ]
    found = rows(items, bodies(folder, signal, items, answers="given"), signal)
    for row, text in zip(found, texts, strict=True):
        assert (row.text, row.signal, row.signal_reason) == (text, signal.kind, None)
        assert list(row.answer_ids) == [*text.encode(), END_ID]
