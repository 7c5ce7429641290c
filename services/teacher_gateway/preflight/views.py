"""A preflight as the API answers it, field by field."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, Field


class Estimate(BaseModel):
    """A figure with its 95 % interval, made from `n` answers; without an interval from one."""

    value: float
    low: float | None
    high: float | None
    n: int


Topic = Literal[
    "answers",
    "batch_api",
    "signal",
    "raw_logprobs",
    "agreement",
    "tokenizer",
    "token_ids",
    "ends",
    "tokens",
    "cost",
    "time",
    "terms",
    "training",
]


class Finding(BaseModel):
    """One thing that a preflight found out. `unfit` ones refuse the check."""

    teacher: str | None = Field(description="none where it is about the whole pipeline")
    topic: Topic
    value: str = Field(description="what was found, for people")
    verdict: Literal["ok", "warning", "unfit", "unknown"]
    field: str | None = Field(None, description="of the spec: what to change")
    message: str = Field("", description="what to change, and why")
    reason: str = Field("", description="a stable name, where it is unfit")


class TeacherPreflight(BaseModel):
    """What a handful of questions told about one teacher."""

    name: str
    calls: int
    answered: int = Field(description="of the prompts that it was asked")
    signal: Literal["text", "topk", "counts"] | None = Field(
        description="the best that it gives; none where nobody knows"
    )
    k: int | None = Field(description="log-probabilities for a token")
    raw_logprobs: bool | None = Field(description="none where it could not be told")
    disagreement_nats: float | None = Field(
        description="largest divergence between answers to the same question"
    )
    ended: Estimate | None = Field(
        description="share of answers that ended before `signal.max_tokens`"
    )
    completion_tokens: Estimate | None = Field(description="of an answer")
    call_seconds: Estimate | None
    items: int = Field(description="that it would answer")
    cost_usd: Estimate | None = Field(description="for all of its items")
    seconds: Estimate | None = Field(
        description="until it has answered them, at the speed seen and within its limits"
    )


class Preflight(BaseModel):
    """What was found out by asking the teachers."""

    teachers: list[TeacherPreflight]
    findings: list[Finding]
    cost_usd: Estimate | None = Field(description="of the whole pipeline")
    seconds: Estimate | None = Field(description="of asking, all teachers at the same time")
    training_steps: Estimate | None = Field(description="before the decay")
    account: str = Field(description="what paid: see `/v1/accounts`")
