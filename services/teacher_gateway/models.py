"""The gateway's tables. Every row belongs to a tenant; money is integer micro-dollars.

Times are UTC seconds since the epoch as the database server or this process saw them; leases use
the clock of one database, so that workers' clocks need not agree.
"""

from __future__ import annotations

from sqlalchemy import (
    BigInteger,
    Float,
    ForeignKey,
    ForeignKeyConstraint,
    Index,
    Integer,
    String,
    Text,
    UniqueConstraint,
)
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

_BIG = BigInteger().with_variant(Integer, "sqlite")


class Base(DeclarativeBase):
    pass


class Tenant(Base):
    __tablename__ = "tenants"

    tenant_id: Mapped[str] = mapped_column(String(63), primary_key=True)
    created_at: Mapped[float] = mapped_column(Float)
    # When the job of a batch of it was put on the queue last: whose turn it is.
    sent_at: Mapped[float] = mapped_column(Float, default=0.0)


class ApiKey(Base):
    """A key by its public prefix; of the secret only a keyed hash is kept."""

    __tablename__ = "api_keys"

    prefix: Mapped[str] = mapped_column(String(16), primary_key=True)
    tenant_id: Mapped[str] = mapped_column(ForeignKey("tenants.tenant_id"))
    secret_hmac: Mapped[str] = mapped_column(String(64))
    created_at: Mapped[float] = mapped_column(Float)
    expires_at: Mapped[float | None] = mapped_column(Float)
    revoked_at: Mapped[float | None] = mapped_column(Float)


class Pipeline(Base):
    """One request to distil. `state`: accepting, running, released, withheld, failed, cancelled;
    the last four absorb. Stage states: waiting, running, done, failed, cancelled."""

    __tablename__ = "pipelines"

    pipeline_id: Mapped[str] = mapped_column(String(63), primary_key=True)
    tenant_id: Mapped[str] = mapped_column(ForeignKey("tenants.tenant_id"))
    name: Mapped[str] = mapped_column(String(63))
    idempotency_key: Mapped[str | None] = mapped_column(String(200))
    body_sha256: Mapped[str] = mapped_column(String(64))
    spec: Mapped[str] = mapped_column(Text)  # the posted spec as canonical JSON
    traceparent: Mapped[str] = mapped_column(String(55))
    state: Mapped[str] = mapped_column(String(16))
    collect: Mapped[str] = mapped_column(String(16), default="waiting")
    build: Mapped[str] = mapped_column(String(16), default="waiting")
    train: Mapped[str] = mapped_column(String(16), default="waiting")
    evaluate: Mapped[str] = mapped_column(String(16), default="waiting")
    release: Mapped[str] = mapped_column(String(16), default="waiting")
    reason: Mapped[str] = mapped_column(Text, default="")  # why it failed or was withheld
    # `cancelled` or `failed` from when that was decided; `state` follows once nothing is reserved.
    stopping: Mapped[str] = mapped_column(String(16), default="")
    # Settled by acceptance:
    dataset_id: Mapped[str | None] = mapped_column(String(63))
    training_id: Mapped[str | None] = mapped_column(String(63))
    student_id: Mapped[str | None] = mapped_column(String(63))
    batches: Mapped[int] = mapped_column(Integer, default=0)
    heldout_batches: Mapped[int] = mapped_column(Integer, default=0)
    items: Mapped[int] = mapped_column(Integer, default=0)
    # Money: spent + reserved <= budget at every instant (checked by the ledger's one UPDATE).
    budget_microusd: Mapped[int] = mapped_column(_BIG, default=0)
    spent_microusd: Mapped[int] = mapped_column(_BIG, default=0)
    reserved_microusd: Mapped[int] = mapped_column(_BIG, default=0)
    # What the events told:
    prompt_tokens: Mapped[int] = mapped_column(_BIG, default=0)
    completion_tokens: Mapped[int] = mapped_column(_BIG, default=0)
    rows: Mapped[int] = mapped_column(Integer, default=0)
    gpu_seconds: Mapped[float] = mapped_column(Float, default=0.0)
    trained_tokens: Mapped[int] = mapped_column(_BIG, default=0)
    figures: Mapped[str] = mapped_column(Text, default="{}")  # last stage.progressed by stage
    next_event: Mapped[int] = mapped_column(Integer, default=1)
    # When acceptance is to be tried next, and how often it was.
    next_attempt_at: Mapped[float | None] = mapped_column(Float)
    attempts: Mapped[int] = mapped_column(Integer, default=0)
    created_at: Mapped[float] = mapped_column(Float)
    sent_at: Mapped[float] = mapped_column(Float, default=0.0)  # as of its tenant
    first_training_step_at: Mapped[float | None] = mapped_column(Float)
    responses_completed_at: Mapped[float | None] = mapped_column(Float)
    ended_at: Mapped[float | None] = mapped_column(Float)

    __table_args__ = (
        UniqueConstraint("tenant_id", "idempotency_key", name="pipelines_idempotency"),
        Index("pipelines_by_age", "tenant_id", "created_at", "pipeline_id"),
        Index("pipelines_due", "state", "next_attempt_at"),
    )


