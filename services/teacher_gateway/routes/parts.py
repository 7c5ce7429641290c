"""What every route works with: the process's parts, the caller, and the caller's pipeline."""

from __future__ import annotations

import re
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Annotated

from fastapi import Depends, Path, Query, Request, Security
from fastapi.security import HTTPBearer
from sqlalchemy import Engine

from services.teacher_gateway.database import Session
from services.teacher_gateway.keys import Caller, KeyRefused, authenticate
from services.teacher_gateway.models import Pipeline
from services.teacher_gateway.problems import not_found, unauthorized
from services.teacher_gateway.settings import TeacherGatewaySettings
from services.teacher_gateway.terms.gate import Catalogue
from stillhouse.chassis.storage import ObjectStore
from stillhouse.contracts.artifacts import ID_PATTERN

_bearer = HTTPBearer(auto_error=False, description="an API key: `Bearer sth_...`")


@dataclass(frozen=True)
class Gateway:
    """The parts of the API's process."""

    settings: TeacherGatewaySettings
    engine: Engine
    store: ObjectStore
    # The same store with short time-outs, so that a probe answers while the store hangs.
    probe: ObjectStore
    catalogue: Catalogue


def gateway_of(request: Request) -> Gateway:
    found: Gateway = request.app.state.gateway
    return found


Parts = Annotated[Gateway, Depends(gateway_of)]


def caller_of(
    request: Request, parts: Parts, _: Annotated[object, Security(_bearer)] = None
) -> Caller:
    """Find who asks; a sync function, so that it runs beside the event loop."""
    try:
        return authenticate(
            parts.engine, parts.settings.key_pepper, request.headers.get("authorization")
        )
    except KeyRefused:
        raise unauthorized() from None


Who = Annotated[Caller, Depends(caller_of)]
PipelineId = Annotated[str, Path(max_length=200, description="a pipeline's id")]
Limit = Annotated[int, Query(ge=1, le=500, description="most items of the page")]


def owned(session: Session, who: Caller, pipeline_id: str) -> Pipeline:
    """Read the caller's pipeline. Raises the same problem for another's and for none."""
    found = session.get(Pipeline, pipeline_id) if re.fullmatch(ID_PATTERN, pipeline_id) else None
    if found is None or found.tenant_id != who.tenant_id:
        raise not_found()
    return found


def moment(seconds: float) -> datetime:
    return datetime.fromtimestamp(seconds, UTC)


def maybe_moment(seconds: float | None) -> datetime | None:
    return None if seconds is None else moment(seconds)
