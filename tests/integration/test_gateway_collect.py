"""A paid batch over a real store, a real database and a teacher that bills."""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from sqlalchemy import select

from services.teacher_gateway.claims import MOST_CRASHES
from services.teacher_gateway.database import DatabaseUnavailable, transaction
from services.teacher_gateway.dispatch import reap
from services.teacher_gateway.models import Batch, History, Pipeline
from stillhouse.chassis.errors import PermanentError, RetryableError, StoreUnavailable
from stillhouse.chassis.storage import ObjectStore
from stillhouse.contracts.responses import ResponsesClosed
from stillhouse.embedded.parts import Store
from tests.support.gateway import FAST, Where, World, collect_in_process, make_world
from tests.support.teacher import Fault, Teacher, running_teacher
from tests.support.waiting import wait_for

SETTLED = ("answers", "probe")
LISTED = ("unused", "unknown")


@pytest.fixture
def teacher(tmp_path: Path) -> Iterator[Teacher]:
    with running_teacher(tmp_path / "invoices.jsonl") as running:
        yield running


def billed(teacher: Teacher, world: World, batch: int = 0) -> int:
    """The invoice for the answers that are stored: one line for each."""
    stored = {answer.item_id for answer in world.answers(batch)}
    assert len(stored) == len(world.answers(batch))
    return sum(answer.cost_microusd for answer in world.answers(batch))


def test_a_batch_is_asked_once_stored_and_closed(
    store: ObjectStore, database_url: str, tenant: str, teacher: Teacher
) -> None:
    world = make_world(store, database_url, tenant, teacher.url, items=20)
    world.collect()
    assert world.batch().state == "closed"
    assert world.outcomes() == {"answered": 20}
    assert len(teacher.requests) == 20
    assert len({r["marker"] for r in teacher.requests}) == 20
    assert {answer.item_id for answer in world.answers()} == {i.item_id for i in world.items()}
    assert [part.key.rsplit("/", 1)[1] for part in world.manifest().parts] == [
        "part-0001.jsonl.gz",
        "part-0002.jsonl.gz",
    ]
    assert world.charged("answers") == teacher.invoiced_microusd()
    assert world.charged(*LISTED) == 0
    assert world.pipeline().reserved_microusd == 0
    world.check_books()
    # A redelivery finds its output.
    world.collect()
    assert len(teacher.requests) == 20
    assert world.events().count("response_batch.stored") == 1
    sums = world.pipeline()
    assert sums.prompt_tokens == sum(i.prompt_tokens for i in teacher.invoices())
    assert sums.completion_tokens == sum(i.completion_tokens for i in teacher.invoices())


def test_the_last_batch_completes_the_responses(
    store: ObjectStore, database_url: str, tenant: str, teacher: Teacher
) -> None:
    world = make_world(store, database_url, tenant, teacher.url, batches=3, items=2)
    for batch in range(3):
        assert "responses.completed" not in world.events()
        world.collect(batch)
    assert world.events()[-1] == "responses.completed"
    assert world.pipeline().collect == "done"
    found = store.find_model(
        f"tenants/{tenant}/pipelines/{world.pipeline_id}/responses.json", ResponsesClosed
    )
    assert found is not None
    assert (found[0].batches, found[0].answers, found[0].rejected) == (3, 6, 0)
    rows = world.rows(select(History).order_by(History.sequence))
    assert [row.sequence for row in rows] == list(range(1, len(rows) + 1))


def test_a_live_lease_is_left_alone(
    store: ObjectStore, database_url: str, tenant: str, teacher: Teacher
) -> None:
    teacher.latency = 0.4
    world = make_world(store, database_url, tenant, teacher.url, items=8, concurrency=2)
    first = threading.Thread(target=world.collect)
    first.start()
    wait_for(lambda: teacher.requests, 5, "the first call")
    asked = len(teacher.requests)
    world.collect()  # returns at once
    assert len(teacher.requests) - asked <= 2
    first.join(20)
    assert world.outcomes() == {"answered": 8}
    assert len(teacher.requests) == 8
    assert world.batch().attempt == 1


