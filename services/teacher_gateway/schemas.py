"""What the API answers, field by field; `/openapi.json` is made from these classes.

Money is given in micro-dollars (exact, as the ledger holds it) and in dollars for reading. Times
are RFC 3339 in UTC. A page carries `next`: give it as `after` for the page that follows.
"""

from __future__ import annotations

from datetime import datetime
from typing import Any, Literal

from pydantic import BaseModel, Field

from services.teacher_gateway.preflight.views import Preflight
from stillhouse.contracts.artifacts import ObjectRef
from stillhouse.contracts.chat import Message
from stillhouse.contracts.events import Split, Stage
from stillhouse.contracts.spec import Batches, Limits, Price, Purpose, SecretRef, Verdict
from stillhouse.contracts.trainings import Figures, Release, Report

PipelineState = Literal["accepting", "running", "released", "withheld", "failed", "cancelled"]
StageState = Literal["waiting", "running", "done", "failed", "cancelled"]


class Created(BaseModel):
    """A pipeline was taken; the same for each repetition of the request."""

    pipeline_id: str
    name: str
    created_at: datetime


class TokenizerFound(BaseModel):
    source: str = Field(description="the reference whose folder holds it")
    sha256: str
    template_sha256: str
    vocabulary: int


class PromptsFound(BaseModel):
    prompts: int
    rejections: dict[str, int] = Field(description="lines by the reason of their rejection")
    items: int = Field(description="prompts x samples")
    batches: Batches


class Cost(BaseModel):
    budget_usd: float
    spent_usd: float
    reserved_usd: float
    budget_microusd: int
    spent_microusd: int
    reserved_microusd: int


class Checked(BaseModel):
    """What a spec would come to; nothing was created."""

    name: str
    spec_sha256: str
    verdicts: list[Verdict]
    duties: list[str]
    tokenizer: TokenizerFound
    prompts: PromptsFound
    prompt_tokens: int = Field(description="estimated from the first 2000 prompts")
    worst_case_usd: float = Field(description="if every answer took `signal.max_tokens`")
    budget_usd: float
    probe_usd: float | None = Field(description="what the questions cost; none without `probe`")
    preflight: Preflight | None = Field(description="none without `probe`")


class StageView(BaseModel):
    state: StageState
    figures: dict[str, float] = Field(default_factory=dict, description="the newest ones")


class Tokens(BaseModel):
    prompt: int = Field(description="sent to the teacher, as it counted them")
    completion: int = Field(description="written by the teacher")
    trained: int = Field(description="supervised tokens trained on so far")


class PipelineSummary(BaseModel):
    """A pipeline in a list."""

    pipeline_id: str
    name: str
    state: PipelineState
    stopping: Literal["", "cancelled", "failed"] = Field(
        description="what it will end as once nothing is reserved any more"
    )
    reason: str = Field(description="why it failed, was cancelled or withheld; else empty")
    rows: int
    cost: Cost
    created_at: datetime
    ended_at: datetime | None


class PipelineView(PipelineSummary):
    """A pipeline with all that its stages told so far."""

    stages: dict[Stage, StageView]
    items: int = Field(description="each ends as one row or as one rejection")
    pending: int = Field(description="items that have neither yet")
    rejections: dict[str, int] = Field(description="items by the reason of their rejection")
    batches: int
    heldout_batches: int
    batches_closed: int
    tokens: Tokens
    gpu_seconds: float
    last_event: int = Field(description="sequence of the last event that this view includes")
    dataset_id: str | None
    training_id: str | None
    student_id: str | None
    first_training_step_at: datetime | None
    responses_completed_at: datetime | None


class Pipelines(BaseModel):
    """Newest first."""

    items: list[PipelineSummary]
    next: str | None


class EventView(BaseModel):
    sequence: int = Field(description="the pipeline's own count, without gaps")
    event_id: str
    type: str
    version: int
    occurred_at: datetime
    recorded_at: datetime
    caused_by: str | None
    payload: dict[str, Any]


class Events(BaseModel):
    items: list[EventView]
    next: int | None


class RejectionView(BaseModel):
    item_id: str
    batch: int | None = Field(description="none where acceptance rejected it")
    stage: str
    reason: str
    detail: str


