"""What an attempt at a batch needs from the store: spec, items, and the worst case of each."""

from __future__ import annotations

import io
from collections import OrderedDict
from dataclasses import dataclass

import pyarrow.parquet as pq
from pydantic import TypeAdapter

from services.teacher_gateway.asking import Asked
from services.teacher_gateway.ledger import cost_microusd
from stillhouse.chassis.errors import MissingObject
from stillhouse.chassis.storage import ObjectStore
from stillhouse.contracts.artifacts import ObjectRef, spec_key
from stillhouse.contracts.chat import ChatTokenizer, Message, TemplateRefused
from stillhouse.contracts.responses import Item
from stillhouse.contracts.spec import ResolvedSpec

_MESSAGES = TypeAdapter(list[Message])
_KEPT_TOKENIZERS = 4
# What a template may write around each message, in tokens, where it cannot be rendered.
_TOKENS_AROUND = 64

_tokenizers: OrderedDict[str, ChatTokenizer] = OrderedDict()


@dataclass(frozen=True)
class BatchInput:
    """The items of a batch in their order."""

    resolved: ResolvedSpec
    asked: tuple[Asked, ...]


def read_spec(store: ObjectStore, tenant: str, pipeline: str) -> ResolvedSpec:
    """Read what acceptance resolved. Raises MissingObject before acceptance."""
    key = spec_key(tenant, pipeline)
    found = store.find_model(key, ResolvedSpec)
    if found is None:
        raise MissingObject(f"{key} is not in the store, and the pipeline was accepted")
    return found[0]


def read_tokenizer(store: ObjectStore, ref: ObjectRef) -> ChatTokenizer:
    """Read a teacher's tokenizer; the last few are kept, since parsing one takes a second."""
    kept = _tokenizers.get(ref.sha256)
    if kept is None:
        kept = _tokenizers[ref.sha256] = store.get_model(ref, ChatTokenizer)
        while len(_tokenizers) > _KEPT_TOKENIZERS:
            _tokenizers.popitem(last=False)
    _tokenizers.move_to_end(ref.sha256)
    return kept


def read_batch(store: ObjectStore, tenant: str, pipeline: str, prompts: ObjectRef) -> BatchInput:
    """Read the items of a batch with the most that one answer to each can cost."""
    resolved = read_spec(store, tenant, pipeline)
    chat = read_tokenizer(store, resolved.tokenizer)
    rows = pq.read_table(io.BytesIO(store.get(prompts))).to_pylist()
    price, most = resolved.teacher.usd_per_million, resolved.spec.signal.max_tokens
    asked = []
    for row in rows:
        item = Item(
            item_id=row["item_id"],
            prompt_id=row["prompt_id"],
            sample=row["sample"],
            messages=_MESSAGES.validate_json(row["messages"]),
            prompt_sha256=row["prompt_sha256"],
        )
        worst = cost_microusd(price, prompt_tokens_bound(chat, item.messages), most)
        asked.append(Asked(item, worst))
    return BatchInput(resolved, tuple(asked))


def prompt_tokens_bound(chat: ChatTokenizer, messages: list[Message]) -> int:
    """The tokens of a rendered conversation; at most, where the template refuses it."""
    try:
        return len(chat.encode_prompt(messages))
    except TemplateRefused:
        return sum(len(m.content.encode()) + _TOKENS_AROUND for m in messages) + _TOKENS_AROUND
