"""What moves through the steps: an item with its answer, filled in until it is a row."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from services.dataset_builder.vocabulary import Vocabulary
from stillhouse.contracts.chat import ChatTokenizer, ToolCall
from stillhouse.contracts.events import Split
from stillhouse.contracts.responses import Item
from stillhouse.contracts.signals import StoredTopK
from stillhouse.contracts.spec import DatasetOptions, Signal


class Reject(Exception):
    """A step refuses an item. `reason` is one of `reasons.REJECTIONS`; no prompt or answer text
    belongs into `detail`, which people read outside the store."""

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(f"{reason}: {detail}")
        self.reason = reason
        self.detail = detail[:500]


@dataclass(frozen=True)
class HeldoutIndex:
    """The held-out prompts and answers as digests of their normalised text."""

    prompts: frozenset[str]
    answers: frozenset[str]


@dataclass(frozen=True)
class Recipe:
    """All that decides about an item beside the item: settled by the spec, the same for a batch.

    `heldout` is None for the held-out batches themselves.
    """

    split: Split
    options: DatasetOptions
    signal: Signal
    chat: ChatTokenizer
    vocabulary: Vocabulary
    heldout: HeldoutIndex | None


@dataclass(frozen=True)
class Draft:
    """An item on its way to a row; each step fills in what its name says and returns a new one.

    text: the answer, or what was said beside `calls`, the functions that it calls. turn: the
    whole turn as the template writes it, where there are calls. reasoning: what was thought apart
    from the answer. prompt_ids: the rendered conversation. answer_ids: what is supervised, with
    the end-of-turn id where the answer stopped. logprobs: the teacher's, as raw JSON, so that only
    rows that come as far as their alignment pay for parsing them.
    """

    item: Item
    body: str
    text: str = ""
    finish_reason: str = ""
    refusal: bool = False
    reasoning: str = ""
    calls: tuple[ToolCall, ...] = ()
    turn: str = ""
    usage_prompt_tokens: int | None = None
    usage_completion_tokens: int | None = None
    logprobs: bytes = b"null"
    answer_sha256: str = ""
    prompt_ids: tuple[int, ...] = ()
    answer_ids: tuple[int, ...] = ()
    signal: Literal["text", "topk", "counts"] = "text"
    signal_reason: str | None = None
    stored: StoredTopK | None = None

    @property
    def input_ids(self) -> list[int]:
        return [*self.prompt_ids, *self.answer_ids]
