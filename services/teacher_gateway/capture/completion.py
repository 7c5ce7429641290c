"""From what a teacher sent to one chat completion, outside the hot path.

A stream is put together: texts, reasoning, tool calls, log-probabilities, usage. Log-probabilities
stay raw bytes here too. What is not whole is never an answer: `Unusable` says why.
"""

from __future__ import annotations

from typing import Any

import msgspec

from services.teacher_gateway.capture import failures
from services.teacher_gateway.capture.record import Tokens
from services.teacher_gateway.capture.sse import DONE, data_of

# Texts of a message, by the names that servers give them.
_TEXTS = ("content", "reasoning_content", "reasoning", "refusal")
# msgspec reads no union with Raw: what may be null is looked at as bytes.
_NULL = msgspec.Raw(b"null")


class Unusable(Exception):
    """No whole answer; `reason` is one of the closed list of failures."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(detail)
        self.reason = reason


class _Function(msgspec.Struct):
    name: str | None = None
    arguments: str | None = None


class _ToolCall(msgspec.Struct):
    index: int | None = None
    id: str | None = None
    type: str | None = None
    function: _Function | None = None


class _Delta(msgspec.Struct):
    role: str | None = None
    content: str | None = None
    reasoning_content: str | None = None
    reasoning: str | None = None
    refusal: str | None = None
    tool_calls: list[_ToolCall] | None = None
    function_call: _Function | None = None


class _Logprobs(msgspec.Struct):
    content: list[msgspec.Raw] | None = None
    refusal: list[msgspec.Raw] | None = None


class _ChoicePart(msgspec.Struct):
    index: int = 0
    delta: _Delta | None = None
    text: str | None = None
    finish_reason: str | None = None
    logprobs: msgspec.Raw = _NULL
    token_ids: list[int] | None = None


class _Chunk(msgspec.Struct):
    id: str | None = None
    created: int | None = None
    model: str | None = None
    system_fingerprint: str | None = None
    choices: list[_ChoicePart] | None = None
    usage: msgspec.Raw = _NULL
    prompt_token_ids: list[int] | None = None
    error: msgspec.Raw = _NULL


class _Call:
    """A function call as far as it has come: it grows by its arguments; its name comes once, whole
    or in pieces."""

    def __init__(self) -> None:
        self.about: dict[str, str] = {"type": "function"}
        self._name: list[str] = []
        self._arguments: list[str] = []

    def add(self, piece: _Function) -> None:
        self._name.append(piece.name or "")
        self._arguments.append(piece.arguments or "")

    @property
    def function(self) -> dict[str, str]:
        if not self._name:
            return {}
        return {"name": "".join(self._name), "arguments": "".join(self._arguments)}


class _Choice:
    """One choice of a stream as far as it has come."""

    def __init__(self, index: int) -> None:
        self.index = index
        self.texts: dict[str, list[str]] = {}
        self.text: list[str] = []
        self.role = "assistant"
        self.calls: dict[int, _Call] = {}
        self.function: _Call | None = None
        self.finish_reason: str | None = None
        self.logprobs: dict[str, list[msgspec.Raw]] = {}
        self.text_logprobs: list[msgspec.Raw] = []
        self.token_ids: list[int] = []

    def add(self, part: _ChoicePart) -> None:
        self.finish_reason = part.finish_reason or self.finish_reason
        self.token_ids += part.token_ids or []
        if part.text is not None:
            self.text.append(part.text)
        if not _is_null(part.logprobs):
            self._add_logprobs(part.logprobs, legacy=part.text is not None)
        if (delta := part.delta) is None:
            return
        self.role = delta.role or self.role
        for name in _TEXTS:
            if (piece := getattr(delta, name)) is not None:
                self.texts.setdefault(name, []).append(piece)
        for position, call in enumerate(delta.tool_calls or []):
            self._add_call(position if call.index is None else call.index, call)
        if delta.function_call is not None:
            self.function = self.function or _Call()
            self.function.add(delta.function_call)

    def _add_logprobs(self, raw: msgspec.Raw, *, legacy: bool) -> None:
        if legacy:
            self.text_logprobs.append(raw)
            return
        found = _logprobs.decode(raw)
        for name in ("content", "refusal"):
            if (entries := getattr(found, name)) is not None:
                self.logprobs.setdefault(name, []).extend(entries)

    def _add_call(self, index: int, piece: _ToolCall) -> None:
        call = self.calls.setdefault(index, _Call())
        if piece.id:
            call.about["id"] = piece.id
        if piece.type:
            call.about["type"] = piece.type
        if piece.function is not None:
            call.add(piece.function)

    def whole(self) -> dict[str, Any]:
        found: dict[str, Any] = {"index": self.index}
        if self.text:
            found["text"] = "".join(self.text)
            found["logprobs"] = self.text_logprobs or None
        else:
            texts = {name: "".join(pieces) for name, pieces in self.texts.items()}
            calls = [
                {"id": None, **call.about, "function": call.function}
                for _, call in sorted(self.calls.items())
            ]
            message: dict[str, Any] = {"role": self.role, "content": None, **texts}
            if calls:
                message["tool_calls"] = calls
                message["content"] = message["content"] or None
            if self.function is not None:
                message["function_call"] = self.function.function
            found["message"] = message
            found["logprobs"] = self.logprobs or None
        if self.token_ids:
            found["token_ids"] = self.token_ids
        found["finish_reason"] = self.finish_reason
        return found


def _is_null(raw: msgspec.Raw) -> bool:
    return bytes(raw) == b"null"


class _WholeMessage(msgspec.Struct):
    role: str | None = None


class _WholeChoice(msgspec.Struct):
    message: _WholeMessage | None = None
    text: str | None = None


class _Whole(msgspec.Struct):
    choices: list[_WholeChoice]
    usage: msgspec.Raw = _NULL


class _Counts(msgspec.Struct):
    """What is believed of a usage: nothing negative, and no more than there can be."""

    prompt_tokens: Tokens | None = None
    completion_tokens: Tokens | None = None
    total_tokens: Tokens | None = None


_chunk = msgspec.json.Decoder(_Chunk)
_logprobs = msgspec.json.Decoder(_Logprobs)
_whole = msgspec.json.Decoder(_Whole)
_counts = msgspec.json.Decoder(_Counts)


def whole_answer(answer: bytes, *, streamed: bool) -> bytes:
    """The completion that was sent, as JSON on one line. Raises Unusable."""
    try:
        # All of it: what stays raw is not looked at by a decoder.
        answer.decode()
        return _put_together(answer) if streamed else _as_it_is(answer)
    except (UnicodeDecodeError, msgspec.DecodeError, RecursionError) as error:
        raise Unusable(failures.TEACHER_INVALID, f"no chat completion: {error}") from error


def _as_it_is(answer: bytes) -> bytes:
    found = _whole.decode(answer)
    if not found.choices or any(c.message is None and c.text is None for c in found.choices):
        raise Unusable(failures.TEACHER_INVALID, "expected choices with a message, found none")
    _check_usage(found.usage)
    return msgspec.json.format(answer, indent=-1)


def _put_together(stream: bytes) -> bytes:
    choices: dict[int, _Choice] = {}
    head: dict[str, Any] = {}
    usage = _NULL
    legacy = done = False
    for data in data_of(stream):
        if data.strip() == DONE:
            done = True
            break
        chunk = _chunk.decode(data)
        if not _is_null(chunk.error):
            raise Unusable(failures.TEACHER_ERROR, "the stream ended in an error of the teacher")
        for name in ("id", "created", "model", "system_fingerprint", "prompt_token_ids"):
            if (value := getattr(chunk, name)) is not None:
                head.setdefault(name, value)
        if not _is_null(chunk.usage):
            usage = chunk.usage
        for part in chunk.choices or []:
            legacy = legacy or part.text is not None
            choices.setdefault(part.index, _Choice(part.index)).add(part)
    if not done:
        raise Unusable(failures.TRUNCATED, "the stream ended without [DONE]")
    if not choices:
        raise Unusable(failures.TEACHER_INVALID, "the stream has no choices")
    found = [choices[index].whole() for index in sorted(choices)]
    if any(choice["finish_reason"] is None for choice in found):
        raise Unusable(failures.TRUNCATED, "a choice has no finish_reason")
    _check_usage(usage)
    whole: dict[str, Any] = {
        "object": "text_completion" if legacy else "chat.completion",
        **head,
        "choices": found,
    }
    if not _is_null(usage):
        whole["usage"] = usage
    return msgspec.json.encode(whole)


def _check_usage(usage: msgspec.Raw) -> None:
    if not _is_null(usage):
        try:
            _counts.decode(usage)
        except msgspec.DecodeError as error:
            raise Unusable(failures.TEACHER_INVALID, f"no count of tokens: {error}") from error
