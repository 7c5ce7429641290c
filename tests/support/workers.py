"""A service's real worker as a process that a test may kill and start again."""

from __future__ import annotations

import sys
import urllib.request
from collections.abc import Callable
from pathlib import Path

from stillhouse.contracts.flow import Service
from stillhouse.embedded.parts import Store
from stillhouse.embedded.ports import free_ports
from stillhouse.embedded.process import base_environment, spawn
from tests.support.waiting import wait_for

ROOT = Path(__file__).parents[2]


class Worker:
    """One `python -m services.<service> worker`. `settings` go without the service's prefix."""

    def __init__(
        self, service: Service, folder: Path, broker: str, store: Store, **settings: object
    ) -> None:
        self.port = next(free_ports())
        self.log = folder / "worker.log"
        self._service = service
        metrics = folder / "metrics"
        metrics.mkdir()
        named = {
            "broker_url": broker,
            "store_endpoint_url": store.endpoint_url,
            "store_bucket": store.bucket,
            "store_access_key": store.access_key,
            "store_secret_key": store.secret_key,
            "metrics_port": self.port,
            "profile": "embedded",
            **settings,
        }
        self._env = base_environment(
            {
                "OMP_NUM_THREADS": "1",
                "PYTHONPATH": str(ROOT),
                "PROMETHEUS_MULTIPROC_DIR": str(metrics),
                **{f"{service}_{name}".upper(): str(value) for name, value in named.items()},
            }
        )
        self.start()

    def start(self) -> None:
        argv = [sys.executable, "-m", f"services.{self._service}", "worker"]
        self.process = spawn(argv, env=self._env, log=self.log, cwd=ROOT)

    def page(self, path: str) -> str:
        with urllib.request.urlopen(f"http://127.0.0.1:{self.port}{path}", timeout=10) as answer:
            body: bytes = answer.read()
        return body.decode()

    def wait(self, look: Callable[[], object], what: str, seconds: float = 120) -> None:
        """Wait for something; where it never comes, show the end of the worker's log."""
        try:
            wait_for(look, seconds, what)
        except AssertionError as error:
            raise AssertionError(f"{error}\n{self.log.read_text()[-3000:]}") from error
