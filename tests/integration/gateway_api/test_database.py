"""Tables, transactions and keys on SQLite and on PostgreSQL."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from pydantic import SecretStr
from sqlalchemy import Engine, select, text
from sqlalchemy.exc import DBAPIError, IntegrityError

from services.teacher_gateway import database
from services.teacher_gateway.database import (
    DatabaseUnavailable,
    now,
    open_engine,
    reading,
    transaction,
)
from services.teacher_gateway.keys import (
    Caller,
    KeyRefused,
    authenticate,
    create_key,
    list_keys,
    revoke_key,
)
from services.teacher_gateway.migrate import check_migrated, migrate
from services.teacher_gateway.models import ApiKey, Audit, Base, Tenant
from stillhouse.chassis.errors import PermanentError

PEPPER = SecretStr("a pepper for tests only")


@pytest.fixture
def engine(database_url: str) -> Iterator[Engine]:
    found = open_engine(database_url)
    yield found
    found.dispose()


@pytest.fixture
def tables(engine: Engine) -> Engine:
    migrate(engine)
    return engine


def test_migrations_make_exactly_the_tables_of_the_models(engine: Engine) -> None:
    with pytest.raises(DatabaseUnavailable, match="revision none, expected"):
        check_migrated(engine)
    assert migrate(engine) == migrate(engine)
    check_migrated(engine)
    with engine.connect() as connection:
        differences = compare_metadata(MigrationContext.configure(connection), Base.metadata)
    assert differences == []


def test_several_processes_may_migrate_at_once(database_url: str) -> None:
    errors: list[Exception] = []

    def run() -> None:
        mine = open_engine(database_url)
        try:
            migrate(mine)
        except Exception as error:
            errors.append(error)
        finally:
            mine.dispose()

    threads = [threading.Thread(target=run) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []


def test_a_transaction_is_whole_or_nothing(tables: Engine) -> None:
    def broken() -> None:
        with transaction(tables) as session:
            session.add(Tenant(tenant_id="a", created_at=1))
            session.flush()
            raise RuntimeError

    with pytest.raises(RuntimeError):
        broken()
    with transaction(tables) as session:
        session.add(Tenant(tenant_id="b", created_at=1))
    with reading(tables) as session:
        assert list(session.scalars(select(Tenant.tenant_id))) == ["b"]
    with pytest.raises(IntegrityError), transaction(tables) as session:
        session.add(Tenant(tenant_id="b", created_at=2))


def test_the_clock_is_the_databases_and_moves_inside_a_transaction(tables: Engine) -> None:
    with transaction(tables) as session:
        first = now(session)
        time.sleep(0.05)
        second = now(session)
    assert abs(first - time.time()) < 5
    assert 0.03 < second - first < 5


def test_readers_do_not_wait_for_a_writer(tables: Engine) -> None:
    with transaction(tables) as writing:
        writing.add(Tenant(tenant_id="a", created_at=1))
        writing.flush()
        started = time.monotonic()
        with reading(tables) as session:
            assert session.scalars(select(Tenant)).all() == []
        assert time.monotonic() - started < 1


def test_a_reading_session_sees_one_picture(tables: Engine) -> None:
    with reading(tables) as session:
        assert session.scalars(select(Tenant)).all() == []
        with transaction(tables) as writing:
            writing.add(Tenant(tenant_id="a", created_at=1))
        assert session.scalars(select(Tenant)).all() == []


def test_writers_that_read_first_wait_for_each_other(tables: Engine) -> None:
    """A writer that took its lock only when it wrote would find its picture out of date."""
    with transaction(tables) as session:
        session.add(Tenant(tenant_id="a", created_at=0))
    locked = select(Tenant).where(Tenant.tenant_id == "a").with_for_update()
    begun = threading.Event()

    def count() -> None:
        begun.set()
        with transaction(tables) as session:
            session.execute(locked).scalar_one().created_at += 1

    with ThreadPoolExecutor(1) as pool:
        with transaction(tables) as session:
            found = session.execute(locked).scalar_one()
            other = pool.submit(count)
            assert begun.wait(60)
            time.sleep(0.3)  # for as long the other one may try
            found.created_at += 1
        other.result(60)
    with reading(tables) as session:
        assert session.scalars(select(Tenant.created_at)).one() == 2


def test_a_lock_that_is_held_too_long_is_told_as_unavailable(
    database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(database, "LOCK_SECONDS", 1)
    impatient = open_engine(database_url)
    migrate(impatient)
    with transaction(impatient) as session:
        session.add(Tenant(tenant_id="a", created_at=1))
    with transaction(impatient) as holder:
        holder.execute(text("UPDATE tenants SET created_at = 2"))
        with pytest.raises(DatabaseUnavailable), transaction(impatient) as other:
            other.execute(text("UPDATE tenants SET created_at = 3"))
    impatient.dispose()


def test_a_database_that_is_away_is_told_as_unavailable() -> None:
    away = open_engine("postgresql://nobody@127.0.0.1:1/none")
    with pytest.raises(DatabaseUnavailable, match="cannot do it now"), reading(away) as session:
        now(session)


@pytest.mark.parametrize("url", ["mysql://x/y", "sqlite://", "not a url"])
def test_another_kind_of_database_is_refused(url: str) -> None:
    with pytest.raises(PermanentError, match=r"expected|does not parse"):
        open_engine(url)


def test_sqlite_commits_reach_the_disk_and_keys_are_foreign(tables: Engine) -> None:
    if tables.dialect.name != "sqlite":
        pytest.skip("these are switches of SQLite")
    with reading(tables) as session:
        found = [
            session.execute(text(f"PRAGMA {name}")).scalar_one()
            for name in ("journal_mode", "synchronous", "foreign_keys", "busy_timeout")
        ]
    assert found == ["wal", 2, 1, 5000]


# API keys


def test_a_key_opens_its_own_tenant_until_it_is_revoked(tables: Engine) -> None:
    one = create_key(tables, PEPPER, "acme")
    other = create_key(tables, PEPPER, "acme")
    prefix = one.split("_")[1]
    assert authenticate(tables, PEPPER, f"Bearer {one}") == Caller("acme", prefix)
    assert revoke_key(tables, prefix)
    assert revoke_key(tables, prefix)
    assert not revoke_key(tables, "0" * 12)
    with pytest.raises(KeyRefused):
        authenticate(tables, PEPPER, f"Bearer {one}")
    assert authenticate(tables, PEPPER, f"bearer {other}").tenant_id == "acme"
    assert [key.revoked_at is None for key in list_keys(tables)].count(True) == 1
    with reading(tables) as session:
        actions = list(session.scalars(select(Audit.action).order_by(Audit.number)))
    assert actions == ["key.created", "key.created", "key.revoked"]


def test_an_expired_key_is_refused(tables: Engine) -> None:
    key = create_key(tables, PEPPER, "acme", days=0.1 / 86_400)
    time.sleep(0.2)
    with pytest.raises(KeyRefused):
        authenticate(tables, PEPPER, f"Bearer {key}")


def test_wrong_keys_are_refused_alike(tables: Engine) -> None:
    key = create_key(tables, PEPPER, "acme")
    _, prefix, secret = key.split("_")
    wrong = [
        None,
        "",
        key,
        f"Basic {key}",
        f"Bearer sth_{prefix}_{'0' * 64}",
        f"Bearer sth_{'0' * 12}_{secret}",
        f"Bearer {key}0",
        f"Bearer {key[:-1]}",
        f"Bearer {key.upper()}",
        f"Bearer sth_{prefix}'--_{secret}",
    ]
    for header in wrong:
        with pytest.raises(KeyRefused):
            authenticate(tables, PEPPER, header)
    with pytest.raises(KeyRefused):
        authenticate(tables, SecretStr("another pepper altogether"), f"Bearer {key}")


def test_no_secret_lies_in_the_database(tables: Engine) -> None:
    key = create_key(tables, PEPPER, "acme")
    secret = key.split("_")[2]
    with reading(tables) as session:
        for table in Base.metadata.sorted_tables:
            for row in session.execute(select(table)):
                assert secret not in repr(row)
        assert session.scalars(select(ApiKey.secret_hmac)).one() != secret


@pytest.mark.parametrize("name", ["Acme/../x", "acme\n"])
def test_a_tenant_that_could_not_be_a_key_of_the_store_is_refused(
    tables: Engine, name: str
) -> None:
    with pytest.raises(PermanentError, match="small letters, digits and hyphens"):
        create_key(tables, PEPPER, name)


def test_writing_in_a_reading_session_is_not_kept(tables: Engine) -> None:
    try:
        with reading(tables) as session:
            session.add(Tenant(tenant_id="a", created_at=1))
            session.flush()
    except (DBAPIError, DatabaseUnavailable):
        assert tables.dialect.name == "postgresql"
    with reading(tables) as session:
        assert session.scalars(select(Tenant)).all() == []
