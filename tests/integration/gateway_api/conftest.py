"""An API on each database in turn, over the session's real store."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
import structlog

from stillhouse.chassis.storage import ObjectStore
from tests.support.gateway_api import Api, gateway_api, serving


@pytest.fixture(autouse=True)
def _plain_logs() -> Iterator[None]:
    """Lines without pictures of local variables, which take seconds to draw."""
    structlog.configure(processors=[structlog.processors.KeyValueRenderer()])
    yield
    structlog.reset_defaults()


@pytest.fixture
def api(tmp_path: Path, store: ObjectStore, tenant: str, database_url: str) -> Iterator[Api]:
    """On SQLite and on PostgreSQL."""
    with gateway_api(tmp_path, store, tenant, DATABASE_URL=database_url) as found:
        yield found


@pytest.fixture
def small(tmp_path: Path, store: ObjectStore, tenant: str) -> Iterator[Api]:
    """On SQLite alone, for what does not depend on the database."""
    with gateway_api(tmp_path, store, tenant) as found:
        yield found


@pytest.fixture
def client(small: Api) -> Iterator[httpx.Client]:
    """Real HTTP with a valid key, on `small`."""
    with serving(small.app) as url, httpx.Client(base_url=url, headers=small.headers()) as found:
        yield found