@pytest.mark.parametrize(
    "crash_at",
    [
        "batch_claimed",
        "series_closed",
        "answer_received:3",
        "part_ready",
        "part_stored",
        "part_stored:2",
        "answers_stored",
        "manifest_written",
        "batch_closed",
        "responses_written",
    ],
)
def test_a_killed_attempt_is_adopted_and_nothing_is_paid_in_the_dark(
    crash_at: str,
    store: ObjectStore,
    store_part: Store,
    tmp_path: Path,
    tenant: str,
    teacher: Teacher,
) -> None:
    url = f"sqlite:///{tmp_path / 'gateway.sqlite3'}"
    world = make_world(store, url, tenant, teacher.url, items=36, concurrency=4)
    assert collect_in_process(Where(url, store_part), world, crash_at=crash_at) == 137
    world.check_books()
    attempts = world.collect_until_closed()
    world.collect()  # what is left after closing: the last event
    assert attempts <= 1
    assert world.outcomes() == {"answered": 36}
    answers = world.answers()
    assert sorted(a.item_id for a in answers) == sorted(i.item_id for i in world.items())
    # At most the calls in flight and one part were asked twice.
    assert len(teacher.requests) <= 36 + 4 + 16
    assert world.charged(*SETTLED) == billed(teacher, world)
    assert world.charged(*SETTLED, *LISTED) >= teacher.invoiced_microusd()
    assert world.pipeline().reserved_microusd == 0
    assert world.events().count("response_batch.stored") == 1
    assert world.events().count("responses.completed") == 1
    world.check_books()


def test_stored_parts_are_not_asked_again(
    store: ObjectStore, store_part: Store, tmp_path: Path, tenant: str, teacher: Teacher
) -> None:
    url = f"sqlite:///{tmp_path / 'gateway.sqlite3'}"
    world = make_world(store, url, tenant, teacher.url, items=40, concurrency=1)
    assert collect_in_process(Where(url, store_part), world, crash_at="part_stored:2") == 137
    first = [r["marker"] for r in teacher.requests]
    world.expire()
    with transaction(world.engine) as session:
        assert reap(session) == 1  # as the clock does, before anyone claims it again
    world.collect_until_closed()
    again = [r["marker"] for r in teacher.requests[len(first) :]]
    assert len(again) == 40 - 32
    assert not set(first[:32]) & set(again)
    assert world.batch().crashes == 1


def test_a_late_writer_is_fenced_and_its_answers_are_listed(
    store: ObjectStore, database_url: str, tenant: str, teacher: Teacher
) -> None:
    teacher.latency = 0.3
    # No renewal within the test: it would rightly win the lease back.
    paused = dataclasses.replace(FAST, lease_ttl=90, beat=30)
    world = make_world(
        store, database_url, tenant, teacher.url, items=12, concurrency=12, times=paused
    )
    late = threading.Thread(target=world.collect)
    late.start()
    wait_for(lambda: len(teacher.requests) == 12, 5, "all calls of the first attempt")
    world.expire()  # as if its worker had been paused beyond its lease
    world.collect()
    late.join(20)
    assert not late.is_alive()
    assert world.batch().state == "closed"
    assert world.batch().attempt == 2
    assert world.outcomes() == {"answered": 12}
    assert world.manifest().attempt == 2
    assert all("attempt-0002" in part.key for part in world.manifest().parts)
    assert world.charged(*SETTLED) == billed(teacher, world)
    assert world.charged(*SETTLED, *LISTED) >= teacher.invoiced_microusd()
    assert world.events().count("response_batch.stored") == 1
    world.check_books()


