"""Items and answers, as the gateway stores them for the builder."""

from __future__ import annotations

from typing import Literal

import pyarrow as pa
from pydantic import BaseModel, ConfigDict, Field

from stillhouse.contracts.artifacts import Id, ObjectRef
from stillhouse.contracts.canonical import derived_id
from stillhouse.contracts.chat import Message, Tools
from stillhouse.contracts.events import Split

# One row an item; `prompts/batch-N.parquet`. `messages` is the JSON of a list of Message, `tools`
# that of the functions offered, `answer` a chat completion that the user gave along; null where
# there is none. `prompt_tokens` is what its teacher counts for the prompt at most.
PROMPT_SCHEMA = pa.schema(
    [
        ("item_id", pa.string()),
        ("prompt_id", pa.string()),
        ("sample", pa.int32()),
        ("messages", pa.string()),
        ("tools", pa.string()),
        ("answer", pa.string()),
        ("prompt_sha256", pa.string()),
        ("prompt_tokens", pa.int32()),
    ]
)


def prompt_id(pipeline_id: str, prompt_sha256: str) -> str:
    return derived_id("pr", pipeline_id, prompt_sha256)


def item_id(prompt: str, sample: int) -> str:
    """One prompt x one sample number: what becomes one row or one recorded rejection."""
    return f"{prompt}-{sample}"


class Record(BaseModel):
    """Base of what is stored as JSON: frozen, unknown fields ignored."""

    model_config = ConfigDict(frozen=True, extra="ignore")


class Item(Record):
    item_id: Id
    prompt_id: Id
    sample: int = Field(ge=0)
    messages: list[Message]
    prompt_sha256: str
    tools: Tools | None = None
    answer: str | None = Field(None, description="a chat completion that the user gave along")


class Answer(Record):
    """One line of a part: a teacher's answer. `body` is the JSON text of an OpenAI chat completion,
    as it came; routes of another form are brought into this one by their adapter."""

    item_id: Id
    body: str
    prompt_tokens: int = Field(ge=0)
    completion_tokens: int = Field(ge=0)
    cost_microusd: int = Field(ge=0)
    received_at: str
    cached: bool = Field(False, description="given before to the same question, and free")


class Rejection(Record):
    """Why an item has no row. `reason` is from a closed list; `detail` is for people."""

    item_id: Id
    stage: Literal["accept", "collect", "build"]
    reason: str = Field(pattern=r"^[a-z0-9_]+$", max_length=64)
    detail: str = Field("", max_length=500)


class ResponsesManifest(Record):
    """The parts that won a batch. Every item of the batch is in a part or in `rejections`."""

    tenant_id: Id
    pipeline_id: Id
    batch: int
    split: Split
    attempt: int
    teacher: Id
    verdict_id: Id
    prompts: ObjectRef
    parts: list[ObjectRef]
    answers: int
    rejections: list[Rejection]


class ResponsesClosed(Record):
    """`responses.json`: how many batches a pipeline had, all closed."""

    tenant_id: Id
    pipeline_id: Id
    batches: int
    answers: int
    rejected: int
    completed_at: str


class Stopped(Record):
    """`stopped.json`: the pipeline was cancelled or failed, and why."""

    tenant_id: Id
    pipeline_id: Id
    outcome: Literal["cancelled", "failed"]
    reason: str
    detail: str
    stopped_at: str
