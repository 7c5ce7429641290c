"""What a batch must know about outages: its last deadline, who was away, whose worker died."""

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("batches", sa.Column("close_latest", sa.Float(), nullable=True))
    for name in ("away", "crashes"):
        column = sa.Column(name, sa.Integer(), nullable=False, server_default="0")
        op.add_column("batches", column)
