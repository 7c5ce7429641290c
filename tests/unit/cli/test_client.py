from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest

from stillhouse.cli import client as cli
from stillhouse.cli.client import (
    Client,
    DamagedFileError,
    StillhouseApiError,
    StillhouseClientError,
    StillhouseUnreachableError,
)

Answer = Callable[[httpx.Request], httpx.Response]

FILES = {"model.safetensors": bytes(range(256)) * 9000, "config.json": b"{}", "README.md": b"card"}


def client_of(answer: Answer, **options: Any) -> Client:
    return Client(
        "http://stillhouse.test", "sk-1", transport=httpx.MockTransport(answer), **options
    )


def entry(data: bytes) -> dict[str, Any]:
    return {"key": "k", "size": len(data), "sha256": hashlib.sha256(data).hexdigest()}


class StudentServer:
    """Serves one student folder; what it sends can be damaged or cut short."""

    def __init__(self, files: dict[str, bytes], *, ranges: bool = True) -> None:
        self.files = files
        self.ranges = ranges
        self.sent: dict[str, bytes] = dict(files)
        self.asked: list[tuple[str, str | None]] = []

    def __call__(self, request: httpx.Request) -> httpx.Response:
        path = request.url.path
        if path == "/v1/pipelines/pl-1/student":
            files = {name: entry(data) for name, data in self.files.items()}
            return httpx.Response(200, json={"student_id": "st-1", "files": files})
        name = path.removeprefix("/v1/pipelines/pl-1/student/files/")
        asked = request.headers.get("Range")
        self.asked.append((name, asked))
        data = self.sent[name]
        if asked and self.ranges:
            start = int(asked.removeprefix("bytes=").removesuffix("-"))
            return httpx.Response(206, content=data[start:])
        return httpx.Response(200, content=data)


def test_the_same_spec_is_submitted_under_the_same_idempotency_key() -> None:
    keys = []

    def answer(request: httpx.Request) -> httpx.Response:
        keys.append(request.headers["Idempotency-Key"])
        assert request.headers["Authorization"] == "Bearer sk-1"
        return httpx.Response(202, json={"pipeline_id": "pl-1"})

    with client_of(answer) as client:
        client.submit({"version": 1, "name": "a"})
        client.submit({"name": "a", "version": 1})
        client.submit({"version": 1, "name": "b"})

    assert keys[0] == keys[1] != keys[2]


def test_pages_are_followed_until_there_is_no_next() -> None:
    def answer(request: httpx.Request) -> httpx.Response:
        after = int(request.url.params["after"])
        items = [{"sequence": n} for n in range(after + 1, min(after + 3, 6))]
        following = items[-1]["sequence"] if items and items[-1]["sequence"] < 5 else None
        return httpx.Response(200, json={"items": items, "next": following})

    with client_of(answer) as client:
        assert [e["sequence"] for e in client.events("pl-1")] == [1, 2, 3, 4, 5]
        assert [e["sequence"] for e in client.events("pl-1", after=3)] == [4, 5]
        assert [e["sequence"] for e in client.events("pl-1", limit=3)] == [1, 2, 3]


def test_a_problem_becomes_an_error_that_lists_its_mistakes() -> None:
    mistakes = [
        {"field": "budget.teacher_usd", "message": "Field required"},
        {"field": "", "message": "teachers: give one"},
    ]
    problem = {"type": "urn:x", "title": "Unprocessable", "status": 422, "detail": "long"}

    def error(errors: list[dict[str, str]]) -> StillhouseApiError:
        answer = httpx.Response(422, json={**problem, "errors": errors})
        with client_of(lambda _: answer) as client, pytest.raises(StillhouseApiError) as caught:
            client.check({})
        return caught.value

    assert error([]).status == 422
    assert error([]).problem == {**problem, "errors": []}
    assert str(error(mistakes[:1])) == "long"
    assert str(error(mistakes)).splitlines() == [
        "2 mistakes:",
        "  budget.teacher_usd: Field required",
        "  teachers: give one",
    ]


def test_a_refused_connection_says_how_to_start_a_gateway() -> None:
    def answer(request: httpx.Request) -> httpx.Response:
        raise httpx.ConnectError("refused", request=request)

    with client_of(answer) as client, pytest.raises(StillhouseUnreachableError) as caught:
        client.status("pl-1")

    assert str(caught.value) == (
        "no Stillhouse at http://stillhouse.test: start one with `stillhouse up`, "
        "or set STILLHOUSE_URL"
    )


