"""A teacher's limits over processes, tenants and replicas, on each database and over real HTTP."""

from __future__ import annotations

import dataclasses
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import and_, delete, select, text, update

from services.teacher_gateway.database import now, reading, transaction
from services.teacher_gateway.dispatch import find_due, mark_enqueued, reap
from services.teacher_gateway.limits import endpoints
from services.teacher_gateway.limits.endpoints import count_call, endpoint_of
from services.teacher_gateway.limits.rates import LATE, MINUTE
from services.teacher_gateway.limits.reports import Grant, Report
from services.teacher_gateway.limits.shared import Holder, SharedLimits
from services.teacher_gateway.limits.strain import Seen
from services.teacher_gateway.models import (
    Batch,
    Pipeline,
    TeacherEndpoint,
    TeacherShare,
    TeacherTenant,
)
from services.teacher_gateway.probe import probe_teacher
from services.teacher_gateway.teachers.outcomes import Retry
from stillhouse.chassis.storage import ObjectStore
from stillhouse.contracts.spec import Teacher as TeacherSpec
from stillhouse.embedded.parts import Store
from tests.support.gateway import FAST, Where, World, collect_in_process, make_world
from tests.support.teacher import Fault, Teacher, running_teacher
from tests.support.waiting import wait_for

# Attempts that wait for one another, however long a loaded machine takes to start them.
PATIENT = dataclasses.replace(FAST, attempt=40, lease=45, job=50, visibility=200)
# Shares that last as long as a test, however slow.
STEADY = dataclasses.replace(FAST, lease_ttl=600)
# SQLite's clock tells milliseconds.
TICK = 0.002
AWAY = Retry("teacher_error", "status 503", away=True)


@pytest.fixture
def teacher(tmp_path: Path) -> Iterator[Teacher]:
    with running_teacher(tmp_path / "invoices.jsonl") as running:
        yield running


@pytest.fixture
def sqlite_url(tmp_path: Path) -> str:
    return f"sqlite:///{tmp_path / 'gateway.sqlite3'}"


def endpoint(world: World) -> TeacherEndpoint:
    with reading(world.engine) as session:
        found = session.get(TeacherEndpoint, world.batch().endpoint)
        if found is None:
            raise LookupError("nobody asked this teacher yet")
        return found


def change_endpoint(world: World, **values: Any) -> None:
    with transaction(world.engine) as session:
        session.execute(
            update(TeacherEndpoint)
            .where(TeacherEndpoint.endpoint == world.batch().endpoint)
            .values(**values)
        )


def change_tenant(world: World, tenant: str, **values: Any) -> None:
    with transaction(world.engine) as session:
        session.execute(
            update(TeacherTenant).where(TeacherTenant.tenant_id == tenant).values(**values)
        )


def one_key(*worlds: World) -> str:
    """Let tenants share an endpoint, as with one key; return it."""
    name = worlds[0].batch().endpoint
    for world in worlds:
        world.set(Batch, endpoint=name)
    return name


def shares(world: World) -> dict[str, TeacherShare]:
    with reading(world.engine) as session:
        return {share.holder: share for share in session.execute(select(TeacherShare)).scalars()}


def collect_all_at_once(where: Where, world: World, starts: float = 0.0) -> float:
    """Each batch in a process of its own, all at the same time; then what is left, one by one.
    Return when the first call was allowed: `starts` seconds after all processes were there."""
    name = world.batch().endpoint
    with transaction(world.engine) as session:
        session.add(TeacherEndpoint(endpoint=name))
        session.flush()
        # Somebody else has all the calls until then.
        gate = {"epoch": 1, "tenant_id": "x", "pipeline_id": "x", "running": 0, "wanted": 0}
        session.add(
            TeacherShare(endpoint=name, holder="gate", calls=99, most=99, until=9e12, **gate)
        )
    threads = [
        threading.Thread(target=collect_in_process, args=(where, world, number))
        for number in range(world.batches)
    ]
    for thread in threads:
        thread.start()
    wait_for(lambda: len(shares(world)), 30, "all attempts", until=lambda n: n == len(threads) + 1)
    with transaction(world.engine) as session:
        first = now(session) + starts
        session.execute(delete(TeacherShare).where(TeacherShare.holder == "gate"))
        session.execute(update(TeacherEndpoint).values(requests_at=first))
    for thread in threads:
        thread.join(60)
    for number in range(world.batches):
        world.collect_until_closed(number)
        assert set(world.outcomes(number)) == {"answered"}
    return first


