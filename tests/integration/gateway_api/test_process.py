"""The gateway's command line and the API as a process of its own."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from stillhouse.embedded.parts import Store
from tests.support.gateway_api import posted_spec
from tests.support.gateway_process import Environ, api_environment, start_api
from tests.support.waiting import wait_for


@pytest.fixture
def environ(tmp_path: Path, store_part: Store) -> Environ:
    return api_environment(tmp_path, store_part)


def command(environ: Environ, *words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "services.teacher_gateway", *words],
        env=environ,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


@pytest.fixture
def api(environ: Environ, tmp_path: Path) -> Iterator[subprocess.Popen[bytes]]:
    process = start_api(environ, tmp_path / "api.log")
    yield process
    process.kill()
    process.wait()


def test_an_operator_makes_tables_and_keys_at_the_command_line(environ: Environ) -> None:
    early = command(environ, "keys", "list")
    assert early.returncode == 1
    assert "services.teacher_gateway migrate" in early.stderr
    assert "revision 0001" in command(environ, "migrate").stdout
    made = command(environ, "keys", "create", "--tenant", "acme", "--json")
    found = json.loads(made.stdout)
    assert found["tenant"] == "acme"
    prefix = found["key"].split("_")[1]
    assert command(environ, "keys", "list").stdout == f"{prefix}  acme  valid\n"
    assert command(environ, "keys", "revoke", f"sth_{prefix}").returncode == 0
    assert command(environ, "keys", "list").stdout == f"{prefix}  acme  revoked\n"
    unknown = command(environ, "keys", "revoke", "000000000000")
    assert (unknown.returncode, "keys list" in unknown.stderr) == (1, True)
    wrong = command(environ, "keys", "create", "--tenant", "No Good")
    assert (wrong.returncode, "small letters" in wrong.stderr) == (1, True)
    for done in (made, unknown, wrong):
        assert "Traceback" not in done.stderr


def test_a_missing_setting_is_one_clear_sentence(environ: Environ) -> None:
    del environ["TEACHER_GATEWAY_KEY_PEPPER"]
    done = command(environ, "api")
    assert done.returncode == 1
    assert done.stderr == "teacher_gateway: setting TEACHER_GATEWAY_KEY_PEPPER: Field required\n"


def test_a_store_with_another_secret_is_refused_at_the_start(environ: Environ) -> None:
    environ["TEACHER_GATEWAY_STORE_SECRET_KEY"] = "wrong"
    done = command(environ, "api")
    assert done.returncode == 1
    assert "check STORE_ENDPOINT_URL, STORE_BUCKET" in done.stderr
    assert "Traceback" not in done.stderr


def test_the_api_starts_survives_a_kill_and_ends_on_a_signal(
    environ: Environ, api: subprocess.Popen[bytes], tmp_path: Path
) -> None:
    url = f"http://127.0.0.1:{environ['TEACHER_GATEWAY_API_PORT']}"
    early = wait_for(
        lambda: httpx.get(f"{url}/readyz"), 30, "the API answers", until=lambda _: True
    )
    assert (early.status_code, "migrate" in early.json()["detail"]) == (503, True)
    command(environ, "migrate")
    assert httpx.get(f"{url}/readyz").json() == {"status": "ready"}
    key = json.loads(command(environ, "keys", "create", "--tenant", "acme", "--json").stdout)["key"]
    headers = {"Authorization": f"Bearer {key}", "Idempotency-Key": "one"}
    spec = posted_spec(tmp_path / "files")
    first = httpx.post(f"{url}/v1/pipelines", json=spec, headers=headers)
    assert first.status_code == 202
    api.kill()
    api.wait()
    again = start_api(environ, tmp_path / "again.log")
    try:
        answer = wait_for(
            lambda: httpx.post(f"{url}/v1/pipelines", json=spec, headers=headers),
            30,
            "the API is back",
            until=lambda found: found.status_code == 202,
        )
        assert answer.content == first.content
        again.send_signal(signal.SIGTERM)
        again.wait(20)
    finally:
        again.kill()
        again.wait()
    log = (tmp_path / "api.log").read_text()
    assert all(json.loads(line) for line in log.splitlines()), "one JSON object a line"
    assert key.split("_")[2] not in log
