"""Prompts out of recorded traffic, as lines that `prompts.read_prompts` reads.

    {"messages": [...], "tools": [...], "tags": {...}, "answer": {...}}

Only exchanges with a whole answer give a line, and only chats: the prompt of a legacy completion is
no conversation. What no teacher of ours can be asked, such as an image, stays in its line, so that
it is refused there by name.
"""

from __future__ import annotations

import gzip
import json
import tempfile
from collections.abc import Callable, Iterator
from datetime import datetime
from pathlib import Path
from typing import Any, BinaryIO

import msgspec
from sqlalchemy import Engine, select

from services.teacher_gateway.capture.ship import Line
from services.teacher_gateway.database import Session, reading
from services.teacher_gateway.models import CapturedBatch
from services.teacher_gateway.prompts.file import PromptsRefused
from stillhouse.chassis.storage import ObjectStore
from stillhouse.contracts.artifacts import ObjectRef
from stillhouse.contracts.spec import Captured

_PAGE = 200
# Fields of a request that leave the distribution of its answer as it is.
_HARMLESS = frozenset(
    {
        *("model", "messages", "tools", "functions", "temperature", "top_p", "n", "stop", "seed"),
        *("max_tokens", "max_completion_tokens", "logprobs", "top_logprobs", "stream"),
        *("stream_options", "metadata", "store", "user"),
    }
)
_KEPT = ("role", "content", "tool_calls", "tool_call_id", "name")

_line = msgspec.json.Decoder(Line)


def open_captured(
    captured: Captured,
    tenant_id: str,
    engine: Engine,
    store: ObjectStore,
    folder: Path,
    max_bytes: int,
    *,
    terms: str | None = None,
    stored_before: float | None = None,
    alive: Callable[[], None] = lambda: None,
) -> BinaryIO:
    """Copy the chosen prompts into an unnamed file, one JSON object a line.

    `terms` are those of the teacher whose answers are given, for `answers: true`. `stored_before`
    (a time of the database) leaves out what was indexed later, so that reading again gives the
    same. `alive` is called now and then. Raises PromptsRefused.
    """
    check_captured(captured, tenant_id, engine, terms=terms)
    file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115 (the caller closes it)
    size = 0
    try:
        lines = captured_lines(captured, tenant_id, engine, store, stored_before=stored_before)
        for line in lines:
            alive()
            size += len(line)
            if size > max_bytes:
                raise PromptsRefused(
                    f"the recorded prompts have over {max_bytes} bytes: choose fewer with `tag`, "
                    "`since` and `until`",
                    reason="prompts_too_large",
                )
            file.write(line)
        if size == 0:
            raise PromptsRefused(
                "no recorded exchange is chosen: GET /v1/captured shows what was recorded, with "
                "its tags; a record is there some seconds after its answer",
                reason="no_prompts",
            )
    except BaseException:
        file.close()
        raise
    file.seek(0)
    return file


def check_captured(
    captured: Captured, tenant_id: str, engine: Engine, *, terms: str | None = None
) -> None:
    """Refuse what can be refused without reading a record. Asks the database alone.

    Raises PromptsRefused: nothing was recorded, or answers of other terms would be given.
    """
    with reading(engine) as session:
        kinds = session.execute(
            select(CapturedBatch.teacher, CapturedBatch.terms)
            .where(*_chosen(captured, tenant_id), CapturedBatch.records > 0)
            .distinct()
        ).all()
    if not kinds:
        of = f" with teacher {captured.teacher!r}" if captured.teacher else ""
        raise PromptsRefused(
            f"nothing was recorded{of} in this time: GET /v1/captured shows what was",
            reason="no_prompts",
        )
    if not captured.answers:
        return
    teachers = sorted({kind[0] for kind in kinds})
    if len(teachers) > 1:
        raise PromptsRefused(
            f"the answers are those of {', '.join(teachers)}: name one with "
            "`prompts.captured.teacher`",
            reason="captured_terms",
        )
    others = sorted({kind[1] for kind in kinds if kind[1] != terms})
    if others:
        raise PromptsRefused(
            f"answers of {teachers[0]!r} were recorded under the terms {', '.join(others)}, and "
            f"the teacher with `answers: given` has {terms!r}: set its `terms` to those, or choose "
            "another time with `since` and `until`",
            reason="captured_terms",
        )


def captured_lines(
    captured: Captured,
    tenant_id: str,
    engine: Engine,
    store: ObjectStore,
    *,
    stored_before: float | None = None,
) -> Iterator[bytes]:
    """Yield the lines of the chosen exchanges, in the order of their batches."""
    for batch in _batches(captured, tenant_id, engine, stored_before):
        if not _may_have(batch, captured.tags):
            continue
        data = gzip.decompress(store.get(ObjectRef.model_validate_json(batch.ref)))
        for raw in data.splitlines():
            line = _line.decode(raw)
            if _is_chosen(line, captured):
                yield _prompt_line(line, captured) + b"\n"


