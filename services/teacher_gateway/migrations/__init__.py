"""The history of the gateway's tables, as Alembic revisions that run on SQLite and PostgreSQL."""
