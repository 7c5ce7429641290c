"""One line of prompts: what a user may write, and why a line is refused.

    {"messages": [{"role": "user", "content": "..."}], "tools": [...], "tags": {"team": "a"}}
    {"prompt": "...", "answer": "..."}

`tags` and `answer` are read where somebody asks for them, and other keys never are.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel, Field, ValidationError

from stillhouse.contracts.canonical import canonical_json, digest_of
from stillhouse.contracts.chat import Message, Tools
from stillhouse.contracts.spec import check_tags, normalised_text

MAX_LINE_BYTES = 1 << 20
MAX_ANSWERED_BYTES = 8 << 20
MAX_MESSAGES = 256
MAX_TOOLS = 128
MAX_TOOL_DEPTH = 32

# Why a line became no prompt: the closed list of acceptance's rejections.
BLANK_PROMPT = "blank_prompt"
INVALID_PROMPT = "invalid_prompt"
DUPLICATE_PROMPT = "duplicate_prompt"
PROMPT_TOO_LONG = "prompt_too_long"
TEMPLATE_REFUSED = "template_refused"
NO_TEACHER = "no_teacher"
ANSWER_MISSING = "answer_missing"
ANSWER_INVALID = "answer_invalid"
ACCEPT_REASONS = frozenset(
    {
        BLANK_PROMPT,
        INVALID_PROMPT,
        DUPLICATE_PROMPT,
        PROMPT_TOO_LONG,
        TEMPLATE_REFUSED,
        NO_TEACHER,
        ANSWER_MISSING,
        ANSWER_INVALID,
    }
)

# What JSON can spell and UTF-8 or SQL cannot hold; only lines with an escape of these are walked
# through.
_SUSPECT = re.compile(r"\\u(?:0000|d[89a-f])", re.IGNORECASE)
_UNHELD = re.compile("[\0\ud800-\udfff]")


class _Choice(BaseModel):
    message: dict[str, Any]


class _Usage(BaseModel):
    # What a count of tokens can be: SQL holds no more.
    prompt_tokens: int = Field(ge=0, lt=2**31)
    completion_tokens: int = Field(ge=0, lt=2**31)


class _Completion(BaseModel):
    """What an answer that is no text must at least be; the builder judges the rest."""

    choices: list[_Choice] = Field(min_length=1)
    usage: _Usage | None = None


class LineRefused(Exception):
    """One line is no prompt; the text says why."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(detail)
        self.reason = reason


@dataclass(frozen=True)
class PromptLine:
    """A conversation with the functions that it offers; `tags` and `answer` as they stand there."""

    messages: list[Message]
    tools: Tools | None = None
    tags: object = None
    answer: object = None


def parse_line(raw: bytes) -> PromptLine:
    """Read one line. Raises LineRefused."""
    try:
        text = raw.decode("utf-8-sig").strip()
    except UnicodeDecodeError as error:
        raise LineRefused(INVALID_PROMPT, "it is not UTF-8") from error
    if not text:
        raise LineRefused(BLANK_PROMPT, "it is blank")
    try:
        value = json.loads(text, parse_constant=_no_constant)
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
    if _SUSPECT.search(text):
        used = ("prompt", "messages", "tools", "tags", "answer", "response")
        _check_values({key: value[key] for key in used if key in value})
    return PromptLine(
        _messages(value["messages"] if "messages" in value else _one(value["prompt"])),
        _tools(value.get("tools")),
        value.get("tags"),
        value["answer"] if value.get("answer") is not None else value.get("response"),
    )


def prompt_sha256(messages: list[Message], tools: Tools | None = None) -> str:
    """Digest of the normalised conversation: equal for prompts that differ in form alone."""
    parts: list[object] = []
    for message in messages:
        part: list[object] = [message.role, normalised_text(message.text)]
        if message.tool_calls or message.name:
            # Ids of calls are random: they are form.
            calls = [[c.function.name, c.function.arguments] for c in message.tool_calls or ()]
            part.append({"calls": calls, "name": message.name})
        parts.append(part)
    return digest_of([*parts, {"tools": tools}] if tools else parts)


def tags_of(line: PromptLine) -> dict[str, str]:
    """The tags of a line. Raises LineRefused."""
    found = {} if line.tags is None else line.tags
    if not isinstance(found, dict) or not all(isinstance(v, str) for v in found.values()):
        raise LineRefused(INVALID_PROMPT, '"tags" is not an object of texts')
    try:
        return check_tags(found)
    except ValueError as error:
        raise LineRefused(INVALID_PROMPT, f'"tags": {error}') from error


