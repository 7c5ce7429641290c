"""The stream of a pipeline's events over real HTTP."""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import pytest
from fastapi import FastAPI
from sqlalchemy import text

from services.teacher_gateway import event_streams
from services.teacher_gateway.keys import create_key, revoke_key
from stillhouse.chassis.storage import ObjectStore
from tests.support.event_streams import end, messages, put_pipeline, tell, tell_much
from tests.support.gateway_api import Api, gateway_api, serving
from tests.support.waiting import wait_for


@pytest.fixture(autouse=True)
def _often(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(event_streams, "LOOK_SECONDS", 0.02)


@pytest.fixture
def served(small: Api) -> Iterator[tuple[FastAPI, httpx.Client]]:
    app = small.app
    with (
        serving(app) as url,
        httpx.Client(base_url=url, headers=small.headers(), timeout=60) as client,
    ):
        yield app, client


@contextlib.contextmanager
def streaming(client: httpx.Client, pipeline_id: str, **how: Any) -> Iterator[httpx.Response]:
    with client.stream("GET", f"/v1/pipelines/{pipeline_id}/events/stream", **how) as answer:
        yield answer


def open_streams(app: FastAPI) -> int:
    return int(app.state.event_streams._open.total())


def test_events_come_as_they_are_recorded_until_the_pipeline_ends(api: Api) -> None:
    """On both databases."""
    pipeline_id = put_pipeline(api.engine, api.tenant)
    tell(api.engine, pipeline_id, 60)
    with (
        serving(api.app) as url,
        httpx.Client(base_url=url, headers=api.headers(), timeout=60) as client,
    ):
        with streaming(client, pipeline_id) as answer:
            assert answer.status_code == 200
            assert answer.headers["content-type"] == "text/event-stream; charset=utf-8"
            assert answer.headers["cache-control"] == "no-store"
            assert answer.headers["x-accel-buffering"] == "no"
            found = messages(answer)
            assert next(found) == {"retry": "2000"}
            seen = [next(found) for _ in range(60)]
            for _ in range(3):
                tell(api.engine, pipeline_id)
                seen.append(next(found))
            end(api.engine, pipeline_id)
            seen += list(found)
        assert [int(message["id"]) for message in seen] == list(range(1, 65))
        listed = client.get(f"/v1/pipelines/{pipeline_id}/events", params={"limit": 500}).json()
        assert [message["data"] for message in seen] == listed["items"]
        assert {message["event"] for message in seen} == {"stage.progressed"}
        view = client.get(f"/v1/pipelines/{pipeline_id}").json()
        assert view["last_event"] == 64
        with streaming(client, pipeline_id, headers={"Last-Event-ID": "64"}) as over:
            assert over.status_code == 204
        # EventSource comes back with the header, and with the `after` it began with.
        how: dict[str, Any] = {"headers": {"Last-Event-ID": "62"}, "params": {"after": 7}}
        with streaming(client, pipeline_id, **how) as again:
            assert [m.get("id") for m in messages(again)] == [None, "63", "64"]
        with streaming(client, pipeline_id, params={"after": 63}) as last:
            assert [m.get("id") for m in messages(last)] == [None, "64"]


def test_a_silent_stream_says_so_and_ends_when_its_key_is_revoked(
    small: Api, served: tuple[FastAPI, httpx.Client], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(event_streams, "HEARTBEAT_SECONDS", 0.05)
    app, client = served
    pipeline_id = put_pipeline(small.engine, small.tenant)
    key = create_key(small.engine, small.gateway.settings.key_pepper, small.tenant)
    with streaming(client, pipeline_id, headers={"Authorization": f"Bearer {key}"}) as answer:
        found = messages(answer)
        assert [next(found) for _ in range(3)][1:] == 2 * [{"": "nothing new"}]
        revoke_key(small.engine, key.split("_")[1])
        assert all(message == {"": "nothing new"} for message in found)
    wait_for(lambda: open_streams(app) == 0, 20, "the stream is counted out")


def test_only_the_pipelines_own_tenant_may_follow_it(
    small: Api, served: tuple[FastAPI, httpx.Client]
) -> None:
    _, client = served
    pipeline_id = put_pipeline(small.engine, small.tenant)
    other = create_key(small.engine, small.gateway.settings.key_pepper, "other")
    for headers, status in (
        ({"Authorization": f"Bearer {other}"}, 404),
        ({"Authorization": "Bearer none"}, 401),
        ({"Last-Event-ID": "-1"}, 422),
        ({"Last-Event-ID": "latest"}, 422),
    ):
        with streaming(client, pipeline_id, headers=headers) as answer:
            assert answer.status_code == status
            assert answer.headers["content-type"] == "application/problem+json"
    with streaming(client, "pl-none") as answer:
        assert answer.status_code == 404


def test_streams_are_limited_for_a_tenant_and_for_the_process(
    tmp_path: Path, store: ObjectStore, tenant: str
) -> None:
    limits = {"MAX_EVENT_STREAMS": "3", "MAX_TENANT_EVENT_STREAMS": "2"}
    with gateway_api(tmp_path, store, tenant, **limits) as api:
        app, pepper = api.app, api.gateway.settings.key_pepper
        others = {"Authorization": f"Bearer {create_key(api.engine, pepper, 'other')}"}
        mine = put_pipeline(api.engine, api.tenant)
        theirs = put_pipeline(api.engine, "other", "pl-other")
        with (
            serving(app) as url,
            httpx.Client(base_url=url, headers=api.headers(), timeout=60) as client,
            contextlib.ExitStack() as open_ones,
        ):

            def opened(pipeline_id: str, **headers: str) -> int:
                stream = streaming(client, pipeline_id, headers=headers)
                return open_ones.enter_context(stream).status_code

            first = contextlib.ExitStack()
            assert first.enter_context(streaming(client, mine)).status_code == 200
            assert opened(mine) == 200
            with streaming(client, mine) as third:
                assert third.status_code == 429
                assert third.headers["retry-after"] == "5"
                assert "of this tenant (2 at most)" in third.read().decode()
            assert opened(theirs, **others) == 200
            with streaming(client, theirs, headers=others) as fourth:
                assert fourth.status_code == 429
                assert "of all tenants together (3 at most)" in fourth.read().decode()
            first.close()
            wait_for(lambda: open_streams(app) == 2, 20, "the first is counted out")
            assert opened(mine) == 200


def test_a_database_that_cannot_be_read_ends_streams_cleanly(
    small: Api, served: tuple[FastAPI, httpx.Client]
) -> None:
    app, client = served
    pipeline_id = put_pipeline(small.engine, small.tenant)
    tell(small.engine, pipeline_id, 3)
    with streaming(client, pipeline_id) as answer:
        found = messages(answer)
        assert [next(found).get("id") for _ in range(4)] == [None, "1", "2", "3"]
        with small.engine.begin() as connection:
            connection.execute(text("ALTER TABLE pipelines RENAME TO away"))
        assert list(found) == []
    with streaming(client, pipeline_id) as answer:
        assert (answer.status_code, answer.headers["retry-after"]) == (503, "5")
    with small.engine.begin() as connection:
        connection.execute(text("ALTER TABLE away RENAME TO pipelines"))
    wait_for(lambda: open_streams(app) == 0, 20, "the stream is counted out")
    end(small.engine, pipeline_id)
    with streaming(client, pipeline_id, headers={"Last-Event-ID": "3"}) as answer:
        assert [m.get("id") for m in messages(answer)] == [None, "4"]


def test_a_reader_that_takes_nothing_is_cut(
    small: Api, served: tuple[FastAPI, httpx.Client], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(event_streams, "SEND_SECONDS", 0.2)
    app, client = served
    pipeline_id = put_pipeline(small.engine, small.tenant)
    # More than the buffers of two sockets.
    count = tell_much(small.engine, pipeline_id, 8)
    address = urlsplit(str(client.base_url))
    with socket.socket() as slow:
        slow.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        slow.connect((address.hostname, address.port))
        request = f"GET /v1/pipelines/{pipeline_id}/events/stream HTTP/1.1\r\nHost: localhost\r\n"
        slow.sendall(f"{request}Authorization: Bearer {small.key}\r\n\r\n".encode())
        wait_for(lambda: open_streams(app) == 1, 20, "it is served")
        wait_for(lambda: open_streams(app) == 0, 60, "it is cut")
    end(small.engine, pipeline_id)
    with streaming(client, pipeline_id, params={"after": count - 10}) as answer:
        assert len(list(messages(answer))) == 1 + 11, "others are served on"


def test_many_streams_are_served_by_one_look_and_no_thread_each(
    small: Api, served: tuple[FastAPI, httpx.Client], monkeypatch: pytest.MonkeyPatch
) -> None:
    app, client = served
    looked: list[int] = []
    look = event_streams._look

    def counting(engine: Any, pipelines: Any) -> Any:
        looked.append(len(pipelines))
        return look(engine, pipelines)

    monkeypatch.setattr(event_streams, "_look", counting)
    names = [put_pipeline(small.engine, small.tenant, f"pl-{n}") for n in range(4)]
    readers = 4 * names
    ready = threading.Barrier(len(readers) + 1, timeout=60)

    def follow(name: str) -> list[str | None]:
        with streaming(client, name) as answer:
            found = messages(answer)
            first = next(found)
            ready.wait()
            return [m.get("id") for m in (first, *found)]

    with ThreadPoolExecutor(len(readers)) as pool:
        running = [pool.submit(follow, name) for name in readers]
        ready.wait()
        assert open_streams(app) == len(readers)
        wait_for(lambda: looked, 20, "it looks")
        for name in names:
            tell(small.engine, name, 2)
            end(small.engine, name)
        assert [future.result(60) for future in running] == 16 * [[None, "1", "2", "3"]]
    assert max(looked) <= len(names), "pipelines, not streams, are looked at"
