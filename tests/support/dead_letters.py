"""Look at dead queues, and put messages on queues that no publisher of ours would."""

from __future__ import annotations

from typing import Any

from kombu import Connection

from stillhouse.chassis import bus
from stillhouse.contracts.flow import Service
from tests.support.waiting import wait_for


def put_raw(url: str, queue: str, body: bytes, **properties: Any) -> None:
    with Connection(url) as connection, connection.Producer() as producer:
        chosen = {"content_type": "application/json", "content_encoding": "utf-8", **properties}
        producer.publish(body, exchange="", routing_key=queue, delivery_mode=2, **chosen)


def dead_letters(url: str, service: Service) -> list[tuple[bytes, str]]:
    """Bodies and reasons on a service's dead queue, taken from it."""
    found = []
    with bus.connect(url, service) as connection, connection.channel() as channel:
        bus.declare(connection, url)
        while message := bus.dead_queue(service, url)(channel).get(no_ack=True):
            body = message.body if isinstance(message.body, bytes) else message.body.encode()
            found.append((body, message.headers.get("reason", "")))
    return found


def wait_for_dead(
    url: str, service: Service, count: int, deadline: float = 20
) -> list[tuple[bytes, str]]:
    """Wait until so many messages are on the dead queue, and take them."""
    wait_for(
        lambda: bus.depth(service, url)[f"{service}.dead"],
        deadline,
        f"{count} messages are on {service}.dead",
        until=lambda depth: depth == count,
    )
    return dead_letters(url, service)
