"""The REST API as an ASGI app: parts in, app out; opens no connection and reads no environment."""

from __future__ import annotations

import contextlib
import os
from collections.abc import AsyncIterator
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from starlette.types import Receive, Scope, Send

from services.teacher_gateway import problems
from services.teacher_gateway.capture.endpoint import CaptureEndpoint
from services.teacher_gateway.capture.registrations import Registration
from services.teacher_gateway.database import open_engine
from services.teacher_gateway.event_streams import EventStreams
from services.teacher_gateway.metrics import RequestMetrics
from services.teacher_gateway.preflight.running import RunningChecks
from services.teacher_gateway.problems import Problem
from services.teacher_gateway.request_limits import RequestLimits
from services.teacher_gateway.routes import (
    accounts,
    captured,
    operations,
    pipelines,
    records,
    results,
    teachers,
    uploads,
)
from services.teacher_gateway.routes.parts import Gateway
from services.teacher_gateway.settings import TeacherGatewaySettings
from services.teacher_gateway.terms.gate import load_catalogue
from stillhouse.chassis.storage import open_store
from stillhouse.contracts.spec import Spec

ROUTERS = (
    pipelines.router,
    records.router,
    results.router,
    accounts.router,
    teachers.router,
    captured.router,
    uploads.router,
    operations.router,
)


class GatewayApp(FastAPI):
    """The REST API, and beside it the capture endpoint, whose calls meet none of its layers."""

    capture: CaptureEndpoint

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and self.capture.takes(scope["path"]):
            await self.capture(scope, receive, send)
        else:
            await super().__call__(scope, receive, send)


def create_app(settings: TeacherGatewaySettings) -> GatewayApp:
    """Build the API with parts of its own. Raises PermanentError for a bad catalogue of terms."""
    return app_of(
        Gateway(
            settings=settings,
            engine=open_engine(settings.database_url),
            store=open_store(settings, connect_timeout=2, read_timeout=20, attempts=3),
            probe=open_store(settings, connect_timeout=1, read_timeout=2, attempts=1),
            catalogue=load_catalogue(settings.terms_file),
        )
    )


def app_of(gateway: Gateway) -> GatewayApp:
    """Build the API on given parts."""

    @contextlib.asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        async with app.capture.running():
            yield
        gateway.engine.dispose()

    app = GatewayApp(
        title="Stillhouse",
        version=_version(),
        description="Distil a large language model into a small one, as a service.",
        lifespan=lifespan,
        # The pages would load scripts from elsewhere; /openapi.json says the same.
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,
    )
    app.state.gateway = gateway
    app.capture = CaptureEndpoint(gateway, environ=os.environ)
    app.state.event_streams = EventStreams(gateway.engine, gateway.settings)
    app.state.running_checks = RunningChecks()
    for router in ROUTERS:
        app.include_router(router)
    problems.install(app)
    settings = gateway.settings

    def max_bytes(path: str) -> int:
        uploading = path.startswith("/v1/uploads/")
        return settings.max_upload_bytes if uploading else settings.max_body_bytes

    app.add_middleware(RequestLimits, hosts=settings.hosts, max_bytes=max_bytes)
    app.add_middleware(RequestMetrics)
    app.openapi = lambda: _openapi(app)  # type: ignore[method-assign]
    return app


def _openapi(app: FastAPI) -> dict[str, Any]:
    """FastAPI's document with the schemas that no parameter or answer of it brings in."""
    if app.openapi_schema is None:
        document = get_openapi(
            title=app.title,
            version=app.version,
            description=app.description,
            routes=app.routes,
        )
        schemas = document.setdefault("components", {}).setdefault("schemas", {})
        for model in (Problem, Spec, Registration):
            schema = model.model_json_schema(ref_template="#/components/schemas/{model}")
            schemas |= {k: v for k, v in schema.pop("$defs", {}).items() if k not in schemas}
            schemas[model.__name__] = schema
        app.openapi_schema = document
    return app.openapi_schema


def _version() -> str:
    try:
        return version("stillhouse")
    except PackageNotFoundError:
        return "0"
