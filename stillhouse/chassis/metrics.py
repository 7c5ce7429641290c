"""Metrics of every process, served on a port of their own beside /healthz.

Metrics are plain prometheus-client objects; a service's own stand in its `metrics.py`. Under
Celery the main process and the pool's children write files of PROMETHEUS_MULTIPROC_DIR, which
the main process sums up. What must survive a restart (evaluation figures, pipeline states) is
rendered by a collector from stored state, never counted. `docs/metrics.md` lists all of them.
"""

from __future__ import annotations

import os
import re
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from prometheus_client import (
    CONTENT_TYPE_LATEST,
    REGISTRY,
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    generate_latest,
)
from prometheus_client.multiprocess import MultiProcessCollector, mark_process_dead

from stillhouse.chassis.logs import logger
from stillhouse.chassis.settings import ServiceSettings

log = logger(__name__)

EVENTS = Counter(
    "stillhouse_events_total", "Events by type and outcome", ["service", "type", "outcome"]
)
EVENT_AGE = Gauge(
    "stillhouse_event_age_seconds",
    "Age of the last event when it was taken",
    ["service"],
    multiprocess_mode="livemostrecent",
)
JOBS = Counter("stillhouse_jobs_total", "Jobs by outcome", ["service", "job", "outcome"])
JOB_SECONDS = Histogram(
    "stillhouse_job_seconds",
    "Duration of jobs",
    ["service", "job"],
    buckets=(0.1, 0.5, 1, 5, 15, 60, 300),
)


def serve(
    settings: ServiceSettings,
    *,
    health: Callable[[], bool] = lambda: True,
    collectors: list[Any] | None = None,
) -> int:
    """Serve /metrics and /healthz on a thread; return the port."""
    registry = CollectorRegistry()
    if os.environ.get("PROMETHEUS_MULTIPROC_DIR"):
        MultiProcessCollector(registry)  # type: ignore[no-untyped-call]
    else:
        registry.register(_Everything())
    for collector in collectors or []:
        registry.register(collector)

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            if self.path == "/healthz":
                healthy = health()
                self._answer(200 if healthy else 503, b"ok\n" if healthy else b"stalled\n")
            elif self.path == "/metrics":
                sweep_dead()
                try:
                    body = generate_latest(registry)
                except Exception as error:  # a scrape fails alone, the service goes on
                    log.warning("metrics not rendered", why=str(error))
                    self._answer(503, b"metrics could not be rendered; see the log\n")
                    return
                self._answer(200, body, CONTENT_TYPE_LATEST)
            else:
                self._answer(404, b"expected /metrics or /healthz\n")

        def _answer(self, status: int, body: bytes, kind: str = "text/plain") -> None:
            self.send_response(status)
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: Any) -> None:
            """Scrapes are not news."""

    server = ThreadingHTTPServer((settings.metrics_host, settings.metrics_port), Handler)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, name="metrics", daemon=True).start()
    port = int(server.server_address[1])
    log.info("metrics served", port=port)
    return port


class _Everything:
    """The default registry as a collector, so that others can be put beside it."""

    def collect(self) -> Any:
        return REGISTRY.collect()

    def describe(self) -> list[Any]:
        return []


def on_child_exit(pid: int | None = None, **_: Any) -> None:
    if os.environ.get("PROMETHEUS_MULTIPROC_DIR"):
        mark_process_dead(pid or os.getpid())  # type: ignore[no-untyped-call]


_LIVE = re.compile(r"^gauge_live\w*_(\d+)\.db$")


def sweep_dead() -> None:
    """Remove live gauges of children that were killed and could not say goodbye."""
    folder = os.environ.get("PROMETHEUS_MULTIPROC_DIR")
    if not folder:
        return
    for path in Path(folder).glob("gauge_live*.db"):
        found = _LIVE.match(path.name)
        if found and not Path(f"/proc/{found[1]}").exists():
            path.unlink(missing_ok=True)
