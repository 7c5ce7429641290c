"""The events: facts in the past tense that pass between the services.

An event carries ids, references and digests, never data. The first line of a docstring is what
happened; `docs/events.md` is made from these docstrings. Within a version only optional fields
are added and readers ignore unknown ones; a break is a new type beside the old one.
"""

from __future__ import annotations

import json
from typing import Annotated, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, field_validator

from stillhouse.contracts.artifacts import Id, ObjectRef

Split = Literal["train", "validation", "test"]
Stage = Literal["collect", "build", "train", "evaluate", "release"]

FigureName = Annotated[str, StringConstraints(pattern=r"^[a-z0-9_]{1,64}$")]
MAX_DETAIL_BYTES = 2000  # as JSON, where a control character takes six

STAGES: tuple[Stage, ...] = ("collect", "build", "train", "evaluate", "release")


class Event(BaseModel):
    """Base of all events: frozen, unknown fields ignored."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    TYPE: ClassVar[str]
    VERSION: ClassVar[int] = 1


class PipelineAccepted(Event):
    """A pipeline was accepted: spec, tokenizer and prompts are in the store."""

    TYPE = "pipeline.accepted"

    spec: ObjectRef
    dataset_id: Id
    training_id: Id


class ResponseBatchStored(Event):
    """A batch of items closed: its answers are in the store, its rejections recorded."""

    TYPE = "response_batch.stored"

    batch: int = Field(ge=0)
    manifest: ObjectRef
    answers: int = Field(ge=0)
    rejected: int = Field(ge=0)


class ResponsesCompleted(Event):
    """The last batch of a pipeline closed: no more answers will come."""

    TYPE = "responses.completed"

    responses: ObjectRef
    batches: int = Field(ge=1)


class PipelineStopped(Event):
    """A pipeline was cancelled or failed: no service works for it any more."""

    TYPE = "pipeline.stopped"

    stopped: ObjectRef
    outcome: Literal["cancelled", "failed"]


class ShardWritten(Event):
    """A shard is in the store: the rows of one batch and the reasons of the rest."""

    TYPE = "shard.written"

    dataset_id: Id
    batch: int = Field(ge=0)
    split: Split
    shard: ObjectRef
    rows: int = Field(ge=0)
    rejected: int = Field(ge=0)
    supervised_tokens: int = Field(ge=0)


class HeldoutSealed(Event):
    """The held-out rows are frozen: `heldout.json` names their shards for ever."""

    TYPE = "heldout.sealed"

    dataset_id: Id
    heldout: ObjectRef


class DatasetSealed(Event):
    """All shards are written: `dataset.json` names them."""

    TYPE = "dataset.sealed"

    dataset_id: Id
    dataset: ObjectRef
    shards: int = Field(ge=1)
    rows: int = Field(ge=0)


class CheckpointSaved(Event):
    """A checkpoint at a step that the spec names (or step 0, or the last) is in the store."""

    TYPE = "checkpoint.saved"

    training_id: Id
    step: int = Field(ge=0)
    epoch: int = Field(ge=1)
    manifest: ObjectRef
    tokens: int = Field(ge=0, description="supervised tokens trained on so far")
    gpu_seconds: float = Field(ge=0)
    final: bool = False


class TrainingCompleted(Event):
    """A training reached its last step."""

    TYPE = "training.completed"

    training_id: Id
    step: int = Field(ge=0)
    epoch: int = Field(ge=1)
    manifest: ObjectRef
    tokens: int = Field(ge=0)
    gpu_seconds: float = Field(ge=0)


class CheckpointEvaluated(Event):
    """The report of one checkpoint over the frozen validation rows is in the store."""

    TYPE = "checkpoint.evaluated"

    training_id: Id
    step: int = Field(ge=0)
    report: ObjectRef


class StudentEvaluated(Event):
    """A student folder is in the store: weights, card, provenance, report over the test rows."""

    TYPE = "student.evaluated"

    student_id: Id
    training_id: Id
    step: int = Field(ge=0)
    manifest: ObjectRef
    report: ObjectRef


class StudentReleased(Event):
    """A student passed its gates and its terms: `release.json` says so."""

    TYPE = "student.released"

    student_id: Id
    release: ObjectRef


class StudentWithheld(Event):
    """A student was refused its release: `release.json` says why."""

    TYPE = "student.withheld"

    student_id: Id
    release: ObjectRef


class StageProgressed(Event):
    """A stage moved: figures to show, at most every five seconds; nothing depends on it."""

    TYPE = "stage.progressed"

    stage: Stage
    figures: dict[FigureName, float] = Field(default_factory=dict, max_length=16)


class StageFailed(Event):
    """A stage met an error that it will not get over by itself (`fatal`) or may."""

    TYPE = "stage.failed"

    stage: Stage
    reason: str = Field(max_length=64, pattern=r"^[a-z0-9_]+$")
    detail: str = Field(max_length=1000, description="for people; a longer text is cut")
    fatal: bool

    @field_validator("detail", mode="before")
    @classmethod
    def _fits(cls, detail: object) -> object:
        """Cut what is too long: the report of an error must not fail on the error's text."""
        if not isinstance(detail, str):
            return detail
        # Lone surrogates, as broken bytes in a message become, have no UTF-8.
        detail = detail[:1000].encode(errors="replace").decode()
        while len(json.dumps(detail, ensure_ascii=False).encode()) > MAX_DETAIL_BYTES:
            detail = detail[: len(detail) * 3 // 4]
        return detail


EVENTS: dict[str, type[Event]] = {
    event.TYPE: event
    for event in (
        PipelineAccepted,
        ResponseBatchStored,
        ResponsesCompleted,
        PipelineStopped,
        ShardWritten,
        HeldoutSealed,
        DatasetSealed,
        CheckpointSaved,
        TrainingCompleted,
        CheckpointEvaluated,
        StudentEvaluated,
        StudentReleased,
        StudentWithheld,
        StageProgressed,
        StageFailed,
    )
}
