"""Answers that were paid for before: free, the same, and in the books."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import func, select

from services.teacher_gateway.batch_input import BatchInput, read_batch
from services.teacher_gateway.cache.index import keys_of
from services.teacher_gateway.claims import MOST_CRASHES
from services.teacher_gateway.database import reading
from services.teacher_gateway.models import Batch, CachedAnswer, Pipeline
from services.teacher_gateway.parts import END_OF_SERIES
from stillhouse.chassis.errors import StoreUnavailable
from stillhouse.chassis.storage import ObjectStore
from stillhouse.contracts.artifacts import ObjectRef
from stillhouse.embedded.parts import Store
from tests.support.gateway import Where, World, collect_in_process, make_world
from tests.support.teacher import Fault, Teacher, running_teacher

SETTLED = ("answers", "probe")
LISTED = ("unused", "unknown")


@pytest.fixture
def teacher(tmp_path: Path) -> Iterator[Teacher]:
    with running_teacher(tmp_path / "invoices.jsonl", vary=True) as running:
        yield running


def bodies(world: World, batch: int = 0) -> dict[str, str]:
    """Answers by their question."""
    asked = {a.item.item_id: a.item.messages[0].text for a in world.asked[batch]}
    return {asked[answer.item_id]: answer.body for answer in world.answers(batch)}


def rows(world: World) -> int:
    with reading(world.engine) as session:
        found = select(func.count()).select_from(CachedAnswer)
        return int(session.execute(found).scalar_one())


def given(world: World, batch: int = 0) -> BatchInput:
    row = world.batch(batch)
    ref = ObjectRef.model_validate_json(row.prompts)
    return read_batch(world.context.store, row.tenant_id, row.pipeline_id, batch, ref)


def check(world: World, teacher: Teacher, invoices: int) -> None:
    """What was asked by this world alone is in its books."""
    billed = sum(invoice.microusd for invoice in teacher.invoices()[invoices:])
    stored = sum(answer.cost_microusd for answer in world.answers())
    assert world.charged(*SETTLED) == stored
    assert world.charged(*SETTLED, *LISTED) >= billed
    assert world.pipeline().reserved_microusd == 0
    world.check_books()


def test_the_second_pipeline_pays_nothing_and_gets_the_same_answers(
    store: ObjectStore, database_url: str, tenant: str, teacher: Teacher
) -> None:
    first = make_world(store, database_url, tenant, teacher.url, items=20)
    first.collect()
    assert rows(first) == 20
    second = make_world(store, database_url, tenant, teacher.url, items=20, name="-2")
    second.collect()
    assert len(teacher.requests) == 20
    assert second.outcomes() == {"answered": 20}
    assert second.batch().state == "closed"
    assert second.batch().attempt == 1
    assert bodies(second) == bodies(first)
    assert {answer.cached for answer in second.answers()} == {True}
    assert {answer.cost_microusd for answer in second.answers()} == {0}
    # Its own parts, so that its manifest needs nobody else's.
    assert all(second.pipeline_id in part.key for part in second.manifest().parts)
    assert len(second.manifest().parts) == 2
    assert second.events() == ["pipeline.accepted", "response_batch.stored", "responses.completed"]
    (charge,) = second.charges()
    assert (charge.kind, charge.answers, charge.cached, charge.microusd) == ("answers", 20, 20, 0)
    sums = second.pipeline()
    assert (sums.spent_microusd, sums.prompt_tokens, sums.completion_tokens) == (0, 0, 0)
    assert {item.cost_microusd for item in second.items()} == {0}
    assert rows(second) == 20  # what is free is not offered again
    second.check_books()


def test_what_the_cache_has_is_not_reserved_for(
    store: ObjectStore, tmp_path: Path, tenant: str, teacher: Teacher
) -> None:
    url = f"sqlite:///{tmp_path / 'gateway.sqlite3'}"
    make_world(store, url, tenant, teacher.url, items=6).collect()
    # The worst case of an answer is about 180 micro-USD: not even one fits.
    poor = make_world(store, url, tenant, teacher.url, items=8, name="-2", budget_usd=0.0001)
    poor.collect()
    assert poor.outcomes() == {"answered": 6, "budget_exhausted": 2}
    assert poor.pipeline().spent_microusd == 0


def test_only_what_is_new_is_asked_for(
    store: ObjectStore, tmp_path: Path, tenant: str, teacher: Teacher
) -> None:
    url = f"sqlite:///{tmp_path / 'gateway.sqlite3'}"
    make_world(store, url, tenant, teacher.url, items=5).collect()
    before = len(teacher.invoices())
    second = make_world(store, url, tenant, teacher.url, items=8, name="-2")
    second.collect()
    assert len(teacher.requests) == 8
    assert second.outcomes() == {"answered": 8}
    assert [len(part.key) for part in second.manifest().parts]
    assert sum(answer.cached for answer in second.answers()) == 5
    check(second, teacher, before)
    assert second.charged(*LISTED) == 0


OTHER: list[dict[str, Any]] = [
    {"signal": {"kind": "text", "max_tokens": 64}},
    {"signal": {"kind": "text", "max_tokens": 64, "temperature": 0.5}},
    {"signal": {"kind": "topk", "k": 4, "max_tokens": 64}},
    {"signal": {"kind": "topk", "k": 8, "max_tokens": 65}},
    {"teacher": {"model": "another"}},
    {"teacher": {"url": "http://127.0.0.2:1/v1"}},
    {"teacher": {"url": None, "weights": f"hf://acme/tiny@{'0' * 40}"}},
]


def test_another_question_is_another_key(
    store: ObjectStore, tmp_path: Path, tenant: str, teacher: Teacher
) -> None:
    url = f"sqlite:///{tmp_path / 'gateway.sqlite3'}"
    first = make_world(store, url, tenant, teacher.url, items=3)
    mine = set(keys_of(given(first), store).values())
    assert len(mine) == 3
    for number, changes in enumerate(OTHER):
        if changes.get("signal", {}).get("kind") == "text":
            changes = {**changes, "training": {"loss": "sft"}}
        name = f"-{number}"
        other = make_world(store, url, tenant, teacher.url, items=3, name=name, **changes)
        theirs = keys_of(given(other), store).values()
        assert len(theirs) == 3
        assert mine.isdisjoint(theirs), changes


def test_a_folder_that_may_change_is_not_remembered(
    store: ObjectStore, tmp_path: Path, tenant: str, teacher: Teacher
) -> None:
    url = f"sqlite:///{tmp_path / 'gateway.sqlite3'}"
    for number, (weights, known) in enumerate(
        [("file:/weights", 0), ("s3://bucket/weights", 3), (f"hf://acme/tiny@{'0' * 40}", 3)]
    ):
        route = {"url": None, "weights": weights}
        world = make_world(
            store, url, tenant, teacher.url, items=3, name=f"-{number}", teacher=route
        )
        assert len(keys_of(given(world), store)) == known


def test_samples_tools_and_messages_are_part_of_the_question(
    store: ObjectStore, tmp_path: Path, tenant: str, teacher: Teacher
) -> None:
    url = f"sqlite:///{tmp_path / 'gateway.sqlite3'}"
    world = make_world(store, url, tenant, teacher.url, items=1)
    found = given(world)
    (asked,) = found.asked
    key = set(keys_of(found, store).values())
    for change in (
        {"sample": 1},
        {"tools": [{"type": "function", "function": {"name": "weather"}}]},
        {"messages": [*asked.item.messages, *asked.item.messages]},
    ):
        item = asked.item.model_copy(update=change)
        other = BatchInput(
            found.resolved, found.teacher, found.signal, (type(asked)(item, asked.worst_microusd),)
        )
        assert key.isdisjoint(keys_of(other, store).values())


def test_the_batch_api_is_another_way_and_no_other_question(
    store: ObjectStore, tmp_path: Path, tenant: str, teacher: Teacher
) -> None:
    url = f"sqlite:///{tmp_path / 'gateway.sqlite3'}"
    first = make_world(store, url, tenant, teacher.url, items=3)
    batches = {"batch_api": True, "usd_per_million": {"input": 0.5, "output": 1}}
    other = make_world(store, url, tenant, teacher.url, items=3, name="-2", teacher=batches)
    mine, theirs = keys_of(given(first), store), keys_of(given(other), store)
    assert sorted(mine.values()) == sorted(theirs.values())


def test_answers_that_are_given_along_are_never_looked_up(
    store: ObjectStore, tmp_path: Path, tenant: str, teacher: Teacher
) -> None:
    url = f"sqlite:///{tmp_path / 'gateway.sqlite3'}"
    for name, route in (("-1", {"url": None}), ("-2", {"url": None, "weights": "file:/weights"})):
        world = make_world(
            store,
            url,
            tenant,
            teacher.url,
            items=1,
            name=name,
            teacher={
                **route,
                "answers": "given",
                "usd_per_million": {"input": 0, "output": 0},
            },
            signal={"kind": "text"},
            training={"loss": "sft"},
        )
        assert keys_of(given(world), store) == {}


def test_who_opts_out_pays_and_offers_nothing(
    store: ObjectStore, tmp_path: Path, tenant: str, teacher: Teacher
) -> None:
    url = f"sqlite:///{tmp_path / 'gateway.sqlite3'}"
    off = {"prompts": {"from": "file:/p.jsonl", "heldout": 0.2, "batch": 8, "cache": False}}
    first = make_world(store, url, tenant, teacher.url, items=3, **off)
    first.collect()
    assert rows(first) == 0
    make_world(store, url, tenant, teacher.url, items=3, name="-2").collect()
    third = make_world(store, url, tenant, teacher.url, items=3, name="-3", **off)
    third.collect()
    assert len(teacher.requests) == 9
    assert third.charged("answers") > 0


def test_a_tenant_finds_its_own_answers_alone(
    store: ObjectStore, tmp_path: Path, tenant: str, teacher: Teacher
) -> None:
    url = f"sqlite:///{tmp_path / 'gateway.sqlite3'}"
    make_world(store, url, tenant, teacher.url, items=3).collect()
    other = make_world(store, url, f"{tenant}-b", teacher.url, items=3)
    other.collect()
    assert len(teacher.requests) == 6
    assert not any(answer.cached for answer in other.answers())


@pytest.mark.parametrize("how", ["missing", "damaged", "no_part"])
def test_a_part_that_is_not_there_any_more_is_a_miss(
    how: str, store: ObjectStore, tmp_path: Path, tenant: str, teacher: Teacher
) -> None:
    url = f"sqlite:///{tmp_path / 'gateway.sqlite3'}"
    first = make_world(store, url, tenant, teacher.url, items=20, concurrency=1)
    first.collect()
    part = first.manifest().parts[0]
    store.delete(part.key)
    if how != "missing":
        store.put_new(part.key, END_OF_SERIES if how == "no_part" else b"x" * part.size)
    before = len(teacher.invoices())
    second = make_world(store, url, tenant, teacher.url, items=20, name="-2")
    assert second.collect_until_closed() == 2  # what was there, and then the rest
    assert second.outcomes() == {"answered": 20}
    assert {item.attempts for item in second.items()} == {0}
    assert len(teacher.requests) == 20 + 16
    assert sum(answer.cached for answer in second.answers()) == 4
    check(second, teacher, before)
    # The rows of the lost part were replaced by those of the new answers.
    third = make_world(store, url, tenant, teacher.url, items=20, name="-3")
    third.collect()
    assert len(teacher.requests) == 36
    assert bodies(third) == bodies(second)


@pytest.mark.parametrize(
    "crash_at",
    [
        "batch_claimed",
        "cached_part_stored",
        "cached_part_stored:2",
        "cached_stored",
        "part_stored",
        "manifest_written",
        "batch_closed",
    ],
)
def test_a_kill_at_any_point_keeps_items_and_money(
    crash_at: str,
    store: ObjectStore,
    store_part: Store,
    tmp_path: Path,
    tenant: str,
    teacher: Teacher,
) -> None:
    url = f"sqlite:///{tmp_path / 'gateway.sqlite3'}"
    first = make_world(store, url, tenant, teacher.url, items=20)
    first.collect()
    before = len(teacher.invoices())
    second = make_world(store, url, tenant, teacher.url, items=26, concurrency=2, name="-2")
    assert collect_in_process(Where(url, store_part), second, crash_at=crash_at) == 137
    second.check_books()
    second.collect_until_closed()
    second.collect()  # what is left after closing: the last event
    assert second.outcomes() == {"answered": 26}
    found = second.answers()
    assert sorted(a.item_id for a in found) == sorted(i.item_id for i in second.items())
    assert sum(answer.cached for answer in found) == 20
    assert bodies(second).items() >= bodies(first).items()
    assert len(teacher.requests) <= 20 + 6 + 6
    assert second.events().count("response_batch.stored") == 1
    assert second.events().count("responses.completed") == 1
    assert sum(charge.cached for charge in second.charges()) == 20
    check(second, teacher, before)


def test_a_killed_payer_leaves_its_answers_to_the_cache(
    store: ObjectStore, store_part: Store, tmp_path: Path, tenant: str, teacher: Teacher
) -> None:
    url = f"sqlite:///{tmp_path / 'gateway.sqlite3'}"
    first = make_world(store, url, tenant, teacher.url, items=20, concurrency=1)
    assert collect_in_process(Where(url, store_part), first, crash_at="part_stored") == 137
    assert rows(first) == 0  # not settled yet
    first.collect_until_closed()
    assert rows(first) == 20


def test_a_store_that_is_down_holds_hits_up_and_costs_nothing(
    store: ObjectStore,
    tmp_path: Path,
    tenant: str,
    teacher: Teacher,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def down(*_: object) -> None:
        raise StoreUnavailable("down")

    url = f"sqlite:///{tmp_path / 'gateway.sqlite3'}"
    make_world(store, url, tenant, teacher.url, items=20).collect()
    second = make_world(store, url, tenant, teacher.url, items=22, name="-2")
    for where in ("cache.index.read_part", "books.Books.store_at"):
        with monkeypatch.context() as patched:
            patched.setattr(f"services.teacher_gateway.{where}", down)
            for _ in range(2):
                second.expire()
                with pytest.raises(StoreUnavailable):
                    second.collect()
                second.check_books()
                assert second.pipeline().reserved_microusd == 0
    second.collect_until_closed()
    assert second.outcomes() == {"answered": 22}
    assert len(teacher.requests) == 22
    assert second.batch().crashes == 0
    assert second.charged(*LISTED) == 0
    second.check_books()


def test_hits_are_taken_at_the_deadline_and_not_for_a_poisonous_batch(
    store: ObjectStore, tmp_path: Path, tenant: str, teacher: Teacher
) -> None:
    url = f"sqlite:///{tmp_path / 'gateway.sqlite3'}"
    make_world(store, url, tenant, teacher.url, items=2).collect()
    late = make_world(store, url, tenant, teacher.url, items=3, name="-2")
    late.set(Batch, close_by=1.0, batch=0)
    late.collect()
    assert late.outcomes() == {"answered": 2, "closed_by_deadline": 1}
    deadly = make_world(store, url, tenant, teacher.url, items=3, name="-3")
    deadly.set(Batch, crashes=MOST_CRASHES, batch=0)
    deadly.collect()
    assert deadly.outcomes() == {"worker_lost": 3}
    stopping = make_world(store, url, tenant, teacher.url, items=3, name="-4")
    stopping.set(Pipeline, stopping="cancelled")
    stopping.collect()
    assert stopping.outcomes() == {"pipeline_stopped": 3}
    assert len(teacher.requests) == 2


def test_only_answers_are_kept(
    store: ObjectStore, tmp_path: Path, tenant: str, teacher: Teacher
) -> None:
    teacher.script(Fault("content_filter", match="[0/1]"))
    url = f"sqlite:///{tmp_path / 'gateway.sqlite3'}"
    first = make_world(store, url, tenant, teacher.url, items=3)
    first.collect_until_closed()
    assert rows(first) == 2
    teacher.forgive()
    second = make_world(store, url, tenant, teacher.url, items=3, name="-2")
    second.collect()
    assert second.outcomes() == {"answered": 3}
    assert len(teacher.requests) == 4
    assert json.loads(bodies(second)[first.asked[0][0].item.messages[0].text])["id"]
