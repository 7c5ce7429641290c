"""`?check=true&probe=true`: real questions to a teacher, before there is a pipeline."""

from __future__ import annotations

import asyncio
import contextlib
import json
import re
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
from anyio.to_thread import current_default_thread_limiter
from sqlalchemy import select

from services.teacher_gateway import admission
from services.teacher_gateway.accept import accept_pipeline
from services.teacher_gateway.database import reading
from services.teacher_gateway.keys import create_key
from services.teacher_gateway.models import Account, AccountCharge, Audit, Pipeline
from services.teacher_gateway.preflight.running import MOST
from services.teacher_gateway.probe import probe_teacher
from stillhouse.chassis.storage import ObjectStore
from stillhouse.embedded.parts import Store
from tests.support.capture import HeldTeacher, held_teacher
from tests.support.gateway_api import (
    Api,
    asgi_client,
    check_in_process,
    gateway_api,
    pipeline,
    posted_spec,
    serving,
    submit,
    write_prompts,
)
from tests.support.provider import running_provider
from tests.support.teacher import Fault, Teacher, running_teacher

PROBE = "Name one colour."
HALF = {"batch_api": True, "usd_per_million": {"input": 0.5, "output": 1}}
PROMPTS = "What is the number"


@pytest.fixture
def teacher(tmp_path: Path) -> Iterator[Teacher]:
    with running_teacher(tmp_path / "invoices.jsonl") as running:
        yield running


def spec(api: Api, teacher: Teacher, changes: Any = None, **parts: Any) -> dict[str, Any]:
    """A spec whose answers end: most of the teacher's do within 128 tokens."""
    signal = {"kind": "topk", "k": 5, "max_tokens": 128}
    training = {"tokens_per_step": 64}
    posted = posted_spec(api.files, **{"signal": signal, "training": training, **parts})
    posted["teachers"][0] |= {"url": teacher.url, "model": teacher.model, **(changes or {})}
    return posted


def check(client: httpx.Client, posted: dict[str, Any]) -> httpx.Response:
    return client.post("/v1/pipelines?check=true&probe=true", json=posted, timeout=60)


def findings(answer: httpx.Response) -> dict[str, dict[str, Any]]:
    assert answer.status_code == 200, answer.text
    return {finding["topic"]: finding for finding in answer.json()["preflight"]["findings"]}


def charges(api: Api) -> list[AccountCharge]:
    with reading(api.engine) as session:
        return list(session.scalars(select(AccountCharge)))


def test_a_fit_teacher_is_found_fit_and_its_cost_is_told(
    client: httpx.Client, small: Api, teacher: Teacher
) -> None:
    answer = check(client, spec(small, teacher))
    found = findings(answer)
    assert {topic: finding["verdict"] for topic, finding in found.items()} == {
        "signal": "ok",
        "agreement": "ok",
        "raw_logprobs": "ok",
        "answers": "ok",
        "tokenizer": "ok",
        "token_ids": "ok",
        "ends": "ok",
        "tokens": "ok",
        "terms": "ok",
        "cost": "ok",
        "time": "ok",
        "training": "ok",
    }
    preflight = answer.json()["preflight"]
    [figures] = preflight["teachers"]
    assert (figures["signal"], figures["k"], figures["raw_logprobs"]) == ("topk", 5, True)
    assert (figures["calls"], figures["answered"]) == (14, 8)
    assert figures["disagreement_nats"] == pytest.approx(0, abs=1e-9)
    # One question for the signal, three times the same, two with other settings, eight prompts.
    assert len(teacher.requests) == 14
    asked = [r for r in teacher.requests if r["max_tokens"] == 128]
    assert len({request["prompt_sha256"] for request in asked}) == 8
    assert answer.json()["probe_usd"] == pytest.approx(teacher.invoiced_microusd() / 1e6)


def test_the_forecast_is_that_of_the_answers_heard(
    client: httpx.Client, small: Api, teacher: Teacher
) -> None:
    answer = check(client, spec(small, teacher))
    invoices = [i for i in teacher.invoices() if i.completion_tokens > 8 or "number" in i.marker]
    whole = answer.json()["preflight"]
    [figures] = whole["teachers"]
    tokens = [i.completion_tokens for i in invoices if i.prompt_sha256 != _probe_digest(teacher)]
    assert figures["completion_tokens"]["n"] == 8
    assert figures["completion_tokens"]["value"] == pytest.approx(sum(tokens) / len(tokens))
    assert figures["items"] == 60
    mean = figures["completion_tokens"]["value"]
    expected = (answer.json()["prompt_tokens"] * 1 + 60 * mean * 2) / 1e6
    assert whole["cost_usd"]["value"] == pytest.approx(expected)
    assert whole["cost_usd"]["low"] < expected < whole["cost_usd"]["high"]
    assert 0 < figures["ended"]["low"] < figures["ended"]["value"] <= figures["ended"]["high"] <= 1


