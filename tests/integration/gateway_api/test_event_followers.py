"""Who follows a pipeline's events, by the Python client or the command line, while the API is
killed, stopped, or reached over bad connections."""

from __future__ import annotations

import contextlib
import json
import signal
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import pytest
from pydantic import SecretStr

from services.teacher_gateway import event_streams
from services.teacher_gateway.database import open_engine, transaction
from services.teacher_gateway.keys import create_key
from services.teacher_gateway.migrate import migrate
from services.teacher_gateway.models import Pipeline
from stillhouse.chassis.storage import ObjectStore
from stillhouse.cli import main as command_line
from stillhouse.cli.client import Client
from stillhouse.embedded.parts import Store
from tests.support.event_streams import end, messages, put_pipeline, tell
from tests.support.gateway_api import PEPPER, Api, gateway_api, serving
from tests.support.gateway_process import api_environment, start_api
from tests.support.proxy import Proxy, proxy
from tests.support.waiting import wait_for


class Follower(threading.Thread):
    """Follows a pipeline with the Python client and keeps what came."""

    def __init__(self, url: str, key: str, pipeline_id: str) -> None:
        super().__init__(name="follower", daemon=True)
        self._url, self._key, self._pipeline_id = url, key, pipeline_id
        self.seen: list[int] = []
        self.failed: BaseException | None = None

    def run(self) -> None:
        try:
            with Client(self._url, self._key, patience_seconds=120) as client:
                for event in client.follow(self._pipeline_id):
                    self.seen.append(event["sequence"])
        except BaseException as error:
            self.failed = error

    def reaches(self, count: int) -> None:
        wait_for(lambda: len(self.seen) >= count or self.failed, 60, f"{count} events")
        assert self.failed is None, self.failed

    def ends_with(self, count: int) -> None:
        self.join(60)
        assert self.failed is None, self.failed
        assert self.seen == list(range(1, count + 1)), "each once, in order"


def test_a_killed_api_costs_nothing_and_one_that_is_stopped_ends_its_streams(
    tmp_path: Path, store_part: Store
) -> None:
    environ = api_environment(tmp_path, store_part)
    url = f"http://127.0.0.1:{environ['TEACHER_GATEWAY_API_PORT']}"
    engine, log = open_engine(environ["TEACHER_GATEWAY_DATABASE_URL"]), tmp_path / "api.log"
    migrate(engine)
    key = create_key(engine, SecretStr(PEPPER), "acme")
    pipeline_id = put_pipeline(engine, "acme")
    tell(engine, pipeline_id, 70)

    @contextlib.contextmanager
    def api() -> Iterator[subprocess.Popen[bytes]]:
        process = start_api(environ, log)
        try:
            wait_for(lambda: httpx.get(f"{url}/healthz").status_code == 200, 60, "the API is up")
            yield process
        finally:
            process.kill()
            process.wait()

    follower = Follower(url, key, pipeline_id)
    with api():
        follower.start()
        follower.reaches(70)
    tell(engine, pipeline_id, 70)
    with api() as again:
        tell(engine, pipeline_id, 3)
        follower.reaches(143)
        headers = {"Authorization": f"Bearer {key}", "Last-Event-ID": "142"}
        stream = f"{url}/v1/pipelines/{pipeline_id}/events/stream"
        with httpx.stream("GET", stream, headers=headers, timeout=60) as answer:
            found = messages(answer)
            assert [next(found).get("id") for _ in range(2)] == [None, "143"]
            again.send_signal(signal.SIGTERM)
            assert list(found) == [], "a whole answer, not one that broke off"
        assert again.wait(60) in (0, -signal.SIGTERM)
    assert "graceful shutdown exceeded" not in log.read_text()
    assert len(follower.seen) == 143
    engine.dispose()