# Over processes, measured by the teacher


def test_processes_together_make_no_more_calls_a_minute_than_the_spec_allows(
    store: ObjectStore, store_part: Store, database_url: str, tenant: str, teacher: Teacher
) -> None:
    per_minute = 900
    limits = {"concurrency": 8, "timeout_seconds": 2, "requests_per_minute": per_minute}
    world = make_world(
        store,
        database_url,
        tenant,
        teacher.url,
        batches=3,
        items=7,
        teacher={"limits": limits},
        times=PATIENT,
    )
    first = collect_all_at_once(Where(database_url, store_part), world, starts=0.3)
    arrived = sorted(request["at"] for request in teacher.requests)
    assert len(arrived) == 21
    # The n-th permit is for this time at the earliest, and no call comes before its permit.
    for number, at in enumerate(arrived):
        assert at >= first + number * (MINUTE + LATE) / per_minute - TICK
    world.engine.dispose()


def test_processes_together_have_no_more_calls_at_once_than_the_spec_allows(
    store: ObjectStore, store_part: Store, database_url: str, tenant: str, teacher: Teacher
) -> None:
    teacher.latency = 0.1
    world = make_world(
        store,
        database_url,
        tenant,
        teacher.url,
        batches=3,
        items=8,
        concurrency=3,
        times=PATIENT,
    )
    collect_all_at_once(Where(database_url, store_part), world)
    assert teacher.most_at_once <= 3
    assert len(teacher.requests) == 24
    assert shares(world) == {}  # all were given back
    world.engine.dispose()


def test_tokens_are_taken_by_the_worst_case_and_corrected_by_the_usage(
    store: ObjectStore, sqlite_url: str, tenant: str, teacher: Teacher
) -> None:
    per_minute = 60_000
    limits = {"concurrency": 4, "timeout_seconds": 2, "tokens_per_minute": per_minute}
    world = make_world(store, sqlite_url, tenant, teacher.url, items=12, teacher={"limits": limits})
    worst = sum(asked.worst_tokens for asked in world.asked[0])
    began = time.time()
    world.collect_until_closed()
    used = {i.request_id: i.prompt_tokens + i.completion_tokens for i in teacher.invoices()}
    total = 0
    for request in sorted(teacher.requests, key=lambda request: request["at"]):
        allowed = (request["at"] - began) * per_minute / (MINUTE + LATE)
        assert total <= allowed + TICK * per_minute
        total += used[request["id"]]
    row = endpoint(world)
    assert 0 < total < worst
    # All that was taken is used up, given back, or kept for later calls.
    taken = (row.tokens_at - began) * per_minute / (MINUTE + LATE)
    assert taken >= total - TICK * per_minute


def test_a_pause_that_one_was_asked_for_is_kept_by_the_next_attempt_elsewhere(
    store: ObjectStore, sqlite_url: str, tenant: str, teacher: Teacher
) -> None:
    teacher.script(Fault("rate_limited", match="[0/", attempts=(1,), retry_after=1.5))
    world = make_world(store, sqlite_url, tenant, teacher.url, batches=2, items=5, concurrency=4)
    refused = threading.Thread(target=world.collect)
    refused.start()
    wait_for(lambda: endpoint(world).cool_until > 0, 10, "the pause, where all see it")
    world.collect(1)  # it knows of the pause by the database alone
    refused.join(20)
    at = [request["at"] for request in teacher.requests]
    # Four were under way before the first reply.
    assert min(at[4:]) >= at[0] + 1.5
    assert any(request["marker"].startswith("1/") for request in teacher.requests)
    for batch in range(2):
        world.collect_until_closed(batch)
        assert world.outcomes(batch) == {"answered": 5}


