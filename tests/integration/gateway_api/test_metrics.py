"""Gauges that a restart does not forget, rendered from the database and the broker."""

from __future__ import annotations

import json
from typing import Any

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.parser import text_string_to_metric_families
from sqlalchemy import update

from services.teacher_gateway import metrics
from services.teacher_gateway.accept import accept_pipeline
from services.teacher_gateway.database import now, open_engine, transaction
from services.teacher_gateway.keys import create_key
from services.teacher_gateway.metrics import StateCollector
from services.teacher_gateway.models import (
    Batch,
    Item,
    Outbox,
    Pipeline,
    TeacherEndpoint,
    TeacherShare,
)
from stillhouse.chassis.bus import Publisher
from stillhouse.contracts.envelope import Envelope
from tests.support.gateway_api import Api, events, posted_spec, submit

Labels = tuple[tuple[str, str], ...]


def scrape(api: Api, broker_url: str = "") -> dict[tuple[str, Labels], float]:
    settings = api.gateway.settings
    if broker_url:
        settings = settings.model_copy(update={"broker_url": broker_url})
    registry = CollectorRegistry()
    registry.register(StateCollector(api.engine, settings))
    text = generate_latest(registry).decode()
    prefix = "stillhouse_teacher_gateway_"
    return {
        (sample.name.removeprefix(prefix), tuple(sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def add_pipeline(api: Api, number: int, **fields: Any) -> str:
    name = f"pl-{number:024d}"
    with transaction(api.engine) as session:
        at = now(session)
        values = {
            "tenant_id": api.tenant,
            "name": "x",
            "body_sha256": "0" * 64,
            "spec": json.dumps({}),
            "traceparent": "",
            "state": "running",
            "budget_microusd": 3_000_000,
            "created_at": at - 100 + number,
            **fields,
        }
        session.add(Pipeline(pipeline_id=name, **values))
    return name


def test_state_is_told_as_it_is_stored(api: Api) -> None:
    running = add_pipeline(api, 1, spent_microusd=1_500_000, reserved_microusd=250_000)
    add_pipeline(api, 2, state="failed", spent_microusd=500_000)
    add_pipeline(api, 3, train="done")
    with transaction(api.engine) as session:
        for n, (outcome, reason) in enumerate(
            [("pending", ""), ("row", ""), ("rejected", "teacher_error")]
        ):
            session.add(
                Item(
                    pipeline_id=running,
                    item_id=f"pr-{n}-0",
                    tenant_id=api.tenant,
                    batch=0,
                    outcome=outcome,
                    reason=reason,
                )
            )
        session.add(
            Outbox(
                tenant_id=api.tenant,
                pipeline_id=running,
                envelope="{}",
                created_at=now(session) - 30,
            )
        )
    found = scrape(api)

    def value(name: str, **labels: str) -> float:
        return found[name, tuple(sorted(labels.items()))]

    assert value("pipelines", state="running") == 2
    assert value("pipelines", state="failed") == 1
    assert value("pipelines", state="released") == 0
    assert value("budget_usd", pipeline=running) == 3
    assert value("spent_usd", pipeline=running) == 1.5
    assert value("reserved_usd", pipeline=running) == 0.25
    assert value("spent_all_usd") == 2
    assert value("items", outcome="pending") == 1
    assert value("rejections", reason="teacher_error") == 1
    assert value("unfinished_trainings") == 1
    assert value("stages", stage="train", state="done") == 1
    assert 90 < value("oldest_pending_item_age_seconds") < 200
    assert value("outbox_events") == 1
    assert 25 < value("outbox_age_seconds") < 60
    assert value("state_readable_bool") == 1


def test_teachers_that_are_still_to_be_asked_are_told_by_digits_and_capped(small: Api) -> None:
    running, ended = add_pipeline(small, 1), add_pipeline(small, 2, state="failed")
    count = metrics.TEACHERS_SHOWN + 5
    with transaction(small.engine) as session:
        clock = now(session)
        for number in range(count):
            name = f"{number:02d}" + 62 * "0"
            more = {"away": 2, "cool_until": clock + 60, "concurrency": 3.5} if not number else {}
            session.add(TeacherEndpoint(endpoint=name, **more))
            session.flush()
            for pipeline, batch in ((running, number), (ended, count + number)):
                session.add(
                    Batch(
                        pipeline_id=pipeline,
                        batch=batch,
                        tenant_id=small.tenant,
                        split="train",
                        teacher="t",
                        endpoint=name if pipeline == running else 64 * "f",
                        items=1,
                        prompts="{}",
                    )
                )
        session.add(TeacherEndpoint(endpoint=64 * "f"))
        for holder, most in (("a", 8), ("b", 6)):
            session.add(
                TeacherShare(
                    endpoint=64 * "0",
                    holder=holder,
                    epoch=1,
                    tenant_id=small.tenant,
                    pipeline_id=running,
                    calls=2,
                    wanted=2,
                    running=2,
                    most=most,
                    until=clock + 60,
                )
            )
    found = scrape(small)
    shown = {dict(labels)["teacher"] for name, labels in found if name == "teacher_calls"}
    assert shown == {f"{number:02d}" + 10 * "0" for number in range(metrics.TEACHERS_SHOWN)}
    first = (("teacher", 12 * "0"),)
    assert found["teacher_calls", first] == 4
    assert found["teacher_calls_limit", first] == 3
    assert found["teacher_away_bool", first] == 1
    assert 50 < found["teacher_pause_seconds", first] <= 60
    assert found["teacher_away_bool", (("teacher", "01" + 10 * "0"),)] == 0


def test_only_the_oldest_active_pipelines_get_series(small: Api) -> None:
    names = [add_pipeline(small, n) for n in range(metrics.PIPELINES_SHOWN + 5)]
    found = scrape(small)
    shown = {dict(labels)["pipeline"] for name, labels in found if name == "spent_usd"}
    assert shown == set(names[: metrics.PIPELINES_SHOWN])


def test_a_database_that_is_away_is_a_figure_and_no_error(small: Api) -> None:
    import dataclasses

    away = open_engine("postgresql://nobody@127.0.0.1:1/none")
    gateway = dataclasses.replace(small.gateway, engine=away)
    found = scrape(dataclasses.replace(small, gateway=gateway))
    assert found == {("state_readable_bool", ()): 0}


def test_queues_are_counted_at_the_broker(small: Api, valkey_url: str) -> None:
    pipeline_id = submit(small, posted_spec(small.files))
    accept_pipeline(small.context(), pipeline_id)
    [accepted] = [e for e in events(small, pipeline_id) if e.type == "pipeline.accepted"]
    assert isinstance(accepted, Envelope)
    Publisher("teacher_gateway", valkey_url).publish(accepted)
    found = scrape(small, valkey_url)
    depths = {dict(labels)["queue"]: n for (name, labels), n in found.items() if "queue" in name}
    assert depths["trainer.events"] == depths["dataset_builder.events"] == 1
    assert depths["teacher_gateway.events"] == 0


def test_no_label_carries_what_a_user_wrote(small: Api) -> None:
    create_key(small.engine, small.gateway.settings.key_pepper, "tenant-name")
    add_pipeline(small, 1, tenant_id="tenant-name", name="name-of-a-pipeline")
    with transaction(small.engine) as session:
        session.execute(update(Pipeline).values(reason="reason of a pipeline"))
    text = str(scrape(small))
    for word in ("tenant-name", "name-of-a-pipeline", "reason of"):
        assert word not in text