ALWAYS = [
    (Fault("rate_limited"), "teacher_rate_limited", False),
    (Fault("rate_limited", retry_after=0.01), "teacher_rate_limited", False),
    (Fault("status", status=500), "teacher_error", False),
    (Fault("status", status=503), "teacher_error", False),
    (Fault("status", status=502, billed=True), "teacher_error", True),
    (Fault("status", status=504, billed=True), "teacher_error", True),
    (Fault("status", status=408, billed=True), "teacher_timeout", True),
    (Fault("status", status=401), "teacher_error", False),
    (Fault("status", status=400), "refused_by_teacher", False),
    (Fault("redirect"), "teacher_invalid", False),
    (Fault("invalid_json"), "teacher_invalid", True),
    (Fault("truncated_json"), "teacher_invalid", True),
    (Fault("cut_reply"), "teacher_error", True),
    (Fault("wrong_schema"), "teacher_invalid", True),
    (Fault("empty_choices"), "teacher_invalid", True),
    (Fault("closed"), "teacher_error", True),
    (Fault("huge_body", size=8 << 20), "teacher_invalid", True),
    (Fault("gzip_bomb", size=1 << 20), "teacher_invalid", True),
    (Fault("null_content"), "teacher_invalid", True),
    (Fault("content_filter"), "refused_by_teacher", True),
    (Fault("missing_logprobs"), "missing_logprobs", True),
    (Fault("missing_usage"), "teacher_invalid", True),
    (Fault("wrong_usage"), "teacher_invalid", True),
]


@pytest.mark.parametrize(
    ("fault", "reason", "costs"), ALWAYS, ids=lambda value: getattr(value, "kind", None)
)
def test_every_misbehaviour_ends_as_a_counted_rejection(
    fault: Fault,
    reason: str,
    costs: bool,
    store: ObjectStore,
    tmp_path: Path,
    tenant: str,
    teacher: Teacher,
) -> None:
    teacher.script(Fault(**{**vars(fault), "match": "[0/1]"}))
    url = f"sqlite:///{tmp_path / 'gateway.sqlite3'}"
    world = make_world(store, url, tenant, teacher.url, items=4)
    world.collect_until_closed()
    assert world.outcomes() == {"answered": 3, reason: 1}
    (rejection,) = world.manifest().rejections
    assert (rejection.stage, rejection.reason) == ("collect", reason)
    assert rejection.detail
    # Beside the answers, a question whether the teacher is there may be paid.
    assert world.charged("answers") == billed(teacher, world)
    assert world.charged(*SETTLED, *LISTED) >= teacher.invoiced_microusd()
    assert (world.charged(*LISTED) > 0) is costs
    assert world.pipeline().reserved_microusd == 0
    world.check_books()


def test_a_silent_teacher_ends_as_timeouts(
    store: ObjectStore, tmp_path: Path, tenant: str, teacher: Teacher
) -> None:
    teacher.script(Fault("never_answers", match="[0/1]"))
    url = f"sqlite:///{tmp_path / 'gateway.sqlite3'}"
    world = make_world(store, url, tenant, teacher.url, items=3, timeout_seconds=1)
    world.collect_until_closed()
    assert world.outcomes() == {"answered": 2, "teacher_timeout": 1}
    assert world.charged(*SETTLED, *LISTED) >= teacher.invoiced_microusd()
    world.check_books()


def test_a_teacher_that_recovers_costs_no_item(
    store: ObjectStore, tmp_path: Path, tenant: str, teacher: Teacher
) -> None:
    teacher.script(
        Fault("rate_limited", attempts=(1,), retry_after=0.01),
        Fault("status", match="[0/2]", attempts=(2, 3)),
        Fault("truncated_json", match="[0/3]", attempts=(2,)),
    )
    url = f"sqlite:///{tmp_path / 'gateway.sqlite3'}"
    world = make_world(store, url, tenant, teacher.url, items=5)
    world.collect_until_closed()
    assert world.outcomes() == {"answered": 5}
    assert world.charged(*SETTLED) == billed(teacher, world)
    assert world.charged(*SETTLED, *LISTED) >= teacher.invoiced_microusd()


