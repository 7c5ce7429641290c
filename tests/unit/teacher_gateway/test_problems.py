"""Which problem an exception becomes."""

from __future__ import annotations

import errno
import json
from collections.abc import Iterator

import pytest
import structlog

from services.teacher_gateway.database import DatabaseUnavailable
from services.teacher_gateway.problems import ProblemError, from_exception, unauthorized
from stillhouse.chassis.errors import MissingObject, PermanentError, StoreUnavailable


@pytest.fixture(autouse=True)
def _plain_logs() -> Iterator[None]:
    structlog.configure(processors=[structlog.processors.KeyValueRenderer()])
    yield
    structlog.reset_defaults()


@pytest.mark.parametrize(
    ("error", "status", "name", "said"),
    [
        (StoreUnavailable("key: secret host"), 503, "unavailable", "(the object store)"),
        (DatabaseUnavailable("database is locked"), 503, "unavailable", "(the database)"),
        (
            DatabaseUnavailable("database or disk is full"),
            503,
            "unavailable",
            "the database, whose disk is full",
        ),
        (OSError(errno.ENOSPC, "No space left"), 507, "disk-full", "should make room"),
        (
            PermanentError("no", reason="store_refused"),
            503,
            "store-refused",
            "check endpoint, bucket and keys",
        ),
        (MissingObject("tenants/x is gone"), 500, "internal", "under the number"),
        (RuntimeError("internals"), 500, "internal", "under the number"),
        (ProblemError(409, "mine", "said"), 409, "mine", "said"),
    ],
)
def test_an_exception_becomes_the_fitting_problem(
    error: Exception, status: int, name: str, said: str
) -> None:
    answer = from_exception(error).response()
    problem = json.loads(answer.body)
    assert answer.status_code == problem["status"] == status
    assert answer.media_type == "application/problem+json"
    assert problem["type"] == f"urn:stillhouse:problem:{name}"
    assert said in problem["detail"]
    assert set(problem) == {"type", "title", "status", "detail", "errors"}
    for internal in ("secret host", "internals", "tenants/x"):
        assert internal not in problem["detail"]


def test_what_may_be_tried_again_says_when() -> None:
    assert from_exception(StoreUnavailable("x")).response().headers["retry-after"] == "5"
    assert "retry-after" not in from_exception(RuntimeError()).response().headers


def test_a_missing_key_is_answered_with_how_to_get_one() -> None:
    answer = unauthorized().response()
    assert answer.headers["www-authenticate"] == "Bearer"
    assert "keys create --tenant" in json.loads(answer.body)["detail"]