class Batch(Base):
    """A numbered group of items: the unit of a lease. `state`: waiting, due, closed.

    `epoch` fences: each claim raises it, and closing is `WHERE epoch = mine`. `holder` stays when
    a worker dies, and is empty after an attempt that ended by itself.
    """

    __tablename__ = "batches"

    pipeline_id: Mapped[str] = mapped_column(ForeignKey("pipelines.pipeline_id"), primary_key=True)
    batch: Mapped[int] = mapped_column(Integer, primary_key=True)
    tenant_id: Mapped[str] = mapped_column(String(63))
    split: Mapped[str] = mapped_column(String(16))
    teacher: Mapped[str] = mapped_column(String(63))
    # Whose limits hold for it (`limits.endpoints.endpoint_of`); empty where nobody is called.
    endpoint: Mapped[str] = mapped_column(String(64), default="")
    items: Mapped[int] = mapped_column(Integer)
    prompts: Mapped[str] = mapped_column(Text)  # ObjectRef of prompts/batch-N.parquet
    state: Mapped[str] = mapped_column(String(16), default="waiting")
    epoch: Mapped[int] = mapped_column(Integer, default=0)
    attempt: Mapped[int] = mapped_column(Integer, default=0)
    holder: Mapped[str] = mapped_column(String(64), default="")
    lease_until: Mapped[float] = mapped_column(Float, default=0.0)
    reserved_microusd: Mapped[int] = mapped_column(_BIG, default=0)
    next_attempt_at: Mapped[float] = mapped_column(Float, default=0.0)
    # When it closes, by answers or not; moved on by time in which nobody could answer, but never
    # past `close_latest`.
    close_by: Mapped[float | None] = mapped_column(Float)
    close_latest: Mapped[float | None] = mapped_column(Float)
    # Attempts in a row that found the teacher away.
    away: Mapped[int] = mapped_column(Integer, default=0)
    # Attempts whose worker died, or lost its lease.
    crashes: Mapped[int] = mapped_column(Integer, default=0)
    answers: Mapped[int] = mapped_column(Integer, default=0)
    rejected: Mapped[int] = mapped_column(Integer, default=0)
    closed_at: Mapped[float | None] = mapped_column(Float)
    # The number of the provider batch that works on it; it is looked at `next_attempt_at` alone.
    provider_batch: Mapped[int | None] = mapped_column(Integer)

    __table_args__ = (Index("batches_due", "state", "next_attempt_at"),)


class Meter:
    """How many calls and tokens were taken of a minute; see `limits.rates`."""

    # From when on the limits of requests and tokens allow the next call; tokens that were taken
    # and not used, which pay for later calls.
    requests_at: Mapped[float] = mapped_column(Float, default=0.0)
    tokens_at: Mapped[float] = mapped_column(Float, default=0.0)
    tokens_unused: Mapped[int] = mapped_column(_BIG, default=0)
    # The limits by which they were counted.
    requests_per_minute: Mapped[int | None] = mapped_column(_BIG)
    tokens_per_minute: Mapped[int | None] = mapped_column(_BIG)