def test_the_share_of_a_killed_worker_comes_back_after_its_lease(
    store: ObjectStore, store_part: Store, sqlite_url: str, tenant: str, teacher: Teacher
) -> None:
    world = make_world(store, sqlite_url, tenant, teacher.url, batches=2, items=4, concurrency=2)
    where = Where(sqlite_url, store_part)
    assert collect_in_process(where, world, crash_at="answer_received") == 137
    (dead,) = shares(world).values()
    assert dead.calls == 2
    world.collect_until_closed(1)
    first = min(r["at"] for r in teacher.requests if r["marker"].startswith("1/"))
    assert first >= dead.until - TICK
    assert world.outcomes(1) == {"answered": 4}
    assert shares(world) == {}


def test_the_next_attempt_at_a_batch_takes_its_share_over_at_once(
    store: ObjectStore, store_part: Store, sqlite_url: str, tenant: str, teacher: Teacher
) -> None:
    world = make_world(store, sqlite_url, tenant, teacher.url, items=4, concurrency=2)
    where = Where(sqlite_url, store_part)
    assert collect_in_process(where, world, crash_at="answer_received") == 137
    with transaction(world.engine) as session:
        session.execute(update(TeacherShare).values(until=9e12))  # as if it lived
    world.collect_until_closed()
    assert world.outcomes() == {"answered": 4}


# Shares, pauses and clocks, one exchange after the other


def teacher_spec(url: str | None = "https://llm.example.com/v1", **fields: Any) -> TeacherSpec:
    return TeacherSpec.model_validate(
        {
            "name": "t",
            "url": url,
            "model": "m",
            "terms": "own-weights",
            "usd_per_million": {"input": 1, "output": 1},
            "api_key": {"env": "LLM_KEY"},
            **fields,
        }
    )


class Attempts:
    """Attempts of several tenants at one teacher."""

    def __init__(self, world: World, **limits: int) -> None:
        self.world = world
        self.limits = {"concurrency": 8, **limits}

    def by(
        self, tenant: str, batch: int = 0, epoch: int = 1, pipeline: str = "", **limits: int
    ) -> SharedLimits:
        holder = Holder(tenant, pipeline or f"pl-{tenant}", batch, epoch)
        spec = teacher_spec(limits={**self.limits, **limits})
        return SharedLimits(self.world.engine, STEADY, spec, holder)

    def row(self) -> TeacherEndpoint:
        with reading(self.world.engine) as session:
            found = session.get(TeacherEndpoint, endpoint_of(teacher_spec(), "any"))
            assert found is not None
            return found

    def own(self, tenant: str) -> TeacherTenant:
        with reading(self.world.engine) as session:
            found = session.get(TeacherTenant, (endpoint_of(teacher_spec(), "any"), tenant))
            assert found is not None
            return found


@pytest.fixture
def attempts(store: ObjectStore, database_url: str, tenant: str) -> Iterator[Attempts]:
    world = make_world(store, database_url, tenant, "http://127.0.0.1:9/v1", items=1)
    yield Attempts(world)
    world.engine.dispose()


def report(running: int = 0, holds: int | None = None, **more: Any) -> Report:
    held = running if holds is None else holds
    return Report(**{"running": running, "holds": held, "peak": running, "wanted": 8, **more})


def test_two_tenants_get_equal_shares_and_never_more_than_all(attempts: Attempts) -> None:
    big, more, small = attempts.by("big"), attempts.by("big", 1), attempts.by("small")
    assert big.exchange(report()).calls == 8
    assert more.exchange(report()).calls == 0  # all are held
    assert small.exchange(report()).calls == 0
    # The first one is told to hold fewer; until it says that it does, nobody gets them.
    assert big.exchange(report(running=8)).calls == 2
    assert small.exchange(report()).calls == 0
    assert big.exchange(report(running=5, holds=5)).calls == 2
    assert small.exchange(report()).calls == 3
    assert big.exchange(report(running=2)).calls == 2
    assert small.exchange(report(running=3)).calls == 4
    assert more.exchange(report()).calls == 2
    # What one gives back goes to the others.
    small.leave(report())
    assert big.exchange(report(running=2)).calls == 4
    assert more.exchange(report(running=2)).calls == 4


def test_a_share_that_its_holder_did_not_renew_is_another_s(attempts: Attempts) -> None:
    gone, other = attempts.by("a"), attempts.by("b")
    assert gone.exchange(report()).calls == 8
    with transaction(attempts.world.engine) as session:
        session.execute(update(TeacherShare).values(until=1.0))
    assert other.exchange(report()).calls == 8
    # It comes back with calls that still run: nobody can take those away, and it gets no others.
    assert gone.exchange(report(running=3, holds=8)).calls == 0
    assert other.exchange(report(running=8)).calls == 4


