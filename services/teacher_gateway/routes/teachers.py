"""Registered teachers: whom live traffic may be sent to, under which terms, for how much."""

from __future__ import annotations

import os
from typing import Annotated, Any

from fastapi import APIRouter, Path, Request, Response
from fastapi.concurrency import run_in_threadpool
from pydantic import ValidationError

from services.teacher_gateway.capture.registrations import (
    Registration,
    account_of,
    judge,
    register,
    registered,
    registration_of,
    remove,
)
from services.teacher_gateway.database import Session, now, reading, transaction
from services.teacher_gateway.keys import Caller
from services.teacher_gateway.models import Account, Audit, RegisteredTeacher
from services.teacher_gateway.posted import JSON_TYPES, YAML_TYPES, read_document, spec_errors
from services.teacher_gateway.problems import FieldError, ProblemError, not_found, responses
from services.teacher_gateway.routes.parts import Gateway, Parts, Who, moment
from services.teacher_gateway.routes.pipelines import cost_of
from services.teacher_gateway.schemas import RegisteredTeachers, RegisteredTeacherView
from services.teacher_gateway.teachers.api_keys import read_api_key
from stillhouse.chassis.errors import PermanentError
from stillhouse.contracts.artifacts import ID_PATTERN

router = APIRouter(prefix="/v1/teachers", tags=["teachers"])

Name = Annotated[
    str, Path(pattern=ID_PATTERN, description="what callers give as `model`; 50 characters at most")
]
_BODY = {
    "requestBody": {
        "required": True,
        "content": {
            media: {"schema": {"$ref": "#/components/schemas/Registration"}}
            for media in JSON_TYPES + YAML_TYPES
        },
    }
}


@router.put(
    "/{name}",
    response_model=RegisteredTeacherView,
    responses={
        201: {"description": "Registered", "model": RegisteredTeacherView},
        **responses(400, 401, 408, 413, 415, 422, 503),
    },
    openapi_extra=_BODY,
)
async def put_teacher(
    name: Name, request: Request, response: Response, who: Who, parts: Parts
) -> Any:
    """Register a teacher for live traffic, or replace it whole; its account keeps what was
    spent."""
    body = await request.body()
    media = request.headers.get("content-type")
    view, fresh = await run_in_threadpool(_put, parts, who, name, body, media)
    request.app.capture.forget(who.tenant_id, name)
    response.status_code = 201 if fresh else 200
    return view


@router.get("", response_model=RegisteredTeachers, responses=responses(400, 401, 422, 503))
def list_teachers(who: Who, parts: Parts) -> RegisteredTeachers:
    """List the tenant's registered teachers by name."""
    with reading(parts.engine) as session:
        rows = registered(session, who.tenant_id)
        return RegisteredTeachers(items=[_view(session, parts, row) for row in rows])


@router.get(
    "/{name}", response_model=RegisteredTeacherView, responses=responses(400, 401, 404, 422, 503)
)
def get_teacher(name: Name, who: Who, parts: Parts) -> RegisteredTeacherView:
    """Read a registered teacher, its verdict and its money."""
    with reading(parts.engine) as session:
        row = session.get(RegisteredTeacher, (who.tenant_id, name))
        if row is None:
            raise not_found("teacher")
        return _view(session, parts, row)


@router.delete("/{name}", status_code=204, responses=responses(400, 401, 404, 422, 503))
async def delete_teacher(name: Name, request: Request, who: Who, parts: Parts) -> None:
    """Take no more calls for a teacher. What was recorded and paid stays."""
    await run_in_threadpool(_remove, parts, who, name)
    request.app.capture.forget(who.tenant_id, name)


def _remove(parts: Gateway, who: Caller, name: str) -> None:
    with transaction(parts.engine) as session:
        if not remove(session, who.tenant_id, name):
            raise not_found("teacher")
        _audit(session, who, "teacher.removed", name)


def _put(
    parts: Gateway, who: Caller, name: str, body: bytes, media: str | None
) -> tuple[RegisteredTeacherView, bool]:
    registration = _read(name, read_document(body, media))
    try:
        verdict = judge(registration, parts.catalogue, parts.settings)
        read_api_key(registration, parts.settings, os.environ)
    except PermanentError as error:
        raise ProblemError(422, "refused", str(error)) from error
    if verdict.outcome == "deny":
        errors = [FieldError(field="terms", message=verdict.reason)]
        raise ProblemError(422, "terms-denied", verdict.reason, errors=errors)
    with transaction(parts.engine) as session:
        fresh = register(session, who.tenant_id, registration)
        action = "teacher.registered" if fresh else "teacher.changed"
        _audit(session, who, action, name)
    with reading(parts.engine) as session:
        row = session.get(RegisteredTeacher, (who.tenant_id, name))
        if row is None:
            raise not_found("teacher")  # removed by someone else in the meantime
        return _view(session, parts, row), fresh


def _read(name: str, found: Any) -> Registration:
    if not isinstance(found, dict):
        raise ProblemError(422, "malformed", "expected a mapping with `url`, `model`, `terms` ...")
    if found.get("name", name) != name:
        raise ProblemError(
            422,
            "invalid-teacher",
            f"`name` is {found['name']!r:.80} and the address says {name!r}: leave `name` out",
        )
    try:
        return Registration.model_validate({**found, "name": name})
    except ValidationError as error:
        errors = spec_errors(error, Registration)
        shown = [f"`{e.field}` {e.message}" if e.field else e.message for e in errors[:4]]
        raise ProblemError(422, "invalid-teacher", "; ".join(shown), errors=errors) from error


def _view(session: Session, parts: Gateway, row: RegisteredTeacher) -> RegisteredTeacherView:
    registration = registration_of(row)
    account = account_of(row.tenant_id, row.name)
    money = session.get(Account, (account.tenant_id, account.name))
    assert money is not None, "registering opens the account"
    return RegisteredTeacherView(
        name=row.name,
        url=registration.url or "",
        model=registration.model,
        api_key=registration.api_key,
        terms=registration.terms,
        usd_per_million=registration.usd_per_million,
        limits=registration.limits,
        purpose=registration.purpose,
        budget_usd=registration.budget_usd,
        on_disconnect=registration.on_disconnect,
        verdict=parts.catalogue.judge_teacher(registration, registration.purpose),
        account=account.name,
        cost=cost_of(money),
        created_at=moment(row.created_at),
        updated_at=moment(row.updated_at),
    )


def _audit(session: Session, who: Caller, action: str, target: str) -> None:
    session.add(
        Audit(
            at=now(session),
            tenant_id=who.tenant_id,
            actor=who.prefix,
            action=action,
            target=target,
        )
    )
