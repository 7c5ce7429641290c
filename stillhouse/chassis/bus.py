"""Events on the broker: one durable topic exchange, one durable queue for each service.

The topology is declared from `contracts/flow.py`; an event that the table does not list for a
service is refused. RabbitMQ gets quorum queues with a delivery limit and a dead-letter queue.
Valkey has neither, so what cannot be handled goes to the same dead queue by our own hand.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from kombu import Connection, Exchange, Queue, binding
from kombu.exceptions import OperationalError

from stillhouse.chassis.errors import PermanentError, RetryableError
from stillhouse.contracts.envelope import Envelope
from stillhouse.contracts.flow import SERVICES, Service, consumed_by, published_by

EXCHANGE = Exchange("stillhouse.events", type="topic", durable=True)
DELIVERY_LIMIT = 5
PUBLISH_TIMEOUT = 10.0
# Seconds of silence after which an answer that the broker owes is given up: py-amqp and redis-py
# wait for ever. It must be longer than the second for which kombu has Valkey wait for a message.
SILENCE_TIMEOUT = 20.0

_JSON = {"content_type": "application/json", "content_encoding": "utf-8"}


class BrokerUnavailable(RetryableError):
    """The broker did not take or give a message."""


def is_redis(broker_url: str) -> bool:
    return broker_url.startswith(("redis", "valkey"))


def queue_arguments(broker_url: str, dead: str) -> dict[str, Any]:
    """Arguments of a queue whose refused messages go to `dead`: none on Valkey."""
    if is_redis(broker_url):
        return {}
    return {
        "x-queue-type": "quorum",
        "x-delivery-limit": DELIVERY_LIMIT,
        "x-dead-letter-exchange": "",
        "x-dead-letter-routing-key": dead,
        "x-dead-letter-strategy": "at-least-once",
        "x-overflow": "reject-publish",
    }


def dead_queue(service: Service, broker_url: str) -> Queue:
    arguments = {} if is_redis(broker_url) else {"x-queue-type": "quorum"}
    name = f"{service}.dead"
    return Queue(name, routing_key=name, durable=True, queue_arguments=arguments)


def event_queue(service: Service, broker_url: str) -> Queue:
    """The queue of a service, bound to what the flow lets it consume."""
    return Queue(
        f"{service}.events",
        durable=True,
        queue_arguments=queue_arguments(broker_url, f"{service}.dead"),
        bindings=[binding(EXCHANGE, routing_key=t) for t in sorted(consumed_by(service))],
    )


def transport_options(
    broker_url: str, service: Service, visibility_timeout: float
) -> dict[str, Any]:
    """Options of kombu's transports: confirms on RabbitMQ; on Valkey a swift return of what a
    dead worker held, booked apart for each service (the visibility timeout is per database)."""
    if not is_redis(broker_url):
        return {
            "confirm_publish": True,
            "read_timeout": SILENCE_TIMEOUT,
            "write_timeout": SILENCE_TIMEOUT,
        }
    return {
        "visibility_timeout": visibility_timeout,
        "unacked_restore_interval": 2,
        "unacked_restore_throttle": 1,
        "unacked_key": f"unacked.{service}",
        "unacked_index_key": f"unacked_index.{service}",
        "unacked_mutex_key": f"unacked_mutex.{service}",
        "socket_timeout": SILENCE_TIMEOUT,
        "socket_keepalive": True,
        "health_check_interval": 10,
    }


@contextmanager
def connect(broker_url: str, service: Service, visibility_timeout: float = 600) -> Iterator[Any]:
    """A short-lived connection; errors of the transport become BrokerUnavailable."""
    options = transport_options(broker_url, service, visibility_timeout)
    try:
        with Connection(
            broker_url, transport_options=options, connect_timeout=5, heartbeat=0
        ) as connection:
            connection.ensure_connection(max_retries=1, timeout=5)
            yield connection
    except (OperationalError, OSError) as error:
        raise BrokerUnavailable(f"the broker did not answer: {error}") from error
    except transport_errors(broker_url) as error:
        raise BrokerUnavailable(f"the broker refused: {error}") from error


def transport_errors(broker_url: str) -> tuple[type[Exception], ...]:
    """What kombu's transport for this URL may raise when the broker is away or refuses.

    kombu counts KeyError among them on Valkey; here it would hide a mistake of ours.
    """
    connection = Connection(broker_url)
    listed = (
        *connection.recoverable_connection_errors,
        *connection.connection_errors,
        *connection.channel_errors,
    )
    return (OperationalError, OSError, *(error for error in listed if error is not KeyError))


def declare(connection: Any, broker_url: str) -> None:
    """Declare exchange and all services' queues, so that no early event is dropped unbound."""
    with connection.channel() as channel:
        EXCHANGE(channel).declare()
        for service in SERVICES:
            dead_queue(service, broker_url)(channel).declare()
            event_queue(service, broker_url)(channel).declare()


