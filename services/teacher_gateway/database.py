"""The gateway's SQL: one engine for each process, short transactions, the database's own clock.

SQLite when embedded (WAL, every writer takes its lock at BEGIN, each commit reaches the disk),
PostgreSQL when deployed. No transaction holds a network call inside. What the database cannot do
just now is a DatabaseUnavailable; a broken constraint stays SQLAlchemy's IntegrityError.
"""

from __future__ import annotations

import sqlite3
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from sqlalchemy import (
    Connection,
    Engine,
    create_engine,
    event,
    literal_column,
    select,
)
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.engine import make_url
from sqlalchemy.exc import ArgumentError, IntegrityError, InterfaceError, OperationalError
from sqlalchemy.exc import TimeoutError as PoolTimeout
from sqlalchemy.orm import Session

from stillhouse.chassis.errors import PermanentError, RetryableError

__all__ = [
    "DatabaseUnavailable",
    "Session",
    "insert_new",
    "now",
    "open_engine",
    "reading",
    "transaction",
]

# Writers queue for SQLite's one lock; PostgreSQL waits this long for a row.
LOCK_SECONDS = 5
_READING = "stillhouse_reading"


class DatabaseUnavailable(RetryableError):
    """The database is locked, down or full: the same transaction may succeed later."""


def open_engine(url: str) -> Engine:
    """Build the engine of a process; opens no connection. Make a new one after a fork.

    Takes `sqlite:////abs/path`, `postgresql://...` or `postgresql+psycopg://...`.
    """
    try:
        parsed = make_url(url)
    except ArgumentError as error:
        raise PermanentError(
            "the database URL does not parse: expected sqlite:////abs/path or "
            "postgresql://user:password@host/database",
            reason="settings",
        ) from error
    if parsed.drivername == "postgresql":
        parsed = parsed.set(drivername="postgresql+psycopg")
    if parsed.drivername == "postgresql+psycopg":
        return create_engine(
            parsed,
            pool_size=10,
            max_overflow=10,
            pool_timeout=LOCK_SECONDS,
            pool_pre_ping=True,
            pool_recycle=1800,
            connect_args={
                "connect_timeout": 5,
                "options": f"-c lock_timeout={LOCK_SECONDS}s "
                "-c statement_timeout=60s -c idle_in_transaction_session_timeout=60s",
            },
        )
    if parsed.get_backend_name() == "sqlite":
        if not parsed.database or parsed.database == ":memory:":
            raise PermanentError(
                "expected a file for SQLite (sqlite:////abs/path): several processes share it",
                reason="settings",
            )
        engine = create_engine(
            parsed,
            # Kept connections: closing the last one would checkpoint the log each time.
            pool_size=10,
            max_overflow=10,
            pool_timeout=LOCK_SECONDS,
            connect_args={"timeout": LOCK_SECONDS, "check_same_thread": False},
        )
        event.listen(engine, "connect", _prepare_sqlite)
        event.listen(engine, "begin", _begin_sqlite)
        return engine
    raise PermanentError(
        f"expected a database URL of sqlite or postgresql, found {parsed.drivername!r}",
        reason="settings",
    )


def _prepare_sqlite(connection: Any, _: Any) -> None:
    # The driver's own BEGIN is late and shared; ours is sent by _begin_sqlite.
    connection.isolation_level = None
    cursor = connection.cursor()
    cursor.execute(f"PRAGMA busy_timeout={LOCK_SECONDS * 1000}")
    _write_ahead(cursor)
    for pragma in ("synchronous=FULL", "foreign_keys=ON"):
        cursor.execute(f"PRAGMA {pragma}")
    cursor.close()


def _write_ahead(cursor: Any) -> None:
    """Switch to a write-ahead log. SQLite does not wait for a lock in the first switch of a new
    file, whatever its busy_timeout, so two processes that start together would meet."""
    end = time.monotonic() + LOCK_SECONDS
    while True:
        try:
            cursor.execute("PRAGMA journal_mode=WAL")
            return
        except sqlite3.OperationalError:
            if time.monotonic() > end:
                raise
            time.sleep(0.05)


def _begin_sqlite(connection: Connection) -> None:
    """A reader takes no lock; a writer takes it at once, since upgrading later can deadlock."""
    reads = connection.get_execution_options().get(_READING, False)
    connection.exec_driver_sql("BEGIN" if reads else "BEGIN IMMEDIATE")


@contextmanager
def transaction(engine: Engine) -> Iterator[Session]:
    """One short writing transaction: committed at the end, rolled back by any exception.

    Raises DatabaseUnavailable when the database cannot do it now; nothing was written then,
    unless the connection broke in the commit itself (so effects must be idempotent).
    """
    with _translated(), Session(engine, expire_on_commit=False) as session, session.begin():
        yield session


@contextmanager
def reading(engine: Engine) -> Iterator[Session]:
    """One consistent picture of the database, without a lock; nothing may be written in it."""
    options: dict[str, Any] = {_READING: True}
    if engine.dialect.name == "postgresql":
        options |= {"isolation_level": "REPEATABLE READ", "postgresql_readonly": True}
    bound = engine.execution_options(**options)
    with _translated(), Session(bound, expire_on_commit=False, autoflush=False) as session:
        yield session


def insert_new(session: Session, table: type[Any], rows: Sequence[dict[str, Any]]) -> None:
    """Insert rows of which some may be there already; those stay as they are."""
    if rows:
        dialect = postgresql if session.get_bind().dialect.name == "postgresql" else sqlite
        session.execute(dialect.insert(table).on_conflict_do_nothing(), list(rows))


def now(session: Session) -> float:
    """Seconds since the epoch by the database's clock, which all workers share."""
    if session.get_bind().dialect.name == "sqlite":
        clock = "(julianday('now') - 2440587.5) * 86400.0"
    else:
        # Not now(): that is when the transaction began, before it waited for a lock.
        clock = "extract(epoch from clock_timestamp())::double precision"
    return float(session.execute(select(literal_column(clock))).scalar_one())


@contextmanager
def _translated() -> Iterator[None]:
    try:
        yield
    except IntegrityError:
        raise
    except (OperationalError, InterfaceError, PoolTimeout) as error:
        cause = getattr(error, "orig", None) or error
        raise DatabaseUnavailable(
            f"the database cannot do it now ({str(cause).strip()}); if a table is missing, run "
            "`python -m services.teacher_gateway migrate`"
        ) from error
