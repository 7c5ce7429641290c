"""The API's process: uvicorn, with the metrics on a port of their own."""

from __future__ import annotations

import uvicorn

from services.teacher_gateway.app import create_app
from services.teacher_gateway.routes import uploads
from services.teacher_gateway.settings import TeacherGatewaySettings
from stillhouse.chassis import metrics
from stillhouse.chassis.errors import StoreUnavailable
from stillhouse.chassis.logs import logger

log = logger(__name__)


def run(settings: TeacherGatewaySettings) -> None:
    """Serve until a signal. Raises PermanentError when the store cannot be used at all."""
    app = create_app(settings)
    try:
        app.state.gateway.probe.self_test()
    except StoreUnavailable as error:
        log.warning("the store is away; /readyz says when it is back", why=str(error))
    uploads.sweep(settings.work_dir)
    metrics.serve(settings)
    server = uvicorn.Server(
        uvicorn.Config(
            app,
            host=settings.api_host,
            port=settings.api_port,
            log_config=None,
            access_log=False,
            server_header=False,
            # Nobody's word about whom they ask for; a proxy in front keeps its own log.
            proxy_headers=False,
            timeout_keep_alive=5,
            timeout_graceful_shutdown=10,
            h11_max_incomplete_event_size=32_768,
        )
    )
    log.info("api served", host=settings.api_host, port=settings.api_port)
    server.run()