def _probe_digest(teacher: Teacher) -> str:
    return next(str(r["prompt_sha256"]) for r in teacher.requests if r["max_tokens"] == 8)


def test_a_check_without_probe_never_calls_the_teacher(
    client: httpx.Client, small: Api, teacher: Teacher
) -> None:
    answer = client.post("/v1/pipelines?check=true", json=spec(small, teacher))
    assert (answer.status_code, answer.json()["preflight"]) == (200, None)
    assert answer.json()["probe_usd"] is None
    assert teacher.invoices() == []


# What a teacher may lack


@pytest.mark.parametrize(
    ("fault", "said", "field"),
    [
        (Fault("status"), "check `teachers[0].url`, and that it is up", "teachers[0].url"),
        (Fault("redirect"), "cannot be asked", "teachers[0]"),
        (Fault("missing_logprobs"), "gave no log-probabilities", "teachers[0]"),
        (Fault("few_logprobs"), "set `signal.k: 3`", "signal.k"),
        (Fault("inflated"), "sum to", "teachers[0]"),
        (Fault("wrong_prompt_tokens"), "`teachers[0].reference`", "teachers[0].reference"),
        (
            Fault("wrong_prompt_tokens", match=PROMPTS),
            "8 of 8 prompts differ",
            "teachers[0].reference",
        ),
        (Fault("other_text", match=PROMPTS), "do not decode to its text", "teachers[0].reference"),
        (Fault("replicas", match=PROBE), "its replicas serve different weights", "teachers[0]"),
        (Fault("refusal", match=PROMPTS), "none of the spec's prompts", "teachers[0]"),
    ],
    ids=lambda value: f"{value.kind}-{value.match}" if isinstance(value, Fault) else "",
)
def test_an_unfit_teacher_is_refused_with_what_to_change(
    fault: Fault, said: str, field: str, client: httpx.Client, small: Api, teacher: Teacher
) -> None:
    teacher.script(fault)
    answer = check(client, spec(small, teacher))
    assert answer.status_code == 422, answer.text
    problem = answer.json()
    assert said in problem["detail"]
    assert [error["field"] for error in problem["errors"]] == [field]
    assert sum(charge.microusd for charge in charges(small)) >= teacher.invoiced_microusd()


@pytest.mark.parametrize(
    ("fault", "topic", "said"),
    [
        (Fault("tempered"), "raw_logprobs", "they follow temperature"),
        (Fault("nucleus"), "raw_logprobs", "they follow top_p"),
        (Fault("status", match="number 1"), "answers", "of 8 prompts"),
        (Fault("wrong_prompt_tokens", match="number 1"), "tokenizer", "of 8 prompts have as many"),
        (Fault("other_text", match="number 1"), "token_ids", "of 8 answers decode to their"),
    ],
    ids=lambda value: value.kind if isinstance(value, Fault) else "",
)
def test_what_is_not_fatal_is_a_warning(
    fault: Fault,
    topic: str,
    said: str,
    client: httpx.Client,
    small: Api,
    teacher: Teacher,
) -> None:
    teacher.script(fault)
    found = findings(check(client, spec(small, teacher)))
    assert found[topic]["verdict"] == "warning"
    assert said in found[topic]["value"]
    others = {t: f["verdict"] for t, f in found.items() if t != topic}
    assert set(others.values()) == {"ok"}


def test_a_depth_that_is_refused_is_found_by_asking_for_fewer(
    client: httpx.Client, small: Api, tmp_path: Path
) -> None:
    with running_teacher(tmp_path / "few.jsonl", most_logprobs=5) as teacher:
        signal = {"kind": "topk", "k": 30, "max_tokens": 128}
        answer = check(client, spec(small, teacher, signal=signal))
        assert answer.status_code == 422
        assert "set `signal.k: 5`" in answer.json()["detail"]
        assert "top_logprobs must be at most 5" in answer.json()["detail"]
        # 30, 20 and 5 were asked for; the prompts were not.
        assert len(teacher.invoices()) == 1