def test_a_long_retry_after_becomes_a_row_and_not_a_sleep(
    store: ObjectStore, tmp_path: Path, tenant: str, teacher: Teacher
) -> None:
    teacher.script(Fault("rate_limited", retry_after=500))
    url = f"sqlite:///{tmp_path / 'gateway.sqlite3'}"
    world = make_world(store, url, tenant, teacher.url, items=3)
    world.collect()
    row, clock = world.batch(), world.pipeline().created_at
    assert row.state == "waiting"
    assert 490 < row.next_attempt_at - clock < 520
    assert row.reserved_microusd == 0
    assert len(teacher.requests) == 3  # left alone, it is not even asked whether it is there
    world.collect()  # its time has not come
    assert len(teacher.requests) == 3


def attempts(world: World, count: int) -> None:
    for _ in range(count):
        world.expire()
        world.collect()


def test_an_unreachable_teacher_costs_no_item_before_the_last_deadline(
    store: ObjectStore, tmp_path: Path, tenant: str
) -> None:
    url = f"sqlite:///{tmp_path / 'gateway.sqlite3'}"
    world = make_world(store, url, tenant, "http://127.0.0.1:9/v1", items=3, close_deadline_hours=1)
    attempts(world, 3 * FAST.attempts)
    assert world.outcomes() == {"pending": 3}
    assert {item.attempts for item in world.items()} == {0}
    row = world.batch()
    assert (row.state, row.away) == ("waiting", 3 * FAST.attempts)
    assert row.close_by is not None
    assert row.close_latest is not None
    # The time away is left out of the deadline, up to twice the deadline in all.
    first = row.close_latest - 2 * 3600
    assert first + 3600 + 5 < row.close_by < row.close_latest
    world.set(Batch, close_by=row.close_latest - 1)
    attempts(world, 1)
    assert world.batch().close_by == row.close_latest
    world.set(Batch, close_by=1.0, close_latest=1.0)
    attempts(world, 1)
    assert world.outcomes() == {"closed_by_deadline": 3}
    assert "the teacher was away" in world.manifest().rejections[0].detail
    assert world.manifest().parts == []
    assert world.pipeline().spent_microusd == 0


@pytest.mark.parametrize(
    "fault",
    [
        Fault("status", status=503),
        Fault("status", status=504, billed=True),
        Fault("rate_limited", retry_after=0.01),
        Fault("closed"),
    ],
    ids=lambda fault: f"{fault.kind}-{fault.status}",
)
def test_an_outage_in_the_middle_costs_no_item_and_little_money(
    fault: Fault, store: ObjectStore, tmp_path: Path, tenant: str, teacher: Teacher
) -> None:
    url = f"sqlite:///{tmp_path / 'gateway.sqlite3'}"
    world = make_world(store, url, tenant, teacher.url, items=6, concurrency=2)
    teacher.script(Fault("status", status=500, match="[0/4]"), Fault("status", match="[0/5]"))
    attempts(world, 1)
    assert world.outcomes() == {"answered": 4, "pending": 2}
    teacher.forgive()
    teacher.script(fault)
    attempts(world, 1)
    before = len(teacher.requests)
    attempts(world, 3 * FAST.attempts)
    # While it is away, an attempt asks nothing but whether somebody is there.
    assert len(teacher.requests) - before == 3 * FAST.attempts
    assert world.outcomes() == {"answered": 4, "pending": 2}
    teacher.forgive()
    attempts(world, 1)
    assert world.outcomes() == {"answered": 6}
    assert world.batch().away == 0
    assert world.charged(*SETTLED, *LISTED) >= teacher.invoiced_microusd()
    assert world.charged("answers") == billed(teacher, world)
    world.check_books()


