"""Prompts as a user gives them: one JSON object a line, each of them accepted or refused by name.

    {"messages": [{"role": "user", "content": "..."}]}
    {"prompt": "..."}

Other keys (`id`, `tags`) are ignored. A line that cannot be used is a recorded rejection with its
number and a reason, never an error of the whole; a line is never held whole beyond its limit.
"""

from __future__ import annotations

import hashlib
import json
import re
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from pydantic import ValidationError

from services.teacher_gateway.files import open_below
from stillhouse.chassis.errors import PermanentError
from stillhouse.chassis.storage import ObjectStore
from stillhouse.contracts.artifacts import SHA256_PATTERN, upload_key
from stillhouse.contracts.canonical import digest_of
from stillhouse.contracts.chat import Message, TemplateRefused
from stillhouse.contracts.spec import normalised_text

MAX_LINE_BYTES = 1 << 20
MAX_MESSAGES = 256
_CHUNK = 1 << 20

# Why a line became no prompt: the closed list of acceptance's rejections.
BLANK_PROMPT = "blank_prompt"
INVALID_PROMPT = "invalid_prompt"
DUPLICATE_PROMPT = "duplicate_prompt"
PROMPT_TOO_LONG = "prompt_too_long"
TEMPLATE_REFUSED = "template_refused"
ACCEPT_REASONS = frozenset(
    {BLANK_PROMPT, INVALID_PROMPT, DUPLICATE_PROMPT, PROMPT_TOO_LONG, TEMPLATE_REFUSED}
)


@dataclass(frozen=True, slots=True)
class Prompt:
    """A prompt by where its line lies in the file; `tokens` of its rendering, -1 if not counted."""

    line: int
    offset: int
    length: int
    sha256: str
    tokens: int


@dataclass(frozen=True, slots=True)
class RefusedLine:
    line: int
    reason: str
    detail: str


class PromptsRefused(PermanentError):
    """The whole file cannot be used."""


