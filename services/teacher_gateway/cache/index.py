"""A question that a tenant paid for already is answered from what is stored, and free.

No answer is copied for it: a row maps the digest of a question to the part that holds its answer
and the item in that part. Rows are written in the transaction that settles the answers; a part
that is missing or damaged is a miss, and its row goes. Two batches that ask the same question at
the same time may both pay: the first one's answer is the one that is found later.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from sqlalchemy import delete, select
from sqlalchemy.orm import Session

from services.teacher_gateway.batch_input import BatchInput, read_tokenizer
from services.teacher_gateway.database import insert_new
from services.teacher_gateway.ledger import changed
from services.teacher_gateway.models import CachedAnswer
from services.teacher_gateway.parts import Part, decode_part
from stillhouse.chassis.errors import DigestMismatch, MissingObject
from stillhouse.chassis.storage import ObjectStore
from stillhouse.contracts.artifacts import ObjectRef
from stillhouse.contracts.canonical import digest_of
from stillhouse.contracts.chat import ChatTokenizer, TemplateRefused
from stillhouse.contracts.responses import Answer, Item
from stillhouse.contracts.spec import ResolvedSpec, Signal, Teacher

# Raise it where the same fields come to mean another question.
_FORM = 1


@dataclass(frozen=True)
class Kept:
    """Where the answer to a question lies."""

    key: str
    part: ObjectRef
    item_id: str


def keys_of(given: BatchInput, store: ObjectStore) -> dict[str, str]:
    """Digest the question of each item; nothing where the cache is off, answers are given, or who
    answers is not known: a `file:` folder may hold other weights under the same name tomorrow."""
    teacher = given.teacher
    unpinned = teacher.weights is not None and teacher.weights.startswith("file:")
    if not given.resolved.spec.prompts.cache or teacher.answers or unpinned:
        return {}
    # Weights see what we render; an endpoint renders by itself.
    chat = read_tokenizer(store, given.resolved.tokenizer) if teacher.weights else None
    return {
        asked.item.item_id: digest_of(
            {
                "form": _FORM,
                "route": _route(teacher, given.resolved),
                # What was bought under other terms is not these terms' answer.
                "terms": teacher.terms,
                "signal": _signal(given.signal),
                "messages": [message.as_sent() for message in asked.item.messages],
                "tools": asked.item.tools or None,
                "rendered": _rendered(chat, asked.item) if chat else None,
                "sample": asked.item.sample,
            }
        )
        for asked in given.asked
    }


def _route(teacher: Teacher, resolved: ResolvedSpec) -> dict[str, Any]:
    if teacher.weights:
        return {
            "weights": teacher.weights,
            "pinned": resolved.pinned.get(teacher.weights),
            "tokenizer": resolved.tokenizer_sha256,
        }
    assert teacher.url is not None, "the spec requires one route"
    return {"url": teacher.url.rstrip("/"), "api": teacher.api, "model": teacher.model}


def _signal(signal: Signal) -> dict[str, Any]:
    found: dict[str, Any] = {
        "kind": signal.kind,
        "max_tokens": signal.max_tokens,
        "temperature": signal.temperature,
    }
    if signal.kind == "topk":
        found["k"] = signal.k
    if signal.kind == "counts":
        found["draws"] = signal.draws
    return found


def _rendered(chat: ChatTokenizer, item: Item) -> str | None:
    try:
        return chat.render(item.messages, item.tools)
    except TemplateRefused:
        return None


def find(session: Session, tenant: str, keys: Mapping[str, str]) -> dict[str, Kept]:
    """Look up the answers to questions, by item, in one query."""
    if not keys:
        return {}
    rows = session.execute(
        select(CachedAnswer).where(
            CachedAnswer.tenant_id == tenant, CachedAnswer.key.in_(sorted(set(keys.values())))
        )
    ).scalars()
    known = {
        row.key: Kept(row.key, ObjectRef.model_validate_json(row.part), row.item_id) for row in rows
    }
    return {item_id: known[key] for item_id, key in keys.items() if key in known}


def read_part(store: ObjectStore, ref: ObjectRef) -> dict[str, Answer]:
    """The answers of a part by item; none where it is missing or damaged."""
    try:
        return {answer.item_id: answer for answer in decode_part(store.get(ref), ref.key)}
    except (MissingObject, DigestMismatch):
        return {}


def remember(session: Session, tenant: str, keys: Mapping[str, str], parts: Iterable[Part]) -> None:
    """Note where paid answers lie; what is known already stays."""
    rows = [
        {
            "tenant_id": tenant,
            "key": keys[answer.item_id],
            "part": part.ref.model_dump_json(),
            "item_id": answer.item_id,
        }
        for part in parts
        for answer in part.answers
        if answer.item_id in keys and not answer.cached
    ]
    # In one order, so that no two transactions wait for each other's rows in a circle.
    insert_new(session, CachedAnswer, sorted(rows, key=lambda row: row["key"]))


def forget(session: Session, tenant: str, gone: Iterable[Kept]) -> None:
    """Remove rows whose answers are not where they were."""
    for kept in gone:
        changed(
            session,
            delete(CachedAnswer).where(
                CachedAnswer.tenant_id == tenant,
                CachedAnswer.key == kept.key,
                CachedAnswer.item_id == kept.item_id,
                CachedAnswer.part == kept.part.model_dump_json(),
            ),
        )