class TeacherEndpoint(Meter, Base):
    """What all who ask one teacher share, over tenants and replicas: its limits and its circuit.

    `clock` is the database's at the last write: one that went back takes all times along.
    """

    __tablename__ = "teacher_endpoints"

    endpoint: Mapped[str] = mapped_column(String(64), primary_key=True)
    clock: Mapped[float] = mapped_column(Float, default=0.0)
    # Calls at once; none: it was not strained, and what the specs say holds.
    concurrency: Mapped[float | None] = mapped_column(Float)
    lowered_at: Mapped[float] = mapped_column(Float, default=0.0)
    raised_at: Mapped[float] = mapped_column(Float, default=0.0)
    # Calls that ended, and those that failed, since it was judged last by them.
    ended: Mapped[int] = mapped_column(Integer, default=0)
    failed: Mapped[int] = mapped_column(Integer, default=0)
    # Until when it asked to be left alone (Retry-After).
    cool_until: Mapped[float] = mapped_column(Float, default=0.0)
    # The circuit: how often in a row the teacher was found away, and until when nobody asks.
    away: Mapped[int] = mapped_column(Integer, default=0)
    open_until: Mapped[float] = mapped_column(Float, default=0.0)


class TeacherTenant(Meter, Base):
    """What one tenant takes of an endpoint, within the limits that its own specs name."""

    __tablename__ = "teacher_tenants"

    endpoint: Mapped[str] = mapped_column(
        ForeignKey("teacher_endpoints.endpoint"), primary_key=True
    )
    tenant_id: Mapped[str] = mapped_column(String(63), primary_key=True)
    # Usual seconds a token: long prompts are not a slow teacher.
    pace: Mapped[float | None] = mapped_column(Float)


class TeacherShare(Base):
    """The part of an endpoint's calls that one attempt may make, while its lease lasts. `holder`
    is the pipeline and the batch, so the next attempt takes over the share of one that died."""

    __tablename__ = "teacher_shares"

    endpoint: Mapped[str] = mapped_column(
        ForeignKey("teacher_endpoints.endpoint"), primary_key=True
    )
    holder: Mapped[str] = mapped_column(String(80), primary_key=True)
    epoch: Mapped[int] = mapped_column(Integer)
    tenant_id: Mapped[str] = mapped_column(String(63))
    pipeline_id: Mapped[str] = mapped_column(String(63))
    calls: Mapped[int] = mapped_column(Integer)  # at once, at most
    wanted: Mapped[int] = mapped_column(Integer)
    running: Mapped[int] = mapped_column(Integer)  # at once, at most since the last report
    # What its spec says.
    most: Mapped[int] = mapped_column(Integer)
    requests_per_minute: Mapped[int | None] = mapped_column(_BIG)
    tokens_per_minute: Mapped[int | None] = mapped_column(_BIG)
    until: Mapped[float] = mapped_column(Float)


class ProviderBatch(Base):
    """Items that a provider answers by its batch API. `state`: uploading (nothing was asked yet),
    creating (the provider may have it), waiting (it has), ended. Its metadata there are the ids of
    this row, so that one whose id was lost is found again."""

    __tablename__ = "provider_batches"

    pipeline_id: Mapped[str] = mapped_column(ForeignKey("pipelines.pipeline_id"), primary_key=True)
    batch: Mapped[int] = mapped_column(Integer, primary_key=True)
    number: Mapped[int] = mapped_column(Integer, primary_key=True)
    tenant_id: Mapped[str] = mapped_column(String(63))
    state: Mapped[str] = mapped_column(String(16))
    items: Mapped[str] = mapped_column(Text)  # JSON list of the items that it is asked for
    file_id: Mapped[str] = mapped_column(String(500), default="")
    provider_id: Mapped[str] = mapped_column(String(500), default="")
    status: Mapped[str] = mapped_column(String(32), default="")  # the provider's own word
    # What was learnt of the parameters that the provider does not know, as JSON.
    form: Mapped[str] = mapped_column(Text, default="")
    created_at: Mapped[float] = mapped_column(Float)
    # Since when it is to end before it is done: by a stop, or its batch's deadline.
    unwanted_since: Mapped[float | None] = mapped_column(Float)
    # Since when the provider does not list one that it was asked to begin.
    absent_since: Mapped[float | None] = mapped_column(Float)

    __table_args__ = (Index("provider_batches_by_state", "state"),)


