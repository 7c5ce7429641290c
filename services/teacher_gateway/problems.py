"""Every error answer of the API has one shape: problem+json (RFC 9457), made here.

A `Problem` says what was expected, what was found and what to do. Anything that is raised below
the API becomes one: errors of the world are 503 with Retry-After, a defect of ours is 500 with a
number that its log line carries too.
"""

from __future__ import annotations

import errno
import secrets
from http import HTTPStatus
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import BaseModel, Field
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from services.teacher_gateway.database import DatabaseUnavailable
from stillhouse.chassis.errors import (
    PermanentError,
    RetryableError,
    StillhouseError,
    StoreUnavailable,
)
from stillhouse.chassis.logs import logger

log = logger(__name__)

MEDIA_TYPE = "application/problem+json"
RETRY_SECONDS = 5


class FieldError(BaseModel):
    """One thing that is wrong, and where."""

    field: str = Field(description="path such as `teachers[0].url`; empty for the whole")
    message: str


class Problem(BaseModel):
    """What went wrong, for programs (`type`, `status`) and for people (`detail`)."""

    type: str = Field(description="`urn:stillhouse:problem:<name>`, stable")
    title: str
    status: int
    detail: str
    errors: list[FieldError] = Field(default_factory=list)


class ProblemError(Exception):
    """Raise it to answer with a problem."""

    def __init__(
        self,
        status: int,
        name: str,
        detail: str,
        *,
        errors: list[FieldError] | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:
        super().__init__(detail)
        self.headers = headers or {}
        self.problem = Problem(
            type=f"urn:stillhouse:problem:{name}",
            title=HTTPStatus(status).phrase,
            status=status,
            detail=detail,
            errors=errors or [],
        )

    def response(self) -> JSONResponse:
        return JSONResponse(
            self.problem.model_dump(),
            self.problem.status,
            headers=self.headers,
            media_type=MEDIA_TYPE,
        )


def unauthorized() -> ProblemError:
    return ProblemError(
        401,
        "unauthorized",
        "expected a valid API key in `Authorization: Bearer sth_...`; an operator makes one with "
        "`python -m services.teacher_gateway keys create --tenant NAME`",
        headers={"WWW-Authenticate": "Bearer"},
    )


def not_found(what: str = "pipeline") -> ProblemError:
    """The same words for what is not there and for what belongs to another tenant."""
    return ProblemError(404, "not-found", f"there is no such {what}")


def unavailable(detail: str) -> ProblemError:
    return ProblemError(
        503,
        "unavailable",
        f"{detail}; try again in a few seconds",
        headers={"Retry-After": str(RETRY_SECONDS)},
    )


def from_exception(error: Exception) -> ProblemError:
    """Decide which problem an exception is."""
    if isinstance(error, ProblemError):
        return error
    if isinstance(error, RetryableError):
        log.warning("request put off", why=str(error))
        return unavailable(f"a part that the gateway needs did not answer ({_kind(error)})")
    if isinstance(error, PermanentError) and error.reason == "store_refused":
        log.error("the store refuses the gateway", why=str(error))
        return ProblemError(
            503,
            "store-refused",
            "the object store refused the gateway: the operator should check endpoint, bucket "
            "and keys (TEACHER_GATEWAY_STORE_...)",
        )
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        log.error("the disk is full", why=str(error))
        return ProblemError(
            507, "disk-full", "the gateway's disk is full: the operator should make room"
        )
    if isinstance(error, ClientDisconnect):
        return ProblemError(400, "broken-off", "the request broke off: send it again")
    number = secrets.token_hex(6)
    if isinstance(error, StillhouseError):
        log.error("request failed", number=number, why=str(error))
    else:
        log.error("request failed", number=number, exc_info=error)
    return ProblemError(
        500,
        "internal",
        f"the gateway failed on this request; its log tells why under the number {number}",
    )


def _kind(error: RetryableError) -> str:
    if isinstance(error, StoreUnavailable):
        return "the object store"
    if isinstance(error, DatabaseUnavailable):
        return "the database, whose disk is full" if "is full" in str(error) else "the database"
    return str(error)


def responses(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """Declare error answers of a route for OpenAPI."""
    schema = {"$ref": "#/components/schemas/Problem"}
    return {
        status: {
            "description": HTTPStatus(status).phrase,
            "content": {MEDIA_TYPE: {"schema": schema}},
        }
        for status in statuses
    }


def install(app: FastAPI) -> None:
    """Answer every exception of an app with a problem."""

    async def raised(_: Request, error: Exception) -> JSONResponse:
        return from_exception(error).response()

    async def invalid(_: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, RequestValidationError)
        found = [
            FieldError(
                field=".".join(str(part) for part in entry["loc"][1:]) or str(entry["loc"][0]),
                message=str(entry["msg"]),
            )
            for entry in error.errors()
        ]
        first = found[0]
        detail = f"the parameter `{first.field}` is wrong: {first.message}"
        return ProblemError(422, "invalid-request", detail, errors=found).response()

    async def refused(request: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, HTTPException)
        if error.status_code == 404:
            problem = not_found("page")
        elif error.status_code == 405:
            allowed = (error.headers or {}).get("Allow", "")
            problem = ProblemError(
                405,
                "method-not-allowed",
                f"{request.method} is not possible here; expected {allowed}",
                headers={"Allow": allowed},
            )
        else:
            problem = ProblemError(error.status_code, "refused", str(error.detail))
        return problem.response()

    app.add_exception_handler(RequestValidationError, invalid)
    app.add_exception_handler(HTTPException, refused)
    for kind in (ProblemError, RetryableError, PermanentError, OSError, ClientDisconnect):
        app.add_exception_handler(kind, raised)
    app.add_exception_handler(Exception, raised)