def test_a_teacher_without_any_log_probabilities_does_for_text(
    client: httpx.Client, small: Api, teacher: Teacher
) -> None:
    teacher.script(Fault("missing_logprobs"), Fault("wrong_prompt_tokens"))
    text = {"signal": {"kind": "text", "max_tokens": 128}, "training": {"loss": "sft"}}
    answer = check(client, spec(small, teacher, **text))
    found = findings(answer)
    assert found["signal"]["value"] == "text"
    assert found["tokenizer"]["verdict"] == "ok"
    assert answer.json()["preflight"]["teachers"][0]["answered"] == 8


def test_a_text_pipeline_hears_what_else_its_teacher_would_give(
    client: httpx.Client, small: Api, teacher: Teacher
) -> None:
    text = {"signal": {"kind": "text", "max_tokens": 128}, "training": {"loss": "sft"}}
    found = findings(check(client, spec(small, teacher, **text)))
    assert "would also give topk, 20 log-probabilities" in found["signal"]["value"]
    assert "agreement" not in found


def test_auto_is_checked_with_the_signal_that_it_would_get(
    client: httpx.Client, small: Api, tmp_path: Path
) -> None:
    with running_teacher(tmp_path / "few.jsonl", most_logprobs=5) as teacher:
        auto = {"kind": "auto", "k": 30, "max_tokens": 128}
        found = findings(check(client, spec(small, teacher, signal=auto)))
        assert found["signal"]["value"] == "topk, 5 log-probabilities a token"
        assert {r["top_logprobs"] for r in teacher.requests if r["max_tokens"] == 128} == {5}
        teacher.script(Fault("missing_logprobs"))
        answer = check(client, spec(small, teacher, signal=auto))
        assert answer.status_code == 422
        assert "use `training.loss: sft`" in answer.json()["detail"]


def test_a_setting_that_the_teacher_refuses_leaves_it_open_whether_they_are_raw(
    client: httpx.Client, small: Api, tmp_path: Path
) -> None:
    with running_teacher(tmp_path / "strict.jsonl", refuses=("temperature",)) as teacher:
        found = findings(check(client, spec(small, teacher)))
    assert (found["raw_logprobs"]["verdict"], found["raw_logprobs"]["value"]) == (
        "warning",
        "not known",
    )
    assert "'temperature' is not supported" in found["raw_logprobs"]["message"]


def test_a_teacher_of_another_api_is_asked_for_text(
    client: httpx.Client, small: Api, tmp_path: Path
) -> None:
    with running_teacher(tmp_path / "claude.jsonl", api="anthropic") as teacher:
        text = {"signal": {"kind": "text", "max_tokens": 128}, "training": {"loss": "sft"}}
        answer = check(client, spec(small, teacher, {"api": "anthropic"}, **text))
        found = findings(answer)
        assert found["signal"]["value"] == "text"
        assert found["tokenizer"]["message"] == "text may come from another tokenizer"
        assert answer.json()["preflight"]["teachers"][0]["calls"] == 9
        assert answer.json()["probe_usd"] == pytest.approx(teacher.invoiced_microusd() / 1e6)


def test_a_teacher_behind_a_batch_api_is_asked_directly_at_twice_its_price(
    client: httpx.Client, small: Api, teacher: Teacher
) -> None:
    with running_provider(teacher) as provider:
        answer = check(client, spec(small, teacher, {**HALF, "url": provider.url}))
    found = findings(answer)
    assert found["answers"]["value"] == "8 of 8 prompts answered"
    assert (found["batch_api"]["verdict"], found["batch_api"]["value"]) == (
        "ok",
        "the server has one",
    )
    assert answer.json()["probe_usd"] == pytest.approx(teacher.invoiced_microusd() / 1e6)
    assert "time" not in found


def test_a_server_without_a_batch_api_is_told_before_it_is_asked_anything(
    client: httpx.Client, small: Api, teacher: Teacher
) -> None:
    answer = check(client, spec(small, teacher, HALF))
    assert answer.status_code == 422, answer.text
    assert answer.json()["type"] == "urn:stillhouse:problem:no-batch-api"
    assert "has no batch API" in answer.json()["detail"]
    assert "remove `batch_api`" in answer.json()["detail"]
    assert [error["field"] for error in answer.json()["errors"]] == ["teachers[0].batch_api"]
    assert teacher.requests == []
    assert {charge.microusd for charge in charges(small)} == {0}