def test_a_later_attempt_at_the_same_batch_takes_its_share_and_the_old_one_gets_none(
    attempts: Attempts,
) -> None:
    old, new = attempts.by("a", epoch=1), attempts.by("a", epoch=2)
    assert old.exchange(report()).calls == 8
    assert new.exchange(report()).calls == 8
    assert old.exchange(report(running=8)).calls == 0
    old.leave(report())
    assert new.exchange(report(running=8)).calls == 8


def test_what_a_spec_says_bounds_its_own_tenant_alone(attempts: Attempts) -> None:
    free, bound = attempts.by("a"), attempts.by("b", concurrency=1, requests_per_minute=30)
    assert bound.exchange(report(wanted=1)).calls == 1
    assert free.exchange(report()).calls == 7
    for _ in range(2):
        grant = free.exchange(report(running=7, permits=(1, 1, 1)))
        assert (grant.calls, grant.limited) == (7, False)
    grant = bound.exchange(report(running=1, permits=(1, 1, 1)))
    assert (grant.calls, grant.limited, len(grant.permits)) == (1, True, 1)
    # Its other pipelines are bound as well: each names what the endpoint bears.
    same = attempts.by("b", pipeline="pl-more")
    grant = same.exchange(report(permits=(1, 1, 1)))
    assert (grant.calls, grant.limited, len(grant.permits)) == (0, True, 0)


def test_a_tenant_s_slow_rate_makes_nobody_else_wait(attempts: Attempts) -> None:
    slow, fast = attempts.by("a", requests_per_minute=1), attempts.by("b", requests_per_minute=6100)
    assert len(slow.exchange(report(permits=(1,))).permits) == 1
    assert slow.exchange(report(running=1, permits=(1,))).next_permit > 50
    (leave,) = fast.exchange(report(permits=(1,))).permits
    assert leave.after < 1
    # And the slow one does not get more by it.
    assert slow.exchange(report(running=1, permits=(1,))).next_permit > 50


def test_all_tenants_together_ask_no_more_often_than_the_one_that_may_the_most(
    attempts: Attempts,
) -> None:
    first, second = (attempts.by(name, requests_per_minute=1) for name in "ab")
    assert len(first.exchange(report(permits=(1,))).permits) == 1
    grant = second.exchange(report(permits=(1,)))
    assert grant.permits == ()
    assert 50 < grant.next_permit <= 61


def test_a_reply_is_counted_from_when_the_clock_was_read_and_not_from_the_wait_for_it(
    attempts: Attempts,
) -> None:
    calls = attempts.by("a", requests_per_minute=61)
    calls.exchange(report())
    found: list[Grant] = []
    asking = threading.Thread(target=lambda: found.append(calls.exchange(report(holds=8))))
    with transaction(attempts.world.engine) as session:
        endpoints.hold(session, calls.endpoint)
        asking.start()
        time.sleep(0.2)
        freed = time.monotonic()
    asking.join(20)
    read = found[0].read
    assert read is not None
    assert freed <= read[0] <= read[1]


def test_strain_of_one_cuts_the_calls_of_all(attempts: Attempts) -> None:
    first, second = attempts.by("a"), attempts.by("b")
    first.exchange(report())
    strained = Seen(ended=4, rate_limited=4, failed=4, youngest_strained=0.0)
    assert first.exchange(report(holds=8, seen=strained)).calls == 5
    assert second.exchange(report()).calls == 0
    assert first.exchange(report(holds=2)).calls in (2, 3)
    assert second.exchange(report()).calls in (2, 3)
    assert sum(share.calls for share in shares(attempts.world).values()) <= 5


