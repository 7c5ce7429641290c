"""How a conversation becomes tokens: one rendering, the same in every service.

The gateway stores the teacher's tokenizer and chat template at acceptance (`ChatTokenizer`); the
builder renders rows with it, the trainer and the evaluator read its hashes. Templates run in a
sandbox, because they come with weights that a user names.
"""

from __future__ import annotations

from datetime import date
from functools import cached_property
from typing import Any, Literal

from jinja2 import StrictUndefined
from jinja2.exceptions import SecurityError, TemplateError
from jinja2.sandbox import ImmutableSandboxedEnvironment
from pydantic import BaseModel, ConfigDict, Field
from tokenizers import Tokenizer

from stillhouse.contracts.canonical import sha256_hex

MAX_TEMPLATE_CHARACTERS = 100_000
MAX_REPEATS = 1000  # of a text or a list in a template, so that it cannot fill the memory


class Message(BaseModel):
    """One turn of a conversation."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    role: Literal["system", "user", "assistant"]
    content: str = Field(min_length=1)


class TemplateRefused(ValueError):
    """A chat template is too long, does not parse, or raised an error."""


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
        environment.globals["strftime_now"] = (self.today or date.today()).strftime
        try:
            return environment.from_string(self.chat_template)
        except TemplateError as error:
            raise TemplateRefused(f"the chat template does not parse: {error}") from error

    def render(self, messages: list[Message]) -> str:
        """Render a conversation up to where the assistant's answer begins."""
        try:
            return str(
                self._template.render(
                    messages=[message.model_dump() for message in messages],
                    add_generation_prompt=True,
                    bos_token=self.bos_token or "",
                    eos_token=self.eos_token,
                )
            )
        except TemplateRefused:
            raise
        except Exception as error:  # a template is a program: it may fail in any way
            raise TemplateRefused(f"the chat template refused the conversation: {error}") from error

    def on(self, day: date) -> ChatTokenizer:
        """The same, with the date that templates see."""
        return ChatTokenizer(**self.model_dump(exclude={"today"}), today=day)

    def encode_prompt(self, messages: list[Message]) -> list[int]:
        """Ids of the rendered conversation; the template writes all special tokens itself."""
        return list(self.tokenizer.encode(self.render(messages), add_special_tokens=False).ids)

    def encode_text(self, text: str) -> list[int]:
        return list(self.tokenizer.encode(text, add_special_tokens=False).ids)

    def decode(self, ids: list[int]) -> str:
        """Text of ids, special tokens kept."""
        return str(self.tokenizer.decode(ids, skip_special_tokens=False))


def _raise(message: str) -> None:
    raise TemplateRefused(f"the chat template refused the conversation: {message}")
