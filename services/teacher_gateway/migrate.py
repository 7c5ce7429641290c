"""Bring the database to this version's tables.

    python -m services.teacher_gateway migrate

Safe to run by several processes at once and again: one of them does it, the others wait.
"""

from __future__ import annotations

from pathlib import Path

from alembic import command
from alembic.config import Config
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import Engine, text

from services.teacher_gateway.database import DatabaseUnavailable, reading, transaction

# Any number that nobody else takes as an advisory lock in this database.
_LOCK = 0x5711_1045


def migrate(engine: Engine) -> str:
    """Run what is missing, in one transaction; return the revision that holds now."""
    config = _config()
    with transaction(engine) as session:
        connection = session.connection()
        if engine.dialect.name == "postgresql":
            connection.execute(text("SELECT pg_advisory_xact_lock(:key)"), {"key": _LOCK})
        config.attributes["connection"] = connection
        command.upgrade(config, "head")
    return _head(config)


def check_migrated(engine: Engine) -> None:
    """Raise DatabaseUnavailable unless the database has exactly this version's tables."""
    with reading(engine) as session:
        found = MigrationContext.configure(session.connection()).get_current_revision()
    expected = _head(_config())
    if found != expected:
        raise DatabaseUnavailable(
            f"the database is at revision {found or 'none'}, expected {expected}: run "
            "`python -m services.teacher_gateway migrate`"
        )


def _config() -> Config:
    config = Config()
    folder = str(Path(__file__).parent / "migrations").replace("%", "%%")
    config.set_main_option("script_location", folder)
    config.set_main_option("path_separator", "os")
    return config


def _head(config: Config) -> str:
    return str(ScriptDirectory.from_config(config).get_current_head())