def answer_of(line: PromptLine) -> str:
    """The answer that a line carries, as the JSON text of a chat completion. Raises LineRefused."""
    found = line.answer
    if found is None or (isinstance(found, str) and not found.strip()):
        raise LineRefused(
            ANSWER_MISSING, 'it has no "answer", and the teacher\'s answers are given along'
        )
    if isinstance(found, str):
        found = _completion_in(found) or {
            "object": "chat.completion",
            "choices": [
                {
                    "index": 0,
                    "message": {"role": "assistant", "content": found},
                    "finish_reason": "stop",
                }
            ],
        }
    try:
        _Completion.model_validate(found)
        return json.dumps(found, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    except (ValueError, RecursionError) as error:
        said = str(error)
        if isinstance(error, ValidationError):
            first = error.errors(include_url=False)[0]
            said = f"{'.'.join(map(str, first['loc']))}: {first['msg']}"
        raise LineRefused(
            ANSWER_INVALID, f'"answer" is neither a text nor a chat completion: {said}'
        ) from error


def _completion_in(text: str) -> dict[str, Any] | None:
    """A chat completion that is written as text, which is all that a Parquet column may hold."""
    if not text.lstrip().startswith("{"):
        return None
    try:
        value = json.loads(text, parse_constant=_no_constant)
    except (ValueError, RecursionError):
        return None
    said = isinstance(value, dict) and value.get("object") == "chat.completion"
    if said and _SUSPECT.search(text):
        _check_values(value)
    return value if said else None


def _no_constant(name: str) -> float:
    raise ValueError(f"{name} is no JSON")


def _check_values(value: object) -> None:
    """Refuse texts that JSON can spell and nothing after it can hold."""
    waiting = [value]
    while waiting:
        found = waiting.pop()
        if isinstance(found, dict):
            waiting += found.keys()
            waiting += found.values()
        elif isinstance(found, list):
            waiting += found
        elif isinstance(found, str) and (bad := _UNHELD.search(found)):
            what = "NUL" if bad[0] == "\0" else f"U+{ord(bad[0]):04X}, half of a surrogate pair"
            raise LineRefused(INVALID_PROMPT, f"it holds the character {what}")


def _one(prompt: object) -> list[dict[str, object]]:
    if not isinstance(prompt, str):
        raise LineRefused(INVALID_PROMPT, '"prompt" is not a text')
    return [{"role": "user", "content": prompt}]


def _messages(found: object) -> list[Message]:
    if not isinstance(found, list) or not found:
        raise LineRefused(INVALID_PROMPT, '"messages" is not a list with a message')
    if len(found) > MAX_MESSAGES:
        raise LineRefused(PROMPT_TOO_LONG, f"it has over {MAX_MESSAGES} messages")
    plain = [_plain(message) for message in found]
    if any(isinstance(m, dict) and m.get("content") == "" for m in plain):
        raise LineRefused(BLANK_PROMPT, "a message has no content")
    try:
        messages = [Message.model_validate(message) for message in plain]
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(map(str, first["loc"]))
        raise LineRefused(INVALID_PROMPT, f"a message is wrong: {where}: {first['msg']}") from error
    last = messages[-1]
    if last.role not in ("user", "tool"):
        raise LineRefused(
            INVALID_PROMPT,
            f"its last message is of the {last.role}, expected the user's or a tool's",
        )
    if not last.text.strip():
        raise LineRefused(BLANK_PROMPT, "its last message is blank")
    return messages


def _plain(message: object) -> object:
    """A message without the empty fields that clients write, its text in one piece."""
    if not isinstance(message, dict):
        return message
    plain = {key: value for key, value in message.items() if value is not None and value != []}
    content, calls = plain.get("content"), plain.get("tool_calls")
    if isinstance(content, list) and all(
        isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str)
        for part in content
    ):
        plain["content"] = "".join(part["text"] for part in content)
    if calls and content == "":
        del plain["content"]
    if isinstance(calls, list):
        plain["tool_calls"] = [_plain_call(call) for call in calls]
    return plain


def _plain_call(call: object) -> object:
    """A call whose arguments are JSON text; data sets also hold them as objects."""
    if not isinstance(call, dict) or not isinstance(call.get("function"), dict):
        return call
    function = call["function"]
    if isinstance(function.get("arguments"), dict):
        arguments = _bounded(function["arguments"], "the arguments of a call")
        function = {**function, "arguments": arguments.decode()}
    kept = {key: call[key] for key in ("id", "type") if call.get(key) is not None}
    return {**kept, "function": function}


def _tools(found: object) -> Tools | None:
    if found is None or found == []:
        return None
    if not isinstance(found, list) or len(found) > MAX_TOOLS:
        raise LineRefused(INVALID_PROMPT, f'"tools" is not a list of at most {MAX_TOOLS}')
    for number, tool in enumerate(found):
        function = tool.get("function") if isinstance(tool, dict) else None
        name = function.get("name") if isinstance(function, dict) else None
        parameters = function.get("parameters", {}) if isinstance(function, dict) else None
        if (
            not isinstance(tool, dict)
            or tool.get("type") != "function"
            or not (isinstance(name, str) and 0 < len(name) <= 200)
            or not isinstance(parameters, dict | None)
        ):
            raise LineRefused(
                INVALID_PROMPT,
                f'"tools"[{number}] is not {{"type": "function", "function": {{"name": ..., '
                '"parameters": {...}}}',
            )
    _bounded(found, '"tools"')
    return found


def _bounded(value: object, what: str) -> bytes:
    """Encode JSON that every later stage writes again. Raises LineRefused where one could not."""
    level: list[object] = [value]
    for _ in range(MAX_TOOL_DEPTH):
        level = [
            inner
            for each in level
            for inner in (
                each.values() if isinstance(each, dict) else each if isinstance(each, list) else ()
            )
        ]
        if not level:
            try:
                return canonical_json(value)
            except ValueError as error:  # 1e999 is JSON, and no float
                raise LineRefused(
                    INVALID_PROMPT, f"{what} cannot be written again: {error}"
                ) from error
    raise LineRefused(INVALID_PROMPT, f"{what} nests over {MAX_TOOL_DEPTH} levels deep")


# What decides which teacher a prompt goes to, by name. Raises LineRefused where none takes it.
TeacherOf = Callable[[PromptLine, str], str]
