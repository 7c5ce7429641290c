"""The first tables."""

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None

# Ids that a database counts up: SQLite does so only for INTEGER.
BIG = sa.BigInteger().with_variant(sa.Integer(), "sqlite")


def upgrade() -> None:
    op.create_table(
        "audit",
        sa.Column("number", BIG, autoincrement=True, nullable=False),
        sa.Column("at", sa.Float(), nullable=False),
        sa.Column("tenant_id", sa.String(length=63), nullable=False),
        sa.Column("actor", sa.String(length=80), nullable=False),
        sa.Column("action", sa.String(length=64), nullable=False),
        sa.Column("target", sa.String(length=200), nullable=False),
        sa.Column("detail", sa.Text(), nullable=False),
        sa.PrimaryKeyConstraint("number"),
    )
    op.create_table(
        "clock_lease",
        sa.Column("name", sa.String(length=16), nullable=False),
        sa.Column("holder", sa.String(length=64), nullable=False),
        sa.Column("until", sa.Float(), nullable=False),
        sa.PrimaryKeyConstraint("name"),
    )
    op.create_table(
        "outbox",
        sa.Column("number", BIG, autoincrement=True, nullable=False),
        sa.Column("tenant_id", sa.String(length=63), nullable=False),
        sa.Column("pipeline_id", sa.String(length=63), nullable=False),
        sa.Column("envelope", sa.Text(), nullable=False),
        sa.Column("created_at", sa.Float(), nullable=False),
        sa.PrimaryKeyConstraint("number"),
    )
    op.create_table(
        "tenants",
        sa.Column("tenant_id", sa.String(length=63), nullable=False),
        sa.Column("created_at", sa.Float(), nullable=False),
        sa.Column("sent_at", sa.Float(), nullable=False),
        sa.PrimaryKeyConstraint("tenant_id"),
    )
    op.create_table(
        "api_keys",
        sa.Column("prefix", sa.String(length=16), nullable=False),
        sa.Column("tenant_id", sa.String(length=63), nullable=False),
        sa.Column("secret_hmac", sa.String(length=64), nullable=False),
        sa.Column("created_at", sa.Float(), nullable=False),
        sa.Column("expires_at", sa.Float(), nullable=True),
        sa.Column("revoked_at", sa.Float(), nullable=True),
        sa.ForeignKeyConstraint(
            ["tenant_id"],
            ["tenants.tenant_id"],
        ),
        sa.PrimaryKeyConstraint("prefix"),
    )
    op.create_table(
        "accounts",
        sa.Column("tenant_id", sa.String(length=63), nullable=False),
        sa.Column("name", sa.String(length=63), nullable=False),
        sa.Column("budget_microusd", BIG, nullable=False),
        sa.Column("spent_microusd", BIG, nullable=False),
        sa.Column("reserved_microusd", BIG, nullable=False),
        sa.Column("created_at", sa.Float(), nullable=False),
        sa.ForeignKeyConstraint(
            ["tenant_id"],
            ["tenants.tenant_id"],
        ),
        sa.PrimaryKeyConstraint("tenant_id", "name"),
    )
    op.create_table(
        "account_charges",
        sa.Column("tenant_id", sa.String(length=63), nullable=False),
        sa.Column("account", sa.String(length=63), nullable=False),
        sa.Column("charge_id", sa.String(length=80), nullable=False),
        sa.Column("kind", sa.String(length=16), nullable=False),
        sa.Column("answers", sa.Integer(), nullable=False),
        sa.Column("microusd", BIG, nullable=False),
        sa.Column("detail", sa.Text(), nullable=False),
        sa.Column("booked_at", sa.Float(), nullable=False),
        sa.ForeignKeyConstraint(
            ["tenant_id", "account"],
            ["accounts.tenant_id", "accounts.name"],
        ),
        sa.PrimaryKeyConstraint("tenant_id", "account", "charge_id"),
    )
    op.create_index(
        "account_charges_by_age",
        "account_charges",
        ["tenant_id", "account", "booked_at", "charge_id"],
        unique=False,
    )
    op.create_table(
        "teachers",
        sa.Column("tenant_id", sa.String(length=63), nullable=False),
        sa.Column("name", sa.String(length=63), nullable=False),
        sa.Column("registration", sa.Text(), nullable=False),
        sa.Column("created_at", sa.Float(), nullable=False),
        sa.Column("updated_at", sa.Float(), nullable=False),
        sa.ForeignKeyConstraint(
            ["tenant_id"],
            ["tenants.tenant_id"],
        ),
        sa.PrimaryKeyConstraint("tenant_id", "name"),
    )
    op.create_table(
        "tranches",
        sa.Column("tranche_id", sa.String(length=63), nullable=False),
        sa.Column("tenant_id", sa.String(length=63), nullable=False),
        sa.Column("account", sa.String(length=63), nullable=False),
        sa.Column("state", sa.String(length=16), nullable=False),
        sa.Column("microusd", BIG, nullable=False),
        sa.Column("drawn", BIG, nullable=False),
        sa.Column("expires_at", sa.Float(), nullable=False),
        sa.ForeignKeyConstraint(
            ["tenant_id", "account"],
            ["accounts.tenant_id", "accounts.name"],
        ),
        sa.PrimaryKeyConstraint("tranche_id"),
    )
    op.create_index("tranches_due", "tranches", ["state", "expires_at"], unique=False)
    op.create_table(
        "captured",
        sa.Column("batch_id", sa.String(length=63), nullable=False),
        sa.Column("tenant_id", sa.String(length=63), nullable=False),
        sa.Column("teacher", sa.String(length=63), nullable=False),
        sa.Column("verdict_id", sa.String(length=63), nullable=False),
        sa.Column("terms", sa.String(length=200), nullable=False),
        sa.Column("first_at", sa.Float(), nullable=False),
        sa.Column("last_at", sa.Float(), nullable=False),
        sa.Column("records", sa.Integer(), nullable=False),
        sa.Column("failures", sa.Integer(), nullable=False),
        sa.Column("microusd", BIG, nullable=False),
        sa.Column("tags", sa.Text(), nullable=False),
        sa.Column("reasons", sa.Text(), nullable=False),
        sa.Column("last_failures", sa.Text(), nullable=False),
        sa.Column("ref", sa.Text(), nullable=False),
        sa.Column("stored_at", sa.Float(), nullable=False),
        sa.ForeignKeyConstraint(
            ["tenant_id"],
            ["tenants.tenant_id"],
        ),
        sa.PrimaryKeyConstraint("batch_id"),
    )
    op.create_index(
        "captured_by_time", "captured", ["tenant_id", "first_at", "batch_id"], unique=False
    )
    op.create_index("captured_by_age", "captured", ["tenant_id", "stored_at"], unique=False)
    op.create_index(
        "captured_by_teacher", "captured", ["tenant_id", "teacher", "stored_at"], unique=False
    )
    op.create_table(
        "captured_totals",
        sa.Column("tenant_id", sa.String(length=63), nullable=False),
        sa.Column("teacher", sa.String(length=63), nullable=False),
        sa.Column("records", BIG, nullable=False),
        sa.Column("failures", BIG, nullable=False),
        sa.Column("microusd", BIG, nullable=False),
        sa.Column("first_at", sa.Float(), nullable=False),
        sa.Column("last_at", sa.Float(), nullable=False),
        sa.ForeignKeyConstraint(
            ["tenant_id"],
            ["tenants.tenant_id"],
        ),
        sa.PrimaryKeyConstraint("tenant_id", "teacher"),
    )
    op.create_table(
        "pipelines",
        sa.Column("pipeline_id", sa.String(length=63), nullable=False),
        sa.Column("tenant_id", sa.String(length=63), nullable=False),
        sa.Column("name", sa.String(length=63), nullable=False),
        sa.Column("idempotency_key", sa.String(length=200), nullable=True),
        sa.Column("body_sha256", sa.String(length=64), nullable=False),
        sa.Column("spec", sa.Text(), nullable=False),
        sa.Column("traceparent", sa.String(length=55), nullable=False),
        sa.Column("state", sa.String(length=16), nullable=False),
        sa.Column("collect", sa.String(length=16), nullable=False),
        sa.Column("build", sa.String(length=16), nullable=False),
        sa.Column("train", sa.String(length=16), nullable=False),
        sa.Column("evaluate", sa.String(length=16), nullable=False),
        sa.Column("release", sa.String(length=16), nullable=False),
        sa.Column("reason", sa.Text(), nullable=False),
        sa.Column("stopping", sa.String(length=16), nullable=False),
        sa.Column("dataset_id", sa.String(length=63), nullable=True),
        sa.Column("training_id", sa.String(length=63), nullable=True),
        sa.Column("student_id", sa.String(length=63), nullable=True),
        sa.Column("batches", sa.Integer(), nullable=False),
        sa.Column("heldout_batches", sa.Integer(), nullable=False),
        sa.Column("items", sa.Integer(), nullable=False),
        sa.Column("budget_microusd", BIG, nullable=False),
        sa.Column("spent_microusd", BIG, nullable=False),
        sa.Column("reserved_microusd", BIG, nullable=False),
        sa.Column("prompt_tokens", BIG, nullable=False),
        sa.Column("completion_tokens", BIG, nullable=False),
        sa.Column("rows", sa.Integer(), nullable=False),
        sa.Column("gpu_seconds", sa.Float(), nullable=False),
        sa.Column("trained_tokens", BIG, nullable=False),
        sa.Column("figures", sa.Text(), nullable=False),
        sa.Column("next_event", sa.Integer(), nullable=False),
        sa.Column("next_attempt_at", sa.Float(), nullable=True),
        sa.Column("attempts", sa.Integer(), nullable=False),
        sa.Column("created_at", sa.Float(), nullable=False),
        sa.Column("sent_at", sa.Float(), nullable=False),
        sa.Column("first_training_step_at", sa.Float(), nullable=True),
        sa.Column("responses_completed_at", sa.Float(), nullable=True),
        sa.Column("ended_at", sa.Float(), nullable=True),
        sa.ForeignKeyConstraint(
            ["tenant_id"],
            ["tenants.tenant_id"],
        ),
        sa.PrimaryKeyConstraint("pipeline_id"),
        sa.UniqueConstraint("tenant_id", "idempotency_key", name="pipelines_idempotency"),
    )
    op.create_index(
        "pipelines_by_age", "pipelines", ["tenant_id", "created_at", "pipeline_id"], unique=False
    )
    op.create_index("pipelines_due", "pipelines", ["state", "next_attempt_at"], unique=False)
    op.create_table(
        "batches",
        sa.Column("pipeline_id", sa.String(length=63), nullable=False),
        sa.Column("batch", sa.Integer(), nullable=False),
        sa.Column("tenant_id", sa.String(length=63), nullable=False),
        sa.Column("split", sa.String(length=16), nullable=False),
        sa.Column("teacher", sa.String(length=63), nullable=False),
        sa.Column("endpoint", sa.String(length=64), nullable=False),
        sa.Column("items", sa.Integer(), nullable=False),
        sa.Column("prompts", sa.Text(), nullable=False),
        sa.Column("state", sa.String(length=16), nullable=False),
        sa.Column("epoch", sa.Integer(), nullable=False),
        sa.Column("attempt", sa.Integer(), nullable=False),
        sa.Column("holder", sa.String(length=64), nullable=False),
        sa.Column("lease_until", sa.Float(), nullable=False),
        sa.Column("reserved_microusd", BIG, nullable=False),
        sa.Column("next_attempt_at", sa.Float(), nullable=False),
        sa.Column("close_by", sa.Float(), nullable=True),
        sa.Column("close_latest", sa.Float(), nullable=True),
        sa.Column("away", sa.Integer(), nullable=False),
        sa.Column("crashes", sa.Integer(), nullable=False),
        sa.Column("answers", sa.Integer(), nullable=False),
        sa.Column("rejected", sa.Integer(), nullable=False),
        sa.Column("closed_at", sa.Float(), nullable=True),
        sa.Column("provider_batch", sa.Integer(), nullable=True),
        sa.ForeignKeyConstraint(
            ["pipeline_id"],
            ["pipelines.pipeline_id"],
        ),
        sa.PrimaryKeyConstraint("pipeline_id", "batch"),
    )
    op.create_index("batches_due", "batches", ["state", "next_attempt_at"], unique=False)
    op.create_table(
        "provider_batches",
        sa.Column("pipeline_id", sa.String(length=63), nullable=False),
        sa.Column("batch", sa.Integer(), nullable=False),
        sa.Column("number", sa.Integer(), nullable=False),
        sa.Column("tenant_id", sa.String(length=63), nullable=False),
        sa.Column("state", sa.String(length=16), nullable=False),
        sa.Column("items", sa.Text(), nullable=False),
        sa.Column("file_id", sa.String(length=500), nullable=False),
        sa.Column("provider_id", sa.String(length=500), nullable=False),
        sa.Column("status", sa.String(length=32), nullable=False),
        sa.Column("form", sa.Text(), nullable=False),
        sa.Column("created_at", sa.Float(), nullable=False),
        sa.Column("unwanted_since", sa.Float(), nullable=True),
        sa.Column("absent_since", sa.Float(), nullable=True),
        sa.ForeignKeyConstraint(
            ["pipeline_id"],
            ["pipelines.pipeline_id"],
        ),
        sa.PrimaryKeyConstraint("pipeline_id", "batch", "number"),
    )
    op.create_index("provider_batches_by_state", "provider_batches", ["state"], unique=False)
    op.create_table(
        "cached_answers",
        sa.Column("tenant_id", sa.String(length=63), nullable=False),
        sa.Column("key", sa.String(length=64), nullable=False),
        sa.Column("part", sa.Text(), nullable=False),
        sa.Column("item_id", sa.String(length=80), nullable=False),
        sa.ForeignKeyConstraint(
            ["tenant_id"],
            ["tenants.tenant_id"],
        ),
        sa.PrimaryKeyConstraint("tenant_id", "key"),
    )
    op.create_table(
        "charges",
        sa.Column("pipeline_id", sa.String(length=63), nullable=False),
        sa.Column("charge_id", sa.String(length=80), nullable=False),
        sa.Column("tenant_id", sa.String(length=63), nullable=False),
        sa.Column("kind", sa.String(length=16), nullable=False),
        sa.Column("batch", sa.Integer(), nullable=True),
        sa.Column("attempt", sa.Integer(), nullable=True),
        sa.Column("answers", sa.Integer(), nullable=False),
        sa.Column("cached", sa.Integer(), nullable=False),
        sa.Column("microusd", BIG, nullable=False),
        sa.Column("detail", sa.Text(), nullable=False),
        sa.Column("booked_at", sa.Float(), nullable=False),
        sa.ForeignKeyConstraint(
            ["pipeline_id"],
            ["pipelines.pipeline_id"],
        ),
        sa.PrimaryKeyConstraint("pipeline_id", "charge_id"),
    )
    op.create_table(
        "history",
        sa.Column("pipeline_id", sa.String(length=63), nullable=False),
        sa.Column("sequence", sa.Integer(), nullable=False),
        sa.Column("tenant_id", sa.String(length=63), nullable=False),
        sa.Column("event_id", sa.String(length=63), nullable=False),
        sa.Column("type", sa.String(length=64), nullable=False),
        sa.Column("pair", sa.Integer(), nullable=True),
        sa.Column("envelope", sa.Text(), nullable=False),
        sa.Column("recorded_at", sa.Float(), nullable=False),
        sa.ForeignKeyConstraint(
            ["pipeline_id"],
            ["pipelines.pipeline_id"],
        ),
        sa.PrimaryKeyConstraint("pipeline_id", "sequence"),
        sa.UniqueConstraint("pipeline_id", "event_id", name="history_once"),
    )
    op.create_index("history_by_type", "history", ["pipeline_id", "type", "pair"], unique=False)
    op.create_table(
        "items",
        sa.Column("pipeline_id", sa.String(length=63), nullable=False),
        sa.Column("item_id", sa.String(length=80), nullable=False),
        sa.Column("tenant_id", sa.String(length=63), nullable=False),
        sa.Column("batch", sa.Integer(), nullable=True),
        sa.Column("outcome", sa.String(length=16), nullable=False),
        sa.Column("stage", sa.String(length=16), nullable=False),
        sa.Column("reason", sa.String(length=64), nullable=False),
        sa.Column("detail", sa.Text(), nullable=False),
        sa.Column("attempts", sa.Integer(), nullable=False),
        sa.Column("cost_microusd", BIG, nullable=False),
        sa.ForeignKeyConstraint(
            ["pipeline_id"],
            ["pipelines.pipeline_id"],
        ),
        sa.PrimaryKeyConstraint("pipeline_id", "item_id"),
    )
    op.create_index("items_by_batch", "items", ["pipeline_id", "batch"], unique=False)
    op.create_index("items_by_outcome", "items", ["pipeline_id", "outcome", "reason"], unique=False)
    op.create_table(
        "redrives",
        sa.Column("pipeline_id", sa.String(length=63), nullable=False),
        sa.Column("step", sa.String(length=80), nullable=False),
        sa.Column("pair", sa.Integer(), nullable=False),
        sa.Column("tries", sa.Integer(), nullable=False),
        sa.Column("sent", sa.Integer(), nullable=False),
        sa.Column("last_at", sa.Float(), nullable=False),
        sa.Column("next_at", sa.Float(), nullable=False),
        sa.ForeignKeyConstraint(
            ["pipeline_id"],
            ["pipelines.pipeline_id"],
        ),
        sa.PrimaryKeyConstraint("pipeline_id", "step", "pair"),
    )
    op.create_table(
        "teacher_endpoints",
        sa.Column("endpoint", sa.String(length=64), nullable=False),
        sa.Column("clock", sa.Float(), nullable=False),
        sa.Column("requests_at", sa.Float(), nullable=False),
        sa.Column("tokens_at", sa.Float(), nullable=False),
        sa.Column("tokens_unused", BIG, nullable=False),
        sa.Column("requests_per_minute", BIG, nullable=True),
        sa.Column("tokens_per_minute", BIG, nullable=True),
        sa.Column("concurrency", sa.Float(), nullable=True),
        sa.Column("lowered_at", sa.Float(), nullable=False),
        sa.Column("raised_at", sa.Float(), nullable=False),
        sa.Column("ended", sa.Integer(), nullable=False),
        sa.Column("failed", sa.Integer(), nullable=False),
        sa.Column("cool_until", sa.Float(), nullable=False),
        sa.Column("away", sa.Integer(), nullable=False),
        sa.Column("open_until", sa.Float(), nullable=False),
        sa.PrimaryKeyConstraint("endpoint"),
    )
    op.create_table(
        "teacher_tenants",
        sa.Column("endpoint", sa.String(length=64), nullable=False),
        sa.Column("tenant_id", sa.String(length=63), nullable=False),
        sa.Column("requests_at", sa.Float(), nullable=False),
        sa.Column("tokens_at", sa.Float(), nullable=False),
        sa.Column("tokens_unused", BIG, nullable=False),
        sa.Column("requests_per_minute", BIG, nullable=True),
        sa.Column("tokens_per_minute", BIG, nullable=True),
        sa.Column("pace", sa.Float(), nullable=True),
        sa.ForeignKeyConstraint(
            ["endpoint"],
            ["teacher_endpoints.endpoint"],
        ),
        sa.PrimaryKeyConstraint("endpoint", "tenant_id"),
    )
    op.create_table(
        "teacher_shares",
        sa.Column("endpoint", sa.String(length=64), nullable=False),
        sa.Column("holder", sa.String(length=80), nullable=False),
        sa.Column("epoch", sa.Integer(), nullable=False),
        sa.Column("tenant_id", sa.String(length=63), nullable=False),
        sa.Column("pipeline_id", sa.String(length=63), nullable=False),
        sa.Column("calls", sa.Integer(), nullable=False),
        sa.Column("wanted", sa.Integer(), nullable=False),
        sa.Column("running", sa.Integer(), nullable=False),
        sa.Column("most", sa.Integer(), nullable=False),
        sa.Column("requests_per_minute", BIG, nullable=True),
        sa.Column("tokens_per_minute", BIG, nullable=True),
        sa.Column("until", sa.Float(), nullable=False),
        sa.ForeignKeyConstraint(
            ["endpoint"],
            ["teacher_endpoints.endpoint"],
        ),
        sa.PrimaryKeyConstraint("endpoint", "holder"),
    )


def downgrade() -> None:
    op.drop_table("teacher_shares")
    op.drop_table("teacher_tenants")
    op.drop_table("teacher_endpoints")
    op.drop_table("cached_answers")
    op.drop_table("provider_batches")
    op.drop_table("redrives")
    op.drop_table("items")
    op.drop_table("history")
    op.drop_table("charges")
    op.drop_table("batches")
    op.drop_table("pipelines")
    op.drop_table("captured_totals")
    op.drop_table("captured")
    op.drop_table("tranches")
    op.drop_table("teachers")
    op.drop_table("account_charges")
    op.drop_table("accounts")
    op.drop_table("api_keys")
    op.drop_table("tenants")
    op.drop_table("outbox")
    op.drop_table("clock_lease")
    op.drop_table("audit")
