"""Recorded traffic under kills, outages and full disks: what was durable is there once."""

from __future__ import annotations

import errno
import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
from sqlalchemy import select, update

from services.teacher_gateway.capture import allowance, keeping, memory, ship, tranches
from services.teacher_gateway.capture.registrations import account_of
from services.teacher_gateway.capture.ship import ship_abandoned
from services.teacher_gateway.capture.spool import Spool
from services.teacher_gateway.capture.tranches import expire
from services.teacher_gateway.counters import CAPTURE_FAILURES
from services.teacher_gateway.database import DatabaseUnavailable, reading, transaction
from services.teacher_gateway.keys import revoke_key
from services.teacher_gateway.models import Tranche
from stillhouse.chassis.errors import StoreUnavailable
from stillhouse.chassis.storage import ObjectStore
from stillhouse.embedded.parts import Store
from tests.support.capture import (
    HTTP,
    HeldTeacher,
    captured,
    capturing,
    held_teacher,
    lines,
    money,
    register,
    registration,
    wait_for_records,
)
from tests.support.gateway_api import Api, gateway_api
from tests.support.gateway_process import Environ, api_environment, api_process
from tests.support.teacher import Teacher, running_teacher
from tests.support.waiting import wait_for

QUESTION = [{"role": "user", "content": "Say something."}]


@pytest.fixture
def api(tmp_path: Path, store: ObjectStore, tenant: str) -> Iterator[Api]:
    with gateway_api(tmp_path, store, tenant) as found:
        yield found


@pytest.fixture
def either(tmp_path: Path, store: ObjectStore, tenant: str, database_url: str) -> Iterator[Api]:
    """On SQLite and on PostgreSQL."""
    with gateway_api(tmp_path, store, tenant, DATABASE_URL=database_url) as found:
        yield found


@pytest.fixture
def teacher(tmp_path: Path) -> Iterator[Teacher]:
    with running_teacher(tmp_path / "invoices.jsonl") as found:
        yield found


@pytest.fixture
def held() -> Iterator[HeldTeacher]:
    with held_teacher() as found:
        yield found


def ask(api: Api, address: str, **body: Any) -> httpx.Response:
    asked = {"model": "fast", "max_tokens": 24, "messages": QUESTION, **body}
    return HTTP.post(f"{address}/v1/chat/completions", json=asked, headers=api.headers())


def end_leases(api: Api) -> None:
    """As if the tranches' processes had been silent for long."""
    with transaction(api.engine) as session:
        session.execute(update(Tranche).values(expires_at=0.0))


# Processes of their own


@pytest.fixture
def environ(tmp_path: Path, store_part: Store) -> Environ:
    return api_environment(tmp_path, store_part)


@pytest.fixture
def own(environ: Environ, tmp_path: Path, tenant: str, store: ObjectStore) -> Iterator[Api]:
    """Tables and a key in the database of the processes."""
    with gateway_api(tmp_path, store, tenant) as found:
        yield found


def spooled(address: str) -> int:
    text = httpx.get(f"{address}/metrics").text
    found = re.search(r"^stillhouse_teacher_gateway_capture_spooled_total (\S+)$", text, re.M)
    return int(float(found[1])) if found else 0


def test_what_was_durable_survives_a_kill_and_is_paid_once(
    own: Api, environ: Environ, teacher: Teacher, store: ObjectStore, tmp_path: Path
) -> None:
    away = {**environ, "TEACHER_GATEWAY_STORE_ENDPOINT_URL": "http://127.0.0.1:1"}
    with api_process(away, tmp_path / "api.log") as (process, address):
        register(own, address, "fast", **registration(teacher.url))
        for number in range(5):
            assert ask(own, address, metadata={"number": str(number)}).status_code == 200
        wait_for(lambda: spooled(address), 20, "all are durable", until=lambda n: n == 5)
        process.kill()
        process.wait()
    assert captured_rows(own) == 0
    before = money(own.engine, own.tenant, "fast")
    assert (before.spent, before.reserved > 0) == (0, True), "the dead process's tranche"

    # The clock takes it for dead before anyone finds its spool: listed, then corrected.
    end_leases(own)
    assert expire(own.engine) == 1
    listed = money(own.engine, own.tenant, "fast")
    assert listed.spent == listed.listed == before.reserved

    # The first process that finds the spool dies with the object stored and nothing indexed, the
    # second one with all done and the spool still there.
    for point, records in (("captured_stored", 0), ("captured_indexed", 5)):
        assert sweep({**environ, "STILLHOUSE_CRASH_AT": point}) == 137
        assert captured_rows(own) == records
    with api_process(environ, tmp_path / "api.log") as (_, address):
        wait_for(
            lambda: list((tmp_path / "captured").glob("*/*.spool")),
            20,
            "the spool is shipped for good",
            until=lambda left: not left,
        )
        wait_for_records(own, address, 5)
    found = lines(own.engine, store, own.tenant)
    assert sorted(line["tags"]["number"] for line in found) == ["0", "1", "2", "3", "4"]
    after = money(own.engine, own.tenant, "fast")
    assert after.of("answers") == teacher.invoiced_microusd()
    assert after.spent == listed.spent, "what is known now was part of what was listed"
    assert after.listed == listed.listed - teacher.invoiced_microusd()