def test_a_batch_api_that_lists_nothing_is_not_taken_for_none(
    client: httpx.Client, small: Api, teacher: Teacher
) -> None:
    with running_provider(teacher, faults={"no_list"}) as provider:
        found = findings(check(client, spec(small, teacher, {**HALF, "url": provider.url})))
    assert found["batch_api"]["verdict"] == "ok"


def test_a_batch_api_that_is_not_told_of_is_a_warning(
    client: httpx.Client, small: Api, teacher: Teacher
) -> None:
    with running_provider(teacher, faults={"list_forbidden"}) as provider:
        found = findings(check(client, spec(small, teacher, {**HALF, "url": provider.url})))
    assert (found["batch_api"]["verdict"], found["batch_api"]["field"]) == (
        "warning",
        "teachers[0].batch_api",
    )
    assert "status 403" in found["batch_api"]["message"]
    assert found["answers"]["verdict"] == "ok"


# Routes that nobody is asked by


def given(api: Api, lines: list[dict[str, Any]], **parts: Any) -> dict[str, Any]:
    """A spec whose prompts carry their answers."""
    posted = posted_spec(api.files, **parts)
    file = api.files / "answered.jsonl"
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    posted["prompts"]["from"] = f"file:{file}"
    free = {"url": None, "answers": "given", "usd_per_million": {"input": 0, "output": 0}}
    posted["teachers"][0] |= free
    return posted


def answered(teacher: Teacher, count: int = 40, **body: Any) -> list[dict[str, Any]]:
    """Prompts with the completions of a teacher, as a user would have kept them."""
    lines = []
    with httpx.Client() as http:
        for number in range(count):
            prompt = f"What is the number {number}?"
            asked = {"messages": [{"role": "user", "content": prompt}], "max_tokens": 128, **body}
            url = f"{teacher.url}/chat/completions"
            answer = http.post(url, json={"model": teacher.model, **asked}).json()
            lines.append({"prompt": prompt, "answer": answer})
    return lines


def test_answers_given_along_are_judged_and_cost_nothing(
    client: httpx.Client, small: Api, teacher: Teacher
) -> None:
    lines = answered(teacher, logprobs=True, top_logprobs=5)
    before = len(teacher.requests)
    answer = check(client, given(small, lines, training={"tokens_per_step": 64}))
    found = findings(answer)
    assert found["signal"]["value"] == "topk, 5 log-probabilities a token"
    assert found["answers"]["value"] == "8 of 8 prompts with a usable answer"
    assert found["raw_logprobs"]["verdict"] == "unknown"
    assert found["cost"]["value"] == "nothing: the answers are given along"
    assert "time" not in found
    ok = ("signal", "answers", "tokenizer", "token_ids", "ends", "terms", "training")
    assert {found[topic]["verdict"] for topic in ok} == {"ok"}
    [figures] = answer.json()["preflight"]["teachers"]
    assert (figures["calls"], figures["answered"], figures["signal"]) == (0, 8, "topk")
    assert figures["completion_tokens"]["n"] == 8
    assert (answer.json()["probe_usd"], len(teacher.requests)) == (0, before)


def test_given_answers_that_cannot_teach_what_is_asked_are_refused_by_name(
    client: httpx.Client, small: Api, teacher: Teacher
) -> None:
    bare = check(client, given(small, answered(teacher)))
    assert bare.status_code == 422
    assert "gave no log-probabilities" in bare.json()["detail"]
    few = check(client, given(small, answered(teacher, logprobs=True, top_logprobs=2)))
    assert few.status_code == 422
    assert "set `signal.k: 2`" in few.json()["detail"]
    teacher.script(Fault("wrong_prompt_tokens"))
    other = check(client, given(small, answered(teacher, logprobs=True, top_logprobs=5)))
    assert other.status_code == 422
    assert "8 of 8 prompts differ" in other.json()["detail"]


