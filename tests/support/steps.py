"""The ground on which the tests of steps stand: one recipe, one item, and what became of it."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from services.dataset_builder.pipeline import run_steps
from services.dataset_builder.records import Draft, HeldoutIndex, Recipe
from services.dataset_builder.vocabulary import Vocabulary
from stillhouse.contracts.chat import ChatTokenizer
from stillhouse.contracts.responses import Item, Rejection
from stillhouse.contracts.spec import DatasetOptions, Signal
from tests.support.answers import make_answer, make_body, make_item
from tests.support.shards import make_resolved_spec
from tests.support.tiny_tokenizer import tiny_chat_tokenizer

K = 8


def make_recipe(
    *,
    chat: ChatTokenizer | None = None,
    kind: str = "topk",
    k: int = K,
    heldout: HeldoutIndex | None = None,
    **options: Any,
) -> Recipe:
    chat = chat or tiny_chat_tokenizer()
    return Recipe(
        split="train" if heldout else "validation",
        options=DatasetOptions(**options),
        signal=Signal(kind=kind, k=k),
        chat=chat,
        vocabulary=Vocabulary(chat),
        heldout=heldout,
    )


def question(text: str = "Say something short.") -> Item:
    return make_item(make_resolved_spec(), text)


def outcome(body: str, recipe: Recipe | None = None, item: Item | None = None) -> Draft | Rejection:
    """What becomes of one answer: its row, or its rejection."""
    item = item or question()
    answers = {item.item_id: make_answer(item, body)}
    rows, rejections = run_steps([item], answers, [], recipe or make_recipe())
    (only,) = [*rows, *rejections]
    return only


def honest(change: Callable[[dict[str, Any]], object] = lambda body: None, **how: Any) -> str:
    return make_body(question().messages, change=change, **how)


def row_of(found: Draft | Rejection) -> Draft:
    assert isinstance(found, Draft), found
    return found


def reason_of(found: Draft | Rejection) -> str:
    assert isinstance(found, Rejection), f"a row: {found.text!r}"
    return found.reason


def spoken(text: str, finish: str = "stop", usage: int | None = None, **message: Any) -> str:
    """An answer without log-probabilities."""
    prompt = len(tiny_chat_tokenizer().encode_prompt(question().messages))
    return json.dumps(
        {
            "choices": [{"message": {"content": text, **message}, "finish_reason": finish}],
            "usage": {"prompt_tokens": prompt if usage is None else usage},
        }
    )