class CachedAnswer(Base):
    """Where the answer to a question lies that a tenant paid for: a part, and the item in it. `key`
    is the digest of all that decides the answer but its seed."""

    __tablename__ = "cached_answers"

    tenant_id: Mapped[str] = mapped_column(ForeignKey("tenants.tenant_id"), primary_key=True)
    key: Mapped[str] = mapped_column(String(64), primary_key=True)
    part: Mapped[str] = mapped_column(Text)  # ObjectRef
    item_id: Mapped[str] = mapped_column(String(80))


class Item(Base):
    """One prompt x one sample. `outcome`: pending, answered, row, rejected; each ends as one row
    or one rejection. Items rejected at acceptance have no batch."""

    __tablename__ = "items"

    pipeline_id: Mapped[str] = mapped_column(ForeignKey("pipelines.pipeline_id"), primary_key=True)
    item_id: Mapped[str] = mapped_column(String(80), primary_key=True)
    tenant_id: Mapped[str] = mapped_column(String(63))
    batch: Mapped[int | None] = mapped_column(Integer)
    outcome: Mapped[str] = mapped_column(String(16), default="pending")
    stage: Mapped[str] = mapped_column(String(16), default="")  # where it was rejected
    reason: Mapped[str] = mapped_column(String(64), default="")
    detail: Mapped[str] = mapped_column(Text, default="")
    attempts: Mapped[int] = mapped_column(Integer, default=0)
    cost_microusd: Mapped[int] = mapped_column(_BIG, default=0)

    __table_args__ = (
        Index("items_by_batch", "pipeline_id", "batch"),
        Index("items_by_outcome", "pipeline_id", "outcome", "reason"),
    )


class Charge(Base):
    """The ledger's lines: what was settled, and why. `kind`: answers (an invoice line for stored
    answers of one attempt), probe, unused (the known bill of an answer that could not be used),
    unknown (a pessimistic charge for calls whose answers were lost). Unique by what it pays for,
    so money is counted once."""

    __tablename__ = "charges"

    pipeline_id: Mapped[str] = mapped_column(ForeignKey("pipelines.pipeline_id"), primary_key=True)
    charge_id: Mapped[str] = mapped_column(String(80), primary_key=True)
    tenant_id: Mapped[str] = mapped_column(String(63))
    kind: Mapped[str] = mapped_column(String(16))
    batch: Mapped[int | None] = mapped_column(Integer)
    attempt: Mapped[int | None] = mapped_column(Integer)
    answers: Mapped[int] = mapped_column(Integer, default=0)
    cached: Mapped[int] = mapped_column(Integer, default=0)  # of these: paid for before, and free
    microusd: Mapped[int] = mapped_column(_BIG)
    detail: Mapped[str] = mapped_column(Text, default="")
    booked_at: Mapped[float] = mapped_column(Float)


class Account(Base):
    """A tenant's money that no pipeline pays: checks of a day, captured traffic. The same rule as
    a pipeline's: spent + reserved <= budget at every instant."""

    __tablename__ = "accounts"

    tenant_id: Mapped[str] = mapped_column(ForeignKey("tenants.tenant_id"), primary_key=True)
    name: Mapped[str] = mapped_column(String(63), primary_key=True)
    budget_microusd: Mapped[int] = mapped_column(_BIG)
    spent_microusd: Mapped[int] = mapped_column(_BIG, default=0)
    reserved_microusd: Mapped[int] = mapped_column(_BIG, default=0)
    created_at: Mapped[float] = mapped_column(Float)


