"""What an attempt at a batch needs from the store: spec, items, and the worst case of each."""

from __future__ import annotations

import io
import json
from collections import OrderedDict
from dataclasses import dataclass

import pyarrow.parquet as pq
from pydantic import TypeAdapter

from services.teacher_gateway.asking import Asked
from services.teacher_gateway.ledger import cost_microusd
from stillhouse.chassis.errors import MissingObject
from stillhouse.chassis.storage import ObjectStore
from stillhouse.contracts.artifacts import ObjectRef, spec_key
from stillhouse.contracts.chat import ChatTokenizer, Message, TemplateRefused, Tools
from stillhouse.contracts.responses import Item
from stillhouse.contracts.spec import ResolvedSpec, Signal, Teacher

_MESSAGES = TypeAdapter(list[Message])
_KEPT_TOKENIZERS = 4
# What a template may write around each message, in tokens, where it cannot be rendered, and what
# a provider may write about the tools in a prompt.
_TOKENS_AROUND = 64
_TOKENS_ABOUT_TOOLS = 1024

_tokenizers: OrderedDict[str, ChatTokenizer] = OrderedDict()


@dataclass(frozen=True)
class BatchInput:
    """The items of a batch in their order."""

    resolved: ResolvedSpec
    teacher: Teacher
    signal: Signal
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


def read_batch(
    store: ObjectStore, tenant: str, pipeline: str, batch: int, prompts: ObjectRef
) -> BatchInput:
    """Read the items of a batch with the most that one answer to each can cost."""
    resolved = read_spec(store, tenant, pipeline)
    # Not `read_table`, which imports pandas in each new process.
    rows = pq.ParquetFile(io.BytesIO(store.get(prompts))).read().to_pylist()
    teacher, signal = resolved.teacher_of(batch), resolved.signal_of(batch)
    asked = []
    for row in rows:
        item = Item(
            item_id=row["item_id"],
            prompt_id=row["prompt_id"],
            sample=row["sample"],
            messages=_MESSAGES.validate_json(row["messages"]),
            tools=row["tools"] and json.loads(row["tools"]),
            answer=row["answer"],
            prompt_sha256=row["prompt_sha256"],
        )
        tokens = row["prompt_tokens"]
        worst = cost_microusd(teacher.usd_per_million, tokens, signal.max_tokens)
        asked.append(Asked(item, worst, tokens + signal.max_tokens))
    return BatchInput(resolved, teacher, signal, tuple(asked))


def counts_as_we_do(teacher: Teacher, signal: Signal) -> bool:
    """Whether a teacher's own tokenizer is ours: it must be wherever its tokens carry a signal."""
    return signal.kind != "text" or (teacher.url is None and teacher.weights is None)


def prompt_tokens_bound(
    chat: ChatTokenizer, messages: list[Message], tools: Tools | None = None, *, ours: bool = True
) -> int:
    """The tokens of a rendered conversation; at most, where the template refuses it or the
    teacher's tokenizer is not `ours`: a token stands for a byte at least."""
    rendered = 0
    try:
        rendered = len(chat.encode_prompt(messages, tools))
        if ours:
            return rendered
    except TemplateRefused:
        pass
    return max(rendered, bytes_bound(messages, tools))


def bytes_bound(messages: list[Message], tools: Tools | None = None) -> int:
    """The tokens of a conversation at most, whatever the tokenizer: one for each byte, and what a
    template writes around."""
    parts = [m.model_dump_json(exclude_none=True) for m in messages]
    around = (len(parts) + 1) * _TOKENS_AROUND
    if tools:
        parts.append(json.dumps(tools))
        around += _TOKENS_ABOUT_TOOLS
    return sum(len(part.encode()) for part in parts) + around