def test_characters_that_are_listed_once_for_several_tokens_are_told(
    client: httpx.Client, small: Api
) -> None:
    def line(number: int, listed: list[int], text: str) -> dict[str, Any]:
        likely = [
            {"id": 48 + n, "logprob": -2.0, "token": str(n), "bytes": [48 + n]} for n in range(5)
        ]
        token = {"id": listed[-1], "logprob": -0.1, "token": text, "bytes": listed}
        logprobs = {"content": [{**token, "top_logprobs": likely}]}
        message = {"role": "assistant", "content": text}
        choice = {"index": 0, "message": message, "finish_reason": "length", "logprobs": logprobs}
        answer = {"object": "chat.completion", "choices": [choice]}
        return {"prompt": f"What is the number {number}?", "answer": answer}

    once = [line(number, [195, 169], "\u00e9") for number in range(40)]
    answer = check(client, given(small, once))
    assert answer.status_code == 422
    assert "lists a character of several tokens once" in answer.json()["detail"]
    some = [line(number, [97], "a") for number in range(0, 40, 2)]
    found = findings(check(client, given(small, once[1::2] + some)))
    assert found["token_ids"]["verdict"] == "warning"
    assert "would be rows of text" in found["token_ids"]["message"]


def test_some_given_answers_without_log_probabilities_are_warned_of(
    client: httpx.Client, small: Api, teacher: Teacher
) -> None:
    whole = answered(teacher, logprobs=True, top_logprobs=5)
    bare = answered(teacher)
    found = findings(check(client, given(small, whole[::2] + bare[1::2])))
    assert found["signal"]["verdict"] == "warning"
    assert "of 8 answers given along do not carry it" in found["signal"]["message"]
    assert found["answers"]["verdict"] == "warning"


def test_given_texts_are_counted_by_our_tokenizer(client: httpx.Client, small: Api) -> None:
    lines = [{"prompt": f"What is the number {n}?", "answer": "Twelve."} for n in range(40)]
    text = {"signal": {"kind": "text", "max_tokens": 16}, "training": {"loss": "sft"}}
    answer = check(client, given(small, lines, **text))
    found = findings(answer)
    assert (found["signal"]["value"], found["ends"]["verdict"]) == ("text", "ok")
    assert "tokenizer" not in found, "nobody counted the prompts"
    [figures] = answer.json()["preflight"]["teachers"]
    assert figures["completion_tokens"]["value"] == len("Twelve.")


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        ("counts", "counts, 50 draws a token, computed from the weights"),
        ("auto", "counts, 50 draws a token, computed from the weights"),
        ("topk", "topk, 100 log-probabilities a token, computed from the weights"),
    ],
)
def test_weights_are_not_asked_and_what_they_give_is_known(
    kind: str, said: str, client: httpx.Client, small: Api
) -> None:
    posted = posted_spec(small.files, signal={"kind": kind, "k": 100, "max_tokens": 16})
    reference = posted["teachers"][0].pop("reference")
    posted["teachers"][0] |= {"url": None, "weights": reference}
    answer = check(client, posted)
    found = findings(answer)
    assert (found["signal"]["value"], found["signal"]["verdict"]) == (said, "ok")
    assert found["raw_logprobs"]["verdict"] == "ok"
    assert (found["answers"]["verdict"], found["answers"]["value"]) == ("unknown", "not asked")
    assert {"cost", "time", "training"} & found.keys() == set()
    assert answer.json()["probe_usd"] == 0


def test_no_more_is_asked_at_once_than_the_spec_allows(
    client: httpx.Client, small: Api, tmp_path: Path
) -> None:
    with running_teacher(tmp_path / "slow.jsonl", latency=0.05) as teacher:
        limits = {"limits": {"concurrency": 2}}
        assert check(client, spec(small, teacher, limits)).status_code == 200
        assert teacher.most_at_once <= 2


def test_answers_that_are_cut_are_warned_of(
    client: httpx.Client, small: Api, teacher: Teacher
) -> None:
    short = {"kind": "topk", "k": 5, "max_tokens": 8}
    found = findings(check(client, spec(small, teacher, signal=short)))
    assert (found["ends"]["verdict"], found["ends"]["field"]) == ("warning", "signal.max_tokens")
    assert found["ends"]["value"].startswith("0 % of answers end by themselves within 8 tokens")
    assert "(0 to 32 %, n 8)" in found["ends"]["value"]


def test_a_small_budget_and_few_steps_are_warned_of(
    client: httpx.Client, small: Api, teacher: Teacher
) -> None:
    write_prompts(small.files / "prompts.jsonl", 400)
    posted = spec(
        small,
        teacher,
        budget={"teacher_usd": 0.01},
        training={"tokens_per_step": 32768, "warmup_steps": 50},
    )
    found = findings(check(client, posted))
    assert (found["cost"]["verdict"], found["cost"]["field"]) == ("warning", "budget.teacher_usd")
    assert found["training"]["verdict"] == "warning"
    assert "`training.warmup_steps: 50`" in found["training"]["message"]


