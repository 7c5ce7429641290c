"""How a conversation becomes tokens: one rendering, the same in every service.

The gateway stores the teacher's tokenizer and chat template at acceptance (`ChatTokenizer`); the
builder renders rows with it, the trainer and the evaluator read its hashes. Templates run in a
sandbox, because they come with weights that a user names.
"""

from __future__ import annotations

import json
from contextlib import suppress
from datetime import date
from functools import cached_property
from typing import Any, Literal

from jinja2 import StrictUndefined
from jinja2.exceptions import SecurityError, TemplateError
from jinja2.sandbox import ImmutableSandboxedEnvironment
from pydantic import BaseModel, ConfigDict, Field, model_validator
from tokenizers import Tokenizer

from stillhouse.contracts.canonical import sha256_hex

MAX_TEMPLATE_CHARACTERS = 100_000
MAX_REPEATS = 1000  # of a text or a list in a template, so that it cannot fill the memory


class FunctionCall(BaseModel):
    """What an assistant asks for; `arguments` is JSON text, as OpenAI writes it."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str = Field(min_length=1, max_length=200)
    arguments: str = "{}"


class ToolCall(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    function: FunctionCall
    id: str | None = None
    type: Literal["function"] = "function"


class Message(BaseModel):
    """One turn of a conversation. Only an assistant's turn that calls tools may be without text."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    role: Literal["system", "user", "assistant", "tool"]
    content: str | None = None
    tool_calls: list[ToolCall] | None = Field(None, min_length=1)
    tool_call_id: str | None = None
    name: str | None = None

    @model_validator(mode="after")
    def _has_content(self) -> Message:
        if self.tool_calls is not None and self.role != "assistant":
            raise ValueError("only the assistant's message may hold `tool_calls`")
        if not self.content and self.tool_calls is None:
            raise ValueError("expected `content`, a text that is not empty")
        return self

    @property
    def text(self) -> str:
        return self.content or ""

    def as_sent(self) -> dict[str, Any]:
        """The message as an OpenAI-compatible endpoint takes it."""
        return self.model_dump(exclude_none=True)

    def as_rendered(self) -> dict[str, Any]:
        """The message as chat templates read it: arguments as an object, content as text."""
        found = self.model_dump(exclude_none=True) | {"content": self.text}
        for call in found.get("tool_calls", ()):
            with suppress(ValueError, RecursionError):
                call["function"]["arguments"] = json.loads(call["function"]["arguments"])
        return found


# The JSON schemas of functions that a prompt offers, as OpenAI's `tools` has them.
Tools = list[dict[str, Any]]


class TemplateRefused(ValueError):
    """A chat template is too long, does not parse, or raised an error."""


class TurnDiffers(TemplateRefused):
    """The template does not write an answer as a turn after the asked conversation."""


class _Sandbox(ImmutableSandboxedEnvironment):
    """Jinja's sandbox, with an end to what `*` and `**` may make."""

    intercepted_binops = frozenset({"*", "**"})

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        for size in (left, right):
            if isinstance(size, int) and abs(size) > MAX_REPEATS:
                raise SecurityError(f"`{operator}` with {size}: expected at most {MAX_REPEATS}")
        return super().call_binop(context, operator, left, right)


class ChatTokenizer(BaseModel):
    """A tokenizer (`tokenizer.json`) with its chat template and special tokens, as JSON data.

    `today` is the date that templates see: the day of acceptance, so that rendering again gives
    the same tokens; None for the present day.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    tokenizer_json: str
    chat_template: str = Field(max_length=MAX_TEMPLATE_CHARACTERS)
    bos_token: str | None = None
    eos_token: str
    today: date | None = None

    @cached_property
    def tokenizer(self) -> Any:
        return Tokenizer.from_str(self.tokenizer_json)

    @cached_property
    def tokenizer_sha256(self) -> str:
        """Digest of what decides the ids of a text."""
        return sha256_hex(self.tokenizer_json.encode())

    @cached_property
    def template_sha256(self) -> str:
        return sha256_hex(self.chat_template.encode())

    @cached_property
    def eos_id(self) -> int:
        """Id of the end-of-turn token, which a finished answer's last position predicts."""
        found = self.tokenizer.token_to_id(self.eos_token)
        if found is None:
            raise TemplateRefused(f"the tokenizer has no token {self.eos_token!r}")
        return int(found)

    @cached_property
    def vocabulary(self) -> int:
        return int(self.tokenizer.get_vocab_size(with_added_tokens=True))

    @cached_property
    def _template(self) -> Any:
        environment = _Sandbox(
            trim_blocks=True,
            lstrip_blocks=True,
            undefined=StrictUndefined,
            extensions=["jinja2.ext.loopcontrols"],
        )
        environment.globals["raise_exception"] = _raise
        environment.filters["tojson"] = _to_json
        environment.globals["strftime_now"] = (self.today or date.today()).strftime
        try:
            return environment.from_string(self.chat_template)
        except TemplateError as error:
            raise TemplateRefused(f"the chat template does not parse: {error}") from error

    def render(
        self, messages: list[Message], tools: Tools | None = None, *, answered: bool = False
    ) -> str:
        """Render a conversation up to where the assistant's answer begins; with `answered` the
        last message is that answer and is rendered whole."""
        try:
            return str(
                self._template.render(
                    messages=[message.as_rendered() for message in messages],
                    tools=tools or None,
                    add_generation_prompt=not answered,
                    bos_token=self.bos_token or "",
                    eos_token=self.eos_token,
                )
            )
        except TemplateRefused:
            raise
        except Exception as error:  # a template is a program: it may fail in any way
            raise TemplateRefused(f"the chat template refused the conversation: {error}") from error

    def render_turn(self, messages: list[Message], tools: Tools | None, answer: Message) -> str:
        """The text of an answer with calls as the template writes it after the conversation,
        without what ends it. Raises TurnDiffers where that cannot be told."""
        asked = self.render(messages, tools)
        answered = self.render([*messages, answer], tools, answered=True)
        if not answered.startswith(asked):
            raise TurnDiffers(
                "the chat template writes the conversation otherwise once it is answered, so the "
                "text of a call cannot be told: use a template whose answered form begins with "
                "the asked"
            )
        turn = answered[len(asked) :]
        if any(call.function.name not in turn for call in answer.tool_calls or ()):
            raise TurnDiffers("the chat template does not write calls of functions")
        end = turn.rfind(self.eos_token)
        return turn if end < 0 else turn[:end]

    def on(self, day: date) -> ChatTokenizer:
        """The same, with the date that templates see."""
        return ChatTokenizer(**self.model_dump(exclude={"today"}), today=day)

    def encode_prompt(self, messages: list[Message], tools: Tools | None = None) -> list[int]:
        """Ids of the rendered conversation; the template writes all special tokens itself."""
        rendered = self.render(messages, tools)
        return list(self.tokenizer.encode(rendered, add_special_tokens=False).ids)

    def encode_text(self, text: str) -> list[int]:
        return list(self.tokenizer.encode(text, add_special_tokens=False).ids)

    def decode(self, ids: list[int]) -> str:
        """Text of ids, special tokens kept."""
        return str(self.tokenizer.decode(ids, skip_special_tokens=False))


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Write JSON as transformers does for templates: jinja's own filter would escape it for HTML
    and sort its keys."""
    if indent is not None and indent > MAX_REPEATS:
        raise SecurityError(f"`tojson` with indent={indent}: expected at most {MAX_REPEATS}")
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _raise(message: str) -> None:
    raise TemplateRefused(f"the chat template refused the conversation: {message}")
