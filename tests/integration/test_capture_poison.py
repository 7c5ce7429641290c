"""What is wrong with one record costs no other: not in a spool, not in a flush, not in a prompt."""

from __future__ import annotations

import asyncio
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web
from sqlalchemy import delete, select

from services.teacher_gateway.capture.read import captured_lines
from services.teacher_gateway.capture.record import Record, frame
from services.teacher_gateway.capture.ship import ship_abandoned
from services.teacher_gateway.counters import CAPTURE_FAILURES
from services.teacher_gateway.database import reading, transaction
from services.teacher_gateway.models import CapturedBatch, CapturedTotal
from services.teacher_gateway.prompts.file import RefusedLine, read_prompts
from stillhouse.chassis.storage import ObjectStore
from stillhouse.contracts.spec import Captured
from tests.support.capture import (
    HTTP,
    captured,
    capturing,
    held_teacher,
    lines,
    money,
    register,
    registration,
    upstream,
    wait_for_records,
)
from tests.support.gateway_api import Api, gateway_api
from tests.support.waiting import wait_for

QUESTION = b'{"model": "fast", "messages": [{"role": "user", "content": "Hi"}]}'
ANSWER = (
    b'{"choices": [{"message": {"role": "assistant", "content": "Yes."}}], '
    b'"usage": {"prompt_tokens": 1, "completion_tokens": 2}}'
)


@pytest.fixture
def api(tmp_path: Path, store: ObjectStore, tenant: str) -> Iterator[Api]:
    with gateway_api(tmp_path, store, tenant) as found:
        yield found


@pytest.fixture
def either(tmp_path: Path, store: ObjectStore, tenant: str, database_url: str) -> Iterator[Api]:
    """On SQLite and on PostgreSQL."""
    with gateway_api(tmp_path, store, tenant, DATABASE_URL=database_url) as found:
        yield found


def record(tenant: str, number: int = 0, **changes: Any) -> Record:
    found = Record(
        tenant_id=tenant,
        teacher="fast",
        verdict_id="tv-1",
        terms="own-weights",
        kind="chat",
        at=1_790_000_000.0 + number,
        seconds=0.5,
        status=200,
        streamed=False,
        failure="",
        detail="",
        tags={"number": str(number)},
        prompt_tokens=1,
        completion_tokens=2,
        tranche_id="",
        bill="known",
        microusd=5,
        request=QUESTION,
        answer=ANSWER,
    )
    for name, value in changes.items():
        setattr(found, name, value)
    return found


def dead_spool(api: Api, name: str, *segments: bytes) -> Path:
    """A spool whose process is gone."""
    path = api.gateway.settings.captured_folder / name
    path.mkdir(mode=0o700, parents=True)
    path.parent.chmod(0o700)
    (path / "lock").touch()
    for number, data in enumerate(segments, 1):
        (path / f"{number:06d}.spool").write_bytes(data)
    return path


def registered(api: Api, *names: str) -> None:
    with capturing(api) as address:
        for name in names or ("fast",):
            register(api, address, name, **registration("http://127.0.0.1:9/v1"))


def sweep(api: Api) -> int:
    return ship_abandoned(api.gateway.settings.captured_folder, api.engine, api.gateway.store)


def counted(reason: str) -> int:
    return int(CAPTURE_FAILURES.labels(reason)._value.get())


UNUSABLE: dict[str, tuple[dict[str, Any], str]] = {
    "an answer that is no JSON": ({"answer": b"no"}, "teacher_invalid"),
    "bytes that are no text": (
        {"answer": ANSWER.replace(b"Yes.", b"\xff")}, "teacher_invalid"
    ),
    "log-probabilities of another form": (
        {"streamed": True, "answer": b'data: {"choices": [{"delta": {}, "logprobs": 7}]}\n\n'},
        "teacher_invalid",
    ),
    "a negative count": (
        {"answer": ANSWER.replace(b": 2", b": -2")}, "teacher_invalid"
    ),
    "a count beyond all": (
        {"answer": ANSWER.replace(b": 2", b": " + b"9" * 40)}, "teacher_invalid"
    ),
    "an answer too deep": ({"answer": b"[" * 100_000}, "teacher_invalid"),
    "a request that is no JSON": ({"request": b'{"model'}, "record_unusable"),
    "a request that is no text": (
        {"request": QUESTION.replace(b"Hi", b"\xff")}, "record_unusable"
    ),
    "a request with half a character": (
        {"request": QUESTION.replace(b"Hi", b"\\ud800")},
        "record_unusable",
    ),
    "a request too deep": ({"request": b"[" * 100_000}, "record_unusable"),
}  # fmt: skip


