"""How a reply is read, over a real connection: its least rate, its blanks, its cap."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from services.teacher_gateway.egress import EgressRefused
from services.teacher_gateway.teachers import endpoint
from services.teacher_gateway.teachers.endpoint import Reply, open_session, post, without_key
from services.teacher_gateway.teachers.outcomes import Retry
from stillhouse.contracts.spec import Teacher as TeacherSpec
from tests.support.teacher import MODEL, Fault, Teacher, running_teacher

BODY = b'{"model": "%s", "messages": [{"role": "user", "content": "go"}]}' % MODEL.encode()


@pytest.fixture
def teacher(tmp_path: Path) -> Iterator[Teacher]:
    with running_teacher(tmp_path / "invoices.jsonl") as running:
        yield running


def fetch_all(
    url: str,
    times: int,
    *,
    key: str | None = None,
    deadline: float = 60,
    cap: int = 1 << 20,
    private: bool = True,
) -> list[Reply | Retry]:
    """Post the same request several times over one session."""
    asked = TeacherSpec.model_validate(
        {
            "name": "t",
            "url": url,
            "model": MODEL,
            "terms": "own-weights",
            "usd_per_million": {"input": 1, "output": 2},
        }
    )

    async def ask() -> list[Reply | Retry]:
        where = f"{url}/chat/completions"
        sent = {"Authorization": f"Bearer {key}"} if key else {}
        async with open_session(asked, private=private, connections=1) as session:
            return [
                await post(session, where, sent, BODY, key=key, cap=cap, deadline=deadline)
                for _ in range(times)
            ]

    return asyncio.run(asyncio.wait_for(ask(), 60))


def fetch(url: str, **how: Any) -> Reply | Retry:
    (outcome,) = fetch_all(url, 1, **how)
    return outcome


@pytest.mark.parametrize("fault", [Fault("slow_drip", seconds=0.02), Fault("stalls")])
def test_a_reply_that_hardly_comes_is_cut_long_before_the_deadline(
    fault: Fault, teacher: Teacher, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(endpoint, "LEAST_SECONDS", 0.3)
    teacher.script(fault)
    outcome = fetch(teacher.url)
    assert isinstance(outcome, Retry)
    assert "brought under 256 bytes" in outcome.detail
    assert (outcome.reason, outcome.lost, outcome.away) == ("teacher_timeout", True, True)


def test_blank_lines_before_a_reply_are_silence(
    teacher: Teacher, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(endpoint, "LEAST_SECONDS", 1.0)
    teacher.script(Fault("kept_alive", seconds=0.075))
    outcome = fetch(teacher.url)
    assert isinstance(outcome, Reply)
    assert outcome.status == 200
    assert outcome.body.startswith(b"\n" * 20 + b"{")


def test_silence_is_bounded_by_the_deadline_alone(
    teacher: Teacher, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(endpoint, "LEAST_SECONDS", 0.05)
    teacher.script(Fault("never_answers"))
    outcome = fetch(teacher.url, deadline=0.5)
    assert isinstance(outcome, Retry)
    assert outcome.detail == "no answer in 0.5 s"
    assert (outcome.reason, outcome.lost) == ("teacher_timeout", True)


def test_a_reply_has_a_cap(teacher: Teacher) -> None:
    outcome = fetch(teacher.url, cap=100)
    assert isinstance(outcome, Retry)
    assert (outcome.reason, outcome.lost) == ("teacher_invalid", True)


def test_a_packed_reply_is_not_unpacked(teacher: Teacher) -> None:
    teacher.script(Fault("gzip_bomb", size=16 << 20))
    outcome = fetch(teacher.url)
    assert isinstance(outcome, Reply)
    assert outcome.body.startswith(b"\x1f\x8b")
    assert len(outcome.body) < 1 << 16


def test_addresses_are_checked_where_the_connection_is_made(teacher: Teacher) -> None:
    with pytest.raises(EgressRefused):
        fetch(teacher.url, private=False)
    with pytest.raises(EgressRefused):
        fetch(teacher.url.replace("127.0.0.1", "localhost"), private=False)
    assert teacher.requests == []


def test_redirects_are_not_followed_and_cookies_not_kept(teacher: Teacher) -> None:
    teacher.script(Fault("redirect", location=f"{teacher.url}/chat/completions"))
    # By its name: cookies of an address are not kept in any case.
    first, second = fetch_all(teacher.url.replace("127.0.0.1", "localhost"), 2)
    assert isinstance(first, Reply)
    assert isinstance(second, Reply)
    assert (first.status, second.status) == (302, 302)
    assert [seen["cookie"] for seen in teacher.requests] == [None, None]


@pytest.mark.parametrize("status", [200, 400, 503])
def test_a_key_comes_back_in_nothing_that_a_teacher_says(teacher: Teacher, status: int) -> None:
    key = "sk-a/b+c-0123456789"
    teacher.script(Fault("status", status=status, message=f"no plan for {key}"))
    outcome = fetch(teacher.url, key=key)
    assert isinstance(outcome, Reply)
    assert outcome.status == status
    assert b'"no plan for [key]"' in outcome.body
    assert without_key(b'{"say": "sk-a\\/b+c-0123456789"}', key) == b'{"say": "[key]"}'


def test_a_word_that_a_server_wants_for_a_key_stays_where_it_stands(teacher: Teacher) -> None:
    teacher.script(Fault("status", status=400, message="none of them"))
    outcome = fetch(teacher.url, key="none")
    assert isinstance(outcome, Reply)
    assert b"none of them" in outcome.body
