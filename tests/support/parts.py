"""Real brokers, stores and databases for tests: found or started, each test with its own share."""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import signal
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit, urlunsplit

from kombu import Connection

from stillhouse.contracts.flow import SERVICES
from stillhouse.embedded import valkey
from stillhouse.embedded.process import base_environment, kill_group, spawn, wait_until_ready

AMQP_URL = "amqp://guest:guest@127.0.0.1:5672//"
POSTGRES_URL = "postgresql+psycopg://postgres@127.0.0.1:5432/postgres"


class Missing(Exception):
    """A part is not at hand; the message says how to have it."""


class RestartableValkey:
    """A Valkey that a test may kill and start again over the same data."""

    def __init__(self, folder: Path) -> None:
        self._data, self._log = folder / "data", folder / "valkey.log"
        self._data.mkdir(parents=True)
        self._runtime = valkey.make_runtime_dir()
        self.url = valkey.broker_url(self._runtime)
        self.start()

    def start(self) -> None:
        command = valkey.command(self._data, self._runtime)
        self._process = spawn(command, env=base_environment(), log=self._log, cwd=self._data)
        wait_until_ready(
            self._process,
            valkey.probe(self._runtime),
            name="valkey",
            log=self._log,
            deadline_seconds=15,
        )

    def kill(self) -> None:
        kill_group(self._process)

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """It takes connections meanwhile, and says nothing."""
        os.killpg(self._process.pid, signal.SIGSTOP)
        try:
            yield
        finally:
            os.killpg(self._process.pid, signal.SIGCONT)

    def close(self) -> None:
        self.kill()
        shutil.rmtree(self._runtime, ignore_errors=True)


@contextlib.contextmanager
def rabbitmq_vhost() -> Iterator[str]:
    """A virtual host of its own on the RabbitMQ at hand; the queue names are fixed, so two runs
    in one would meet. Where vhosts cannot be made, the given one is used and its queues purged.

    Raises Missing when there is no RabbitMQ.
    """
    given = os.environ.get("STILLHOUSE_TEST_AMQP_URL")
    url = given or AMQP_URL
    parts = urlsplit(url)
    if not given and not _listens(parts.hostname or "", parts.port or 5672):
        raise Missing(
            "STILLHOUSE_TEST_AMQP_URL is not set and nothing listens on 127.0.0.1:5672: start a "
            "RabbitMQ, or name one"
        )
    name = f"stillhouse-test-{secrets.token_hex(4)}"
    if not _rabbitmqctl("add_vhost", name):
        yield url
        return
    try:
        everything = (".*", ".*", ".*")
        _rabbitmqctl("set_permissions", "-p", name, parts.username or "guest", *everything)
        yield urlunsplit(parts._replace(path=f"/{name}"))
    finally:
        _rabbitmqctl("delete_vhost", name)


def _rabbitmqctl(*words: str) -> bool:
    if shutil.which("rabbitmqctl") is None:
        return False
    done = subprocess.run(["rabbitmqctl", "-q", *words], capture_output=True, timeout=60)
    return done.returncode == 0


def empty_broker(url: str) -> None:
    """Remove all that an earlier test left: queues with their messages and bindings."""
    if url.startswith("redis"):
        import redis

        path = url.removeprefix("redis+socket://")
        with redis.Redis(unix_socket_path=path) as client:
            client.flushall()
        return
    with Connection(url) as connection, connection.channel() as channel:
        for service in SERVICES:
            for kind in ("events", "jobs", "dead"):
                # Deleting what is not there is fine with RabbitMQ.
                channel.queue_delete(queue=f"{service}.{kind}")


@contextlib.contextmanager
def postgres_database() -> Iterator[str]:
    """A fresh database on the PostgreSQL at hand, as an SQLAlchemy URL; dropped at the end.

    Raises Missing when there is none.
    """
    given = os.environ.get("STILLHOUSE_TEST_POSTGRES_URL")
    url = given or POSTGRES_URL
    parts = urlsplit(url)
    if not given and not _listens(parts.hostname or "", parts.port or 5432):
        raise Missing(
            "STILLHOUSE_TEST_POSTGRES_URL is not set and nothing listens on 127.0.0.1:5432: start "
            "a PostgreSQL, or name one whose user may create databases"
        )
    import psycopg

    name = f"stillhouse_test_{secrets.token_hex(4)}"
    plain = urlunsplit(parts._replace(scheme="postgresql"))
    with psycopg.connect(plain, autocommit=True) as connection:
        connection.execute(f"CREATE DATABASE {name}")
        try:
            yield urlunsplit(parts._replace(scheme="postgresql+psycopg", path=f"/{name}"))
        finally:
            connection.execute(f"DROP DATABASE {name} WITH (FORCE)")


def _listens(host: str, port: int) -> bool:
    try:
        with socket.create_connection((host, port), timeout=1):
            return True
    except OSError:
        return False
