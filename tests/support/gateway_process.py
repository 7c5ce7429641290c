"""The gateway's API as a process of its own."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx

from stillhouse.embedded.parts import Store
from tests.support.gateway_api import NO_BROKER, PEPPER
from tests.support.waiting import wait_for

Environ = dict[str, str]


def api_environment(tmp_path: Path, part: Store) -> Environ:
    """What an API on SQLite is told; its port is a free one."""
    files = tmp_path / "files"
    files.mkdir()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    told = {
        "BROKER_URL": NO_BROKER,
        "STORE_ENDPOINT_URL": part.endpoint_url,
        "STORE_BUCKET": part.bucket,
        "STORE_ACCESS_KEY": part.access_key,
        "STORE_SECRET_KEY": part.secret_key,
        "DATABASE_URL": f"sqlite:///{tmp_path / 'gateway.sqlite3'}",
        "KEY_PEPPER": PEPPER,
        "FILE_ROOTS": str(files),
        "WORK_DIR": str(tmp_path),
        "PROFILE": "embedded",
        "API_PORT": str(port),
    }
    return {
        **{k: v for k, v in os.environ.items() if not k.startswith("TEACHER_GATEWAY_")},
        **{f"TEACHER_GATEWAY_{name}": value for name, value in told.items()},
    }


def start_api(environ: Environ, log: Path) -> subprocess.Popen[bytes]:
    """Start the API; what it logs is appended to a file."""
    with log.open("ab") as sink:
        return subprocess.Popen(
            [sys.executable, "-m", "services.teacher_gateway", "api"], env=environ, stderr=sink
        )


@contextmanager
def api_process(environ: Environ, log: Path) -> Iterator[tuple[subprocess.Popen[bytes], str]]:
    """An API that answers, and its address; it is killed at the end."""
    process = start_api(environ, log)
    address = f"http://127.0.0.1:{environ['TEACHER_GATEWAY_API_PORT']}"
    try:
        wait_for(
            lambda: httpx.get(f"{address}/healthz").status_code,
            60,
            "the API answers",
            until=lambda status: status == 200,
        )
        yield process, address
    finally:
        process.kill()
        process.wait()
