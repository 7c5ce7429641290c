"""What a chat completion means: an answer, a refusal, or nothing that can be used.

All routes end here, since an answer's body is always an OpenAI chat completion. Only what decides
about it is parsed; log-probabilities stay raw bytes.
"""

from __future__ import annotations

from typing import Any

import msgspec

from services.teacher_gateway import reasons
from services.teacher_gateway.teachers.outcomes import Answered, Outcome, Reject, Retry, Usage
from stillhouse.contracts.spec import Signal

FINISHED = ("stop", "length", "tool_calls", "function_call")
STILL_REASONING = (
    "the teacher had not begun to answer at `signal.max_tokens`, which its reasoning counts "
    "against: raise it"
)


class Logprobs(msgspec.Struct):
    content: list[msgspec.Raw] | None = None


class Message(msgspec.Struct):
    content: str | None = None
    refusal: str | None = None
    tool_calls: list[msgspec.Raw] | None = None
    function_call: dict[str, Any] | None = None

    @property
    def calls(self) -> bool:
        """Whether it calls a tool."""
        return bool(self.tool_calls or self.function_call)


class Choice(msgspec.Struct):
    message: Message
    finish_reason: str | None = None
    logprobs: Logprobs | None = None


class Counts(msgspec.Struct):
    prompt_tokens: int
    completion_tokens: int


class Completion(msgspec.Struct):
    choices: list[Choice]
    usage: Counts | None = None


class Unreadable(ValueError):
    """Not the JSON of a chat completion with a choice."""


_decoder = msgspec.json.Decoder(Completion)


def read_completion(body: bytes) -> Completion:
    """Parse a body. Raises Unreadable."""
    try:
        body.decode()
        completion = _decoder.decode(body)
        _ = completion.choices[0]
    except (UnicodeDecodeError, msgspec.DecodeError, IndexError, RecursionError) as error:
        # ValidationError is a DecodeError: JSON of another shape. RecursionError: nested deeper
        # than anyone means.
        raise Unreadable(
            f"expected a chat completion, found {body[:80]!r} ({error})"[:300]
        ) from error
    return completion


def judge_reply(body: bytes, signal: Signal) -> Outcome:
    """Decide what the body of a paid call means; without its usage nobody knows what it cost."""
    try:
        completion = read_completion(body)
    except Unreadable as error:
        return Retry(reasons.TEACHER_INVALID, str(error), lost=True)
    usage = usage_of(completion)
    if usage is None:
        return Reject(
            reasons.TEACHER_INVALID, "expected `usage` with token counts, found none", lost=True
        )
    return judge_choice(completion, usage, signal) or Answered(body.decode(), usage)


def usage_of(completion: Completion) -> Usage | None:
    counts = completion.usage
    if counts is None or min(counts.prompt_tokens, counts.completion_tokens) < 0:
        return None
    return Usage(counts.prompt_tokens, counts.completion_tokens)


def judge_choice(completion: Completion, usage: Usage, signal: Signal) -> Reject | None:
    """Say why the first choice is no answer; None where it is one."""
    choice = completion.choices[0]
    message, ended = choice.message, choice.finish_reason
    if message.refusal or ended == "content_filter":
        said = message.refusal or "its content filter cut the answer"
        return Reject(reasons.REFUSED_BY_TEACHER, said[:300], usage)
    scored = choice.logprobs is not None and bool(choice.logprobs.content)
    if not message.content and not message.calls:
        # A token that was scored may be a character's first half, which has no text yet.
        if ended == "length" and (message.content is None or not scored):
            return Reject(reasons.STILL_REASONING, STILL_REASONING, usage)
        if message.content is None:
            return Reject(reasons.TEACHER_INVALID, "expected text or a call, found neither", usage)
    if ended not in FINISHED:
        return Reject(
            reasons.TEACHER_INVALID,
            f"expected finish_reason {' or '.join(FINISHED)}, found {ended!r}",
            usage,
        )
    if ended in ("tool_calls", "function_call") and not message.calls:
        return Reject(reasons.TEACHER_INVALID, f"finish_reason {ended!r} without a call", usage)
    # Endpoints score text, and many of them no call of a tool: such an answer is a row of text.
    if signal.kind == "topk" and not scored and not message.calls:
        return Reject(reasons.MISSING_LOGPROBS, "asked for log-probabilities, found none", usage)
    return None