@pytest.mark.parametrize("name", UNUSABLE)
def test_a_record_that_cannot_be_used_is_a_failure_and_its_flush_goes_on(
    api: Api, store: ObjectStore, name: str
) -> None:
    changes, reason = UNUSABLE[name]
    registered(api)
    bad = record(api.tenant, 2, **changes)
    segment = frame(record(api.tenant, 1)) + frame(bad) + frame(record(api.tenant, 3))
    spool = dead_spool(api, "sp-1", segment)
    before = counted(reason)
    assert sweep(api) == 3
    assert counted(reason) == before + 1
    found = lines(api.engine, store, api.tenant)
    assert [line["failure"] for line in found] == [None, reason, None]
    assert found[1]["detail"]
    assert not spool.exists()
    after = money(api.engine, api.tenant, "fast")
    assert (after.of("answers"), after.of("unused")) == (10, 5), "each is paid for once"
    with capturing(api) as address:
        view = captured(api, address)
        assert (view["records"], view["failures"], view["reasons"]) == (2, 1, {reason: 1})
        assert view["last_failures"][0]["reason"] == reason


@pytest.mark.parametrize("kind", ["payload", "head", "garbage", "zeros"])
def test_a_damaged_segment_is_set_aside_and_counted_and_the_sweep_goes_on(
    api: Api, store: ObjectStore, kind: str
) -> None:
    registered(api)
    framed = [bytearray(frame(record(api.tenant, number))) for number in range(3)]
    if kind == "payload":
        framed[1][40] ^= 1
        kept = {"0", "2"}
    elif kind == "head":
        framed[1][2] ^= 1
        kept = {"0"}
    else:
        framed[1:] = [bytearray(os.urandom(500) if kind == "garbage" else 500)]
        kept = {"0"}
    damaged = b"".join(framed)
    cut = frame(record(api.tenant, 4)) + frame(record(api.tenant, 5))[:-1]
    first = dead_spool(api, "sp-1", damaged, frame(record(api.tenant, 3)))
    second = dead_spool(api, "sp-2", cut)
    before = counted("spool_damaged")
    sweep(api)
    tags = {line["tags"]["number"] for line in lines(api.engine, store, api.tenant)}
    assert tags == kept | {"3", "4"}
    assert counted("spool_damaged") == before + 1
    assert (first / "000001.damaged").read_bytes() == damaged, "for an operator"
    assert not list(first.glob("*.spool"))
    assert not second.exists(), "what its writer's death cut is nobody's"
    assert sweep(api) == 0
    assert counted("spool_damaged") == before + 1, "once, however often it is looked at"


def test_a_batch_that_can_never_be_indexed_holds_up_no_other_teachers(
    either: Api, store: ObjectStore
) -> None:
    api = either
    registered(api, "fast", "broken")
    with transaction(api.engine) as session:
        session.execute(delete(CapturedTotal).where(CapturedTotal.teacher == "broken"))
    records = [
        record(api.tenant, 1, teacher="broken"),
        record(api.tenant, 2),
        record("nobody", 3),
        record(api.tenant, 4, tags={"number": "\0"}),
    ]
    spool = dead_spool(api, "sp-1", b"".join(map(frame, records)), frame(record(api.tenant, 5)))
    sweep(api)
    tags = [line["tags"]["number"] for line in lines(api.engine, store, api.tenant)]
    assert sorted(tags) == ["\0", "2", "5"]
    assert [path.name for path in sorted(spool.iterdir())] == ["000001.damaged", "lock"]
    assert money(api.engine, api.tenant, "fast").of("answers") == 15

    # What was wrong is mended: the operator's segment brings what is missing, and nothing twice.
    with capturing(api) as address:
        register(api, address, "broken", **registration("http://127.0.0.1:9/v1"))
    (spool / "000001.damaged").rename(spool / "000001.spool")
    sweep(api)
    assert len(lines(api.engine, store, api.tenant)) == 4
    assert money(api.engine, api.tenant, "fast").of("answers") == 15
    assert money(api.engine, api.tenant, "broken").of("answers") == 5


