"""`?check=true&probe=true`: one real question to a teacher, before there is a pipeline."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from sqlalchemy import select

from services.teacher_gateway.database import reading
from services.teacher_gateway.models import Audit, Pipeline
from tests.support.gateway_api import Api, posted_spec
from tests.support.teacher import Fault, FaultKind, Teacher, running_teacher


@pytest.fixture
def teacher(tmp_path: Path) -> Iterator[Teacher]:
    with running_teacher(tmp_path / "invoices.jsonl") as running:
        yield running


def spec(api: Api, teacher: Teacher, **changes: Any) -> dict[str, Any]:
    posted = posted_spec(api.files)
    posted["teachers"][0] |= {"url": teacher.url, "model": teacher.model, **changes}
    return posted


def test_a_probe_asks_once_and_its_cost_is_told_and_audited(
    client: httpx.Client, small: Api, teacher: Teacher
) -> None:
    answer = client.post("/v1/pipelines?check=true&probe=true", json=spec(small, teacher))
    assert answer.status_code == 200, answer.text
    [invoice] = teacher.invoices()
    micro = invoice.prompt_tokens * 1 + invoice.completion_tokens * 2
    assert answer.json()["probe_usd"] == pytest.approx(micro / 1e6)
    with reading(small.engine) as session:
        [audit] = session.scalars(select(Audit).where(Audit.action == "teacher.probed"))
        assert session.scalars(select(Pipeline)).all() == []
    assert (audit.target, audit.detail) == (teacher.url, f"{micro} micro-USD")


def test_a_check_without_probe_never_calls_the_teacher(
    client: httpx.Client, small: Api, teacher: Teacher
) -> None:
    answer = client.post("/v1/pipelines?check=true", json=spec(small, teacher))
    assert (answer.status_code, answer.json()["probe_usd"]) == (200, None)
    assert teacher.invoices() == []


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        ("status", "check `teachers[0].url`, and that it is up"),
        ("redirect", "cannot be asked"),
        ("missing_logprobs", "gave no log-probabilities"),
    ],
)
def test_an_unfit_teacher_is_told_with_what_to_change(
    client: httpx.Client, small: Api, teacher: Teacher, kind: FaultKind, said: str
) -> None:
    teacher.script(Fault(kind))
    answer = client.post("/v1/pipelines?check=true&probe=true", json=spec(small, teacher))
    assert answer.status_code == 422, answer.text
    assert said in answer.json()["detail"]


def test_an_unreachable_teacher_is_told(client: httpx.Client, small: Api, teacher: Teacher) -> None:
    away = spec(small, teacher, url="http://127.0.0.1:1/v1")
    answer = client.post("/v1/pipelines?check=true&probe=true", json=away)
    assert answer.status_code == 422
    assert "and that it is up" in answer.json()["detail"]
