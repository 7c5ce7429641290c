"""Parse and validate: is the body an OpenAI chat completion at all?"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace

import msgspec

from services.dataset_builder import reasons
from services.dataset_builder.records import Draft, Recipe, Reject
from stillhouse.contracts.chat import FunctionCall, ToolCall


class Function(msgspec.Struct):
    name: str
    arguments: str = "{}"


class Call(msgspec.Struct):
    function: Function
    id: str | None = None


class Message(msgspec.Struct):
    """`reasoning_content` and `reasoning` are servers' two names for one thing; `function_call` is
    the older form of one call."""

    content: str | None = None
    refusal: str | None = None
    reasoning_content: str | None = None
    reasoning: str | None = None
    tool_calls: list[Call] | None = None
    function_call: Function | None = None


class Choice(msgspec.Struct):
    message: Message
    finish_reason: str | None = None
    logprobs: msgspec.Raw = msgspec.Raw(b"null")


class Usage(msgspec.Struct):
    prompt_tokens: int | None = None
    completion_tokens: int | None = None


class Completion(msgspec.Struct):
    choices: list[Choice]
    usage: Usage | None = None


class ErrorBody(msgspec.Struct):
    error: msgspec.Raw


_COMPLETION = msgspec.json.Decoder(Completion)
_ERROR = msgspec.json.Decoder(ErrorBody)


def parse(draft: Draft, recipe: Recipe) -> Draft:
    """Read text, calls, finish reason and usage; the log-probabilities stay raw until they are
    used. An answer that ends with a call is an answer that stopped."""
    completion = _decode(draft.body)
    if not completion.choices:
        raise Reject(reasons.NO_CHOICES, "expected one choice, found none")
    choice = completion.choices[0]
    message, usage = choice.message, completion.usage or Usage()
    calls = tuple(_calls(message))
    finish = choice.finish_reason or ""
    if calls and finish in ("tool_calls", "function_call"):
        finish = "stop"
    return replace(
        draft,
        body="",  # a megabyte with its log-probabilities: not held beside the row
        text=message.content or "",
        finish_reason=finish,
        refusal=bool(message.refusal),
        reasoning=message.reasoning_content or message.reasoning or "",
        calls=calls,
        usage_prompt_tokens=usage.prompt_tokens,
        usage_completion_tokens=usage.completion_tokens,
        logprobs=bytes(choice.logprobs),
    )


def _calls(message: Message) -> Iterator[ToolCall]:
    found = [(call.function, call.id) for call in message.tool_calls or ()]
    if message.function_call is not None:
        found.append((message.function_call, None))
    for function, name_of_call in found:
        try:
            called = FunctionCall(name=function.name, arguments=function.arguments)
        except ValueError as error:
            raise Reject(reasons.WRONG_SCHEMA, "a call's function has no usable name") from error
        yield ToolCall(function=called, id=name_of_call)


def _decode(body: str) -> Completion:
    try:
        return _COMPLETION.decode(body)
    except msgspec.ValidationError as error:
        raise _not_a_completion(body, error) from error
    except (msgspec.DecodeError, UnicodeEncodeError, RecursionError) as error:
        first = error
    # Some servers write -Infinity for "not computed", which is no JSON.
    try:
        return _COMPLETION.decode(msgspec.json.encode(json.loads(body, parse_constant=_constant)))
    except msgspec.ValidationError as error:
        raise _not_a_completion(body, error) from error
    except (ValueError, RecursionError):
        raise Reject(reasons.MALFORMED_JSON, f"{first} ({len(body)} characters)") from first


def _constant(name: str) -> float:
    if name != "-Infinity":
        raise ValueError(f"{name} is no JSON")
    return -9999.0  # below signals.SENTINEL


def _not_a_completion(body: str, error: Exception) -> Reject:
    try:
        _ERROR.decode(body)
    except RecursionError:
        return Reject(reasons.MALFORMED_JSON, f"nested too deep ({len(body)} characters)")
    except msgspec.DecodeError:
        return Reject(reasons.WRONG_SCHEMA, f"not a chat completion: {error}")
    return Reject(reasons.ERROR_BODY, "the teacher answered with an error object")