def test_a_jump_of_a_process_s_clock_changes_nothing(
    attempts: Attempts, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = attempts.by("a", requests_per_minute=1)
    calls.exchange(report())
    assert len(calls.exchange(report(permits=(1,))).permits) == 1
    calls.exchange(report(cool=200.0))
    before, clock = attempts.row(), time.time
    for hours in (-1, 1):
        monkeypatch.setattr(time, "time", lambda hours=hours: clock() + hours * 3600)
        grant = calls.exchange(report(permits=(1,)))
        after = attempts.row()
        assert (after.requests_at, after.cool_until) == (before.requests_at, before.cool_until)
        assert 0 < grant.cool <= 200
        assert 0 <= after.clock - before.clock < 100


@pytest.mark.parametrize("hours", [-1, 1])
def test_a_database_s_clock_that_jumps_neither_opens_nor_locks(
    hours: int, attempts: Attempts, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = attempts.by("a", requests_per_minute=1), attempts.by("b")
    first.exchange(report())
    assert len(first.exchange(report(holds=8, permits=(1, 1))).permits) == 1
    first.away(Retry("teacher_error", "status 503", after=200, away=True))
    first.exchange(report(holds=8, cool=100.0))
    before = attempts.row()
    monkeypatch.setattr(
        "services.teacher_gateway.limits.endpoints.now",
        lambda session: now(session) + hours * 3600,
    )
    grant = first.exchange(report(holds=8, permits=(1,)))
    row = attempts.row()
    if hours < 0:
        # All goes on as it was: what was left to wait, who holds what, and that it is away.
        assert 0 < grant.cool <= 100
        assert row.open_until - row.clock == pytest.approx(200, abs=60)
        assert row.requests_at - row.clock == pytest.approx(61, abs=60)
        assert second.exchange(report()).calls == 0
    else:
        # An hour went by: pauses are over, and one call may start as after any idle hour.
        assert grant.cool == 0
        assert row.open_until == before.open_until < row.clock
        assert len(grant.permits) == 1
    with transaction(attempts.world.engine) as session:
        session.execute(update(TeacherEndpoint).values(cool_until=0.0))
    grant = first.exchange(report(permits=(1,)))
    assert grant.permits == ()
    assert grant.next_permit <= 61


def test_a_probe_does_not_wait_for_its_turn_but_counts(attempts: Attempts) -> None:
    calls = attempts.by("a", requests_per_minute=1)
    calls.exchange(report())
    probe = teacher_spec(limits={"concurrency": 8})
    for _ in range(3):
        assert count_call(attempts.world.engine, probe, "a", 50) == 0
        assert count_call(attempts.world.engine, probe, "b", 50) == 0
    # The strictest limit of its tenant holds: a minute for each of its three.
    grant = calls.exchange(report(holds=8, permits=(1,)))
    assert grant.permits == ()
    assert 120 < grant.next_permit <= 183
    calls.exchange(report(holds=8, cool=50.0))
    before = attempts.own("a").requests_at
    assert 40 < count_call(attempts.world.engine, probe, "a", 50) <= 50
    assert attempts.own("a").requests_at == before


def test_a_probe_in_a_pause_is_put_off_and_costs_no_attempt(
    store: ObjectStore, sqlite_url: str, tenant: str, teacher: Teacher
) -> None:
    world = make_world(store, sqlite_url, tenant, teacher.url, items=1, collect="waiting")
    with transaction(world.engine) as session:
        until = now(session) + 50
        session.add(TeacherEndpoint(endpoint=world.batch().endpoint, cool_until=until))
    probe_teacher(world.context, world.pipeline_id)
    pipeline = world.pipeline()
    assert (teacher.requests, pipeline.attempts, world.charges()) == ([], 0, [])
    assert pipeline.next_attempt_at == pytest.approx(until, abs=1)
    change_endpoint(world, cool_until=0.0)
    world.set(Pipeline, next_attempt_at=0.0)
    probe_teacher(world.context, world.pipeline_id)
    assert (len(teacher.requests), world.pipeline().collect) == (1, "running")


# Which endpoint it is


def test_an_endpoint_is_what_the_provider_counts_by() -> None:
    known = endpoint_of(teacher_spec(), "a")
    assert len(known) == 64
    for url in ("https://LLM.example.com/v1/", "https://llm.example.com:443/v1"):
        assert endpoint_of(teacher_spec(url), "b") == known  # the key's account, whoever asks
    others = [
        teacher_spec("https://llm.example.com/v2"),
        teacher_spec("http://llm.example.com/v1"),
        teacher_spec(model="m2"),
        teacher_spec(api_key={"env": "OTHER_KEY"}),
        teacher_spec(batch_api=True),
    ]
    assert len({known, *(endpoint_of(other, "a") for other in others)}) == 6
    nobody_s = teacher_spec(api_key=None)
    assert endpoint_of(nobody_s, "a") != endpoint_of(nobody_s, "b")
    local = teacher_spec(url=None, weights="file:/weights", api_key=None)
    assert endpoint_of(local, "a") == ""


# The circuit, and who is sent next


def due(world: World, at_once: int = 99, window: int = 8) -> list[tuple[str, int]]:
    with reading(world.engine) as session:
        found = find_due(session, FAST, window=window, at_once=at_once)
    return [(d.pipeline_id, d.batch) for d in found]


def test_a_circuit_opens_lets_one_batch_try_and_closes(
    store: ObjectStore, database_url: str, tenant: str, teacher: Teacher
) -> None:
    world = make_world(store, database_url, tenant, teacher.url, batches=2, items=2)
    name = world.pipeline_id
    assert due(world) == [(name, 0), (name, 1)]
    with reading(world.engine) as session:
        clock = now(session)
    world.set(Batch, batch=1, close_by=clock + 100, close_latest=clock + 1000)
    teacher.script(Fault("status", status=503))
    world.collect(0)
    row = endpoint(world)
    assert row.away == 1
    assert row.open_until > 0
    # The pause is left out of the deadlines of those that wait for it.
    waits = world.batch(1).close_by
    assert waits is not None
    assert 0.8 * FAST.batch_backoff <= waits - clock - 100 <= 1.2 * FAST.batch_backoff + TICK
    change_endpoint(world, open_until=9e12)
    world.expire(0)
    assert due(world) == []
    world.set(Batch, batch=1, close_by=1.0)
    assert due(world) == [(name, 1)]  # its own deadline ends a batch all the same
    world.set(Batch, batch=1, close_by=clock + 100)

    change_endpoint(world, open_until=0.0)
    assert due(world) == [(name, 0)]  # one tries, the others wait for it
    world.set(Batch, batch=0, state="due", lease_until=9e12)
    assert due(world) == []
    world.expire(0)
    asked = len(teacher.requests)
    world.collect(0)
    assert len(teacher.requests) == asked + 1  # the question goes first, and nothing else
    assert endpoint(world).away == 2

    teacher.forgive()
    change_endpoint(world, open_until=0.0)
    world.set(Batch, batch=1, away=2, next_attempt_at=9e12)
    world.expire(0)
    world.collect(0)
    assert world.outcomes(0) == {"answered": 2}
    assert (endpoint(world).away, endpoint(world).open_until) == (0, 0.0)
    assert due(world) == [(name, 1)]  # it need not wait for its own pause
    world.engine.dispose()


def test_the_pause_of_an_open_circuit_grows_and_failures_meanwhile_are_the_same_one(
    attempts: Attempts,
) -> None:
    calls, first = attempts.by("a"), FAST.batch_backoff
    for number in range(4):
        calls.away(AWAY)
        row = attempts.row()
        pause = row.open_until - row.clock
        assert 0.8 * first * 2**number - TICK <= pause <= 1.2 * first * 2**number + TICK
        with transaction(attempts.world.engine) as session:
            session.execute(update(TeacherEndpoint).values(open_until=row.clock + 60))
        calls.away(AWAY)  # of an attempt that was under way
        assert attempts.row().open_until == row.clock + 60
        with transaction(attempts.world.engine) as session:
            session.execute(update(TeacherEndpoint).values(open_until=0.0))
    row = attempts.row()
    assert row.away == 4
    calls.away(Retry("teacher_rate_limited", "429", after=500, away=True))
    row = attempts.row()
    assert row.open_until - row.clock == pytest.approx(500, abs=1)
    assert calls.exchange(report()).suspect
    assert not calls.exchange(report(heard=True)).suspect


def test_a_teacher_that_asked_for_a_pause_or_whose_rate_is_used_up_is_sent_nothing(
    store: ObjectStore, sqlite_url: str, tenant: str
) -> None:
    world = make_world(store, sqlite_url, tenant, "http://127.0.0.1:9/v1", batches=2, items=1)
    name = world.batch().endpoint
    with transaction(world.engine) as session:
        session.add(TeacherEndpoint(endpoint=name))
        session.flush()
        session.add(TeacherTenant(endpoint=name, tenant_id=tenant))
        session.add(TeacherTenant(endpoint=name, tenant_id="another"))
        clock = now(session)
    for column in ("cool_until", "open_until"):
        change_endpoint(world, **{column: clock + 600})
        assert due(world) == []
        change_endpoint(world, **{column: 0.0})
        assert len(due(world)) == 2
    for column in ("requests_at", "tokens_at"):
        for whose, sent in ((tenant, 0), ("another", 2)):
            change_tenant(world, whose, **{column: clock + 600})
            assert len(due(world)) == sent
            change_tenant(world, whose, **{column: 0.0})
    change_endpoint(world, concurrency=1.4)  # the second would wait for a call
    assert len(due(world)) == 1


def test_a_tenant_takes_no_more_places_than_its_spec_allows_calls(
    store: ObjectStore, sqlite_url: str, tenant: str
) -> None:
    url = "http://127.0.0.1:9/v1"
    narrow = make_world(store, sqlite_url, tenant, url, batches=2, items=1, concurrency=1)
    wide = make_world(store, sqlite_url, f"{tenant}b", url, batches=2, items=1)
    one_key(narrow, wide)
    assert due(wide, at_once=4) == [
        (narrow.pipeline_id, 0),
        (wide.pipeline_id, 0),
        (wide.pipeline_id, 1),
    ]


def test_a_teacher_that_hangs_leaves_a_place_to_others(
    store: ObjectStore, sqlite_url: str, tenant: str
) -> None:
    hangs = make_world(store, sqlite_url, tenant, "http://127.0.0.1:9/v1", batches=2, items=1)
    assert len(due(hangs, at_once=2)) == 2  # alone it has all places
    other = make_world(
        store, sqlite_url, f"{tenant}b", "http://127.0.0.1:10/v1", batches=2, items=1
    )
    other.set(Batch, next_attempt_at=9e12)
    assert due(hangs, at_once=2) == [(hangs.pipeline_id, 0)]
    hangs.set(Batch, batch=0, state="due", lease_until=9e12)
    assert due(hangs, at_once=2) == []
    other.set(Batch, next_attempt_at=0.0)
    assert due(hangs, at_once=2) == [(other.pipeline_id, 0)]


def test_tenants_take_turns_and_in_them_pipelines(
    store: ObjectStore, sqlite_url: str, tenant: str
) -> None:
    url = "http://127.0.0.1:9/v1"
    first, second, small = (
        make_world(store, sqlite_url, f"{tenant}{letter}", url, batches=2, items=1)
        for letter in "abc"
    )
    # Two pipelines of one tenant, and one of another.
    second.set(Pipeline, tenant_id=first.resolved.tenant_id)
    second.set(Batch, tenant_id=first.resolved.tenant_id)
    assert due(first, at_once=5) == [
        (first.pipeline_id, 0),
        (small.pipeline_id, 0),
        (second.pipeline_id, 0),
        (small.pipeline_id, 1),
        (first.pipeline_id, 1),
    ]


def serve(world: World, rounds: int) -> list[str]:
    """One place for all: send one batch after the other; return whose they were."""
    sent: list[str] = []
    for _ in range(rounds):
        with transaction(world.engine) as session:
            (best,) = find_due(session, FAST, window=8, at_once=1)
            mark_enqueued(session, best, FAST)
        assert due(world, at_once=1) == []
        with transaction(world.engine) as session:
            session.execute(
                update(Batch)
                .where(Batch.pipeline_id == best.pipeline_id, Batch.batch == best.batch)
                .values(state="closed")
            )
        sent.append(best.pipeline_id)
    return sent


def test_whoever_waits_the_longest_is_served_next_and_not_the_oldest(
    store: ObjectStore, database_url: str, tenant: str
) -> None:
    url = "http://127.0.0.1:9/v1"
    old, middle, young = (
        make_world(store, database_url, f"{tenant}{letter}", url, batches=4, items=1)
        for letter in "abc"
    )
    more = make_world(
        store, database_url, f"{tenant}c", url, batches=4, items=1, name="more"
    )  # a second pipeline of the youngest
    everyone = (old, middle, young, more)
    for world in everyone:
        world.set(Pipeline, heldout_batches=4)
    names = [world.pipeline_id for world in everyone]
    assert serve(old, 8) == [names[number] for number in (0, 1, 2, 0, 1, 3, 0, 1)]
    # Two places, of which one keeps being taken: the other goes round all the same.
    with transaction(old.engine) as session:
        held = and_(Batch.pipeline_id == names[0], Batch.batch == 3)
        session.execute(update(Batch).where(held).values(state="due", lease_until=9e12))
        found = find_due(session, FAST, window=8, at_once=3)
    assert [(one.pipeline_id, one.batch) for one in found] == [(names[2], 1), (names[1], 3)]
    for world in everyone:
        world.engine.dispose()


# One tenant's impatience


def test_a_deadline_that_a_spec_made_short_says_nothing_about_the_teacher_to_others(
    store: ObjectStore, sqlite_url: str, tenant: str, teacher: Teacher
) -> None:
    teacher.latency = 0.5
    hasty = make_world(
        store, sqlite_url, tenant, teacher.url, items=12, concurrency=12, timeout_seconds=0.05
    )
    patient = make_world(store, sqlite_url, f"{tenant}b", teacher.url, items=2)
    name = one_key(hasty, patient)
    hasty.collect_until_closed()
    assert hasty.outcomes() == {"teacher_timeout": 12}
    with reading(hasty.engine) as session:
        row = session.get(TeacherEndpoint, endpoint_of(hasty.resolved.teacher_of(0), tenant))
    assert row is not None
    assert (row.away, row.open_until, row.concurrency, row.failed) == (0, 0.0, None, 0)
    assert due(patient) == [(patient.pipeline_id, 0)]
    assert row.endpoint == name
    patient.collect_until_closed()
    assert patient.outcomes() == {"answered": 2}


def test_a_teacher_that_hangs_is_found_away_by_the_question_whatever_the_spec_s_deadline(
    store: ObjectStore, sqlite_url: str, tenant: str, teacher: Teacher
) -> None:
    teacher.latency = 60
    world = make_world(store, sqlite_url, tenant, teacher.url, items=2, timeout_seconds=0.05)
    world.collect()
    assert endpoint(world).away == 1
    assert world.outcomes() == {"pending": 2}


# Locks


@pytest.mark.parametrize(
    "database_url", [pytest.param("postgres", marks=pytest.mark.postgres)], indirect=True
)
@pytest.mark.parametrize("by", ["circuit", "reaper"])
def test_whoever_changes_many_batches_holds_them_in_the_order_of_their_keys(
    by: str, store: ObjectStore, database_url: str, tenant: str
) -> None:
    world = make_world(store, database_url, tenant, "http://127.0.0.1:9/v1", batches=3, items=1)
    # As rows and the index lie, the first one is the last.
    world.set(Batch, batch=0, close_by=2e12, close_latest=3e12)
    world.set(Batch, close_by=1e12, close_latest=2e12, state="due", lease_until=1.0)
    world.set(Batch, batch=0, next_attempt_at=1.0)
    holder = Holder(tenant, "pl-other", 0, 1)
    spec = world.resolved.teacher_of(0)

    def change() -> None:
        if by == "circuit":
            SharedLimits(world.engine, STEADY, spec, holder).away(AWAY)
        else:
            with transaction(world.engine) as session:
                reap(session)

    changing = threading.Thread(target=change)
    first = and_(Batch.pipeline_id == world.pipeline_id, Batch.batch == 0)
    others = and_(Batch.pipeline_id == world.pipeline_id, Batch.batch > 0)
    with transaction(world.engine) as session:
        session.execute(select(Batch).where(first).with_for_update())
        changing.start()
        wait_for(lambda: waiting_for_locks(world), 20, "who waits for the first batch")
        # It waits, and holds none that comes after.
        session.execute(select(Batch).where(others).with_for_update(nowait=True))
    changing.join(20)
    assert not changing.is_alive()
    world.engine.dispose()


def waiting_for_locks(world: World) -> int:
    with reading(world.engine) as session:
        query = "select count(*) from pg_stat_activity where wait_event_type = 'Lock'"
        return int(session.execute(text(query)).scalar_one())