def test_an_unreachable_teacher_is_told(client: httpx.Client, small: Api, teacher: Teacher) -> None:
    answer = check(client, spec(small, teacher, {"url": "http://127.0.0.1:1/v1"}))
    assert answer.status_code == 422
    assert "and that it is up" in answer.json()["detail"]


def test_each_of_several_teachers_is_asked_its_own_prompts(
    client: httpx.Client, small: Api, teacher: Teacher, tmp_path: Path
) -> None:
    with running_teacher(tmp_path / "second.jsonl") as second:
        posted = spec(small, teacher, {"weight": 2})
        other = {**posted["teachers"][0], "name": "second", "url": second.url, "weight": 1}
        posted["teachers"].append(other)
        second.script(Fault("tempered"))
        answer = check(client, posted)
        assert answer.status_code == 200, answer.text
        raw = {
            finding["teacher"]: finding["verdict"]
            for finding in answer.json()["preflight"]["findings"]
            if finding["topic"] == "raw_logprobs"
        }
        assert raw == {"local": "ok", "second": "warning"}
        first, other = answer.json()["preflight"]["teachers"]
        assert first["items"] + other["items"] == 60
        prompts = [
            {r["prompt_sha256"] for r in one.requests if r["max_tokens"] == 128}
            for one in (teacher, second)
        ]
        assert not prompts[0] & prompts[1]


# Money


def test_checks_are_paid_by_the_days_account_and_audited(
    client: httpx.Client, small: Api, teacher: Teacher
) -> None:
    answer = check(client, spec(small, teacher))
    [account] = client.get("/v1/accounts").json()["items"]
    assert account["name"] == answer.json()["preflight"]["account"]
    assert account["name"].startswith("checks-")
    assert account["cost"]["budget_usd"] == 5
    assert account["cost"]["spent_microusd"] == teacher.invoiced_microusd()
    page = client.get(f"/v1/accounts/{account['name']}/charges?limit=3").json()
    assert len(page["items"]) == 3
    whole = client.get(f"/v1/accounts/{account['name']}/charges").json()
    assert whole["totals_microusd"] == {"probe": teacher.invoiced_microusd()}
    second = client.get(f"/v1/accounts/{account['name']}/charges?after={page['next']}").json()
    assert page["items"] + second["items"] == whole["items"]
    with reading(small.engine) as session:
        [audit] = session.scalars(select(Audit).where(Audit.action == "teacher.probed"))
        assert session.scalars(select(Pipeline)).all() == []
    micro = teacher.invoiced_microusd()
    assert (audit.target, audit.detail) == (teacher.url, f"{micro} micro-USD")


def test_another_tenants_account_is_not_there(client: httpx.Client) -> None:
    answer = client.get("/v1/accounts/checks-2026-01-01/charges")
    assert (answer.status_code, answer.json()["detail"]) == (404, "there is no such account")
    assert client.get("/v1/accounts").json() == {"items": [], "next": None}


def test_a_spent_day_refuses_before_anything_is_asked(
    tmp_path: Path, store: ObjectStore, tenant: str, teacher: Teacher
) -> None:
    with (
        gateway_api(tmp_path, store, tenant, CHECK_USD_PER_DAY="0.0001") as poor,
        serving(poor.app) as url,
        httpx.Client(base_url=url, headers=poor.headers()) as client,
    ):
        answer = check(client, spec(poor, teacher))
        assert answer.status_code == 402, answer.text
        assert "TEACHER_GATEWAY_CHECK_USD_PER_DAY" in answer.json()["detail"]
        assert answer.json()["type"] == "urn:stillhouse:problem:check-budget"
    assert teacher.requests == []


@pytest.mark.parametrize(
    ("crash_at", "asked"), [("check_booked", 0), ("question_answered:9", 9)], ids=["none", "nine"]
)
def test_a_kill_in_the_middle_of_a_check_leaves_its_charges_listed(
    crash_at: str,
    asked: int,
    small: Api,
    teacher: Teacher,
    tmp_path: Path,
    store_part: Store,
    tenant: str,
) -> None:
    posted = spec(small, teacher, {"limits": {"concurrency": 1}})
    assert check_in_process(tmp_path, store_part, tenant, posted, crash_at=crash_at) == 137
    assert len(teacher.invoices()) == asked
    booked = charges(small)
    # What was answered and booked is exact; all the rest is listed at its worst case.
    known = max(asked - 1, 0)
    kinds = sorted(charge.kind for charge in booked)
    assert kinds == ["probe"] * known + ["unknown"] * (15 - known)
    assert sum(charge.microusd for charge in booked) >= teacher.invoiced_microusd()
    with reading(small.engine) as session:
        [account] = session.scalars(select(Account))
    assert account.spent_microusd == sum(charge.microusd for charge in booked)
    assert account.reserved_microusd == 0


