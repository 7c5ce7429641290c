"""The APIs that the billing teacher speaks: how each reads a request, writes an answer, and lies.

`openai` is a chat completion as llama.cpp writes it (token ids beside the bytes), `vllm` one with
the schema that vLLM publishes, `anthropic` a message of Anthropic's Messages API. Requests are
checked as strictly as the published schemas are, so that a client which strays is refused.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

from aiohttp import web

from stillhouse.contracts.chat import Message
from tests.support.teacher_language import Spoken

THOUGHTS = "Let me think about it."


@dataclass(frozen=True)
class Question:
    """What a request asks, in the same words for every API."""

    model: str
    messages: list[Message]
    max_tokens: int
    tools: list[dict[str, Any]]
    top_logprobs: int | None = None
    ids_as_tokens: bool = False
    seed: int | None = None
    temperature: float | None = None
    top_p: float | None = None

    @property
    def tool(self) -> str:
        """The first tool offered, for an answer that calls one."""
        return str(self.tools[0]["function"]["name"]) if self.tools else "look_up"


class BadRequest(Exception):
    """A request that the published schema does not allow."""

    def __init__(self, message: str, status: int = 400, **fields: Any) -> None:
        super().__init__(message)
        self.status = status
        self.fields = fields


class Api(Protocol):
    path: str
    hidden_tokens: int  # what it counts in a prompt beside what we render

    def key_of(self, headers: Mapping[str, str]) -> str | None:
        """The key that a caller sent."""

    def read(self, headers: Mapping[str, str], body: dict[str, Any]) -> Question:
        """Read a request. Raises BadRequest."""

    def write(self, request_id: str, spoken: Spoken, question: Question) -> dict[str, Any]:
        """Write an answer."""

    def error(
        self, status: int, message: str, headers: Mapping[str, str] | None = None, **fields: Any
    ) -> web.Response:
        """Write an error."""

    def lie(self, kind: str, answer: dict[str, Any], tool: str) -> None:
        """Change an answer into the one that a fault names."""


@dataclass
class OpenAI:
    """`refuses` are parameters that its model does not support, as those of reasoning models."""

    refuses: Sequence[str] = ()
    most_logprobs: int = 64
    path: str = "/v1/chat/completions"
    hidden_tokens: int = 0

    def key_of(self, headers: Mapping[str, str]) -> str | None:
        return headers.get("Authorization", "").removeprefix("Bearer ") or None

    def read(self, headers: Mapping[str, str], body: dict[str, Any]) -> Question:
        for name in self.refuses:
            if name in body:
                instead = " Use 'max_completion_tokens' instead." if name == "max_tokens" else ""
                raise BadRequest(
                    f"Unsupported parameter: '{name}' is not supported with this model.{instead}",
                    param=name,
                    code="unsupported_parameter",
                )
        top = int(body.get("top_logprobs") or 0) if body.get("logprobs") else None
        if top is not None and top > self.most_logprobs:
            raise BadRequest(f"top_logprobs must be at most {self.most_logprobs}")
        return Question(
            model=str(body.get("model")),
            messages=[Message.model_validate(message) for message in body["messages"]],
            max_tokens=int(body.get("max_tokens") or body.get("max_completion_tokens") or 16),
            tools=list(body.get("tools") or ()),
            top_logprobs=top,
            ids_as_tokens=bool(body.get("return_tokens_as_token_ids")),
            seed=body.get("seed"),
            temperature=body.get("temperature"),
            top_p=body.get("top_p"),
        )

    def write(self, request_id: str, spoken: Spoken, question: Question) -> dict[str, Any]:
        choice: dict[str, Any] = {
            "index": 0,
            "message": {"role": "assistant", "content": spoken.text},
            "finish_reason": spoken.finish_reason,
        }
        if question.top_logprobs is not None:
            choice["logprobs"] = {"content": spoken.positions}
        return {
            "id": request_id,
            "object": "chat.completion",
            "created": int(time.time()),
            "model": question.model,
            "choices": [choice],
            "usage": {
                "prompt_tokens": spoken.prompt_tokens,
                "completion_tokens": spoken.completion_tokens,
                "total_tokens": spoken.prompt_tokens + spoken.completion_tokens,
            },
        }

    def error(
        self, status: int, message: str, headers: Mapping[str, str] | None = None, **fields: Any
    ) -> web.Response:
        kind = {401: "invalid_api_key", 404: "model_not_found", 429: "rate_limit_exceeded"}.get(
            status, "invalid_request_error" if status < 500 else "server_error"
        )
        body = {"error": {"message": message, "type": kind, "code": kind, **fields}}
        return web.json_response(body, status=status, headers=headers)

    def lie(self, kind: str, answer: dict[str, Any], tool: str) -> None:
        if kind == "empty_choices":
            answer["choices"] = []
            return
        choice, usage = answer["choices"][0], answer["usage"]
        message = choice["message"]
        positions = (choice.get("logprobs") or {}).get("content") or []
        match kind:
            case "tool_call":
                function = {"name": tool, "arguments": json.dumps({"text": message["content"]})}
                message["tool_calls"] = [{"id": "call_1", "type": "function", "function": function}]
                message["content"] = None
                choice["finish_reason"] = "tool_calls"
            case "reasoning":
                message[self.reasoning_field] = THOUGHTS
            case "still_reasoning":
                message[self.reasoning_field], message["content"] = message["content"], None
                choice["finish_reason"] = "length"
            case "null_content":
                message["content"] = None
            case "refusal":
                message["content"], message["refusal"] = None, "I cannot help with that."
            case "content_filter":
                choice["finish_reason"] = "content_filter"
            case "strange_finish":
                choice["finish_reason"] = "abort"
            case "missing_logprobs":
                choice.pop("logprobs", None)
            case "missing_ids":
                for position in positions:
                    for outcome in (position, *position["top_logprobs"]):
                        outcome.pop("id", None)
            case "missing_usage":
                del answer["usage"]
            case "wrong_usage":
                usage["completion_tokens"] *= 10
                usage["total_tokens"] = usage["prompt_tokens"] + usage["completion_tokens"]
            case "wrong_prompt_tokens":
                usage["prompt_tokens"] += 3
                usage["total_tokens"] += 3
            case "inflated":
                for position in positions:
                    for outcome in position["top_logprobs"]:
                        outcome["logprob"] = min(0.0, outcome["logprob"] + 1.0)
            case "other_text":
                message["content"] += "!"
            case "few_logprobs":
                for position in positions:
                    del position["top_logprobs"][3:]
            case _:
                raise ValueError(f"this API has no {kind}")

    reasoning_field: ClassVar[str] = "reasoning_content"


@dataclass
class Vllm(OpenAI):
    """As vLLM's `ChatCompletionResponse` has it: tokens by text and bytes, without ids unless they
    are asked for as tokens; the sampled token first in the list; -9999 for what has no mass."""

    end_text: str = "<|im_end|>"

    reasoning_field: ClassVar[str] = "reasoning"

    def write(self, request_id: str, spoken: Spoken, question: Question) -> dict[str, Any]:
        answer = super().write(f"chatcmpl-{request_id}", spoken, question)
        choice = answer["choices"][0]
        choice["message"] |= {
            "refusal": None,
            "annotations": None,
            "audio": None,
            "function_call": None,
            "reasoning": None,
        }
        choice |= {"stop_reason": None, "token_ids": None, "logprobs": None}
        if question.top_logprobs is not None:
            listed = [self._position(entry, question) for entry in spoken.positions]
            choice["logprobs"] = {"content": listed}
        answer["usage"]["prompt_tokens_details"] = None
        return answer | {
            "service_tier": None,
            "system_fingerprint": None,
            "prompt_logprobs": None,
            "prompt_token_ids": None,
            "kv_transfer_params": None,
        }

    def _position(self, entry: dict[str, Any], question: Question) -> dict[str, Any]:
        others = [other for other in entry["top_logprobs"] if other["id"] != entry["id"]]
        listed = [
            self._outcome(outcome, question)
            for outcome in [entry, *others][: question.top_logprobs]
        ]
        if len(listed) > 1:
            listed[-1]["logprob"] = -9999.0
        return {**self._outcome(entry, question), "top_logprobs": listed}

    def _outcome(self, outcome: dict[str, Any], question: Question) -> dict[str, Any]:
        # A special token has its text; what is no whole character becomes the sign for that.
        token = outcome["token"] if outcome["bytes"] else self.end_text
        if question.ids_as_tokens:
            token = f"token_id:{outcome['id']}"
        return {
            "token": token,
            "logprob": max(outcome["logprob"], -9999.0),
            "bytes": list(token.encode("utf-8", errors="replace")),
        }

    def error(
        self, status: int, message: str, headers: Mapping[str, str] | None = None, **fields: Any
    ) -> web.Response:
        kind = {400: "BadRequestError", 404: "NotFoundError"}.get(status, "InternalServerError")
        error = {"message": message, "type": kind, "param": None, "code": status}
        return web.json_response({"error": error}, status=status, headers=headers)