class Publisher:
    """Publishes what the flow lets a service publish, confirmed, on a connection of its own.

    It opens a connection for each call: events are few, and a held one would need its heartbeats
    read between them.
    """

    def __init__(self, service: Service, broker_url: str) -> None:
        self._service = service
        self._url = broker_url
        self._allowed = published_by(service)

    def publish(self, *envelopes: Envelope) -> None:
        """Publish in order; each is taken by the broker when this returns. Raises
        BrokerUnavailable, after which the caller publishes all of them again."""
        for envelope in envelopes:
            if envelope.type not in self._allowed:
                raise PermanentError(
                    f"{self._service} may not publish {envelope.type}: contracts/flow.py does "
                    "not list it",
                    reason="not_in_flow",
                )
        with connect(self._url, self._service) as connection:
            # Each time (15 ms): a broker that lost its data drops what no queue is bound to.
            declare(connection, self._url)
            with connection.Producer(auto_declare=False) as producer:
                for envelope in envelopes:
                    _send(producer, envelope, exchange=EXCHANGE.name, routing_key=envelope.type)

    def republish(self, envelope: Envelope, to: Service) -> None:
        """Send a stored event again to one service's queue alone: re-drive, and wake-ups that a
        trainer hands on."""
        with connect(self._url, self._service) as connection:
            declare(connection, self._url)
            with connection.Producer(auto_declare=False) as producer:
                _send(producer, envelope, exchange="", routing_key=f"{to}.events")


def _send(producer: Any, envelope: Envelope, **where: str) -> None:
    producer.publish(envelope.encode(), delivery_mode=2, timeout=PUBLISH_TIMEOUT, **where, **_JSON)


def pull(service: Service, broker_url: str) -> Envelope | None:
    """Take one message from a service's queue and acknowledge it; None when it is empty.

    For a worker that takes messages only when idle: a connection for each pull, since a held one
    hoards or dies (measured). A message that does not decode goes to the dead queue.
    """
    with connect(broker_url, service) as connection:
        declare(connection, broker_url)
        channel = connection.channel()
        message = event_queue(service, broker_url)(channel).get(no_ack=False)
        if message is None:
            return None
        try:
            envelope = Envelope.decode(message.body)
            envelope.event()
        except ValueError as error:
            bury(channel, service, broker_url, message, str(error))
            message.ack()
            return None
        message.ack()
        return envelope


def bury(channel: Any, service: Service, broker_url: str, message: Any, reason: str) -> None:
    """Put a copy of a message that cannot be handled on the dead queue, with the reason."""
    queue = dead_queue(service, broker_url)(channel)
    queue.declare()
    with channel.connection.client.Producer(channel, auto_declare=False) as producer:
        producer.publish(
            message.body if isinstance(message.body, bytes | str) else bytes(message.body),
            exchange="",
            routing_key=queue.name,
            delivery_mode=2,
            headers={"reason": reason[:500]},
            timeout=PUBLISH_TIMEOUT,
            **_JSON,
        )


def depth(service: Service, broker_url: str) -> dict[str, int]:
    """Messages ready in a service's queues, by queue name."""
    names = [f"{service}.events", f"{service}.dead"]
    if service != "trainer":
        names.append(f"{service}.jobs")
    found: dict[str, int] = {}
    with connect(broker_url, service) as connection:
        declare(connection, broker_url)
        for name in names:
            with connection.channel() as channel:
                try:
                    found[name] = int(channel.queue_declare(queue=name, passive=True).message_count)
                except connection.channel_errors:
                    found[name] = 0  # the jobs queue is declared by its worker
    return found
