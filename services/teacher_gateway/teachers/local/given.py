"""An answer that was given along, as the tokens that are scored.

Text alone is scored: reasoning beside it stays in the message and out of the tokens, as the
builder leaves it out of the row. Calls of functions are scored as the chat template writes them.
"""

from __future__ import annotations

from typing import Any

import msgspec
from pydantic import ValidationError

from services.teacher_gateway import reasons
from services.teacher_gateway.teachers.completions import (
    Unreadable,
    judge_choice,
    read_completion,
)
from services.teacher_gateway.teachers.local.work import Finish
from services.teacher_gateway.teachers.outcomes import Call, Reject, Usage
from stillhouse.contracts.chat import ChatTokenizer, Message, TemplateRefused
from stillhouse.contracts.spec import Signal

# What an answer must be to be scored at all; log-probabilities are what scoring is for.
_TEXT = Signal(kind="text")


class Given(msgspec.Struct):
    """The choice of a completion, as it was given."""

    message: dict[str, Any]
    finish_reason: str

    @property
    def finish(self) -> Finish:
        return "length" if self.finish_reason == "length" else "stop"

    def as_choice(self) -> dict[str, Any]:
        return {"message": self.message, "finish_reason": self.finish_reason}


class _Completion(msgspec.Struct):
    choices: list[Given]


def read_given(completion: str) -> Given | Reject:
    """Read a chat completion, or say why it is no answer."""
    try:
        read = read_completion(completion.encode(errors="replace"))
        refused = judge_choice(read, Usage(0, 0), _TEXT)
        if refused is not None:
            return Reject(refused.reason, f"the answer given along: {refused.detail}"[:300])
        return msgspec.json.decode(completion, type=_Completion).choices[0]
    except (Unreadable, msgspec.DecodeError) as error:
        return Reject(reasons.TEACHER_INVALID, f"the answer given along: {error}"[:300])


def answer_ids(given: Given, chat: ChatTokenizer, call: Call, most: int) -> list[int] | Reject:
    """The tokens of a given answer, with the end of turn where it stopped."""
    try:
        text = _text(given.message, chat, call)
    except TemplateRefused as error:
        return Reject(reasons.TEACHER_INVALID, f"the answer given along: {error}"[:300])
    ids = chat.encode_text(text) if text else []
    if not ids:
        return Reject(reasons.TEACHER_INVALID, "the answer given along is empty")
    if given.finish == "stop":
        ids.append(chat.eos_id)
    if len(ids) > most:
        return Reject(
            reasons.TEACHER_INVALID,
            f"the answer given along has {len(ids)} tokens, and `signal.max_tokens` is {most}: "
            "raise it",
        )
    return ids


def _text(message: dict[str, Any], chat: ChatTokenizer, call: Call) -> str:
    content, calls = message.get("content"), message.get("tool_calls")
    if message.get("function_call"):
        calls = [{"function": message["function_call"]}]
    if not calls:
        return content or ""
    try:
        said = content if content and content.strip() else None
        answer = Message(role="assistant", content=said, tool_calls=calls)
    except ValidationError as error:
        where = error.errors()[0]
        detail = f"its calls are wrong: {'.'.join(map(str, where['loc']))}: {where['msg']}"
        raise TemplateRefused(detail) from error
    return chat.render_turn(call.messages, call.tools, answer)