def test_many_checks_at_once_never_spend_more_than_the_day_allows(
    tmp_path: Path, store: ObjectStore, tenant: str, teacher: Teacher
) -> None:
    """Each at a replica of its own, since one would refuse the second."""
    with (
        gateway_api(tmp_path, store, tenant, CHECK_USD_PER_DAY="0.01") as poor,
        contextlib.ExitStack() as stack,
    ):
        posted = spec(poor, teacher)
        replicas = [
            httpx.Client(base_url=stack.enter_context(serving(poor.app)), headers=poor.headers())
            for _ in range(6)
        ]
        with ThreadPoolExecutor(6) as pool:
            statuses = [a.status_code for a in pool.map(lambda one: check(one, posted), replicas)]
        for replica in replicas:
            replica.close()
        with reading(poor.engine) as session:
            [account] = session.scalars(select(Account))
        assert set(statuses) <= {200, 402, 503}
        assert 200 in statuses
        assert account.spent_microusd == teacher.invoiced_microusd() <= 10_000


def test_a_check_that_may_cost_more_than_the_specs_budget_is_refused_before_it_asks(
    client: httpx.Client, small: Api, teacher: Teacher
) -> None:
    dear = {"usd_per_million": {"input": 100, "output": 100}}
    answer = check(client, spec(small, teacher, dear, budget={"teacher_usd": 0.05}))
    assert answer.status_code == 402, answer.text
    assert answer.json()["type"] == "urn:stillhouse:problem:check-budget"
    [error] = answer.json()["errors"]
    assert error["field"] == "budget.teacher_usd"
    told = re.search(r"may cost (0\.\d{6}) USD, more than .* \(0\.050000 USD\)", error["message"])
    assert told, error
    assert (teacher.requests, charges(small)) == ([], [])
    # What it says is enough.
    enough = {"teacher_usd": float(told[1])}
    assert check(client, spec(small, teacher, dear, budget=enough)).status_code == 200
    assert 0 < sum(charge.microusd for charge in charges(small)) <= float(told[1]) * 1e6


# What is known without asking


@pytest.mark.parametrize("probe", ["", "&probe=true"], ids=["unasked", "probe"])
@pytest.mark.parametrize("kind", ["topk", "auto"])
def test_a_budget_below_the_first_questions_is_refused_in_the_words_of_the_pipeline(
    kind: str, probe: str, client: httpx.Client, small: Api, teacher: Teacher
) -> None:
    signal = {"kind": kind, "k": 30, "max_tokens": 16}
    posted = spec(small, teacher, signal=signal, budget={"teacher_usd": 0.000187})
    answer = client.post(f"/v1/pipelines?check=true{probe}", json=posted, timeout=60)
    assert answer.status_code == 422, answer.text
    assert [error["field"] for error in answer.json()["errors"]] == ["budget.teacher_usd"]
    told = answer.json()["detail"]
    pipeline_id = submit(small, posted)
    accept_pipeline(small.context(), pipeline_id)
    probe_teacher(small.context(), pipeline_id)
    assert pipeline(small, pipeline_id).reason.endswith(f"budget_exhausted: {told}")
    dollars = re.search(r"\((0\.\d{6}) USD at the worst\)", told)
    assert dollars, told
    assert teacher.requests == []
    # What it says is enough.
    posted["budget"]["teacher_usd"] = float(dollars[1])
    assert client.post("/v1/pipelines?check=true", json=posted).status_code == 200
    if kind == "topk":
        pipeline_id = submit(small, posted)
        accept_pipeline(small.context(), pipeline_id)
        probe_teacher(small.context(), pipeline_id)
        assert pipeline(small, pipeline_id).state == "running"