SWEEP = """
from services.teacher_gateway.capture.registrations import account_of
from services.teacher_gateway.capture.ship import ship_abandoned
from services.teacher_gateway.database import open_engine
from services.teacher_gateway.settings import TeacherGatewaySettings
from stillhouse.chassis.settings import load
from stillhouse.chassis.storage import open_store
told = load(TeacherGatewaySettings)
ship_abandoned(told.captured_folder, open_engine(told.database_url), open_store(told))
"""


def sweep(environ: Environ) -> int:
    """Ship dead spools in a process of its own; return how it ended."""
    return subprocess.run([sys.executable, "-c", SWEEP], env=environ, timeout=60).returncode


def captured_rows(api: Api) -> int:
    return len(lines(api.engine, api.gateway.store, api.tenant))


def test_a_call_in_flight_when_its_process_is_killed_is_listed(
    own: Api, environ: Environ, held: HeldTeacher, tmp_path: Path
) -> None:
    with (
        api_process(environ, tmp_path / "api.log") as (process, address),
        ThreadPoolExecutor(1) as pool,
    ):
        register(own, address, "fast", **registration(held.url))
        call = pool.submit(ask, own, address, max_tokens=100)
        wait_for(lambda: len(held.seen), 20, "the call is upstream")
        process.kill()
        with pytest.raises(httpx.TransportError):
            call.result(30)
    reserved = money(own.engine, own.tenant, "fast").reserved
    assert reserved > 200, "the most that the call can cost, at least"
    assert expire(own.engine) == 0, "its lease is not over yet"
    end_leases(own)
    assert expire(own.engine) == 1
    after = money(own.engine, own.tenant, "fast")
    assert (after.reserved, after.spent, after.listed) == (0, reserved, reserved)
    assert expire(own.engine) == 0


def test_sigterm_finishes_what_runs_and_brings_everything_home(
    own: Api, environ: Environ, held: HeldTeacher, store: ObjectStore, tmp_path: Path
) -> None:
    with (
        api_process(environ, tmp_path / "api.log") as (process, address),
        ThreadPoolExecutor(1) as pool,
    ):
        register(own, address, "fast", **registration(held.url))
        call = pool.submit(ask, own, address)
        wait_for(lambda: len(held.seen), 20, "the call is upstream")
        process.send_signal(signal.SIGTERM)
        wait_for(
            lambda: refuses(address), 20, "it takes no more connections", until=lambda yes: yes
        )
        held.go.set()
        assert call.result(30).status_code == 200
        process.wait(30)
    (line,) = lines(own.engine, store, own.tenant)
    assert line["failure"] is None
    after = money(own.engine, own.tenant, "fast")
    assert (after.reserved, after.of("answers")) == (0, 20)
    assert list((tmp_path / "captured").iterdir()) == [], "its spool is gone"


def refuses(address: str) -> bool:
    try:
        httpx.get(f"{address}/healthz")
    except httpx.ConnectError:
        return True
    return False


def test_a_call_that_outlasts_the_grace_is_cut_and_listed_at_its_most(
    api: Api, held: HeldTeacher, store: ObjectStore
) -> None:
    with ThreadPoolExecutor(1) as pool:
        with capturing(api, grace=1) as address:
            register(api, address, "fast", **registration(held.url))
            call = pool.submit(ask, api, address)
            wait_for(lambda: len(held.seen), 20, "the call is upstream")
        with pytest.raises(httpx.TransportError):
            raise_for(call.result(30))
    (line,) = lines(api.engine, store, api.tenant)
    assert line["failure"] == "gateway_stopped"
    after = money(api.engine, api.tenant, "fast")
    assert after.reserved == 0
    assert after.spent == after.of("unknown") > 0