class AccountCharge(Base):
    """The lines of an account, as a pipeline's charges are."""

    __tablename__ = "account_charges"

    tenant_id: Mapped[str] = mapped_column(String(63), primary_key=True)
    account: Mapped[str] = mapped_column(String(63), primary_key=True)
    charge_id: Mapped[str] = mapped_column(String(80), primary_key=True)
    kind: Mapped[str] = mapped_column(String(16))
    answers: Mapped[int] = mapped_column(Integer, default=0)
    microusd: Mapped[int] = mapped_column(_BIG)
    detail: Mapped[str] = mapped_column(Text, default="")
    booked_at: Mapped[float] = mapped_column(Float)

    __table_args__ = (
        ForeignKeyConstraint(["tenant_id", "account"], ["accounts.tenant_id", "accounts.name"]),
        Index("account_charges_by_age", "tenant_id", "account", "booked_at", "charge_id"),
    )


class RegisteredTeacher(Base):
    """A teacher for live traffic, by the name that callers give as `model`."""

    __tablename__ = "teachers"

    tenant_id: Mapped[str] = mapped_column(ForeignKey("tenants.tenant_id"), primary_key=True)
    name: Mapped[str] = mapped_column(String(63), primary_key=True)
    registration: Mapped[str] = mapped_column(Text)  # as posted, as canonical JSON
    created_at: Mapped[float] = mapped_column(Float)
    updated_at: Mapped[float] = mapped_column(Float)


class Tranche(Base):
    """Money that one process of the API took from a teacher's account, to serve live traffic
    without a transaction a call. `state`: open (`microusd` are reserved in the account), expired
    (its process died: `microusd` of it are still listed as an `unknown` charge). `drawn` is what it
    took and did not give back, settled or not: by that a repeated change is told from a new one."""

    __tablename__ = "tranches"

    tranche_id: Mapped[str] = mapped_column(String(63), primary_key=True)
    tenant_id: Mapped[str] = mapped_column(String(63))
    account: Mapped[str] = mapped_column(String(63))
    state: Mapped[str] = mapped_column(String(16), default="open")
    microusd: Mapped[int] = mapped_column(_BIG)
    drawn: Mapped[int] = mapped_column(_BIG)
    expires_at: Mapped[float] = mapped_column(Float)

    __table_args__ = (
        ForeignKeyConstraint(["tenant_id", "account"], ["accounts.tenant_id", "accounts.name"]),
        Index("tranches_due", "state", "expires_at"),
    )


class CapturedBatch(Base):
    """Recorded exchanges with one teacher in one object of the store; never changed."""

    __tablename__ = "captured"

    batch_id: Mapped[str] = mapped_column(String(63), primary_key=True)
    tenant_id: Mapped[str] = mapped_column(ForeignKey("tenants.tenant_id"))
    teacher: Mapped[str] = mapped_column(String(63))
    verdict_id: Mapped[str] = mapped_column(String(63))
    terms: Mapped[str] = mapped_column(String(200))
    first_at: Mapped[float] = mapped_column(Float)  # when exchanges began, by their process
    last_at: Mapped[float] = mapped_column(Float)
    records: Mapped[int] = mapped_column(Integer)  # with a whole answer
    failures: Mapped[int] = mapped_column(Integer)
    microusd: Mapped[int] = mapped_column(_BIG)
    tags: Mapped[str] = mapped_column(Text)  # {name: {value: records}}; "" when they are too many
    reasons: Mapped[str] = mapped_column(Text)  # {reason: failures}
    last_failures: Mapped[str] = mapped_column(Text)  # the newest few, without any text of theirs
    ref: Mapped[str] = mapped_column(Text)  # ObjectRef
    stored_at: Mapped[float] = mapped_column(Float)

    __table_args__ = (
        Index("captured_by_time", "tenant_id", "first_at", "batch_id"),
        Index("captured_by_age", "tenant_id", "stored_at"),
        Index("captured_by_teacher", "tenant_id", "teacher", "stored_at"),
    )


