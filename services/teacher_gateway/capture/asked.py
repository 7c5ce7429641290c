"""A request's body: the few fields that decide are read, all others stay the bytes they are.

The body that goes upstream is built from the same parse that was judged: of two equal keys both
know the last one alone, so nobody can show one thing to us and another to the teacher.
"""

from __future__ import annotations

from typing import Literal

import msgspec

from services.teacher_gateway.capture.refusal import Refusal
from stillhouse.contracts.spec import check_tags

Kind = Literal["chat", "text"]

# A token is at least one byte of the body, and the JSON around a message is longer than what chat
# templates put around it. A template's own system message is not in the body.
_TEMPLATE_TOKENS = 512
# An image's address says nothing of its size.
_IMAGE_TOKENS = 16_384


class _Deciding(msgspec.Struct):
    model: str
    stream: bool | None = None
    n: int | None = None
    best_of: int | None = None
    max_tokens: int | None = None
    max_completion_tokens: int | None = None
    metadata: dict[str, str] | None = None
    stream_options: dict[str, msgspec.Raw] | None = None
    prompt: msgspec.Raw = msgspec.Raw(b"null")


class Asked(msgspec.Struct):
    """What a body asks for. `usage_hidden`: the client did not ask for the chunk with the usage,
    which we need."""

    kind: Kind
    model: str
    stream: bool
    usage_hidden: bool
    tags: dict[str, str]
    most_prompt_tokens: int
    most_answer_tokens: int
    fields: dict[str, msgspec.Raw]

    def body_for(self, model: msgspec.Raw) -> bytes:
        """The body that goes upstream, with the teacher's own name of its model."""
        return _encoder.encode({**self.fields, "model": model})


_deciding = msgspec.json.Decoder(_Deciding)
_fields = msgspec.json.Decoder(dict[str, msgspec.Raw])
_encoder = msgspec.json.Encoder()
_prompts = msgspec.json.Decoder(list[msgspec.Raw])
_YES = msgspec.Raw(b"true")


def read_body(body: bytes, kind: Kind, *, max_tokens: int) -> Asked:
    """Read what decides. `max_tokens` is what a call without a limit of its own is counted with.

    Raises Refusal (400).
    """
    try:
        body.decode()
        found = _deciding.decode(body)
        fields = _fields.decode(body)
        tags = check_tags(found.metadata or {})
    except (UnicodeDecodeError, msgspec.DecodeError, ValueError) as error:
        raise Refusal(400, "invalid_body", f"the body cannot be used: {error}") from error
    except RecursionError as error:
        raise Refusal(400, "invalid_body", "the body is nested too deeply") from error
    limits = (found.max_completion_tokens, found.max_tokens, found.n, found.best_of)
    if any(limit is not None and limit < 1 for limit in limits):
        raise Refusal(
            400, "invalid_body", "expected `max_tokens` and `n` of at least 1, or none of them"
        )
    answer = max(found.max_completion_tokens or 0, found.max_tokens or 0) or max_tokens
    choices = max(found.n or 1, found.best_of or 1)
    hidden = False
    fields.pop("metadata", None)
    fields.pop("store", None)
    if found.stream:
        options = found.stream_options or {}
        hidden = not _is_true(options.get("include_usage"))
        if hidden:
            fields["stream_options"] = msgspec.Raw(
                _encoder.encode({**options, "include_usage": _YES})
            )
    return Asked(
        kind=kind,
        model=found.model,
        stream=bool(found.stream),
        usage_hidden=hidden,
        tags=tags,
        most_prompt_tokens=len(body)
        + _TEMPLATE_TOKENS
        + _IMAGE_TOKENS * body.count(b'"image_url"'),
        most_answer_tokens=answer * choices * _prompts_in(found.prompt),
        fields=fields,
    )


def _is_true(raw: msgspec.Raw | None) -> bool:
    return raw is not None and bytes(raw) == b"true"


def _prompts_in(raw: msgspec.Raw) -> int:
    """How many prompts a legacy completion asks at once: texts, or lists of token ids."""
    if not bytes(raw).startswith(b"["):
        return 1
    return sum(bytes(part)[:1] in (b'"', b"[") for part in _prompts.decode(raw)) or 1
