"""Probes and the metrics of the API's own process: open, and told to nobody's disadvantage."""

from __future__ import annotations

from fastapi import APIRouter, Response
from prometheus_client import CONTENT_TYPE_LATEST, REGISTRY, generate_latest

from services.teacher_gateway.migrate import check_migrated
from services.teacher_gateway.problems import responses, unavailable
from services.teacher_gateway.routes.parts import Parts
from services.teacher_gateway.schemas import Health
from stillhouse.chassis.errors import StillhouseError

router = APIRouter(tags=["operations"])

READINESS_KEY = "self-test/readiness"


@router.get("/healthz", response_model=Health)
async def healthz() -> Health:
    """Whether the process answers at all."""
    return Health(status="ok")


@router.get("/readyz", response_model=Health, responses=responses(503))
def readyz(parts: Parts) -> Health:
    """Whether database and store can be used now."""
    try:
        check_migrated(parts.engine)
        # A real write and read: a store may answer probes before it knows its volumes.
        parts.probe.put_new(READINESS_KEY, b"ready")
    except StillhouseError as error:
        raise unavailable(f"not ready: {error}") from error
    return Health(status="ready")


@router.get(
    "/metrics",
    response_class=Response,
    responses={
        200: {
            "description": "Prometheus text: requests of this process, nothing of any tenant",
            "content": {"text/plain": {"schema": {"type": "string"}}},
        }
    },
)
def metrics() -> Response:
    """Requests by route, method and class of status."""
    return Response(generate_latest(REGISTRY), media_type=CONTENT_TYPE_LATEST)