class CapturedTotal(Base):
    """The sums over all recorded exchanges with one teacher, kept with each batch, so that nobody
    reads all batches for them."""

    __tablename__ = "captured_totals"

    tenant_id: Mapped[str] = mapped_column(ForeignKey("tenants.tenant_id"), primary_key=True)
    teacher: Mapped[str] = mapped_column(String(63), primary_key=True)
    records: Mapped[int] = mapped_column(_BIG)
    failures: Mapped[int] = mapped_column(_BIG)
    microusd: Mapped[int] = mapped_column(_BIG)
    first_at: Mapped[float] = mapped_column(Float)
    last_at: Mapped[float] = mapped_column(Float)


class Outbox(Base):
    """Events to publish, written in the transaction of their effect; removed once taken."""

    __tablename__ = "outbox"

    number: Mapped[int] = mapped_column(_BIG, primary_key=True, autoincrement=True)
    tenant_id: Mapped[str] = mapped_column(String(63))
    pipeline_id: Mapped[str] = mapped_column(String(63))
    envelope: Mapped[str] = mapped_column(Text)
    created_at: Mapped[float] = mapped_column(Float)


class History(Base):
    """Every event of a pipeline, published or consumed, once, in the order it was recorded."""

    __tablename__ = "history"

    pipeline_id: Mapped[str] = mapped_column(ForeignKey("pipelines.pipeline_id"), primary_key=True)
    sequence: Mapped[int] = mapped_column(Integer, primary_key=True)
    tenant_id: Mapped[str] = mapped_column(String(63))
    event_id: Mapped[str] = mapped_column(String(63))
    type: Mapped[str] = mapped_column(String(64))
    pair: Mapped[int | None] = mapped_column(Integer)  # the step's `per` field: batch or step
    envelope: Mapped[str] = mapped_column(Text)
    recorded_at: Mapped[float] = mapped_column(Float)

    __table_args__ = (
        UniqueConstraint("pipeline_id", "event_id", name="history_once"),
        Index("history_by_type", "pipeline_id", "type", "pair"),
    )


class Redrive(Base):
    """How often a step's input was sent again, and when it will be next."""

    __tablename__ = "redrives"

    pipeline_id: Mapped[str] = mapped_column(ForeignKey("pipelines.pipeline_id"), primary_key=True)
    step: Mapped[str] = mapped_column(String(80), primary_key=True)  # "input->output"
    pair: Mapped[int] = mapped_column(Integer, primary_key=True)  # -1 where there is one
    tries: Mapped[int] = mapped_column(Integer, default=0)  # counted ones
    sent: Mapped[int] = mapped_column(Integer, default=0)
    last_at: Mapped[float] = mapped_column(Float, default=0.0)  # when it was sent last
    next_at: Mapped[float] = mapped_column(Float)


class ClockLease(Base):
    """Which clock is active."""

    __tablename__ = "clock_lease"

    name: Mapped[str] = mapped_column(String(16), primary_key=True)
    holder: Mapped[str] = mapped_column(String(64))
    until: Mapped[float] = mapped_column(Float)


class Audit(Base):
    """Who did what: append-only."""

    __tablename__ = "audit"

    number: Mapped[int] = mapped_column(_BIG, primary_key=True, autoincrement=True)
    at: Mapped[float] = mapped_column(Float)
    tenant_id: Mapped[str] = mapped_column(String(63))
    actor: Mapped[str] = mapped_column(String(80))  # key prefix, or `system`
    action: Mapped[str] = mapped_column(String(64))
    target: Mapped[str] = mapped_column(String(200))
    detail: Mapped[str] = mapped_column(Text, default="")
