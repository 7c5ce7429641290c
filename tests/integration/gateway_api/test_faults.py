"""What a caller of the API may count on while its process, its database or its disk fails."""

from __future__ import annotations

import asyncio
import json
import re
import signal
import socket
import sqlite3
from collections.abc import Iterator
from contextlib import ExitStack, closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest
from pydantic import SecretStr
from sqlalchemy import Engine, event, func, select, text

from services.teacher_gateway import database
from services.teacher_gateway.database import open_engine, reading, transaction
from services.teacher_gateway.http_protocol import MOST_HEAD_BYTES
from services.teacher_gateway.keys import create_key
from services.teacher_gateway.migrate import migrate
from services.teacher_gateway.models import Audit, Pipeline
from services.teacher_gateway.routes import pipelines as routes
from stillhouse.embedded.parts import Store
from tests.support.gateway_api import PEPPER, Api, asgi_client, posted_spec
from tests.support.gateway_process import Environ, api_environment, api_process
from tests.support.waiting import wait_for


@pytest.fixture
def environ(tmp_path: Path, store_part: Store) -> Environ:
    return api_environment(tmp_path, store_part)


@pytest.fixture
def engine(environ: Environ) -> Iterator[Engine]:
    """The database of the processes, with its tables."""
    found = open_engine(environ["TEACHER_GATEWAY_DATABASE_URL"])
    migrate(found)
    yield found
    found.dispose()


@pytest.fixture
def headers(engine: Engine) -> dict[str, str]:
    key = create_key(engine, SecretStr(PEPPER), "acme")
    return {"Authorization": f"Bearer {key}", "Idempotency-Key": "one"}


def kept(engine: Engine) -> tuple[int, int]:
    """Pipelines, and the audit's lines about them."""
    with reading(engine) as session:
        rows = session.execute(select(func.count()).select_from(Pipeline)).scalar_one()
        lines = session.execute(
            select(func.count()).select_from(Audit).where(Audit.action == "pipeline.created")
        ).scalar_one()
    return rows, lines


# G1, G2: its process is killed


@pytest.mark.parametrize(("crash_at", "left"), [("pipeline_inserted", 0), ("pipeline_created", 1)])
def test_a_post_that_was_killed_before_or_after_its_commit_makes_one_pipeline(
    crash_at: str,
    left: int,
    environ: Environ,
    engine: Engine,
    headers: dict[str, str],
    tmp_path: Path,
) -> None:
    spec = posted_spec(tmp_path / "files")
    log = tmp_path / "api.log"
    with api_process({**environ, "STILLHOUSE_CRASH_AT": crash_at}, log) as (process, url):
        with pytest.raises(httpx.TransportError):
            httpx.post(f"{url}/v1/pipelines", json=spec, headers=headers, timeout=60)
        assert process.wait(60) == 137
    assert kept(engine) == (left, left)
    with reading(engine) as session:
        before = session.scalars(select(Pipeline.pipeline_id)).all()
    with api_process(environ, log) as (_, url), httpx.Client(timeout=60, headers=headers) as client:
        answers = [client.post(f"{url}/v1/pipelines", json=spec) for _ in range(2)]
        other = client.post(f"{url}/v1/pipelines", json=spec | {"name": "other"})
    assert [answer.status_code for answer in answers] == [202, 202]
    assert answers[0].content == answers[1].content
    assert before in ([], [answers[0].json()["pipeline_id"]]), "the answer of the first time"
    assert other.status_code == 422
    assert kept(engine) == (1, 1)


# G4: nobody takes what was accepted


