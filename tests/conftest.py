"""Fixtures of all tests: real parts once a session, and for each test a share of its own."""

from __future__ import annotations

import contextlib
import secrets
from collections.abc import Iterator
from pathlib import Path

import hypothesis
import pytest

from stillhouse.chassis.storage import ObjectStore
from stillhouse.embedded import parts as embedded
from stillhouse.embedded.parts import Store
from tests.support import parts
from tests.support.shards import store_of

# A loaded machine must not fail a property.
hypothesis.settings.register_profile("stillhouse", deadline=None)
hypothesis.settings.load_profile("stillhouse")


@pytest.fixture
def tenant() -> str:
    """A tenant that no other test has: its keys in the store are its own."""
    return f"t-{secrets.token_hex(6)}"


@pytest.fixture(scope="session")
def store_part(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Store]:
    """SeaweedFS with its bucket, as a service's settings name it."""
    with embedded.seaweedfs(tmp_path_factory.mktemp("seaweedfs")) as part:
        yield part


@pytest.fixture(scope="session")
def store(store_part: Store) -> ObjectStore:
    return store_of(store_part, connect_timeout=2, read_timeout=10)


@pytest.fixture(scope="session")
def _valkey(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with embedded.valkey(tmp_path_factory.mktemp("valkey")) as url:
        yield url


@pytest.fixture
def valkey_url(_valkey: str) -> str:
    """An empty Valkey."""
    parts.empty_broker(_valkey)
    return _valkey


@pytest.fixture(scope="session")
def _rabbitmq() -> Iterator[str]:
    with contextlib.ExitStack() as stack:
        try:
            url = stack.enter_context(parts.rabbitmq_vhost())
        except parts.Missing as missing:
            pytest.skip(str(missing))
        yield url


@pytest.fixture
def rabbitmq_url(_rabbitmq: str) -> str:
    """A RabbitMQ without any of our queues, in a virtual host of this session."""
    parts.empty_broker(_rabbitmq)
    return _rabbitmq


@pytest.fixture(params=["valkey", pytest.param("rabbitmq", marks=pytest.mark.rabbitmq)])
def broker_url(request: pytest.FixtureRequest) -> str:
    """Each broker in turn, empty."""
    return str(request.getfixturevalue(f"{request.param}_url"))


@pytest.fixture(params=["sqlite", pytest.param("postgres", marks=pytest.mark.postgres)])
def database_url(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """Each database in turn, fresh and without tables, as an SQLAlchemy URL."""
    if request.param == "sqlite":
        yield f"sqlite:///{tmp_path / 'gateway.sqlite3'}"
        return
    with contextlib.ExitStack() as stack:
        try:
            url = stack.enter_context(parts.postgres_database())
        except parts.Missing as missing:
            pytest.skip(str(missing))
        yield url
