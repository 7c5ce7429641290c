"""What Alembic runs: the caller's connection, so that one transaction holds lock and change."""

from alembic import context

from services.teacher_gateway.models import Base

context.configure(
    connection=context.config.attributes["connection"],
    target_metadata=Base.metadata,
    render_as_batch=True,
)
with context.begin_transaction():
    context.run_migrations()
