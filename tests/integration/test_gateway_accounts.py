"""Money that no pipeline pays: accounts under races, on SQLite and PostgreSQL."""

from __future__ import annotations

import re
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from sqlalchemy import Engine, func, select

from services.teacher_gateway.accounts import checks_account, open_account
from services.teacher_gateway.database import (
    DatabaseUnavailable,
    open_engine,
    reading,
    transaction,
)
from services.teacher_gateway.ledger import AccountId, Line, available, correct, reserve, settle
from services.teacher_gateway.models import Account, AccountCharge, Base, Tenant

ACCOUNT = AccountId("t-1", "checks-2026-01-01")


@pytest.fixture
def engine(database_url: str) -> Iterator[Engine]:
    made = open_engine(database_url)
    Base.metadata.create_all(made)
    with transaction(made) as session:
        session.add_all([Tenant(tenant_id=name, created_at=0.0) for name in ("t-1", "t-2")])
    yield made
    made.dispose()


def row(engine: Engine, account: AccountId = ACCOUNT) -> Account:
    with reading(engine) as session:
        found = session.get(Account, (account.tenant_id, account.name))
        assert found is not None
        return found


def booked(engine: Engine) -> int:
    with reading(engine) as session:
        return int(session.scalar(select(func.coalesce(func.sum(AccountCharge.microusd), 0))) or 0)


def test_64_callers_on_the_last_cent_are_admitted_exactly_as_often_as_it_pays_for(
    engine: Engine,
) -> None:
    left, estimate = 10_000, 700
    with transaction(engine) as session:
        open_account(session, ACCOUNT, 50_000)
        assert settle(session, ACCOUNT, [Line("earlier", "probe", 50_000 - left)], release=0)
    admitted: list[int] = []
    refused: list[int] = []
    errors: list[BaseException] = []
    start = threading.Barrier(64)

    def call(number: int) -> None:
        start.wait()
        line = Line(f"check:{number}", "unknown", estimate)
        while True:
            try:
                with transaction(engine) as session:
                    fits = settle(session, ACCOUNT, [line], release=0)
                (admitted if fits else refused).append(number)
                return
            except DatabaseUnavailable:
                continue  # it waited for SQLite's one writer too long, and had no effect
            except BaseException as error:
                errors.append(error)
                return

    threads = [threading.Thread(target=call, args=(n,)) for n in range(64)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert errors == []
    assert len(admitted) == left // estimate
    assert len(admitted) + len(refused) == 64
    found = row(engine)
    assert found.spent_microusd == booked(engine) == 50_000 - left + estimate * len(admitted)
    assert found.reserved_microusd == 0


def test_a_tranche_is_settled_by_lines_and_given_back(engine: Engine) -> None:
    with transaction(engine) as session:
        open_account(session, ACCOUNT, 1_000)
        assert reserve(session, ACCOUNT, 800)
        assert not reserve(session, ACCOUNT, 201)
        lines = [Line("call:1", "answers", 300, answers=1), Line("call:2", "unknown", 200)]
        assert settle(session, ACCOUNT, lines, release=800)
        assert settle(session, ACCOUNT, lines, release=0)  # again: booked already
        correct(session, ACCOUNT, "call:2", "unused", 50, "now known")
        assert available(session, ACCOUNT) == 650
    assert (row(engine).spent_microusd, row(engine).reserved_microusd) == (350, 0)
    assert booked(engine) == 350


def test_accounts_of_two_tenants_are_apart(engine: Engine) -> None:
    other = AccountId("t-2", ACCOUNT.name)
    with transaction(engine) as session:
        open_account(session, ACCOUNT, 100)
        open_account(session, other, 100)
        assert settle(session, ACCOUNT, [Line("call", "answers", 100)], release=0)
        assert settle(session, other, [Line("call", "answers", 40)], release=0)
    assert (row(engine).spent_microusd, row(engine, other).spent_microusd) == (100, 40)


def test_a_budget_may_change_and_is_never_below_what_is_spent(engine: Engine) -> None:
    with transaction(engine) as session:
        open_account(session, ACCOUNT, 1_000)
        assert settle(session, ACCOUNT, [Line("call", "answers", 600)], release=0)
        assert reserve(session, ACCOUNT, 100)
        open_account(session, ACCOUNT, 500)
    assert row(engine).budget_microusd == 700
    with transaction(engine) as session:
        assert not reserve(session, ACCOUNT, 1)
        open_account(session, ACCOUNT, 2_000)
        assert reserve(session, ACCOUNT, 1_300)
    assert row(engine).budget_microusd == 2_000


def test_checks_of_a_day_have_an_account_with_the_settings_budget(tmp_path: Path) -> None:
    engine = open_engine(f"sqlite:///{tmp_path / 'gateway.sqlite3'}")
    Base.metadata.create_all(engine)
    with transaction(engine) as session:
        session.add(Tenant(tenant_id="t-1", created_at=0.0))
        session.flush()
        account = checks_account(session, "t-1", 2.5)
        assert available(session, account) == 2_500_000
    assert re.fullmatch(r"checks-\d{4}-\d{2}-\d{2}", account.name)
    engine.dispose()