def test_a_server_that_is_no_gateway_is_named_as_such() -> None:
    with (
        client_of(lambda _: httpx.Response(200, text="<html>")) as client,
        pytest.raises(StillhouseUnreachableError, match="is no Stillhouse"),
    ):
        client.status("pl-1")


def test_patience_asks_again_while_the_gateway_is_away() -> None:
    tries = []

    def answer(request: httpx.Request) -> httpx.Response:
        tries.append(request)
        if len(tries) == 1:
            raise httpx.ConnectError("refused", request=request)
        if len(tries) == 2:
            return httpx.Response(503, json={"title": "starting"})
        return httpx.Response(200, json={"state": "running"})

    with client_of(answer, patience_seconds=30) as client:
        assert client.status("pl-1") == {"state": "running"}
    assert len(tries) == 3


def test_what_cannot_succeed_later_is_not_asked_again() -> None:
    tries = []

    def answer(request: httpx.Request) -> httpx.Response:
        tries.append(request)
        return httpx.Response(404, json={"title": "not found", "detail": "no pipeline pl-1"})

    with client_of(answer, patience_seconds=30) as client, pytest.raises(StillhouseApiError):
        client.status("pl-1")
    assert len(tries) == 1


def test_an_upload_is_stored_under_the_digest_of_the_file(tmp_path: Path) -> None:
    file = tmp_path / "prompts.jsonl"
    file.write_bytes(b'{"messages": []}\n' * 3)
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    got: dict[str, bytes] = {}

    def answer(request: httpx.Request) -> httpx.Response:
        assert request.headers["Content-Length"] == str(file.stat().st_size)
        got[request.url.path] = request.read()
        return httpx.Response(201, json={"sha256": digest})

    with client_of(answer) as client:
        assert client.upload(file) == f"upload:{digest}"
    assert got == {f"/v1/uploads/{digest}": file.read_bytes()}


def test_a_pulled_student_appears_whole_under_its_name(tmp_path: Path) -> None:
    with client_of(StudentServer(FILES)) as client:
        folder = client.pull("pl-1", tmp_path / "student")

    assert {path.name: path.read_bytes() for path in folder.iterdir()} == FILES
    assert [path.name for path in tmp_path.iterdir()] == ["student"]


@pytest.mark.parametrize("ranges", [True, False])
def test_a_broken_pull_goes_on_where_it_ended(tmp_path: Path, ranges: bool) -> None:
    server = StudentServer(FILES, ranges=ranges)
    name = "model.safetensors"
    half = len(FILES[name]) // 2
    left_behind = tmp_path / ".student.st-1.partial"
    left_behind.mkdir()
    (left_behind / name).write_bytes(FILES[name][:half])
    (left_behind / "config.json").write_bytes(FILES["config.json"])

    with client_of(server) as client:
        client.pull("pl-1", tmp_path / "student")

    assert (tmp_path / "student" / name).read_bytes() == FILES[name]
    assert (name, f"bytes={half}-") in server.asked
    assert not any(asked == "config.json" for asked, _ in server.asked)


def test_wrong_bytes_of_an_earlier_pull_are_fetched_again(tmp_path: Path) -> None:
    left_behind = tmp_path / ".student.st-1.partial"
    left_behind.mkdir()
    (left_behind / "model.safetensors").write_bytes(b"another file's beginning")

    with client_of(StudentServer(FILES)) as client:
        client.pull("pl-1", tmp_path / "student")

    stored = (tmp_path / "student" / "model.safetensors").read_bytes()
    assert stored == FILES["model.safetensors"]


def test_a_damaged_file_never_becomes_a_student(tmp_path: Path) -> None:
    server = StudentServer(FILES)
    server.sent["model.safetensors"] = b"x" * len(FILES["model.safetensors"])

    with client_of(server) as client, pytest.raises(DamagedFileError, match=r"model\.safetensors"):
        client.pull("pl-1", tmp_path / "student")

    assert not (tmp_path / "student").exists()


def test_pulling_twice_keeps_what_is_there(tmp_path: Path) -> None:
    server = StudentServer(FILES)
    with client_of(server) as client:
        client.pull("pl-1", tmp_path / "student")
        asked = len(server.asked)
        client.pull("pl-1", tmp_path / "student")

    assert len(server.asked) == asked


def test_a_folder_with_something_else_is_not_touched(tmp_path: Path) -> None:
    (tmp_path / "student").mkdir()
    (tmp_path / "student" / "thesis.txt").write_text("mine")

    with (
        client_of(StudentServer(FILES)) as client,
        pytest.raises(StillhouseClientError, match="name another with --to"),
    ):
        client.pull("pl-1", tmp_path / "student")

    assert (tmp_path / "student" / "thesis.txt").read_text() == "mine"