def test_an_item_that_nobody_answers_does_not_hold_its_batch_up(
    store: ObjectStore, tmp_path: Path, tenant: str, teacher: Teacher
) -> None:
    teacher.script(Fault("status", status=500, match="[0/"))
    url = f"sqlite:///{tmp_path / 'gateway.sqlite3'}"
    world = make_world(store, url, tenant, teacher.url, items=3)
    assert world.collect_until_closed() == FAST.attempts
    assert world.outcomes() == {"teacher_error": 3}


def test_a_store_that_is_down_stops_the_deadline(
    store: ObjectStore,
    tmp_path: Path,
    tenant: str,
    teacher: Teacher,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def down(*_: object) -> None:
        raise StoreUnavailable("down")

    url = f"sqlite:///{tmp_path / 'gateway.sqlite3'}"
    world = make_world(store, url, tenant, teacher.url, items=3, close_deadline_hours=1)
    for where in ("closing.write_manifest", "collect.read_batch"):
        before = world.batch().close_by
        with monkeypatch.context() as patched:
            patched.setattr(f"services.teacher_gateway.{where}", down)
            world.expire()
            with pytest.raises(StoreUnavailable):
                world.collect()
        row = world.batch()
        assert row.close_by is not None
        assert row.close_latest is not None
        start = before or row.close_latest - 3600
        assert row.close_by >= start + FAST.batch_backoff
        assert row.state == "waiting"
    assert world.outcomes() == {"answered": 3}  # what was stored is settled
    world.collect_until_closed()
    assert len(teacher.requests) == 3


def test_the_deadline_closes_what_is_left(
    store: ObjectStore, tmp_path: Path, tenant: str, teacher: Teacher
) -> None:
    url = f"sqlite:///{tmp_path / 'gateway.sqlite3'}"
    world = make_world(store, url, tenant, teacher.url, items=3)
    world.set(Batch, close_by=1.0, next_attempt_at=9e12)
    world.collect()
    assert world.outcomes() == {"closed_by_deadline": 3}
    assert teacher.requests == []


def test_a_batch_that_kills_its_workers_is_given_up(
    store: ObjectStore, tmp_path: Path, tenant: str, teacher: Teacher
) -> None:
    url = f"sqlite:///{tmp_path / 'gateway.sqlite3'}"
    world = make_world(store, url, tenant, teacher.url, items=3)
    world.set(Batch, crashes=MOST_CRASHES - 1, holder="dead", attempt=1)
    world.collect()
    assert world.outcomes() == {"worker_lost": 3}
    assert teacher.requests == []


@pytest.mark.parametrize(
    ("where", "error"),
    [
        ("closing.write_manifest", StoreUnavailable("down")),
        ("collect.close_series", StoreUnavailable("down")),
        ("books.Books.adopt", DatabaseUnavailable("locked")),
        ("books.Books.renew", DatabaseUnavailable("locked")),
        ("collect.take_cached", StoreUnavailable("down")),
    ],
)
def test_an_attempt_that_the_store_or_the_database_ended_killed_nobody(
    where: str,
    error: RetryableError,
    store: ObjectStore,
    tmp_path: Path,
    tenant: str,
    teacher: Teacher,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def down(*_: object) -> None:
        raise error

    url = f"sqlite:///{tmp_path / 'gateway.sqlite3'}"
    world = make_world(store, url, tenant, teacher.url, items=3)
    # One worker did die before, and had reserved for its calls.
    world.set(Batch, holder="dead", attempt=1, reserved_microusd=300, batch=0)
    world.set(Pipeline, reserved_microusd=300)
    with monkeypatch.context() as patched:
        patched.setattr(f"services.teacher_gateway.{where}", down)
        for _ in range(MOST_CRASHES + 1):
            world.expire()
            with pytest.raises(type(error)):
                world.collect()
            world.check_books()
    world.collect_until_closed()
    assert world.outcomes() == {"answered": 3}
    assert len(teacher.requests) == 3
    assert world.batch().crashes == 1
    assert world.charged(*LISTED) == 300  # of the attempts that asked nothing, nothing
    assert world.pipeline().reserved_microusd == 0
    world.check_books()


def test_a_teacher_that_cannot_be_asked_at_all_frees_its_money(
    store: ObjectStore,
    tmp_path: Path,
    tenant: str,
    teacher: Teacher,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("LLM_KEY", raising=False)
    url = f"sqlite:///{tmp_path / 'gateway.sqlite3'}"
    key = {"api_key": {"env": "LLM_KEY"}}
    world = make_world(store, url, tenant, teacher.url, items=3, teacher=key)
    for _ in range(2):
        world.expire()
        with pytest.raises(PermanentError, match="has no LLM_KEY"):
            world.collect()
        # Nothing was asked: nothing is listed, nothing stays reserved, and no worker died.
        assert (world.batch().state, world.batch().holder) == ("waiting", "")
        assert (world.pipeline().reserved_microusd, world.charged(*LISTED)) == (0, 0)
        world.check_books()
    monkeypatch.setenv("LLM_KEY", "sk-there-at-last")
    world.collect_until_closed()
    assert world.outcomes() == {"answered": 3}
    assert (world.batch().crashes, world.charged(*LISTED)) == (0, 0)


def test_a_budget_is_used_up_and_never_exceeded(
    store: ObjectStore, tmp_path: Path, tenant: str, teacher: Teacher
) -> None:
    url = f"sqlite:///{tmp_path / 'gateway.sqlite3'}"
    # The worst case of an answer is about 180 micro-USD: a few of twelve fit.
    world = make_world(store, url, tenant, teacher.url, items=12, budget_usd=0.0008)
    worst = max(asked.worst_microusd for asked in world.asked[0])
    world.collect_until_closed()
    outcomes = world.outcomes()
    assert set(outcomes) == {"answered", "budget_exhausted"}
    assert world.charged("answers") == teacher.invoiced_microusd() <= 800
    # It asked as long as one more worst case fitted.
    assert 800 - world.pipeline().spent_microusd < worst
    world.check_books()


def test_a_batch_waits_for_open_reservations_before_its_items_are_rejected(
    store: ObjectStore, tmp_path: Path, tenant: str, teacher: Teacher
) -> None:
    url = f"sqlite:///{tmp_path / 'gateway.sqlite3'}"
    world = make_world(store, url, tenant, teacher.url, batches=2, items=4, budget_usd=0.001)
    world.set(Pipeline, reserved_microusd=900)
    world.set(Batch, batch=1, reserved_microusd=900, lease_until=9e12, state="due")
    world.collect()
    assert world.batch().state == "waiting"
    assert world.batch().attempt == 0
    assert teacher.requests == []
    world.set(Pipeline, reserved_microusd=0)
    world.set(Batch, batch=1, reserved_microusd=0)
    world.expire()
    world.collect()
    assert world.outcomes() == {"answered": 4}


def test_slow_answers_leave_the_rest_to_the_next_attempt(
    store: ObjectStore, tmp_path: Path, tenant: str, teacher: Teacher
) -> None:
    teacher.latency = 0.3
    # An attempt begins calls in its first second, and one takes 0.3: never all six.
    times = dataclasses.replace(FAST, call=4, attempt=5)
    url = f"sqlite:///{tmp_path / 'gateway.sqlite3'}"
    world = make_world(
        store,
        url,
        tenant,
        teacher.url,
        items=6,
        concurrency=1,
        times=times,
        timeout_seconds=4,
    )
    attempts = world.collect_until_closed()
    assert attempts > 1
    assert world.outcomes() == {"answered": 6}
    assert len(teacher.requests) == 6
    assert world.charged(*SETTLED) == teacher.invoiced_microusd()
    assert world.charged(*LISTED) == 0