@pytest.fixture
def edge(small: Api, monkeypatch: pytest.MonkeyPatch) -> Iterator[Proxy]:
    """A bad connection to an API."""
    monkeypatch.setattr(event_streams, "LOOK_SECONDS", 0.05)
    with serving(small.app) as url, proxy("127.0.0.1", urlsplit(url).port or 0) as found:
        yield found


def test_broken_and_silent_connections_are_borne(
    small: Api, edge: Proxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("stillhouse.cli.client._STREAM_TIMEOUT", httpx.Timeout(1.0, connect=5.0))
    pipeline_id = put_pipeline(small.engine, small.tenant)
    follower = Follower(edge.url, small.key, pipeline_id)
    follower.start()
    tell(small.engine, pipeline_id, 5)
    follower.reaches(5)
    edge.reset_all()
    tell(small.engine, pipeline_id, 5)
    follower.reaches(10)
    edge.mode = "refuse"
    edge.reset_all()
    tell(small.engine, pipeline_id, 5)
    edge.mode = "pass"
    follower.reaches(15)
    edge.mode = "hold"  # nothing comes and nothing ends: the follower gives up by itself
    tell(small.engine, pipeline_id, 5)
    before = len(edge._writers)
    wait_for(lambda: len(edge._writers) > before, 60, "it connects again")
    edge.mode = "pass"
    follower.reaches(20)
    end(small.engine, pipeline_id)
    follower.ends_with(21)


def test_whoever_comes_when_all_streams_are_taken_follows_all_the_same(
    tmp_path: Path, store: ObjectStore, tenant: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("stillhouse.cli.client._POLL", 0.05)
    with gateway_api(tmp_path, store, tenant, MAX_TENANT_EVENT_STREAMS="1") as api:
        pipeline_id = put_pipeline(api.engine, tenant)
        stream = f"/v1/pipelines/{pipeline_id}/events/stream"
        with serving(api.app) as url, httpx.Client(base_url=url, headers=api.headers()) as first:
            with first.stream("GET", stream) as held:
                assert held.status_code == 200
                follower = Follower(url, api.key, pipeline_id)
                follower.start()
                tell(api.engine, pipeline_id, 3)
                follower.reaches(3)
                tell(api.engine, pipeline_id, 2)
                follower.reaches(5)
            end(api.engine, pipeline_id)
            follower.ends_with(6)


def test_watching_shows_progress_over_a_broken_connection(
    small: Api,
    edge: Proxy,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    pipeline_id = put_pipeline(small.engine, small.tenant)
    shown: list[str] = []
    monkeypatch.setattr(
        "stillhouse.cli.screen.Screen.progress", lambda _screen, line: shown.append(line)
    )
    monkeypatch.setenv("STILLHOUSE_URL", edge.url)
    monkeypatch.setenv("STILLHOUSE_API_KEY", small.key)
    monkeypatch.setattr("sys.argv", ["stillhouse", "status", pipeline_id, "--watch"])

    def step(number: int) -> None:
        with transaction(small.engine) as session:
            pipeline = session.get(Pipeline, pipeline_id)
            assert pipeline is not None
            pipeline.train, pipeline.figures = "running", json.dumps({"train": {"step": number}})
        tell(small.engine, pipeline_id)
        wait_for(lambda: any(f"step {number}" in line for line in shown), 60, f"step {number}")

    failed: list[BaseException] = []

    def distil() -> None:
        try:
            step(1)
            edge.reset_all()
            step(2)
            edge.mode = "refuse"
            edge.reset_all()
            threading.Timer(0.5, setattr, (edge, "mode", "pass")).start()
            step(3)
        except BaseException as error:
            failed.append(error)
        finally:
            end(small.engine, pipeline_id)

    thread = threading.Thread(target=distil, name="distil")
    thread.start()
    with pytest.raises(SystemExit) as ended:
        command_line.main()
    thread.join(60)
    assert not failed
    assert ended.value.code in (0, None), capsys.readouterr().err
    said: list[Any] = [line.rsplit("step ", 1)[1] for line in shown if "step " in line]
    assert said == ["1", "2", "3"], "each once"
