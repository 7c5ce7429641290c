"""Batches that a provider answers by its batch API: the money, the kills, the faults."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import select, update

from services.teacher_gateway.books import Books
from services.teacher_gateway.claims import MOST_CRASHES
from services.teacher_gateway.counters import PROVIDER_FILES
from services.teacher_gateway.database import reading, transaction
from services.teacher_gateway.dispatch import find_due
from services.teacher_gateway.models import Batch, Pipeline, ProviderBatch
from services.teacher_gateway.stop import cancel_pipeline
from stillhouse.chassis.errors import PermanentError, StoreUnavailable
from stillhouse.chassis.storage import ObjectStore
from stillhouse.embedded.parts import Store
from tests.support.gateway import FAST, Where, World, collect_in_process, make_world
from tests.support.provider import Provider, running_provider
from tests.support.teacher import Fault, Teacher, running_teacher

SETTLED = ("answers", "probe")
LISTED = ("unused", "unknown")


@pytest.fixture
def teacher(tmp_path: Path) -> Iterator[Teacher]:
    with running_teacher(tmp_path / "invoices.jsonl") as running:
        yield running


@pytest.fixture
def provider(teacher: Teacher) -> Iterator[Provider]:
    with running_provider(teacher) as running:
        yield running


@pytest.fixture
def url(tmp_path: Path) -> str:
    return f"sqlite:///{tmp_path / 'gateway.sqlite3'}"


def make(store: ObjectStore, url: str, tenant: str, provider: Provider, **more: Any) -> World:
    more["teacher"] = {"batch_api": True, **more.pop("teacher", {})}
    return make_world(store, url, tenant, provider.url, **{"items": 6, **more})


def go(world: World, provider: Provider, times: int = 1) -> None:
    """Let the provider end what it has, and do the next jobs of the batch."""
    for _ in range(times):
        provider.wait()
        world.expire()
        world.collect()


def until_closed(world: World, provider: Provider, jobs: int = 20) -> int:
    for number in range(jobs):
        if world.batch().state == "closed":
            return number
        go(world, provider)
    raise AssertionError(f"not closed: {vars(world.batch())}")


def made(world: World) -> list[ProviderBatch]:
    return world.rows(select(ProviderBatch).order_by(ProviderBatch.number))


def check(world: World, teacher: Teacher, *, listed: int | None = None) -> None:
    """The ledger is the invoice for stored answers; what is listed covers the rest."""
    by_request = {invoice.request_id: invoice.microusd for invoice in teacher.invoices()}
    stored = [json.loads(a.body)["id"] for a in world.answers()] if world.batch().answers else []
    assert world.charged(*SETTLED) == sum(by_request[request] for request in stored)
    assert world.charged(*SETTLED, *LISTED) >= teacher.invoiced_microusd()
    if listed is not None:
        assert world.charged(*LISTED) == listed
    assert world.pipeline().reserved_microusd == 0
    world.check_books()


def test_a_batch_is_uploaded_waited_for_read_and_closed(
    store: ObjectStore,
    database_url: str,
    tenant: str,
    teacher: Teacher,
    provider: Provider,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("PROVIDER_KEY", "sk-provider")
    provider.hold = True
    world = make(
        store,
        database_url,
        tenant,
        provider,
        items=20,
        teacher={"api_key": {"env": "PROVIDER_KEY"}},
    )
    world.collect()
    row, worst = world.batch(), sum(asked.worst_microusd for asked in world.asked[0])
    # It waits there: no lease, no worker, and the money set aside.
    assert (row.state, row.holder, row.lease_until, row.attempt) == ("waiting", "", 0.0, 1)
    assert row.reserved_microusd == world.pipeline().reserved_microusd == worst
    assert row.next_attempt_at - world.pipeline().created_at > FAST.provider_poll - 1
    (job,) = provider.jobs.values()
    assert job.metadata == {
        "stillhouse_pipeline": world.pipeline_id,
        "stillhouse_batch": "0",
        "stillhouse_number": "1",
    }
    lines = [json.loads(line) for line in provider.files[job.file_id].splitlines()]
    assert {line["custom_id"] for line in lines} == {item.item_id for item in world.items()}
    assert lines[0]["body"]["logprobs"] is True
    for _ in range(15):
        world.expire()
        world.collect()
    row = world.batch()
    # However often it is looked at.
    assert (row.state, row.attempt, row.crashes, row.epoch) == ("waiting", 1, 0, 1)
    assert row.reserved_microusd == worst
    assert teacher.requests == []
    provider.release()
    world.expire()
    world.collect()
    row = world.batch()
    assert (row.state, row.attempt, row.provider_batch) == ("closed", 2, None)
    assert world.outcomes() == {"answered": 20}
    assert {a.item_id for a in world.answers()} == {i.item_id for i in world.items()}
    assert len(world.manifest().parts) == 2
    assert [p.state for p in made(world)] == ["ended"]
    check(world, teacher, listed=0)
    assert world.charged("answers") == teacher.invoiced_microusd()
    assert world.events()[-2:] == ["response_batch.stored", "responses.completed"]
    assert provider.authorizations == {"Bearer sk-provider"}
    assert set(provider.deleted) == {"file-1", "batch_1-output"}
    # Their seeds are those of live calls, so the answers are the same.
    live = make_world(store, database_url, f"{tenant}-b", teacher.url, items=20)
    assert (provider.count("POST /v1/files"), provider.count("POST /v1/batches")) == (1, 1)
    assert live.asked[0][0].worst_microusd == world.asked[0][0].worst_microusd


def test_what_the_cache_has_is_not_sent(
    store: ObjectStore, url: str, tenant: str, teacher: Teacher, provider: Provider
) -> None:
    first = make(store, url, tenant, provider, items=4)
    until_closed(first, provider)
    second = make(store, url, tenant, provider, items=6, name="-2")
    second.collect()
    assert second.outcomes() == {"answered": 4, "pending": 2}
    assert len(provider.files["file-2"].splitlines()) == 2
    go(second, provider)
    assert second.outcomes() == {"answered": 6}
    assert sum(answer.cached for answer in second.answers()) == 4
    assert len(second.manifest().parts) == 2
    third = make(store, url, tenant, provider, items=6, name="-3")
    third.collect()
    assert (third.batch().state, third.batch().attempt) == ("closed", 1)
    assert third.charged("answers") == 0
    assert len(provider.jobs) == 2


SUBMITTING = [
    "batch_claimed",
    "provider_planned",
    "provider_uploaded",
    "provider_creating",
    "provider_created",
    "provider_noted",
]
UNLISTED = ["provider_creating", "provider_created"]


@pytest.mark.parametrize(
    ("crash_at", "lists"),
    [*((point, True) for point in SUBMITTING), *((point, False) for point in UNLISTED)],
)
def test_a_kill_while_it_is_sent_pays_once_or_lists_it(
    crash_at: str,
    lists: bool,
    store: ObjectStore,
    store_part: Store,
    url: str,
    tenant: str,
    teacher: Teacher,
    provider: Provider,
) -> None:
    if not lists:
        provider.faults.add("no_list")
    world = make(store, url, tenant, provider)
    worst = sum(asked.worst_microusd for asked in world.asked[0])
    assert collect_in_process(Where(url, store_part), world, crash_at=crash_at) == 137
    world.check_books()
    until_closed(world, provider)
    assert world.outcomes() == {"answered": 6}
    # Whether it was asked to begin is not known where its metadata cannot be looked for.
    unknown = not lists and crash_at in ("provider_creating", "provider_created")
    twice = unknown and crash_at == "provider_created"
    assert len(teacher.requests) == (12 if twice else 6)
    assert world.batch().crashes == (crash_at != "provider_noted")
    check(world, teacher, listed=worst if unknown else 0)
    assert world.events().count("response_batch.stored") == 1


READING = [
    "provider_seen",
    "batch_claimed",
    "part_ready",
    "part_stored",
    "answers_stored",
    "manifest_written",
    "batch_closed",
]


@pytest.mark.parametrize("crash_at", READING)
def test_a_kill_while_it_is_read_pays_once(
    crash_at: str,
    store: ObjectStore,
    store_part: Store,
    url: str,
    tenant: str,
    teacher: Teacher,
    provider: Provider,
) -> None:
    teacher.script(Fault("content_filter", match="[0/1]"))
    world = make(store, url, tenant, provider, items=20)
    world.collect()
    provider.wait()
    world.expire()
    assert collect_in_process(Where(url, store_part), world, crash_at=crash_at) == 137
    world.check_books()
    until_closed(world, provider)
    world.collect()  # what is left after closing: the last event
    assert world.outcomes() == {"answered": 19, "refused_by_teacher": 1}
    assert len(teacher.requests) == 20
    assert len(provider.jobs) == 1
    filtered = [i.microusd for i in teacher.invoices() if i.fault == "content_filter"]
    check(world, teacher, listed=filtered[0])
    assert world.charged(*SETTLED, *LISTED) == teacher.invoiced_microusd()
    assert world.events().count("response_batch.stored") == 1
    assert world.events().count("responses.completed") == 1


def test_a_create_whose_reply_was_lost_is_found_among_many(
    store: ObjectStore, url: str, tenant: str, teacher: Teacher, provider: Provider
) -> None:
    provider.faults.add("create_lost_reply")
    provider.page = 1
    world = make(store, url, tenant, provider)
    world.collect()
    assert [p.state for p in made(world)] == ["creating"]
    assert world.batch().reserved_microusd > 0
    provider.faults.clear()
    other = make(store, url, f"{tenant}-b", provider)
    other.collect()
    until_closed(world, provider)
    assert world.outcomes() == {"answered": 6}
    assert len(provider.jobs) == 2
    assert provider.count("GET /v1/batches") > 2
    assert world.charged(*LISTED) == 0
    world.check_books()


PATIENT = dataclasses.replace(FAST, provider_absent=600)


def overdue(world: World) -> None:
    """Let the time be over in which a provider may list what it was asked to begin."""
    with transaction(world.engine) as session:
        session.execute(update(ProviderBatch).values(absent_since=1.0))


def test_a_batch_that_is_listed_late_is_not_created_twice(
    store: ObjectStore, url: str, tenant: str, teacher: Teacher, provider: Provider
) -> None:
    provider.faults |= {"create_lost_reply", "lists_late"}
    world = make(store, url, tenant, provider, times=PATIENT)
    world.collect()
    for _ in range(4):
        go(world, provider)
        assert [p.state for p in made(world)] == ["creating"]
        assert world.pipeline().reserved_microusd > 0
    row = world.batch()
    assert (row.attempt, row.away, row.lease_until, row.state) == (1, 0, 0.0, "waiting")
    assert provider.deleted == []
    provider.faults.clear()
    until_closed(world, provider)
    assert (len(provider.jobs), len(provider.files), len(teacher.requests)) == (1, 1, 6)
    check(world, teacher, listed=0)


def test_a_batch_that_never_comes_is_made_impossible_before_there_is_another(
    store: ObjectStore, url: str, tenant: str, teacher: Teacher, provider: Provider
) -> None:
    provider.faults.add("create_lost_reply")
    world = make(store, url, tenant, provider, times=PATIENT)
    world.collect()
    provider.wait()
    provider.jobs.clear()  # it never came there
    asked = len(teacher.requests)
    provider.faults.clear()
    go(world, provider)
    assert provider.deleted == []
    overdue(world)
    go(world, provider)
    assert provider.deleted == ["file-1"]
    assert [p.status for p in made(world)] == ["absent"]
    until_closed(world, provider)
    creations = [r for r in provider.requests if r.split()[0] in ("POST", "DELETE")]
    assert creations.index("DELETE /v1/files/file-1") < creations.index("POST /v1/files", 1)
    assert len(teacher.requests) - asked == 6
    assert world.outcomes() == {"answered": 6}
    assert world.charged(*LISTED) == 0


def test_a_batch_that_may_yet_come_is_listed(
    store: ObjectStore, url: str, tenant: str, teacher: Teacher, provider: Provider
) -> None:
    provider.faults |= {"create_lost_reply", "lists_late", "keeps_files"}
    world = make(store, url, tenant, provider, times=PATIENT)
    worst = sum(asked.worst_microusd for asked in world.asked[0])
    world.collect()
    go(world, provider)
    overdue(world)
    provider.faults.remove("create_lost_reply")
    go(world, provider)
    assert world.charged("unknown") == worst
    until_closed(world, provider)
    assert len(teacher.requests) == 12
    check(world, teacher, listed=worst)


def test_an_uploaded_file_is_used_again_while_it_is_there(
    store: ObjectStore, url: str, tenant: str, teacher: Teacher, provider: Provider
) -> None:
    provider.faults.add("create_busy")
    world = make(store, url, tenant, provider)
    for _ in range(3):
        world.expire()
        world.collect()
    assert (provider.count("POST /v1/files"), provider.count("POST /v1/batches")) == (1, 3)
    provider.deleted.append("file-1")  # by its own clock
    provider.faults.clear()
    until_closed(world, provider)
    assert provider.count("POST /v1/files") == 2
    assert world.outcomes() == {"answered": 6}
    check(world, teacher, listed=0)


def test_files_that_cannot_be_deleted_hold_nothing_up(
    store: ObjectStore, url: str, tenant: str, teacher: Teacher, provider: Provider
) -> None:
    provider.faults.add("keeps_files")
    world = make(store, url, tenant, provider)
    before = PROVIDER_FILES.labels("left")._value.get()
    until_closed(world, provider)
    assert world.outcomes() == {"answered": 6}
    assert PROVIDER_FILES.labels("left")._value.get() == before + 2
    check(world, teacher, listed=0)


def test_a_key_that_a_provider_repeats_is_in_no_answer(
    store: ObjectStore,
    url: str,
    tenant: str,
    provider: Provider,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("PROVIDER_KEY", "sk-provider-0123")
    world = make(store, url, tenant, provider, teacher={"api_key": {"env": "PROVIDER_KEY"}})
    world.collect()
    provider.wait()
    (job,) = provider.jobs.values()
    for line in job.output:
        line["response"]["body"]["id"] = "sk-provider-0123"
    go(world, provider)
    assert {json.loads(answer.body)["id"] for answer in world.answers()} == {"[key]"}


@pytest.mark.parametrize(
    ("fault", "state"),
    [("upload_down", "uploading"), ("create_busy", "uploading"), ("down", "uploading")],
)
def test_a_provider_that_is_away_costs_no_item_and_no_money(
    fault: Any,
    state: str,
    store: ObjectStore,
    url: str,
    tenant: str,
    teacher: Teacher,
    provider: Provider,
) -> None:
    provider.faults |= {fault, "no_list"}
    world = make(store, url, tenant, provider)
    for number in range(2 * FAST.attempts + 1):
        world.expire()
        world.collect()
        assert world.batch().away == number + 1
        world.check_books()
    assert [p.state for p in made(world)] == [state]
    assert {item.attempts for item in world.items()} == {0}
    row = world.batch()
    assert row.close_by is not None
    assert row.close_latest is not None
    assert row.close_by > row.close_latest - 86_400  # the time away is left out
    provider.faults.clear()
    until_closed(world, provider)
    assert world.outcomes() == {"answered": 6}
    assert world.batch().away == 0
    check(world, teacher, listed=0)


def test_a_provider_that_is_away_while_it_works_is_looked_at_again(
    store: ObjectStore, url: str, tenant: str, teacher: Teacher, provider: Provider
) -> None:
    world = make(store, url, tenant, provider)
    world.collect()
    provider.wait()
    provider.faults.add("down")
    for _ in range(3):
        go(world, provider)
    assert (world.batch().attempt, world.batch().away) == (1, 3)
    assert world.batch().reserved_microusd > 0
    provider.faults = {"cut_output"}
    go(world, provider)
    assert world.batch().state == "waiting"
    assert world.batch().reserved_microusd + world.pipeline().spent_microusd > 0
    world.check_books()
    provider.faults = set()
    go(world, provider)
    assert world.outcomes() == {"answered": 6}
    assert len(teacher.requests) == 6
    check(world, teacher, listed=0)


@pytest.mark.parametrize("fault", ["create_refused", "create_not_found"])
def test_what_a_provider_refuses_is_rejected_with_its_words(
    fault: Any, store: ObjectStore, url: str, tenant: str, teacher: Teacher, provider: Provider
) -> None:
    provider.faults.add(fault)
    world = make(store, url, tenant, provider)
    assert until_closed(world, provider) == 1
    assert world.outcomes() == {"refused_by_teacher": 6}
    assert "status 40" in world.manifest().rejections[0].detail
    check(world, teacher, listed=0)


def test_lines_that_failed_are_asked_again_and_then_rejected(
    store: ObjectStore, url: str, tenant: str, teacher: Teacher, provider: Provider
) -> None:
    teacher.script(
        Fault("status", match="[0/1]", status=500),
        Fault("status", match="[0/2]", status=500, attempts=(1,)),
        Fault("status", match="[0/3]", status=504, billed=True, attempts=(1,)),
        Fault("wrong_usage", match="[0/4]"),
    )
    world = make(store, url, tenant, provider)
    until_closed(world, provider)
    assert world.outcomes() == {"answered": 4, "teacher_error": 1, "teacher_invalid": 1}
    assert "status 500" in world.manifest().rejections[0].detail
    assert [len(json.loads(p.items)) for p in made(world)] == [6, 3]
    assert len(teacher.requests) == 9
    worst = {asked.item.messages[0].text: asked.worst_microusd for asked in world.asked[0]}
    text = "[0/{}] Say something short.".format
    check(world, teacher, listed=worst[text(3)] + worst[text(4)])


@pytest.mark.parametrize("counts", [True, False])
def test_an_expired_batch_keeps_what_it_answered(
    counts: bool,
    store: ObjectStore,
    url: str,
    tenant: str,
    teacher: Teacher,
    provider: Provider,
) -> None:
    provider.faults.add("expired")
    provider.stop_after = 2
    world = make(store, url, tenant, provider)
    world.collect()
    provider.wait()
    if not counts:
        # It says nothing of what it did not answer either: that may be billed.
        (job,) = provider.jobs.values()
        job.errors, job.counts = [], False
    provider.faults.clear()
    go(world, provider)
    assert world.outcomes() == {"answered": 2, "pending": 4}
    assert {item.attempts for item in world.items()} == {0, 1}
    assert made(world)[0].status == "expired"
    provider.stop_after = None
    until_closed(world, provider)
    assert world.outcomes() == {"answered": 6}
    assert len(teacher.requests) == 6
    missing = sum(asked.worst_microusd for asked in world.asked[0][2:])
    check(world, teacher, listed=0 if counts else missing)


def test_answers_that_a_provider_counts_and_does_not_give_are_listed(
    store: ObjectStore, url: str, tenant: str, teacher: Teacher, provider: Provider
) -> None:
    provider.faults.add("no_output")
    world = make(store, url, tenant, provider)
    world.collect()
    go(world, provider)
    assert world.outcomes() == {"pending": 6}
    worst = sum(asked.worst_microusd for asked in world.asked[0])
    assert world.charged("unknown") == worst
    provider.faults.clear()
    until_closed(world, provider)
    assert world.outcomes() == {"answered": 6}
    check(world, teacher, listed=worst)


def test_a_batch_that_fails_as_a_whole_is_rejected_with_the_cause(
    store: ObjectStore, url: str, tenant: str, teacher: Teacher, provider: Provider
) -> None:
    provider.faults.add("validation")
    world = make(store, url, tenant, provider)
    until_closed(world, provider)
    assert world.outcomes() == {"teacher_error": 6}
    assert len(provider.jobs) == FAST.attempts
    assert "invalid_json_line" in world.manifest().rejections[0].detail
    check(world, teacher, listed=0)


def test_an_accounts_limit_is_no_fault_of_the_items(
    store: ObjectStore, url: str, tenant: str, teacher: Teacher, provider: Provider
) -> None:
    provider.faults.add("limit")
    world = make(store, url, tenant, provider)
    for _ in range(2 * FAST.attempts + 2):
        go(world, provider)
    assert world.outcomes() == {"pending": 6}
    assert {item.attempts for item in world.items()} == {0}
    assert world.pipeline().spent_microusd == 0
    provider.faults.clear()
    until_closed(world, provider)
    assert world.outcomes() == {"answered": 6}
    check(world, teacher, listed=0)


def test_a_batch_that_a_provider_forgot_is_listed_and_asked_again(
    store: ObjectStore, url: str, tenant: str, teacher: Teacher, provider: Provider
) -> None:
    world = make(store, url, tenant, provider)
    world.collect()
    provider.wait()
    provider.faults.add("forgotten")
    go(world, provider)
    worst = sum(asked.worst_microusd for asked in world.asked[0])
    assert world.charged("unknown") == worst
    provider.faults.clear()
    until_closed(world, provider)
    assert world.outcomes() == {"answered": 6}
    assert len(teacher.requests) == 12
    check(world, teacher, listed=worst)


def test_cancelling_ends_it_there_and_settles_what_was_billed(
    store: ObjectStore, url: str, tenant: str, teacher: Teacher, provider: Provider
) -> None:
    provider.hold, provider.stop_after = True, 2
    world = make(store, url, tenant, provider, batches=2)
    world.collect()
    world.set(Batch, next_attempt_at=9e12, batch=0)
    assert cancel_pipeline(world.engine, store, world.pipeline_id, "test") == "running"
    assert world.batch(0).next_attempt_at == 0.0  # at once, whenever it was to be looked at
    assert world.batch(1).state == "closed"
    world.collect()
    (job,) = provider.jobs.values()
    assert job.cancels == 1
    assert made(world)[0].unwanted_since is not None
    assert world.batch().next_attempt_at > world.pipeline().created_at
    go(world, provider)
    assert world.pipeline().state == "cancelled"
    assert world.batch().state == "closed"
    assert set(world.outcomes()) == {"pipeline_stopped"}
    assert world.charged("answers") == teacher.invoiced_microusd() > 0
    assert world.pipeline().reserved_microusd == 0
    world.check_books()
    # What it had answered is paid for, and the next pipeline has it.
    provider.hold, provider.stop_after = False, None
    again = make(store, url, tenant, provider, name="-2")
    until_closed(again, provider)
    assert sum(answer.cached for answer in again.answers()) == 2


def test_a_batch_that_does_not_end_when_it_is_cancelled_is_listed(
    store: ObjectStore, url: str, tenant: str, teacher: Teacher, provider: Provider
) -> None:
    provider.hold, provider.stop_after = True, 2
    provider.faults.add("never_cancels")
    world = make(store, url, tenant, provider)
    world.collect()
    cancel_pipeline(world.engine, store, world.pipeline_id, "test")
    for _ in range(3):
        world.expire()
        world.collect()
    assert world.pipeline().state == "running"
    assert next(iter(provider.jobs.values())).cancels == 1
    with transaction(world.engine) as session:
        session.execute(update(ProviderBatch).values(unwanted_since=1.0))
    world.expire()
    world.collect()
    assert world.pipeline().state == "cancelled"
    worst = sum(asked.worst_microusd for asked in world.asked[0])
    check(world, teacher, listed=worst)
    provider.faults.clear()


@pytest.mark.parametrize("when", ["uploading", "creating"])
def test_cancelling_what_was_not_sent_is_free(
    when: str, store: ObjectStore, url: str, tenant: str, teacher: Teacher, provider: Provider
) -> None:
    provider.faults.add("upload_down" if when == "uploading" else "create_lost_reply")
    world = make(store, url, tenant, provider)
    world.collect()
    if when == "creating":
        provider.wait()
        provider.jobs.clear()  # it never came there
    cancel_pipeline(world.engine, store, world.pipeline_id, "test")
    go(world, provider, 2)
    assert world.pipeline().state == "cancelled"
    assert world.charged(*SETTLED, *LISTED) == 0
    world.check_books()


def test_the_deadline_cancels_and_closes(
    store: ObjectStore, url: str, tenant: str, teacher: Teacher, provider: Provider
) -> None:
    provider.hold, provider.stop_after = True, 4
    world = make(store, url, tenant, provider, close_deadline_hours=1)
    world.collect()
    row = world.batch()
    assert row.close_by is not None
    assert row.next_attempt_at <= row.close_by
    world.set(Batch, close_by=1.0, batch=0)
    with reading(world.engine) as session:
        assert find_due(session, FAST, window=8, at_once=8) == []  # in its own time
    world.expire()
    world.collect()
    assert next(iter(provider.jobs.values())).cancels == 1
    go(world, provider)
    assert world.outcomes() == {"answered": 4, "closed_by_deadline": 2}
    check(world, teacher, listed=0)


def test_the_deadline_closes_even_when_the_answers_never_come(
    store: ObjectStore, url: str, tenant: str, teacher: Teacher, provider: Provider
) -> None:
    world = make(store, url, tenant, provider)
    world.collect()
    provider.wait()
    provider.faults.add("cut_output")
    world.set(Batch, close_by=1.0, close_latest=1.0, batch=0)
    go(world, provider)
    assert world.batch().state == "waiting"
    with transaction(world.engine) as session:
        session.execute(update(ProviderBatch).values(unwanted_since=1.0))
    go(world, provider)
    assert world.batch().state == "closed"
    assert world.outcomes() == {"closed_by_deadline": 6}
    assert world.charged(*SETTLED, *LISTED) >= teacher.invoiced_microusd()
    world.check_books()


def test_a_batch_whose_workers_die_is_given_up_and_listed(
    store: ObjectStore, url: str, tenant: str, teacher: Teacher, provider: Provider
) -> None:
    world = make(store, url, tenant, provider)
    world.collect()
    world.set(Batch, crashes=MOST_CRASHES, batch=0)
    go(world, provider)
    assert world.outcomes() == {"worker_lost": 6}
    worst = sum(asked.worst_microusd for asked in world.asked[0])
    check(world, teacher, listed=worst)


def test_a_missing_key_fails_the_pipeline_and_frees_its_money(
    store: ObjectStore,
    url: str,
    tenant: str,
    teacher: Teacher,
    provider: Provider,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("PROVIDER_KEY", "sk-provider")
    world = make(store, url, tenant, provider, teacher={"api_key": {"env": "PROVIDER_KEY"}})
    world.collect()
    monkeypatch.delenv("PROVIDER_KEY")
    world.expire()
    with pytest.raises(PermanentError, match="PROVIDER_KEY"):
        world.collect()
    world.set(Pipeline, stopping="failed")
    go(world, provider)
    assert world.pipeline().state == "failed"
    worst = sum(asked.worst_microusd for asked in world.asked[0])
    check(world, teacher, listed=worst)


def test_a_store_that_is_down_while_it_is_read_loses_nothing(
    store: ObjectStore,
    url: str,
    tenant: str,
    teacher: Teacher,
    provider: Provider,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def down(*_: object) -> None:
        raise StoreUnavailable("down")

    teacher.script(Fault("wrong_usage", match="[0/0]"))  # an answer that only the last job books
    world = make(store, url, tenant, provider)
    worst = sum(asked.worst_microusd for asked in world.asked[0])
    world.collect()
    provider.wait()
    for where in ("provider.batches.close_series", "books.Books.store", "closing.write_manifest"):
        with monkeypatch.context() as patched:
            patched.setattr(f"services.teacher_gateway.{where}", down)
            for _ in range(2):
                world.expire()
                with pytest.raises(StoreUnavailable):
                    world.collect()
                world.check_books()
                row = world.batch()
                assert (row.state, row.crashes, row.provider_batch) == ("waiting", 0, 1)
                assert row.reserved_microusd + world.pipeline().spent_microusd == worst
    go(world, provider)
    assert world.outcomes() == {"answered": 5, "teacher_invalid": 1}
    assert len(teacher.requests) == 6
    check(world, teacher, listed=world.asked[0][0].worst_microusd)


def test_a_creator_that_lost_its_lease_cancels_what_nobody_found(
    store: ObjectStore,
    url: str,
    tenant: str,
    teacher: Teacher,
    provider: Provider,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    provider.hold = True
    world = make(store, url, tenant, provider)
    fenced, seen = Books.fenced, []

    def lose_it(self: Books, session: Any) -> Batch:
        seen.append(len(provider.jobs))
        if len(seen) > 1 and seen[-1]:  # created, and not noted yet
            world_epoch = update(Batch).values(epoch=Batch.epoch + 1)
            session.execute(world_epoch)
        return fenced(self, session)

    with monkeypatch.context() as patched:
        patched.setattr(Books, "fenced", lose_it)
        world.collect()
    (job,) = provider.jobs.values()
    assert job.cancels == 1
    worst = sum(asked.worst_microusd for asked in world.asked[0])
    assert world.charged("unknown") == worst
    world.check_books()


def test_a_hostile_id_reaches_no_url(
    store: ObjectStore, url: str, tenant: str, teacher: Teacher, provider: Provider
) -> None:
    provider.faults.add("rude_ids")
    world = make(store, url, tenant, provider)
    world.collect()
    assert world.batch().state == "waiting"
    assert provider.requests == ["POST /v1/files"]
    assert [p.file_id for p in made(world)] == [""]


def test_a_parameter_that_the_provider_does_not_know_is_left_out_the_next_time(
    store: ObjectStore, url: str, tenant: str, teacher: Teacher, provider: Provider
) -> None:
    provider.unknown = "seed"
    world = make(store, url, tenant, provider)
    until_closed(world, provider)
    assert world.outcomes() == {"answered": 6}
    bodies = [json.loads(data.splitlines()[0])["body"] for data in provider.files.values()]
    assert ["seed" in body for body in bodies] == [True, False]
    check(world, teacher, listed=0)


def test_batches_at_a_provider_take_no_place_in_the_window(
    store: ObjectStore, url: str, tenant: str, teacher: Teacher, provider: Provider
) -> None:
    provider.hold = True
    world = make(store, url, tenant, provider, batches=2, items=2)
    with reading(world.engine) as session:
        (first,) = find_due(session, FAST, window=1, at_once=8)
    assert first.batch == 0
    world.collect(0)
    with reading(world.engine) as session:
        (second,) = find_due(session, FAST, window=1, at_once=8)
        assert second.batch == 1
    world.collect(1)
    world.set(Batch, next_attempt_at=0.0)
    with reading(world.engine) as session:
        due = find_due(session, FAST, window=1, at_once=8)
    assert [one.batch for one in due] == [0]
    provider.release()


def test_a_batch_that_does_not_fit_waits_without_counting_attempts(
    store: ObjectStore, url: str, tenant: str, teacher: Teacher, provider: Provider
) -> None:
    provider.hold = True
    world = make(store, url, tenant, provider, batches=2, items=4, budget_usd=0.001)
    world.collect(0)
    for _ in range(4):
        world.expire(1)
        world.collect(1)
    assert (world.batch(1).state, world.batch(1).attempt) == ("waiting", 0)
    assert len(provider.jobs) == 1
    provider.release()
    go(world, provider)
    world.expire(1)
    world.collect(1)
    provider.wait()
    world.expire(1)
    world.collect(1)
    assert set(world.outcomes(0)) == {"answered"}
    assert "answered" in world.outcomes(1)
    world.check_books()