def test_posts_are_put_off_while_too_many_wait_for_acceptance(
    client: httpx.Client, small: Api, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(routes, "MOST_WAITING", 2)
    spec = posted_spec(small.files)
    keys = [{"Idempotency-Key": key} for key in "abc"]
    answers = [client.post("/v1/pipelines", json=spec, headers=key) for key in keys]
    assert [answer.status_code for answer in answers] == [202, 202, 503]
    assert answers[2].headers["Retry-After"] == "5"
    assert "2 pipelines wait for acceptance" in answers[2].json()["detail"]
    assert kept(small.engine) == (2, 2)
    # Who asks again for what was taken is told, whoever waits.
    again = client.post("/v1/pipelines", json=spec, headers=keys[0])
    assert (again.status_code, again.content) == (202, answers[0].content)
    with transaction(small.engine) as session:
        session.execute(text("UPDATE pipelines SET state = 'running'"))
    assert client.post("/v1/pipelines", json=spec, headers=keys[2]).status_code == 202


# G5: the database is locked, or down


def ask(api: Api, engine: Engine, *calls: tuple[str, str]) -> list[httpx.Response]:
    """Make calls one after the other, with the API on this engine; a POST posts a spec."""
    there = replace(api, gateway=replace(api.gateway, engine=engine))
    spec = posted_spec(api.files)

    async def made() -> list[httpx.Response]:
        async with asgi_client(there, **{"Idempotency-Key": "one"}) as client:
            return [
                await client.request(method, path, json=spec if method == "POST" else None)
                for method, path in calls
            ]

    return asyncio.run(made())


def test_a_locked_database_refuses_writing_for_now_and_stores_nothing(
    api: Api, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(database, "LOCK_SECONDS", 1)
    impatient = open_engine(api.gateway.settings.database_url)
    with transaction(api.engine) as holder:
        lock = "UPDATE tenants SET created_at = 1"
        if api.engine.dialect.name == "postgresql":
            lock = "LOCK TABLE pipelines IN SHARE MODE"
        holder.execute(text(lock))
        refused, read, lives = ask(
            api, impatient, ("POST", "/v1/pipelines"), ("GET", "/v1/pipelines"), ("GET", "/healthz")
        )
    assert (refused.status_code, refused.headers["Retry-After"]) == (503, "5")
    assert "the database" in refused.json()["detail"]
    assert (read.status_code, read.json()["items"], lives.status_code) == (200, [], 200)
    assert kept(api.engine) == (0, 0)
    assert ask(api, impatient, ("POST", "/v1/pipelines"))[0].status_code == 202
    assert kept(api.engine) == (1, 1)
    impatient.dispose()


def test_a_database_that_is_down_makes_the_api_unready_and_does_not_end_it(
    small: Api, tmp_path: Path
) -> None:
    down = open_engine(f"sqlite:///{tmp_path / 'nowhere' / 'gateway.sqlite3'}")
    ready, lives, refused = ask(
        small, down, ("GET", "/readyz"), ("GET", "/healthz"), ("POST", "/v1/pipelines")
    )
    down.dispose()
    assert (ready.status_code, lives.status_code, refused.status_code) == (503, 200, 503)
    assert refused.headers["Retry-After"] == "5"


# G6: the disk is full


def test_a_full_disk_refuses_writing_and_mends_by_itself(small: Api) -> None:
    path = str(small.engine.url.database)
    engine = open_engine(small.gateway.settings.database_url)
    room = [2**30]

    @event.listens_for(engine, "checkout")
    def _bound(connection: Any, *_: Any) -> None:
        # SQLite itself then says what it says on a full disk.
        connection.execute(f"PRAGMA max_page_count = {room[0]}")

    with closing(sqlite3.connect(path)) as other:
        (pages,) = other.execute("PRAGMA page_count").fetchone()
    room[0] = pages
    spec = posted_spec(small.files)
    there = replace(small, gateway=replace(small.gateway, engine=engine))

    async def fill() -> tuple[list[httpx.Response], httpx.Response, httpx.Response]:
        async with asgi_client(there) as client:
            posts = [await client.post("/v1/pipelines", json=spec)]
            while posts[-1].status_code == 202 and len(posts) < 500:
                posts.append(await client.post("/v1/pipelines", json=spec))
            read = await client.get("/v1/pipelines?limit=200")
            room[0] = 2**30
            return posts, read, await client.post("/v1/pipelines", json=spec)

    posts, read, later = asyncio.run(fill())
    engine.dispose()
    assert (posts[-1].status_code, posts[-1].headers["Retry-After"]) == (503, "5")
    assert "whose disk is full" in posts[-1].json()["detail"]
    assert (read.status_code, len(read.json()["items"])) == (200, len(posts) - 1)
    assert later.status_code == 202
    assert kept(small.engine) == (len(posts), len(posts))
    with closing(sqlite3.connect(path)) as other:
        assert other.execute("PRAGMA integrity_check").fetchall() == [("ok",)]


# G7: bodies that mean harm


def test_no_hostile_body_is_a_500_and_none_leaves_anything(api: Api) -> None:
    spec = posted_spec(api.files)
    teacher = spec["teachers"][0]
    many = ",".join(f'"f{n}":{n}' for n in range(18_000))
    bodies = [
        json.dumps(spec | {"name": "a\0b"}),
        json.dumps(spec | {"teachers": [teacher | {"model": "\ud800"}]}),
        json.dumps(spec | {"budget": {"teacher_usd": 10**30}}),
        json.dumps(spec | {"budget": {"teacher_usd": "XX"}}).replace('"XX"', "1e999"),
        json.dumps(spec | {"signal": {"kind": "text", "max_tokens": 2**63}}),
        json.dumps(spec | {"training": {"seed": 2**64}}),
        "{" + many + "}",
        json.dumps(spec)[:-1] + "," + many + "}",
        '{"version": ' + "9" * 5000 + "}",
        "[" * 100_000,
        "\ufeff",
    ]

    async def post() -> list[httpx.Response]:
        kind = {"Content-Type": "application/json"}
        async with asgi_client(api, **kind) as client:
            return [await client.post("/v1/pipelines", content=body) for body in bodies]

    answers = asyncio.run(post())
    assert [answer.status_code for answer in answers] == [422] * len(bodies)
    assert kept(api.engine) == (0, 0)


# G8: a head without end


def test_the_process_bounds_the_head_of_a_request(
    environ: Environ, engine: Engine, tmp_path: Path
) -> None:
    with api_process(environ, tmp_path / "api.log") as (_, url):
        many = {f"X-{n}": "a" * 1000 for n in range(MOST_HEAD_BYTES // 1000 + 1)}
        assert httpx.get(f"{url}/healthz", headers=many).status_code == 400


# G17: it is told to end


def test_requests_under_way_at_a_signal_are_answered_and_kept(
    environ: Environ, engine: Engine, headers: dict[str, str], tmp_path: Path
) -> None:
    body = json.dumps(posted_spec(tmp_path / "files")).encode()
    with api_process(environ, tmp_path / "api.log") as (process, url), ExitStack() as stack:
        address = ("127.0.0.1", int(url.rpartition(":")[2]))
        clients = [
            stack.enter_context(closing(socket.create_connection(address, timeout=60)))
            for _ in range(8)
        ]
        for number, client in enumerate(clients):
            head = [
                "POST /v1/pipelines HTTP/1.1",
                "Host: localhost",
                f"Authorization: {headers['Authorization']}",
                f"Idempotency-Key: {number}",
                "Content-Type: application/json",
                f"Content-Length: {len(body)}",
                "Expect: 100-continue",
            ]
            client.sendall("\r\n".join([*head, "", ""]).encode())
            # So the app has begun to read the body.
            assert client.recv(65_536).startswith(b"HTTP/1.1 100")
        process.send_signal(signal.SIGTERM)
        wait_for(lambda: refuses(address), 60, "it takes no more connections")
        for client in clients:
            client.sendall(body)
        answers = [everything(client) for client in clients]
        assert process.wait(60) in (0, -signal.SIGTERM)
    assert [answer[:12] for answer in answers] == [b"HTTP/1.1 202"] * 8
    told = {re.findall(rb'"pipeline_id":"([^"]+)"', answer)[0].decode() for answer in answers}
    with reading(engine) as session:
        assert set(session.scalars(select(Pipeline.pipeline_id))) == told
    assert len(told) == 8


def refuses(address: tuple[str, int]) -> bool:
    try:
        socket.create_connection(address, timeout=10).close()
    except ConnectionRefusedError:
        return True
    return False


def everything(client: socket.socket) -> bytes:
    found = b""
    while more := client.recv(65_536):
        found += more
    return found