@pytest.mark.parametrize("name", ["../escape", "a/b", "", ".hidden"])
def test_a_manifest_cannot_name_a_file_outside_the_folder(tmp_path: Path, name: str) -> None:
    with (
        client_of(StudentServer({name: b"x"})) as client,
        pytest.raises(StillhouseClientError, match="not to be trusted"),
    ):
        client.pull("pl-1", tmp_path / "student")

    assert list(tmp_path.iterdir()) == []


def test_waiting_ends_with_the_pipeline() -> None:
    states = iter(["accepting", "running", "released"])
    seen: list[str] = []

    def answer(request: httpx.Request) -> httpx.Response:
        if request.url.path.endswith("/events/stream"):
            assert request.headers["Last-Event-ID"] == "4"
            return stream(event(5), event(6), ": nothing new")
        # The second look came after event 6, so the third waits for the stream to go silent.
        shown = {"state": next(states), "last_event": 4 if not seen else 6}
        return httpx.Response(200, json=shown)

    with client_of(answer) as client:
        ended = client.wait("pl-1", seen=lambda p: seen.append(p["state"]))

    assert ended["state"] == "released"
    assert seen == ["accepting", "running", "released"]


def test_waiting_has_a_deadline_that_says_what_it_last_saw() -> None:
    with (
        client_of(
            lambda _: httpx.Response(200, json={"state": "running", "last_event": 0})
        ) as client,
        pytest.raises(TimeoutError, match="still running after 0 s"),
    ):
        client.wait("pl-1", timeout_seconds=0)


def event(sequence: int, **more: str) -> str:
    data = json.dumps({"sequence": sequence, **more}, ensure_ascii=False)
    return f"id: {sequence}\nevent: shard.written\ndata: {data}"


def stream(*messages: str, end: str = "\n\n", cut: str = "") -> httpx.Response:
    body = "".join(message + end for message in messages) + cut
    headers = {"Content-Type": "text/event-stream"}
    return httpx.Response(200, content=body.encode(), headers=headers)


def test_events_are_followed_over_connections_each_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cli, "_PAUSE", 0.001)
    cut = 'id: 4\nevent: shard.written\ndata: {"seq'
    answers = [
        stream(
            "retry: 2000",
            event(2, text="a line\u2028in a line"),
            ": nothing new",
            event(3),
            cut=cut,
        ),
        httpx.ReadError("reset"),
        httpx.Response(503, json={"detail": "the database is away"}),
        stream(event(3), event(4), end="\r\n\r\n"),
        httpx.Response(204),
    ]
    asked = []

    def answer(request: httpx.Request) -> httpx.Response:
        asked.append(request.headers["Last-Event-ID"])
        found = answers.pop(0)
        if isinstance(found, Exception):
            raise found
        return found

    with client_of(answer, patience_seconds=60) as client:
        found = list(client.follow("pl-1", after=1))

    assert [entry["sequence"] for entry in found] == [2, 3, 4]
    assert found[0]["text"] == "a line\u2028in a line"
    assert asked == ["1", "3", "3", "3", "4"]


def test_a_gateway_without_a_stream_to_spare_is_read_in_pages(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(cli, "_POLL", 0.001)
    pages = [[2, 3], [], [4]]
    streams = [httpx.Response(429, json={"detail": "too many event streams"}) for _ in pages]
    streams.append(httpx.Response(204))
    asked = []

    def answer(request: httpx.Request) -> httpx.Response:
        if request.url.path.endswith("/stream"):
            return streams.pop(0)
        asked.append(request.url.params["after"])
        items = [{"sequence": number} for number in pages.pop(0)]
        return httpx.Response(200, json={"items": items, "next": None})

    with client_of(answer) as client:
        found = list(client.follow("pl-1", after=1))

    assert [entry["sequence"] for entry in found] == [2, 3, 4]
    assert asked == ["1", "3", "3"]


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        (httpx.Response(404, json={"detail": "there is no such pipeline"}), "no such pipeline"),
        (httpx.Response(429, json={"detail": "too many event streams"}), "too many event streams"),
        (httpx.Response(200, json={}), "it sent no stream of events"),
        (stream("data: {"), "it sent an event that is no JSON"),
        (stream(cut=f"data: {'x' * (2 << 20)}"), "it sent a line without an end"),
    ],
)
def test_what_is_no_stream_is_told(answer: httpx.Response, said: str) -> None:
    with client_of(lambda _: answer) as client, pytest.raises(StillhouseClientError, match=said):
        list(client.follow("pl-1"))