class Rejections(BaseModel):
    items: list[RejectionView]
    next: str | None
    counts: dict[str, int] = Field(description="all rejections by reason")


class SampleView(BaseModel):
    """A row as it lies in its shard."""

    row_id: str
    batch: int
    split: Split
    teacher: str
    messages: list[Message]
    answer: str
    finish_reason: str
    prompt_tokens: int
    supervised_tokens: int
    signal: str


class Samples(BaseModel):
    items: list[SampleView]


class CheckpointFigures(BaseModel):
    training_id: str
    step: int
    model: Figures
    report: ObjectRef


class ReportView(Report):
    """The student's report over the test rows, or the newest checkpoint's until there is one."""

    of: Literal["student", "checkpoint"]
    checkpoints: list[CheckpointFigures] = Field(
        description="validation figures of the newest 100 checkpoints, oldest first"
    )


class FileView(BaseModel):
    size: int
    sha256: str


class StudentView(BaseModel):
    """The student's folder by its manifest, and the decision about it."""

    student_id: str
    training_id: str
    step: int
    files: dict[str, FileView]
    manifest: ObjectRef
    release: Release | None = Field(description="none until the gateway has decided")


class ChargeView(BaseModel):
    charge_id: str
    kind: str
    batch: int | None
    attempt: int | None
    answers: int
    cached: int = Field(description="of these answers: paid for before, and free")
    microusd: int
    detail: str
    booked_at: datetime


class Charges(BaseModel):
    """The ledger's lines, oldest first, and the pipeline's money."""

    items: list[ChargeView]
    next: str | None
    cost: Cost
    totals_microusd: dict[str, int] = Field(description="all lines by kind")


class AccountView(BaseModel):
    """Money of the tenant that no pipeline pays."""

    name: str
    cost: Cost
    created_at: datetime


class Accounts(BaseModel):
    """Newest first."""

    items: list[AccountView]
    next: str | None


class AccountChargeView(BaseModel):
    charge_id: str
    kind: str
    answers: int
    microusd: int
    detail: str
    booked_at: datetime


class AccountCharges(BaseModel):
    """An account's lines, oldest first, and its money."""

    items: list[AccountChargeView]
    next: str | None
    cost: Cost
    totals_microusd: dict[str, int] = Field(description="all lines by kind")


class RegisteredTeacherView(BaseModel):
    """A teacher for live traffic: as it was posted, its verdict, and its money."""

    name: str
    url: str
    model: str
    api_key: SecretRef | None
    terms: str
    usd_per_million: Price
    limits: Limits
    purpose: Purpose
    budget_usd: float
    on_disconnect: Literal["finish", "abort"]
    verdict: Verdict
    account: str = Field(description="`/v1/accounts/{account}/charges` lists what was paid")
    cost: Cost
    created_at: datetime
    updated_at: datetime


class RegisteredTeachers(BaseModel):
    """By name."""

    items: list[RegisteredTeacherView]


class CapturedFailure(BaseModel):
    """An exchange without a whole answer. Nothing of its text is told."""

    at: datetime
    teacher: str
    reason: str
    status: int
    detail: str


class CapturedTeacher(BaseModel):
    """What was recorded of one teacher."""

    teacher: str
    records: int
    failures: int
    cost_microusd: int
    first_at: datetime
    last_at: datetime


class CapturedView(BaseModel):
    """Recorded live traffic. A record is here some seconds after its answer."""

    records: int = Field(description="exchanges with a whole answer: what prompts are made from")
    failures: int = Field(description="exchanges without one")
    cost_microusd: int
    teachers: list[CapturedTeacher] = Field(description="a page of them, by name")
    next: str | None = Field(description="what to give as `after` for the next page of teachers")
    tags: dict[str, dict[str, int]] = Field(
        description="names and values with their records, among the newest batches: of each name "
        "the most frequent values"
    )
    tags_left_out: int = Field(description="pairs of name and value that are not in `tags`")
    reasons: dict[str, int] = Field(description="failures by reason, among the newest batches")
    last_failures: list[CapturedFailure] = Field(description="newest first")


class Uploaded(BaseModel):
    sha256: str
    size: int
    reference: str = Field(description="what to write into a spec's `prompts.from`")


class Health(BaseModel):
    status: Literal["ok", "ready"]