def _batches(
    captured: Captured, tenant_id: str, engine: Engine, stored_before: float | None
) -> Iterator[CapturedBatch]:
    """The batches that may hold chosen records, a page at a time: no read stays open meanwhile."""
    after: tuple[float, str] | None = None
    while True:
        with reading(engine) as session:
            found = _page(session, captured, tenant_id, stored_before, after)
        yield from found
        if len(found) < _PAGE:
            return
        after = (found[-1].first_at, found[-1].batch_id)


def _page(
    session: Session,
    captured: Captured,
    tenant_id: str,
    stored_before: float | None,
    after: tuple[float, str] | None,
) -> list[CapturedBatch]:
    query = select(CapturedBatch).where(*_chosen(captured, tenant_id), CapturedBatch.records > 0)
    if stored_before is not None:
        query = query.where(CapturedBatch.stored_at <= stored_before)
    if after is not None:
        later = CapturedBatch.first_at > after[0]
        same = (CapturedBatch.first_at == after[0]) & (CapturedBatch.batch_id > after[1])
        query = query.where(later | same)
    order = (CapturedBatch.first_at, CapturedBatch.batch_id)
    return list(session.scalars(query.order_by(*order).limit(_PAGE)))


def _chosen(captured: Captured, tenant_id: str) -> list[Any]:
    found: list[Any] = [CapturedBatch.tenant_id == tenant_id]
    if captured.teacher is not None:
        found.append(CapturedBatch.teacher == captured.teacher)
    if captured.since is not None:
        found.append(CapturedBatch.last_at >= captured.since.timestamp())
    if captured.until is not None:
        found.append(CapturedBatch.first_at < captured.until.timestamp())
    return found


def _may_have(batch: CapturedBatch, tags: dict[str, str]) -> bool:
    if not batch.tags:
        return True  # too many to list: its records tell
    known = json.loads(batch.tags)
    return all(value in known.get(name, ()) for name, value in tags.items())


def _is_chosen(line: Line, captured: Captured) -> bool:
    if line.failure or line.kind != "chat":
        return False
    at = datetime.fromisoformat(line.at)
    if captured.since is not None and at < captured.since:
        return False
    if captured.until is not None and at >= captured.until:
        return False
    return all(line.tags.get(name) == value for name, value in captured.tags.items())


def _prompt_line(line: Line, captured: Captured) -> bytes:
    try:
        return json.dumps(_prompt_of(line, captured)).encode()
    except (ValueError, TypeError, LookupError, AttributeError, RecursionError):
        # JSON of another form than ours, such as a number of 5,000 digits, passed to the teacher
        # as it came. It is a line that is refused by its number, and never an error of the whole.
        return json.dumps({"messages": None, "tags": line.tags}).encode()


def _prompt_of(line: Line, captured: Captured) -> dict[str, Any]:
    asked: dict[str, Any] = msgspec.json.decode(line.request)
    found: dict[str, Any] = {"messages": asked.get("messages"), "tags": line.tags}
    if isinstance(found["messages"], list):
        found["messages"] = [_message(message) for message in found["messages"]]
    if asked.get("tools"):
        found["tools"] = asked["tools"]
    elif functions := asked.get("functions"):
        found["tools"] = [{"type": "function", "function": function} for function in functions]
    if captured.answers:
        found["answer"] = answer = msgspec.json.decode(line.answer)
        answer["choices"] = answer["choices"][:1]
        choice = answer["choices"][0]
        if not _sampled_plainly(asked):
            # They may be those of another distribution, or the text was not drawn from theirs.
            choice.pop("logprobs", None)
        cut = asked.get("stop") or isinstance(choice.get("stop_reason"), str)
        if cut and choice.get("finish_reason") == "stop":
            # The caller's own stop text may have ended it: that is no end of turn to learn.
            choice["finish_reason"] = "length"
    return found


def _sampled_plainly(asked: dict[str, Any]) -> bool:
    """Whether nothing in a request changed what tokens were drawn from: T = 1, top-p = 1, and no
    field that we do not know to be harmless."""
    told = {name for name, value in asked.items() if value is not None}
    at_one = all(asked.get(name) in (None, 1) for name in ("temperature", "top_p"))
    return at_one and told <= _HARMLESS


def _message(message: Any) -> Any:
    """A message with what a prompt may hold; texts in parts become one text."""
    if not isinstance(message, dict):
        return message
    found = {name: message[name] for name in _KEPT if message.get(name) is not None}
    if found.get("role") == "developer":
        found["role"] = "system"
    content = found.get("content")
    if isinstance(content, list) and all(_is_text(part) for part in content):
        found["content"] = "".join(part["text"] for part in content)
    return found


def _is_text(part: object) -> bool:
    return (
        isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str)
    )
