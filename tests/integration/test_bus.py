"""Events on real brokers: routing by the flow table, dead letters, pulling, lost confirms."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from urllib.parse import urlsplit, urlunsplit

import pytest

from stillhouse.chassis import bus
from stillhouse.chassis.errors import PermanentError
from stillhouse.chassis.jobs import Job, Timeouts, enqueue, make_app
from stillhouse.contracts import events as e
from stillhouse.contracts.envelope import Envelope, seal
from stillhouse.contracts.flow import BUILDER, EVALUATOR, GATEWAY, SERVICES, TRAINER
from tests.support.dead_letters import dead_letters, put_raw
from tests.support.parts import RestartableValkey
from tests.support.proxy import proxy
from tests.support.recording_service import Settings, make_shell, ref, stored
from tests.support.waiting import wait_for

WHERE = {"exchange": bus.EXCHANGE.name, "routing_key": "pipeline.accepted"}


def accepted() -> Envelope:
    event = e.PipelineAccepted(spec=ref("spec"), dataset_id="ds-1", training_id="tr-1")
    return seal(event, tenant_id="t-1", pipeline_id="pl-1")


def shard(batch: int) -> Envelope:
    event = e.ShardWritten(
        dataset_id="ds-1",
        batch=batch,
        split="train",
        shard=ref("shard"),
        rows=1,
        rejected=0,
        supervised_tokens=9,
    )
    return seal(event, tenant_id="t-1", pipeline_id="pl-1")


def test_an_event_reaches_the_services_that_the_flow_lists_and_no_other(broker_url: str) -> None:
    envelope = accepted()
    bus.Publisher(GATEWAY, broker_url).publish(envelope)
    assert bus.pull(GATEWAY, broker_url) is None
    for service in (BUILDER, TRAINER, EVALUATOR):
        assert bus.pull(service, broker_url) == envelope
        assert bus.pull(service, broker_url) is None


def test_the_first_event_finds_all_queues_declared(broker_url: str) -> None:
    bus.Publisher(BUILDER, broker_url).publish(shard(3))
    for service in SERVICES:
        expected = 1 if service in (TRAINER, GATEWAY) else 0
        assert bus.depth(service, broker_url)[f"{service}.events"] == expected


def test_a_broker_that_lost_its_data_loses_no_later_event(valkey_url: str) -> None:
    import redis

    publisher = bus.Publisher(BUILDER, valkey_url)
    publisher.publish(shard(1))
    with redis.Redis(unix_socket_path=valkey_url.removeprefix("redis+socket://")) as client:
        client.flushall()
    publisher.publish(shard(2))
    taken = bus.pull(TRAINER, valkey_url)
    assert taken is not None
    assert taken.payload["batch"] == 2


def test_a_publication_that_the_flow_does_not_list_is_refused(broker_url: str) -> None:
    with pytest.raises(PermanentError, match=r"trainer may not publish pipeline\.accepted") as why:
        bus.Publisher(TRAINER, broker_url).publish(accepted())
    assert why.value.reason == "not_in_flow"
    assert bus.pull(BUILDER, broker_url) is None


def test_pull_takes_one_message_and_leaves_the_others(broker_url: str) -> None:
    bus.Publisher(BUILDER, broker_url).publish(shard(1), shard(2), shard(3))
    taken = [bus.pull(TRAINER, broker_url)]
    assert bus.depth(TRAINER, broker_url)["trainer.events"] == 2
    taken += [bus.pull(TRAINER, broker_url) for _ in range(2)]
    assert [envelope.payload["batch"] for envelope in taken if envelope] == [1, 2, 3]
    assert bus.pull(TRAINER, broker_url) is None


def test_a_republished_event_reaches_one_service_alone(broker_url: str) -> None:
    envelope = shard(4)
    bus.Publisher(GATEWAY, broker_url).republish(envelope, TRAINER)
    assert bus.depth(GATEWAY, broker_url)["teacher_gateway.events"] == 0
    assert bus.pull(TRAINER, broker_url) == envelope


def test_publishing_twice_delivers_the_same_event_id_twice(broker_url: str) -> None:
    publisher = bus.Publisher(BUILDER, broker_url)
    publisher.publish(shard(5))
    publisher.publish(shard(5))
    first, second = bus.pull(TRAINER, broker_url), bus.pull(TRAINER, broker_url)
    assert first is not None
    assert second is not None
    assert first.event_id == second.event_id


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        (b"not json", "Invalid JSON"),
        (b"{}", "event_id"),
        (shard(1).encode().replace(b"shard.written", b"shard.broken!"), "shard.broken!"),
        (shard(1).encode().replace(b'"rows":1', b'"rows":-1'), "greater than or equal to 0"),
    ],
)
def test_pull_moves_an_undecodable_message_to_the_dead_queue_with_its_reason(
    broker_url: str, body: bytes, reason: str
) -> None:
    bus.Publisher(BUILDER, broker_url).publish(shard(1))
    assert bus.pull(TRAINER, broker_url) is not None
    put_raw(broker_url, "trainer.events", body)
    bus.Publisher(BUILDER, broker_url).publish(shard(2))
    assert bus.pull(TRAINER, broker_url) is None
    behind = bus.pull(TRAINER, broker_url)
    assert behind is not None
    assert behind.payload["batch"] == 2
    [(buried, why)] = dead_letters(broker_url, TRAINER)
    assert buried == body
    assert reason in why


def test_depth_counts_what_waits(broker_url: str) -> None:
    assert bus.depth(TRAINER, broker_url) == {"trainer.events": 0, "trainer.dead": 0}
    bus.Publisher(GATEWAY, broker_url).publish(*(stored(n) for n in range(3)))
    assert bus.depth(BUILDER, broker_url) == {
        "dataset_builder.events": 3,
        "dataset_builder.dead": 0,
        "dataset_builder.jobs": 0,
    }


@pytest.mark.parametrize("url", ["amqp://127.0.0.1:1//", "redis+socket:///nowhere/vk.sock"])
def test_a_broker_that_is_away_is_a_retryable_error_within_seconds(url: str) -> None:
    started = time.monotonic()
    for call in (
        lambda: bus.Publisher(GATEWAY, url).publish(accepted()),
        lambda: bus.pull(TRAINER, url),
        lambda: bus.depth(TRAINER, url),
    ):
        with pytest.raises(bus.BrokerUnavailable, match="the broker"):
            call()
    assert time.monotonic() - started < 20


@pytest.mark.rabbitmq
def test_wrong_credentials_are_an_error_of_the_broker_without_the_password(
    rabbitmq_url: str,
) -> None:
    wrong = rabbitmq_url.replace("guest:guest", "guest:not-this-one")
    with pytest.raises(bus.BrokerUnavailable, match="ACCESS_REFUSED") as why:
        bus.Publisher(GATEWAY, wrong).publish(accepted())
    assert "not-this-one" not in str(why.value)


@pytest.mark.rabbitmq
def test_an_event_given_back_too_often_goes_to_the_dead_queue(rabbitmq_url: str) -> None:
    bus.Publisher(GATEWAY, rabbitmq_url).publish(stored(1))
    for _ in range(bus.DELIVERY_LIMIT + 1):
        with bus.connect(rabbitmq_url, BUILDER) as connection, connection.channel() as channel:
            get = partial(bus.event_queue(BUILDER, rabbitmq_url)(channel).get, no_ack=False)
            wait_for(get, 5, "the event comes again").requeue()
    found = wait_for(
        lambda: dead_letters(rabbitmq_url, BUILDER), 10, "the event is on the dead queue"
    )
    assert Envelope.decode(found[0][0]).event_id == stored(1).event_id


@pytest.mark.rabbitmq
def test_a_broker_that_falls_silent_is_an_error_and_not_a_hang(
    rabbitmq_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bus, "SILENCE_TIMEOUT", 1.0)
    monkeypatch.setattr(bus, "PUBLISH_TIMEOUT", 1.0)
    parts = urlsplit(rabbitmq_url)
    with proxy(parts.hostname or "", parts.port or 5672) as edge:
        behind = urlunsplit(parts._replace(netloc=f"guest:guest@127.0.0.1:{edge.port}"))
        bus.Publisher(GATEWAY, behind).publish(accepted())

        def publish_into_silence(published_before: int) -> None:
            with (
                bus.connect(behind, GATEWAY) as connection,
                connection.Producer(auto_declare=False) as producer,
            ):
                for _ in range(published_before):
                    bus._send(producer, accepted(), **WHERE)
                edge.mode = "hold"
                bus._send(producer, accepted(), **WHERE)

        for published_before in (0, 1):  # the first one asks for confirms besides
            edge.mode = "pass"
            started = time.monotonic()
            with pytest.raises(bus.BrokerUnavailable):
                publish_into_silence(published_before)
            assert time.monotonic() - started < 8
        edge.mode = "refuse"
        edge.reset_all()


def test_a_valkey_that_falls_silent_is_an_error_and_not_a_hang(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bus, "SILENCE_TIMEOUT", 1.5)
    broker = RestartableValkey(tmp_path)
    shell = make_shell(Settings(broker_url=broker.url), tmp_path / "records", Timeouts(10, 40))
    app, job = make_app(shell), Job.of("record", stored(1), batch=1)
    try:
        publisher = bus.Publisher(GATEWAY, broker.url)
        publisher.publish(accepted())
        enqueue(app, job)
        with ThreadPoolExecutor(1) as pool, broker.paused():
            publishing = pool.submit(publisher.publish, accepted())
            assert isinstance(publishing.exception(60), bus.BrokerUnavailable)
            enqueuing = pool.submit(enqueue, app, job)
            assert isinstance(enqueuing.exception(60), bus.BrokerUnavailable)
        publisher.publish(accepted())
        enqueue(app, job)
    finally:
        broker.close()


def test_a_killed_valkey_gives_back_what_it_took(tmp_path: Path) -> None:
    broker = RestartableValkey(tmp_path)
    try:
        publisher = bus.Publisher(BUILDER, broker.url)
        publisher.publish(*(shard(n) for n in range(20)))
        broker.kill()
        with pytest.raises(bus.BrokerUnavailable):
            publisher.publish(shard(20))
        broker.start()
        publisher.publish(shard(20))
        taken = [bus.pull(TRAINER, broker.url) for _ in range(21)]
    finally:
        broker.close()
    assert [envelope.payload["batch"] for envelope in taken if envelope] == list(range(21))