def test_a_segment_that_the_disk_does_not_give_is_passed_over(
    api: Api, store: ObjectStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    registered(api)
    spool = dead_spool(api, "sp-1", frame(record(api.tenant, 1)), frame(record(api.tenant, 2)))
    real = Path.read_bytes

    def read_bytes(path: Path) -> bytes:
        if path.name == "000001.spool":
            raise OSError(5, "Input/output error")
        return real(path)

    monkeypatch.setattr(Path, "read_bytes", read_bytes)
    assert sweep(api) == 1
    assert [path.name for path in spool.glob("*.spool")] == ["000001.spool"]
    monkeypatch.undo()
    assert sweep(api) == 1
    assert not spool.exists()


def test_two_sweeps_that_meet_at_a_half_made_spool_both_go_on(api: Api) -> None:
    registered(api)
    folder = api.gateway.settings.captured_folder
    half = folder / ".making-sp-0"
    half.mkdir()
    (half / "not-ours").touch()
    os.utime(half, (1, 1))
    dead_spool(api, "sp-1", frame(record(api.tenant, 1)))
    assert sweep(api) == 1
    assert half.exists()


def test_a_hostile_teacher_costs_no_other_answer_of_its_process(
    api: Api, store: ObjectStore
) -> None:
    """Headers that are no text, counts without end, and log-probabilities of another form."""

    async def lie(request: web.Request) -> web.StreamResponse:
        body = await request.json()
        how = body["messages"][0]["content"]
        if how == "headers":
            assert isinstance(request.transport, asyncio.Transport)
            head = b"HTTP/1.1 200 OK\r\nContent-Type: text/\xff\r\nContent-Length: 2\r\n\r\nno"
            request.transport.write(head)
            request.transport.close()
            return web.Response()
        if how == "logprobs":
            answer = b'data: {"choices": [{"delta": {}, "logprobs": 7}]}\n\ndata: [DONE]\n\n'
            return web.Response(body=answer, content_type="text/event-stream")
        usage = {"negative": -5, "endless": 10**40, "large": 1 << 41}[how]
        return web.json_response(
            {
                "choices": [{"index": 0, "message": {"content": "x"}}],
                "usage": {"prompt_tokens": 1, "completion_tokens": usage},
            }
        )

    hows = ("headers", "logprobs", "negative", "endless", "large")
    with upstream(lie) as url, held_teacher() as honest, capturing(api) as address:
        honest.go.set()
        register(api, address, "liar", **registration(url))
        register(api, address, "fast", **registration(honest.url))
        for how in hows:
            for name in ("liar", "fast"):
                body = {"model": name, "messages": [{"role": "user", "content": how}]}
                body |= {"max_tokens": 10, "stream": name == "liar" and how in hows[:2]}
                HTTP.post(f"{address}/v1/chat/completions", json=body, headers=api.headers())
        found = wait_for_records(api, address, 5, failures=5)
        assert found["reasons"] == {"teacher_invalid": 5}
        wait_for(lambda: money(api.engine, api.tenant, "liar").of("unknown"), 20, "it is listed")
    assert money(api.engine, api.tenant, "fast").of("answers") == 5 * 20
    liar = money(api.engine, api.tenant, "liar")
    assert liar.spent == liar.of("unknown") < 10_000, "the most that these calls can have cost"


HOSTILE = [
    b'{"model": "fast", "messages": [], "functions": 7}',
    b'{"model": "fast", "messages": [], "functions": {"a": 1}, "tools": []}',
    b'{"model": "fast", "messages": {"a": 1}, "tools": 3}',
    b'{"model": "fast", "messages": [{"role": "user", "content": [1, null]}]}',
    b'{"model": "fast", "messages": [{"role": ["x"], "content": "a"}]}',
    b'{"model": "fast", "messages": ' + b"9" * 5000 + b"}",
    b'{"model": "fast", "messages": 1e400}',
    b'{"model": "fast", "messages": [{"role": "user", "content": "\\u0000"}]}',
    b'{"model": "fast", "messages": ' + b"[" * 500 + b"]" * 500 + b"}",
    b'{"model": "fast"}',
    b"7",
]


def test_recorded_requests_of_any_form_are_lines_that_are_refused_one_by_one(
    api: Api, store: ObjectStore, tmp_path: Path
) -> None:
    registered(api)
    records = [record(api.tenant, n, request=request) for n, request in enumerate(HOSTILE)]
    dead_spool(api, "sp-1", b"".join(map(frame, [*records, record(api.tenant, 99)])))
    sweep(api)
    for answers in (False, True):
        wanted = Captured.model_validate({"answers": answers})
        found = list(captured_lines(wanted, api.tenant, api.engine, store))
        assert found == list(captured_lines(wanted, api.tenant, api.engine, store))
        assert len(found) == len(records) + 1
        file = tmp_path / "prompts.jsonl"
        file.write_bytes(b"".join(found))
        with file.open("rb") as opened:
            judged = list(
                read_prompts(
                    opened,
                    max_lines=100,
                    max_line_bytes=1 << 20,
                    max_tokens=100,
                    teacher_of=lambda line, sha256: "t",
                    tokens_of=None,
                )
            )
        assert [isinstance(line, RefusedLine) for line in judged] == [True] * len(records) + [False]


def test_what_was_recorded_is_shown_in_pages_with_the_most_frequent_tags(
    either: Api, store: ObjectStore
) -> None:
    api = either
    names = [f"teacher-{number}" for number in range(5)]
    registered(api, *names)
    records = [
        record(api.tenant, n, teacher=name, tags={"user": f"u{n}", "app": "x"})
        for name in names
        for n in range(40)
    ]
    records += [record(api.tenant, 60 + n, teacher=names[0]) for n in range(20)]
    dead_spool(api, "sp-1", b"".join(map(frame, records)))
    sweep(api)

    def page(**query: Any) -> dict[str, Any]:
        url = f"{address}/v1/captured"
        answer = HTTP.get(url, params=query, headers=api.headers())
        assert answer.status_code == 200, answer.text
        found: dict[str, Any] = answer.json()
        return found

    with capturing(api) as address:
        first = page(limit=3)
        assert (first["records"], first["cost_microusd"]) == (220, 220 * 5), "of all teachers"
        assert [t["teacher"] for t in first["teachers"]] == names[:3]
        second = page(limit=3, after=first["next"])
        assert [t["teacher"] for t in second["teachers"]] == names[3:]
        assert (second["next"], second["records"]) == (None, 220)
        assert first["tags"]["app"] == {"x": 200}
        assert first["tags_left_out"] == 0
        one = page(teacher=names[0])
        assert (one["records"], one["teachers"][0]["records"]) == (60, 60)
        assert len(one["tags"]["number"]) == 20
        assert (
            HTTP.get(f"{address}/v1/captured?limit=501", headers=api.headers()).status_code == 422
        )

    more = [record(api.tenant, n, tags={f"n{n % 60}": "v", "user": f"x{n}"}) for n in range(120)]
    registered(api)
    dead_spool(api, "sp-2", *(frame(found) for found in more))
    sweep(api)
    with capturing(api) as address:
        found = page()
        assert len(found["tags"]) == 50
        assert max(len(values) for values in found["tags"].values()) == 50
        shown = sum(len(values) for values in found["tags"].values())
        # 60 names of one value, `user` with 40 and 120 values, `app` with one, `number` with 20.
        assert shown + found["tags_left_out"] == 60 + 160 + 1 + 20
    with reading(api.engine) as session:
        batches = session.scalars(select(CapturedBatch)).all()
        total = sum(batch.records for batch in batches if batch.tenant_id == api.tenant)
    assert found["records"] == total


def test_nobody_ships_a_spool_whose_lock_is_held(api: Api) -> None:
    registered(api)
    spool = dead_spool(api, "sp-1", frame(record(api.tenant, 1)))
    with (spool / "lock").open("r+") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert sweep(api) == 0
    assert sweep(api) == 1