@pytest.mark.parametrize("probe", ["", "&probe=true"], ids=["unasked", "probe"])
def test_given_answers_that_auto_takes_as_text_are_refused_for_a_loss_that_needs_more(
    probe: str, client: httpx.Client, small: Api
) -> None:
    lines = [{"prompt": f"What is the number {n}?", "answer": "Twelve."} for n in range(40)]
    posted = given(small, lines, signal={"kind": "auto", "k": 5, "max_tokens": 16})
    answer = client.post(f"/v1/pipelines?check=true{probe}", json=posted, timeout=60)
    assert answer.status_code == 422, answer.text
    told = answer.json()["detail"]
    assert [error["field"] for error in answer.json()["errors"]] == ["training.loss"]
    pipeline_id = submit(small, posted)
    accept_pipeline(small.context(), pipeline_id)
    assert pipeline(small, pipeline_id).reason == f"missing_logprobs: {told}"
    assert "use `training.loss: sft`, or `signal.kind: topk` where the answers carry" in told
    assert "server" not in told, "nobody is asked"
    sft = posted | {"training": {"loss": "sft"}}
    assert client.post("/v1/pipelines?check=true", json=sft).status_code == 200


# Turns


def test_a_slow_teacher_holds_up_no_other_request_and_one_check_of_its_tenant(
    small: Api,
) -> None:
    others = [_other_tenant(small, f"other-{number}") for number in range(MOST)]

    async def ask(teacher: HeldTeacher) -> None:
        # One thread for everything else: whoever took it would be noticed.
        current_default_thread_limiter().total_tokens = 1
        posted = posted_spec(small.files)
        posted["teachers"][0]["url"] = teacher.url
        url = "/v1/pipelines?check=true&probe=true"
        async with asgi_client(small) as client, asyncio.TaskGroup() as tasks:

            async def checks(headers: dict[str, str]) -> httpx.Response:
                return await client.post(url, json=posted, headers=headers)

            async def refused(headers: dict[str, str], said: str) -> None:
                answer = await checks(headers)
                assert answer.status_code == 429, answer.text
                assert int(answer.headers["Retry-After"]) > 0
                assert said in answer.json()["detail"]

            try:
                async with asyncio.timeout(60):
                    held = [tasks.create_task(checks({}))]
                    await _asked(teacher, 1)
                    await refused({}, "a check of this tenant is asking teachers already")
                    for number, headers in enumerate(others[:-1], 2):
                        held.append(tasks.create_task(checks(headers)))
                        await _asked(teacher, number)
                    await refused(others[-1], f"{MOST} checks of other tenants")
                    assert (await client.get("/v1/pipelines")).status_code == 200
                    unasked = await client.post("/v1/pipelines?check=true", json=posted)
                    assert unasked.status_code == 200
            finally:
                teacher.go.set()
            answers = [await task for task in held]
            assert [a.status_code for a in answers] == [422] * MOST  # no log-probabilities
            # Whose check has ended may ask again.
            assert (await checks({})).status_code == 422

    with held_teacher() as teacher:
        asyncio.run(ask(teacher))


def test_checks_that_wait_for_their_turn_to_read_prompts_hold_up_no_other_request(
    small: Api, monkeypatch: pytest.MonkeyPatch
) -> None:
    waiting, go = threading.Event(), threading.Event()

    class Busy:
        def acquire(self, **_: float) -> bool:
            waiting.set()
            return go.wait(120)

        def release(self) -> None:
            pass

    monkeypatch.setattr(admission, "_surveys", Busy())

    async def ask() -> None:
        current_default_thread_limiter().total_tokens = 1
        async with asgi_client(small) as client, asyncio.TaskGroup() as tasks:
            url = "/v1/pipelines?check=true"
            check = tasks.create_task(client.post(url, json=posted_spec(small.files)))
            try:
                async with asyncio.timeout(60):
                    while not waiting.is_set():  # noqa: ASYNC110 (it is on another thread)
                        await asyncio.sleep(0.01)
                    assert (await client.get("/v1/pipelines")).status_code == 200
                assert not check.done()
            finally:
                go.set()
            assert (await check).status_code == 200

    asyncio.run(ask())


def _other_tenant(api: Api, name: str) -> dict[str, str]:
    key = create_key(api.engine, api.gateway.settings.key_pepper, name)
    return {"Authorization": f"Bearer {key}"}


async def _asked(teacher: HeldTeacher, times: int) -> None:
    while len(teacher.seen) < times:  # noqa: ASYNC110 (it is on another thread)
        await asyncio.sleep(0.01)