def raise_for(answer: httpx.Response) -> None:
    """A call that was cut may end as a closed connection or as an answer that says so."""
    if answer.status_code >= 500:
        raise httpx.RemoteProtocolError(answer.text)


# The store, the disk, the database


class AwayStore:
    """The store, which can be away."""

    def __init__(self, inner: ObjectStore) -> None:
        self._inner = inner
        self.away = threading.Event()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    def put_new(self, key: str, data: bytes) -> Any:
        if self.away.is_set():
            raise StoreUnavailable("the store is away")
        return self._inner.put_new(key, data)


def test_an_outage_of_the_store_delays_records_and_a_long_one_drops_and_counts_them(
    api: Api, teacher: Teacher, store: ObjectStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(keeping, "_PAUSE_SECONDS", 0.1)
    away = AwayStore(store)
    away.away.set()
    settings = api.gateway.settings.model_copy(update={"capture_spool_bytes": 8000})
    before = failures_counted("spool_full")
    with capturing(api, store=away, settings=settings) as address:
        register(api, address, "fast", **registration(teacher.url))
        texts = [{"role": "user", "content": "x" * 1500}]
        statuses = [ask(api, address, messages=texts).status_code for _ in range(10)]
        assert statuses == [200] * 10, "no answer waits for the store"
        dropped = failures_counted("spool_full") - before
        assert 0 < dropped < 10
        assert captured(api, address)["records"] == 0
        away.away.clear()
        wait_for_records(api, address, 10 - dropped)
        wait_for(
            lambda: money(api.engine, api.tenant, "fast").spent,
            20,
            "dropped records are paid for too",
            until=lambda spent: spent == teacher.invoiced_microusd(),
        )
    assert money(api.engine, api.tenant, "fast").reserved == 0


def failures_counted(reason: str) -> int:
    return int(CAPTURE_FAILURES.labels(reason)._value.get())


def test_a_full_disk_drops_records_counts_them_and_mends_by_itself(
    api: Api, teacher: Teacher, monkeypatch: pytest.MonkeyPatch
) -> None:
    full = threading.Event()
    real = os.write

    def write(handle: int, data: Any) -> int:
        if full.is_set() and b"billing-teacher" in bytes(data):
            real(handle, data)  # it may take all of it, and fail at the very end
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(handle, data)

    before = failures_counted("spool_disk")
    with capturing(api) as address:
        register(api, address, "fast", **registration(teacher.url))
        assert ask(api, address).status_code == 200
        wait_for_records(api, address, 1)
        monkeypatch.setattr("services.teacher_gateway.capture.spool.os.write", write)
        full.set()
        assert ask(api, address).status_code == 200
        wait_for(lambda: failures_counted("spool_disk") - before, 20, "it is counted", until=bool)
        full.clear()
        assert ask(api, address).status_code == 200
        wait_for_records(api, address, 2)
    after = money(api.engine, api.tenant, "fast")
    assert (after.spent, after.reserved) == (teacher.invoiced_microusd(), 0)


def test_a_revoked_key_is_refused_within_seconds(
    api: Api, teacher: Teacher, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory, "FRESH_SECONDS", 0.05)
    monkeypatch.setattr(memory, "HELD_SECONDS", 0.5)
    with capturing(api) as address:
        register(api, address, "fast", **registration(teacher.url))
        assert ask(api, address).status_code == 200
        assert revoke_key(api.engine, api.key.split("_")[1])
        wait_for(
            lambda: ask(api, address).status_code,
            20,
            "the key is refused",
            until=lambda status: status == 401,
        )
        assert ask(api, address).status_code == 401


def test_a_store_that_stalls_lets_no_tranche_expire(
    api: Api, teacher: Teacher, store: ObjectStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tranches, "TTL_SECONDS", 0.3)
    stalled = StalledStore(store)
    with capturing(api, store=stalled) as address:
        try:
            register(api, address, "fast", **registration(teacher.url))
            assert ask(api, address).status_code == 200
            assert stalled.asked.wait(20), "a segment is on its way"
            since = lease_end(api)
            # It stalls for longer than the tranche lives, several times over.
            wait_for(lambda: lease_end(api), 20, "it is renewed", until=lambda at: at > since + 1)
            assert ask(api, address).status_code == 200
        finally:
            stalled.go.set()
        wait_for_records(api, address, 2)
    after = money(api.engine, api.tenant, "fast")
    assert (after.reserved, after.listed) == (0, 0)
    assert after.spent == after.of("answers") == teacher.invoiced_microusd()


def lease_end(api: Api) -> float:
    with reading(api.engine) as session:
        return session.scalars(select(Tranche.expires_at)).one()


class StalledStore:
    """The store, which takes an object when it may."""

    def __init__(self, inner: ObjectStore) -> None:
        self._inner = inner
        self.asked = threading.Event()
        self.go = threading.Event()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    def put_new(self, key: str, data: bytes) -> Any:
        self.asked.set()
        assert self.go.wait(60)
        return self._inner.put_new(key, data)


class Losing:
    """The database, as one process sees it that never hears of what it changed: each change is
    made, and its answer lost, as often as `losses` says."""

    def __init__(self, change: Any, losses: int) -> None:
        self._change = change
        self.losses = losses

    def __call__(self, *given: Any, **named: Any) -> Any:
        done = self._change(*given, **named)
        if self.losses:
            self.losses -= 1
            raise DatabaseUnavailable("the connection broke in the commit")
        return done


@pytest.mark.parametrize("change", ["take", "give_back", "settle_once"])
def test_a_change_whose_answer_was_lost_counts_once(
    either: Api, teacher: Teacher, monkeypatch: pytest.MonkeyPatch, change: str
) -> None:
    api = either
    monkeypatch.setattr(allowance, "_IDLE_SECONDS", 0.0)
    losing = Losing(getattr(tranches, change), losses=2)
    monkeypatch.setattr(tranches, change, losing)
    if change == "settle_once":  # it pays for what is not recorded
        monkeypatch.setattr(Spool, "add", lambda spool, record: False)
    with capturing(api) as address:
        register(api, address, "fast", **registration(teacher.url))
        answers = [ask(api, address).status_code for _ in range(5)]
        assert set(answers) <= {200, 503}
        wait_for(lambda: losing.losses, 20, "answers are lost", until=lambda left: left == 0)
        assert ask(api, address).status_code == 200
        wait_for(
            lambda: money(api.engine, api.tenant, "fast"),
            20,
            "all is settled, and what is not used is given back",
            until=lambda seen: (seen.spent, seen.reserved) == (teacher.invoiced_microusd(), 0),
        )
        assert ask(api, address).status_code == 200
    after = money(api.engine, api.tenant, "fast")
    assert (after.reserved, after.listed) == (0, 0)
    assert after.spent == teacher.invoiced_microusd()
    end_leases(api)
    expire(api.engine)
    assert money(api.engine, api.tenant, "fast") == after, "nothing was left to be listed"
    with reading(api.engine) as session:
        assert session.scalars(select(Tranche)).all() == []


def test_a_bill_that_cannot_be_settled_holds_up_no_other(
    api: Api, teacher: Teacher, monkeypatch: pytest.MonkeyPatch
) -> None:
    settle = tranches.settle_once

    def settle_but_one(engine: Any, account: Any, bill: Any, charge_id: str) -> int:
        if account.name == "teacher-bad":
            raise LookupError("a defect")
        return settle(engine, account, bill, charge_id)

    monkeypatch.setattr(tranches, "settle_once", settle_but_one)
    monkeypatch.setattr(Spool, "add", lambda spool, record: False)  # so records are dropped
    with capturing(api) as address:
        for name in ("bad", "fast"):
            register(api, address, name, **registration(teacher.url))
            assert ask(api, address, model=name).status_code == 200
        wait_for(
            lambda: money(api.engine, api.tenant, "fast").spent,
            20,
            "the second one is settled",
            until=lambda spent: spent > 0,
        )


def test_money_of_a_take_that_was_not_answered_goes_back_by_itself(
    either: Api, teacher: Teacher, monkeypatch: pytest.MonkeyPatch
) -> None:
    losing = Losing(tranches.take, losses=1)
    monkeypatch.setattr(tranches, "take", losing)
    with capturing(either) as address:
        register(either, address, "fast", **registration(teacher.url))
        assert ask(either, address).status_code == 503
        assert losing.losses == 0
        wait_for(
            lambda: money(either.engine, either.tenant, "fast").reserved,
            20,
            "nobody holds it",
            until=lambda reserved: reserved == 0,
        )
    after = money(either.engine, either.tenant, "fast")
    assert (after.spent, after.reserved) == (0, 0)


def test_a_repeated_change_of_a_tranche_changes_nothing_more(either: Api) -> None:
    with capturing(either) as address:
        register(either, address, "fast", **registration("http://127.0.0.1:9/v1"))
    account = account_of(either.tenant, "fast")

    def reserved() -> int:
        return money(either.engine, either.tenant, "fast").reserved

    def take(drawn: int, wish: int) -> int:
        return tranches.take(
            either.engine, account, "tr-1", drawn=drawn, need=0, wish=wish
        ).microusd

    assert (take(0, 1000), take(0, 5000), reserved()) == (1000, 1000, 1000)
    assert (take(1000, 500), take(1000, 9), reserved()) == (500, 500, 1500)
    for _ in range(2):
        assert tranches.give_back(either.engine, account, "tr-1", drawn=900)
        assert reserved() == 900
    for _ in range(2):  # the second time there is nothing of it any more
        assert tranches.give_back(either.engine, account, "tr-1", drawn=0)
        assert reserved() == 0
    with pytest.raises(tranches.TrancheExpired):
        take(900, 100)


def test_a_tranche_that_expires_while_its_process_lives_is_replaced(
    api: Api, teacher: Teacher, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tranches, "TTL_SECONDS", 0.3)
    with capturing(api) as address:
        register(api, address, "fast", **registration(teacher.url))
        assert ask(api, address).status_code == 200
        wait_for_records(api, address, 1)
        monkeypatch.setattr(tranches, "TTL_SECONDS", 3600)  # its process is not heard of
        end_leases(api)
        assert expire(api.engine) == 1
        monkeypatch.setattr(tranches, "TTL_SECONDS", 0.3)
        for _ in range(3):
            assert ask(api, address).status_code == 200
        wait_for_records(api, address, 4)
    after = money(api.engine, api.tenant, "fast")
    assert after.reserved == 0
    assert after.of("answers") == teacher.invoiced_microusd()
    assert after.spent == after.of("answers") + after.listed


def test_a_teacher_that_bills_more_than_it_was_asked_for_never_overspends(
    api: Api, held: HeldTeacher
) -> None:
    held.go.set()
    held.body["usage"] = {"prompt_tokens": 10, "completion_tokens": 10_000}
    with capturing(api) as address:
        register(api, address, "fast", **registration(held.url, budget_usd=0.002))
        assert ask(api, address).status_code == 200
        wait_for_records(api, address, 1)
        refused = ask(api, address)
        assert refused.status_code in (402, 429)
    after = money(api.engine, api.tenant, "fast")
    assert (after.spent, after.budget, after.reserved) == (2000, 2000, 0)


def test_what_a_stopping_process_cannot_ship_is_shipped_by_the_clock(
    api: Api, teacher: Teacher, store: ObjectStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    away = AwayStore(store)
    away.away.set()
    folder = api.gateway.settings.captured_folder
    with capturing(api, store=away) as address:
        register(api, address, "fast", **registration(teacher.url))
        assert ask(api, address).status_code == 200
        wait_for(lambda: list(folder.glob("*/*.spool")), 20, "it is on the disk")
        assert ship_abandoned(folder, api.engine, store) == 0, "its process lives"
    assert captured_rows(api) == 0
    kept = money(api.engine, api.tenant, "fast")
    billed = teacher.invoiced_microusd()
    assert kept.reserved == billed, "what is not used was given back"

    monkeypatch.setattr(ship, "SWEEP_SECONDS", 0.01)
    ended = threading.Event()
    clock = threading.Thread(target=ship.sweep_until, args=(ended, folder, api.engine, store))
    clock.start()
    try:
        wait_for(lambda: captured_rows(api), 20, "it is in the store")
        wait_for(lambda: not list(folder.iterdir()), 20, "its spool is gone")
    finally:
        ended.set()
        clock.join(20)
    assert captured_rows(api) == 1
    after = money(api.engine, api.tenant, "fast")
    assert (after.reserved, after.of("answers")) == (0, billed)