class LineRefused(Exception):
    """One line is no prompt; the text says why."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(detail)
        self.reason = reason


def snapshot(
    reference: str,
    *,
    tenant_id: str,
    roots: Sequence[Path],
    store: ObjectStore,
    folder: Path,
    max_bytes: int,
) -> BinaryIO:
    """Copy the prompts into an unnamed file, so that nobody changes them while they are read."""
    if reference.startswith("upload:"):
        digest = upload_digest(reference)
        chunks = store.chunks(upload_key(tenant_id, digest))
        if chunks is None:
            raise PromptsRefused(
                f"nothing was uploaded as {digest}: send the file with PUT /v1/uploads/{digest}",
                reason="prompts_not_found",
            )
        return _copy(chunks, folder, max_bytes, digest)
    with open_below(roots, reference) as source:
        return _copy(iter(lambda: source.read(_CHUNK), b""), folder, max_bytes, None)


def upload_digest(reference: str) -> str:
    """The digest that an `upload:` reference names. Raises PromptsRefused."""
    digest = reference.removeprefix("upload:")
    if not re.fullmatch(SHA256_PATTERN, digest):
        raise PromptsRefused(
            f"expected upload:<64 hex digits of the file's SHA-256>, found {reference!r}",
            reason="prompts_not_found",
        )
    return digest


def _copy(chunks: Iterator[bytes], folder: Path, max_bytes: int, digest: str | None) -> BinaryIO:
    found, size = hashlib.sha256(), 0
    file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115 (the caller closes it)
    try:
        for chunk in chunks:
            size += len(chunk)
            if size > max_bytes:
                raise PromptsRefused(
                    f"the prompts have over {max_bytes} bytes: split them over several pipelines",
                    reason="prompts_too_large",
                )
            found.update(chunk)
            file.write(chunk)
        if digest is not None and found.hexdigest() != digest:
            raise PromptsRefused(
                f"the upload {digest} is damaged (its SHA-256 is {found.hexdigest()}): upload it "
                "again",
                reason="prompts_damaged",
            )
    except BaseException:
        file.close()
        raise
    file.seek(0)
    return file


def read_prompts(
    file: BinaryIO,
    *,
    max_lines: int,
    max_tokens: int,
    tokens_of: Callable[[list[Message]], int] | None,
    measured: int | None = None,
) -> Iterator[Prompt | RefusedLine]:
    """Judge every line of a file. `tokens_of` counts the rendering of the first `measured`
    prompts (all when None); a prompt that leaves no room for an answer is refused."""
    seen: dict[str, int] = {}
    for number, offset, raw in _lines(file):
        if number > max_lines:
            raise PromptsRefused(
                f"the prompts have over {max_lines} lines: split them over several pipelines",
                reason="too_many_prompts",
            )
        try:
            messages = parse_line(raw)
            sha256 = prompt_sha256(messages)
            if sha256 in seen:
                raise LineRefused(DUPLICATE_PROMPT, f"the same as line {seen[sha256]}")
            tokens = -1
            if tokens_of is not None and (measured is None or len(seen) < measured):
                tokens = _count(tokens_of, messages, max_tokens)
        except LineRefused as refused:
            yield RefusedLine(number, refused.reason, f"line {number}: {refused}"[:500])
            continue
        seen[sha256] = number
        assert raw is not None
        yield Prompt(number, offset, len(raw), sha256, tokens)


def judge_all(
    lines: Iterable[Prompt | RefusedLine],
) -> tuple[list[Prompt], list[RefusedLine]]:
    """Part the lines into prompts and refusals. Raises PromptsRefused when no prompt is left."""
    prompts: list[Prompt] = []
    refused: list[RefusedLine] = []
    for line in lines:
        if isinstance(line, Prompt):
            prompts.append(line)
        else:
            refused.append(line)
    if not prompts:
        why = f"{len(refused)} lines, none a prompt; {refused[0].detail}" if refused else "is empty"
        raise PromptsRefused(
            f"the file of prompts {'has ' if refused else ''}{why}: expected one "
            '{"messages": [{"role": "user", "content": "..."}]} a line',
            reason="no_prompts",
        )
    return prompts, refused


def read_messages(file: BinaryIO, prompt: Prompt) -> list[Message]:
    """Read a judged prompt again from where it lies."""
    file.seek(prompt.offset)
    return parse_line(file.read(prompt.length))


def _count(
    tokens_of: Callable[[list[Message]], int], messages: list[Message], max_tokens: int
) -> int:
    try:
        tokens = tokens_of(messages)
    except TemplateRefused as error:
        raise LineRefused(TEMPLATE_REFUSED, str(error)) from error
    if tokens >= max_tokens:
        raise LineRefused(
            PROMPT_TOO_LONG,
            f"it has {tokens} tokens and `dataset.max_tokens` allows rows of {max_tokens}, answer "
            "included",
        )
    return tokens


def _lines(file: BinaryIO) -> Iterator[tuple[int, int, bytes | None]]:
    """Yield number, offset and bytes of each line; None for one that is too long to be held."""
    number, offset = 0, 0
    while raw := file.readline(MAX_LINE_BYTES + 1):
        number += 1
        start, offset = offset, offset + len(raw)
        if len(raw) > MAX_LINE_BYTES and not raw.endswith(b"\n"):
            while rest := file.readline(_CHUNK):
                offset += len(rest)
                if rest.endswith(b"\n"):
                    break
            yield number, start, None
        else:
            yield number, start, raw


def parse_line(raw: bytes | None) -> list[Message]:
    """Read the messages of one line. Raises LineRefused."""
    if raw is None or len(raw) > MAX_LINE_BYTES + 1:
        raise LineRefused(PROMPT_TOO_LONG, f"it has over {MAX_LINE_BYTES} bytes")
    try:
        text = raw.decode("utf-8-sig").strip()
    except UnicodeDecodeError as error:
        raise LineRefused(INVALID_PROMPT, "it is not UTF-8") from error
    if not text:
        raise LineRefused(BLANK_PROMPT, "it is blank")
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise LineRefused(
            INVALID_PROMPT, f"it is not JSON ({error}): expected one object a line"
        ) from error
    if not isinstance(value, dict) or ("messages" in value) == ("prompt" in value):
        found = ", ".join(sorted(value)[:8]) if isinstance(value, dict) else type(value).__name__
        raise LineRefused(
            INVALID_PROMPT,
            f'expected an object with either "messages" or "prompt", found {found or "neither"}',
        )
    return _messages(value["messages"] if "messages" in value else _one(value["prompt"]))


def _one(prompt: object) -> list[dict[str, object]]:
    if not isinstance(prompt, str):
        raise LineRefused(INVALID_PROMPT, '"prompt" is not a text')
    return [{"role": "user", "content": prompt}]


def _messages(found: object) -> list[Message]:
    if not isinstance(found, list) or not found:
        raise LineRefused(INVALID_PROMPT, '"messages" is not a list with a message')
    if len(found) > MAX_MESSAGES:
        raise LineRefused(PROMPT_TOO_LONG, f"it has over {MAX_MESSAGES} messages")
    if any(isinstance(m, dict) and m.get("content") == "" for m in found):
        raise LineRefused(BLANK_PROMPT, "a message has no content")
    try:
        messages = [Message.model_validate(message) for message in found]
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(map(str, first["loc"]))
        raise LineRefused(INVALID_PROMPT, f"a message is wrong: {where}: {first['msg']}") from error
    if messages[-1].role != "user":
        raise LineRefused(
            INVALID_PROMPT, f"its last message is of the {messages[-1].role}, expected the user's"
        )
    if not messages[-1].content.strip():
        raise LineRefused(BLANK_PROMPT, "its last message is blank")
    if any("\0" in message.content for message in messages):
        raise LineRefused(INVALID_PROMPT, "a message holds the character NUL")
    return messages


def prompt_sha256(messages: list[Message]) -> str:
    """Digest of the normalised conversation: equal for prompts that differ in form alone."""
    return digest_of([[message.role, normalised_text(message.content)] for message in messages])
