"""The API's process: uvicorn, with the metrics on a port of their own."""

from __future__ import annotations

import gc
import math
import socket
import sys
from collections.abc import Callable

import uvicorn

from services.teacher_gateway.app import create_app
from services.teacher_gateway.capture.spool import open_folder
from services.teacher_gateway.http_protocol import BoundedHttpProtocol
from services.teacher_gateway.routes import uploads
from services.teacher_gateway.settings import TeacherGatewaySettings
from stillhouse.chassis import metrics
from stillhouse.chassis.errors import StoreUnavailable
from stillhouse.chassis.logs import logger

log = logger(__name__)


class ApiServer(uvicorn.Server):
    """Calls `leaving` when it is told to end, before it waits for open requests: a stream of
    events would have it wait in vain."""

    def __init__(self, config: uvicorn.Config, leaving: Callable[[], None]) -> None:
        super().__init__(config)
        self._leaving = leaving

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self._leaving()
        await super().shutdown(sockets)


def run(settings: TeacherGatewaySettings) -> None:
    """Serve until a signal. Raises PermanentError when the store cannot be used at all."""
    app = create_app(settings)
    try:
        app.state.gateway.probe.self_test()
    except StoreUnavailable as error:
        log.warning("the store is away; /readyz says when it is back", why=str(error))
    uploads.sweep(settings.work_dir)
    open_folder(settings.captured_folder)
    # A thread that packs recorded traffic gives the event loop its turn sooner, and what was made
    # so far stays: the collector would halt every call for a tenth of a second to look through it.
    sys.setswitchinterval(0.001)
    # What a call made dies with it, by its references, so looking for rings is seldom worth it.
    gc.collect()
    gc.freeze()
    gc.set_threshold(20_000, 20, 20)
    metrics.serve(settings)
    server = ApiServer(
        uvicorn.Config(
            app,
            host=settings.api_host,
            port=settings.api_port,
            log_config=None,
            access_log=False,
            server_header=False,
            # Nobody's word about whom they ask for; a proxy in front keeps its own log.
            proxy_headers=False,
            # Bounds heads as the argument for h11 would; that parser takes several times as long.
            http=BoundedHttpProtocol,
            timeout_keep_alive=5,
            timeout_graceful_shutdown=math.ceil(settings.grace_seconds),
        ),
        leaving=app.state.event_streams.close,
    )
    log.info("api served", host=settings.api_host, port=settings.api_port)
    server.run()
