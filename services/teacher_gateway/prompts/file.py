"""A file of prompts: each of its lines is accepted, or refused by name.

A line that cannot be used is a recorded rejection with its number and a reason, never an error of
the whole; a line is never held whole beyond its limit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import BinaryIO

from services.teacher_gateway.prompts.lines import (
    DUPLICATE_PROMPT,
    MAX_ANSWERED_BYTES,
    MAX_LINE_BYTES,
    PROMPT_TOO_LONG,
    TEMPLATE_REFUSED,
    LineRefused,
    PromptLine,
    TeacherOf,
    parse_line,
    prompt_sha256,
)
from stillhouse.chassis.errors import PermanentError
from stillhouse.contracts.chat import TemplateRefused
from stillhouse.contracts.spec import Spec

_CHUNK = 1 << 20

# Counts the tokens of a prompt's rendering. Raises TemplateRefused.
TokensOf = Callable[[PromptLine], int]


@dataclass(frozen=True, slots=True)
class Prompt:
    """A prompt by where its line lies in the file; `tokens` of its rendering, -1 if not counted."""

    line: int
    offset: int
    length: int
    sha256: str
    tokens: int
    teacher: str


@dataclass(frozen=True, slots=True)
class RefusedLine:
    line: int
    reason: str
    detail: str


class PromptsRefused(PermanentError):
    """The whole file cannot be used."""


def max_line_bytes(spec: Spec) -> int:
    """How long a line may be: an answer with its log-probabilities is far longer than prompts."""
    return MAX_ANSWERED_BYTES if any(t.answers for t in spec.teachers) else MAX_LINE_BYTES


def read_prompts(
    file: BinaryIO,
    *,
    max_lines: int,
    max_line_bytes: int,
    max_tokens: int,
    teacher_of: TeacherOf,
    tokens_of: TokensOf | None,
    measured: int | None = None,
) -> Iterator[Prompt | RefusedLine]:
    """Judge every line of a file. `tokens_of` counts the rendering of the first `measured`
    prompts (all when None); a prompt that leaves no room for an answer is refused."""
    seen: dict[str, int] = {}
    for number, offset, raw in _lines(file, max_line_bytes):
        if number > max_lines:
            raise PromptsRefused(
                f"the prompts have over {max_lines} lines: split them over several pipelines",
                reason="too_many_prompts",
            )
        try:
            if raw is None:
                raise LineRefused(PROMPT_TOO_LONG, f"it has over {max_line_bytes} bytes")
            line = parse_line(raw)
            sha256 = prompt_sha256(line.messages, line.tools)
            if sha256 in seen:
                raise LineRefused(DUPLICATE_PROMPT, f"the same as line {seen[sha256]}")
            teacher, tokens = teacher_of(line, sha256), -1
            if tokens_of is not None and (measured is None or len(seen) < measured):
                tokens = _count(tokens_of, line, max_tokens)
        except LineRefused as refused:
            detail = f"line {number}: {refused}"[:500].encode(errors="replace").decode()
            yield RefusedLine(number, refused.reason, detail)
            continue
        seen[sha256] = number
        yield Prompt(number, offset, len(raw), sha256, tokens, teacher)


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


def read_again(file: BinaryIO, prompt: Prompt) -> PromptLine:
    """Read a judged prompt again from where it lies."""
    file.seek(prompt.offset)
    return parse_line(file.read(prompt.length))


def _count(tokens_of: TokensOf, line: PromptLine, max_tokens: int) -> int:
    try:
        tokens = tokens_of(line)
    except TemplateRefused as error:
        raise LineRefused(TEMPLATE_REFUSED, str(error)) from error
    if tokens >= max_tokens:
        raise LineRefused(
            PROMPT_TOO_LONG,
            f"it has {tokens} tokens and `dataset.max_tokens` allows rows of {max_tokens}, answer "
            "included",
        )
    return tokens


def _lines(file: BinaryIO, most: int) -> Iterator[tuple[int, int, bytes | None]]:
    """Yield number, offset and bytes of each line; None for one that is too long to be held."""
    number, offset = 0, 0
    while raw := file.readline(most + 1):
        number += 1
        start, offset = offset, offset + len(raw)
        if len(raw) > most and not raw.endswith(b"\n"):
            while rest := file.readline(_CHUNK):
                offset += len(rest)
                if rest.endswith(b"\n"):
                    break
            yield number, start, None
        else:
            yield number, start, raw
