"""The probe: one paid question that finds out what would spoil every row."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from services.teacher_gateway.fitness import judge
from services.teacher_gateway.models import Pipeline
from services.teacher_gateway.probe import probe_teacher
from services.teacher_gateway.teachers.outcomes import Answered, Usage
from stillhouse.chassis.errors import StoreUnavailable
from stillhouse.chassis.storage import ObjectStore
from stillhouse.contracts.responses import Stopped
from tests.support.gateway import World, make_world
from tests.support.teacher import Fault, Teacher, running_teacher
from tests.support.tiny_tokenizer import tiny_chat_tokenizer


@pytest.fixture
def teacher(tmp_path: Path) -> Iterator[Teacher]:
    with running_teacher(tmp_path / "invoices.jsonl") as running:
        yield running


@pytest.fixture
def make(store: ObjectStore, tmp_path: Path, tenant: str) -> Any:
    def made(url: str, **more: Any) -> World:
        database = f"sqlite:///{tmp_path / 'gateway.sqlite3'}"
        return make_world(store, database, tenant, url, collect="waiting", **more)

    return made


def probe(world: World) -> None:
    world.set(Pipeline, next_attempt_at=None)
    probe_teacher(world.context, world.pipeline_id)


def test_a_fit_teacher_opens_the_collection_and_is_paid_once(make: Any, teacher: Teacher) -> None:
    world = make(teacher.url)
    probe(world)
    probe(world)  # a redelivery
    assert world.pipeline().collect == "running"
    assert len(teacher.requests) == 1
    (charge,) = world.charges()
    assert (charge.kind, charge.microusd) == ("probe", teacher.invoiced_microusd())
    world.check_books()


def test_a_probe_under_way_is_not_repeated(make: Any, teacher: Teacher) -> None:
    world = make(teacher.url)
    world.set(Pipeline, next_attempt_at=9e12)
    probe_teacher(world.context, world.pipeline_id)
    assert teacher.requests == []


@pytest.mark.parametrize("status", [408, 502, 504])
def test_a_probe_that_a_proxy_cut_off_stays_listed(
    status: int, make: Any, teacher: Teacher
) -> None:
    teacher.script(Fault("status", status=status, billed=True, attempts=(1,)))
    world = make(teacher.url)
    probe(world)
    assert world.charged("unknown") >= teacher.invoiced_microusd() > 0


@pytest.mark.parametrize(
    ("fault", "reason", "change"),
    [
        (Fault("missing_logprobs"), "missing_logprobs", "signal.kind: text"),
        (Fault("wrong_prompt_tokens"), "tokenizer_mismatch", "teachers[0].reference"),
        (Fault("status", status=404), "refused_by_teacher", "status 404"),
        (Fault("inflated"), "logprobs_not_raw", "signal.kind: text"),
        (Fault("missing_usage"), "teacher_invalid", "usage"),
        (Fault("redirect"), "teacher_invalid", "final URL"),
    ],
    ids=lambda value: getattr(value, "kind", None),
)
def test_an_unfit_teacher_fails_the_pipeline_with_what_to_change(
    fault: Fault, reason: str, change: str, make: Any, teacher: Teacher, store: ObjectStore
) -> None:
    teacher.script(fault)
    world = make(teacher.url)
    probe(world)
    pipeline = world.pipeline()
    assert (pipeline.state, pipeline.collect) == ("failed", "failed")
    assert reason in pipeline.reason
    assert change in pipeline.reason
    assert world.events()[-2:] == ["stage.failed", "pipeline.stopped"]
    found = store.find_model(
        f"tenants/{pipeline.tenant_id}/pipelines/{pipeline.pipeline_id}/stopped.json", Stopped
    )
    assert found is not None
    assert found[0].outcome == "failed"
    assert world.charged("probe", "unknown") >= teacher.invoiced_microusd()
    world.check_books()


def test_too_few_logprobs_are_refused_by_name(make: Any, teacher: Teacher) -> None:
    world = make(teacher.url, k=8)
    body = b"".join(
        [
            b'{"choices": [{"message": {"content": "a"}, "finish_reason": "stop", "logprobs": ',
            b'{"content": [{"logprob": -1, "id": 1, "top_logprobs": [{"logprob": -1, "id": 1}]}]}',
            b'}], "usage": {"prompt_tokens": 1, "completion_tokens": 1}}',
        ]
    )
    outcome = Answered(body.decode(), Usage(1, 1))
    asked, signal = world.resolved.teacher_of(0), world.resolved.signal_of(0)
    unfit = judge(outcome, asked, signal, tiny_chat_tokenizer(), 1)
    assert unfit is not None
    assert unfit.reason == "too_few_logprobs"
    assert "set `signal.k: 1`" in unfit.detail


def test_an_unreachable_teacher_is_tried_again_and_then_fails(make: Any) -> None:
    world = make("http://127.0.0.1:9/v1")
    probe(world)
    pipeline = world.pipeline()
    assert (pipeline.state, pipeline.collect) == ("running", "waiting")
    assert pipeline.next_attempt_at is not None
    probe(world)
    assert world.pipeline().state == "failed"
    assert "check `teachers[0].url`" in world.pipeline().reason
    assert world.pipeline().spent_microusd == 0


def test_a_probe_that_breaks_off_again_and_again_fails_the_pipeline(
    make: Any, teacher: Teacher, monkeypatch: pytest.MonkeyPatch
) -> None:
    def die(*_: object, **__: object) -> None:
        raise RuntimeError("a defect, or a kill")

    monkeypatch.setattr("services.teacher_gateway.probe.judge", die)
    world = make(teacher.url)
    for _ in range(world.context.times.probe_attempts):
        with pytest.raises(RuntimeError):
            probe(world)
    assert world.pipeline().state == "running"
    asked = len(teacher.requests)
    probe(world)
    assert len(teacher.requests) == asked
    assert world.pipeline().state == "failed"
    assert "worker_lost: the probe broke off in 2 attempts" in world.pipeline().reason
    assert world.events()[-2:] == ["stage.failed", "pipeline.stopped"]


def test_a_store_that_is_down_costs_no_attempt_of_the_probe(
    make: Any, teacher: Teacher, monkeypatch: pytest.MonkeyPatch
) -> None:
    def down(*_: object) -> None:
        raise StoreUnavailable("down")

    world = make(teacher.url)
    with monkeypatch.context() as patched:
        patched.setattr("services.teacher_gateway.probe.read_spec", down)
        for _ in range(world.context.times.probe_attempts + 1):
            with pytest.raises(StoreUnavailable):
                probe(world)
    probe(world)
    assert world.pipeline().collect == "running"


def test_a_teacher_that_starts_late_is_waited_for(make: Any, teacher: Teacher) -> None:
    teacher.script(Fault("status", status=503, attempts=(1,)))
    world = make(teacher.url)
    probe(world)
    assert world.pipeline().collect == "waiting"
    probe(world)
    assert world.pipeline().collect == "running"


def test_a_budget_below_one_answer_fails_before_anything_is_asked(
    make: Any, teacher: Teacher
) -> None:
    world = make(teacher.url, budget_usd=0.000001)
    probe(world)
    assert teacher.requests == []
    assert "budget.teacher_usd" in world.pipeline().reason
    assert world.pipeline().state == "failed"


def test_a_metadata_address_is_never_asked(make: Any) -> None:
    world = make("http://169.254.169.254/v1")
    probe(world)
    assert "never a teacher's address" in world.pipeline().reason


def test_each_of_several_teachers_is_asked_once(
    make: Any, teacher: Teacher, tmp_path: Path
) -> None:
    with running_teacher(tmp_path / "second.jsonl") as second:
        other = {"name": "second", "url": second.url, "weight": 1}
        world = make(teacher.url, teacher={"weight": 1}, others=[other])
        probe(world)
        assert world.pipeline().collect == "running"
        assert (len(teacher.requests), len(second.requests)) == (1, 1)
        assert sorted(charge.charge_id for charge in world.charges()) == [
            "probe:1:billing",
            "probe:1:second",
        ]
        assert world.charged("probe") == teacher.invoiced_microusd() + second.invoiced_microusd()
        world.check_books()


def test_one_unfit_teacher_of_several_fails_the_pipeline_by_its_place(
    make: Any, teacher: Teacher, tmp_path: Path
) -> None:
    with running_teacher(tmp_path / "second.jsonl") as second:
        second.script(Fault("wrong_prompt_tokens"))
        other = {"name": "second", "url": second.url, "weight": 1}
        world = make(teacher.url, teacher={"weight": 1}, others=[other])
        probe(world)
        assert world.pipeline().state == "failed"
        assert "teachers[1].reference" in world.pipeline().reason
        assert world.charged("probe") >= teacher.invoiced_microusd() + second.invoiced_microusd()


def test_answers_that_are_given_along_need_no_probe(make: Any) -> None:
    free = {"input": 0, "output": 0}
    world = make("", teacher={"url": None, "answers": "given", "usd_per_million": free})
    probe(world)
    assert (world.pipeline().collect, world.charges()) == ("running", [])


@pytest.mark.parametrize(
    ("dies", "kind"), [("paid_calls.crash_point", "unknown"), ("probe._decide", "probe")]
)
def test_a_killed_probe_leaves_its_charges_listed(
    make: Any, teacher: Teacher, monkeypatch: pytest.MonkeyPatch, dies: str, kind: str
) -> None:
    def die(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    world = make(teacher.url)
    with monkeypatch.context() as patched:
        patched.setattr(f"services.teacher_gateway.{dies}", die)
        with pytest.raises(KeyboardInterrupt):
            probe(world)
    assert world.charged(kind) >= teacher.invoiced_microusd() > 0
    probe(world)
    assert world.pipeline().collect == "running"
    assert world.charged("unknown", "probe") >= teacher.invoiced_microusd()
    world.check_books()
