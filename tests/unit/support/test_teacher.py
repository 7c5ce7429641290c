"""The billing teacher is the oracle of other tests, so it is tested itself."""

from __future__ import annotations

import asyncio
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import aiohttp
import httpx
import numpy as np
import pytest

from stillhouse.contracts import signals
from stillhouse.contracts.chat import Message
from tests.support.teacher import (
    MODEL,
    Fault,
    Language,
    Prices,
    Teacher,
    read_invoices,
    running_teacher,
    teacher_process,
)
from tests.support.tiny_tokenizer import (
    END_ID,
    read_folder,
    tiny_chat_tokenizer,
    write_folder,
)


@pytest.fixture
def teacher(tmp_path: Path) -> Iterator[Teacher]:
    with running_teacher(tmp_path / "invoices.jsonl", prices=Prices(0.2, 0.6)) as running:
        yield running


def ask(teacher: Teacher, content: str, **more: Any) -> httpx.Response:
    body = {
        "model": MODEL,
        "messages": [{"role": "user", "content": content}],
        "max_tokens": 64,
        "temperature": 1.0,
        "logprobs": True,
        "top_logprobs": 5,
        **more,
    }
    with httpx.Client(trust_env=False, timeout=5) as client:
        return client.post(f"{teacher.url}/chat/completions", json=body)


def spoken(content: str, **more: Any) -> Any:
    options = {"max_tokens": 64, "top_logprobs": 5, **more}
    language = Language(tiny_chat_tokenizer())
    return language.answer([Message(role="user", content=content)], **options)


def test_the_answer_is_what_the_language_says_beforehand(teacher: Teacher) -> None:
    answer = ask(teacher, "hello [item 1]", seed=4).json()
    said = spoken("hello [item 1]", seed=4)
    choice = answer["choices"][0]
    assert choice["message"]["content"] == said.text
    assert [entry["id"] for entry in choice["logprobs"]["content"]] == said.ids
    assert answer["usage"]["completion_tokens"] == len(said.ids)
    assert ask(teacher, "hello [item 1]", seed=5).json()["choices"][0] != choice


def test_answers_decode_from_their_ids_and_end_by_stop_or_length(teacher: Teacher) -> None:
    chat = tiny_chat_tokenizer()
    finishes = set()
    for number in range(12):
        choice = ask(teacher, f"question {number}", max_tokens=24).json()["choices"][0]
        ids = [entry["id"] for entry in choice["logprobs"]["content"]]
        stopped = choice["finish_reason"] == "stop"
        assert (ids[-1] == END_ID) == stopped
        assert chat.decode(ids[:-1] if stopped else ids) == choice["message"]["content"]
        finishes.add(choice["finish_reason"])
    assert finishes == {"stop", "length"}


def test_prompt_tokens_are_our_rendering(teacher: Teacher) -> None:
    messages = [
        {"role": "system", "content": "Be short."},
        {"role": "user", "content": "Gr\u00fc\u00dfe"},
    ]
    answer = ask(teacher, "", messages=messages).json()
    chat = tiny_chat_tokenizer()
    ids = chat.encode_prompt([Message.model_validate(message) for message in messages])
    assert answer["usage"]["prompt_tokens"] == len(ids)
    assert chat.decode(ids).startswith("<|im_start|>system\nBe short.<|im_end|>\n")


def test_log_probabilities_are_one_distribution() -> None:
    language = Language(tiny_chat_tokenizer())
    for last, position in ((None, 0), (65, 3), (97, 20)):
        mass = language.probabilities(last, position)
        assert mass.sum() == pytest.approx(1)
        assert mass.min() > 0
    said = spoken("anything", top_logprobs=20)
    outside = 0
    for entry in said.positions:
        listed = [math.exp(outcome["logprob"]) for outcome in entry["top_logprobs"]]
        assert listed == sorted(listed, reverse=True)
        assert sum(listed) < 1
        assert len({outcome["id"] for outcome in entry["top_logprobs"]}) == 20
        outside += entry["id"] not in {outcome["id"] for outcome in entry["top_logprobs"]}
    rows = [{o["id"]: o["logprob"] for o in entry["top_logprobs"]} for entry in said.positions]
    kept = signals.from_outcomes(rows, 20)
    assert np.exp(kept.logp).sum(1) + np.exp(kept.tail) == pytest.approx(1)
    assert outside < len(said.positions)


def test_some_sampled_tokens_are_outside_the_list() -> None:
    outside = [
        entry
        for number in range(20)
        for entry in spoken(f"prompt {number}", top_logprobs=5).positions
        if entry["id"] not in {outcome["id"] for outcome in entry["top_logprobs"]}
    ]
    assert outside


def test_every_billed_call_is_one_line_of_the_invoice(teacher: Teacher) -> None:
    usage = [ask(teacher, f"[item {n}] go").json()["usage"] for n in range(3)]
    lines = teacher.invoices()
    assert [line.marker for line in lines] == ["item 0", "item 1", "item 2"]
    assert [line.attempt for line in lines] == [1, 1, 1]
    for line, used in zip(lines, usage, strict=True):
        cost = 0.2 * used["prompt_tokens"] + 0.6 * used["completion_tokens"]
        assert line.microusd == math.ceil(round(cost, 6))
    assert teacher.invoiced_microusd() == sum(line.microusd for line in lines)


def test_prices_round_up_and_not_by_accident() -> None:
    assert Prices(0.1, 0.0).microusd(30, 0) == 3
    assert Prices(0.1, 0.0).microusd(31, 0) == 4
    assert Prices(0.0, 0.0).microusd(31, 10) == 0


def test_faults_follow_the_script_by_conversation_and_attempt(teacher: Teacher) -> None:
    teacher.script(
        Fault("rate_limited", match="[item 1]", attempts=(1,), retry_after=2),
        Fault("status", match="[item 1]", attempts=(2,), status=503),
    )
    first, second, third = (ask(teacher, "[item 1] go") for _ in range(3))
    assert (first.status_code, first.headers["Retry-After"]) == (429, "2")
    assert second.status_code == 503
    assert third.status_code == 200
    assert ask(teacher, "[item 2] go").status_code == 200
    assert [(line.marker, line.attempt) for line in teacher.invoices()] == [
        ("item 1", 3),
        ("item 2", 1),
    ]


def test_a_fault_may_be_meant_by_the_digest_of_its_conversation(teacher: Teacher) -> None:
    ask(teacher, "[item 7] go")
    teacher.script(Fault("status", match=str(teacher.requests[0]["prompt_sha256"])[:16]))
    assert ask(teacher, "[item 7] go").status_code == 500
    assert ask(teacher, "[item 8] go").status_code == 200


@pytest.mark.parametrize(
    ("kind", "seen"),
    [
        ("wrong_schema", lambda r: "choices" not in r.json()),
        ("empty_choices", lambda r: r.json()["choices"] == []),
        ("null_content", lambda r: r.json()["choices"][0]["message"]["content"] is None),
        ("content_filter", lambda r: r.json()["choices"][0]["finish_reason"] == "content_filter"),
        ("missing_logprobs", lambda r: "logprobs" not in r.json()["choices"][0]),
        (
            "missing_ids",
            lambda r: "id" not in r.json()["choices"][0]["logprobs"]["content"][0],
        ),
        ("missing_usage", lambda r: "usage" not in r.json()),
        (
            "wrong_usage",
            lambda r: r.json()["usage"]["completion_tokens"] >= 10,
        ),
        (
            "wrong_prompt_tokens",
            lambda r: r.json()["usage"]["prompt_tokens"] == spoken("go").prompt_tokens + 3,
        ),
        (
            "inflated",
            lambda r: (
                sum(
                    math.exp(o["logprob"])
                    for o in r.json()["choices"][0]["logprobs"]["content"][0]["top_logprobs"]
                )
                > 1
            ),
        ),
        (
            "other_text",
            lambda r: r.json()["choices"][0]["message"]["content"] == spoken("go").text + "!",
        ),
        ("invalid_json", lambda r: r.text.startswith("<html>")),
    ],
)
def test_lies_are_billed_answers(teacher: Teacher, kind: Any, seen: Any) -> None:
    teacher.script(Fault(kind))
    answer = ask(teacher, "go")
    assert answer.status_code == 200
    assert seen(answer)
    assert [line.fault for line in teacher.invoices()] == [kind]
    assert teacher.invoices()[0].completion_tokens == spoken("go").completion_tokens


def test_truncated_json_is_a_whole_reply_that_does_not_parse(teacher: Teacher) -> None:
    teacher.script(Fault("truncated_json"))
    with pytest.raises(json.JSONDecodeError):
        ask(teacher, "go").json()


@pytest.mark.parametrize("kind", ["cut_reply", "closed"])
def test_a_cut_connection_is_an_error_of_the_transport(teacher: Teacher, kind: Any) -> None:
    teacher.script(Fault(kind))
    with pytest.raises(httpx.TransportError):
        ask(teacher, "go")
    assert len(teacher.invoices()) == 1


@pytest.mark.parametrize("kind", ["never_answers", "slow_drip"])
def test_a_stalling_teacher_meets_the_callers_deadline(teacher: Teacher, kind: Any) -> None:
    teacher.script(Fault(kind, seconds=0.2))

    async def call() -> None:
        body = {"model": MODEL, "messages": [{"role": "user", "content": "go"}]}
        timeout = aiohttp.ClientTimeout(total=0.7)
        async with (
            aiohttp.ClientSession(timeout=timeout) as session,
            session.post(f"{teacher.url}/chat/completions", json=body) as reply,
        ):
            await reply.read()

    with pytest.raises(TimeoutError):
        asyncio.run(call())


def test_a_huge_body_keeps_coming(teacher: Teacher) -> None:
    teacher.script(Fault("huge_body", size=8 << 20), Fault("gzip_bomb", match="bomb"))
    assert len(ask(teacher, "go").content) > 8 << 20
    teacher.forgive()
    teacher.script(Fault("gzip_bomb", size=4 << 20))
    answer = ask(teacher, "go")
    assert int(answer.headers["Content-Length"]) < 20_000
    assert len(answer.content) == 4 << 20


def test_a_redirect_is_not_billed(teacher: Teacher) -> None:
    teacher.script(Fault("redirect"))
    answer = ask(teacher, "go")
    assert answer.status_code == 302
    assert "169.254" in answer.headers["Location"]
    assert teacher.invoices() == []


def test_bad_requests_are_refused_as_an_endpoint_does(tmp_path: Path) -> None:
    with running_teacher(tmp_path / "log", api_key="secret", most_logprobs=5) as teacher:
        assert ask(teacher, "go").status_code == 401
        with httpx.Client(
            trust_env=False, headers={"Authorization": "Bearer secret"}, base_url=teacher.url
        ) as client:

            def post(**more: Any) -> int:
                body = {"model": MODEL, "messages": [{"role": "user", "content": "x"}], **more}
                return client.post("/chat/completions", json=body).status_code

            assert client.get("/models").json()["data"][0]["id"] == MODEL
            assert post() == 200
            assert post(model="another") == 404
            assert post(logprobs=True, top_logprobs=6) == 400
            assert post(messages=[{"role": "king", "content": "x"}]) == 400


def test_vllm_names_tokens_by_text_and_bytes_or_by_id_alone(tmp_path: Path) -> None:
    with running_teacher(tmp_path / "log", api="vllm") as teacher:
        answer = ask(teacher, "go", max_tokens=64).json()
        by_id = ask(teacher, "go", max_tokens=64, return_tokens_as_token_ids=True).json()
    said = spoken("go")
    choice = answer["choices"][0]
    listed = choice["logprobs"]["content"]
    assert (answer["prompt_logprobs"], choice["message"]["reasoning"]) == (None, None)
    assert all("id" not in outcome for entry in listed for outcome in entry["top_logprobs"])
    assert [len(entry["top_logprobs"]) for entry in listed] == [5] * len(said.ids)
    for entry in listed:
        assert entry["top_logprobs"][0]["token"] == entry["token"]
        assert entry["top_logprobs"][-1]["logprob"] == -9999.0
        assert bytes(entry["bytes"]) == entry["token"].encode()
    named = [entry["token"] for entry in by_id["choices"][0]["logprobs"]["content"]]
    assert named == [f"token_id:{i}" for i in said.ids]


def test_anthropic_refuses_what_its_schema_does_not_allow(tmp_path: Path) -> None:
    user = {"role": "user", "content": "When?"}
    use = {"type": "tool_use", "id": "t1", "name": "now", "input": {}}
    result = {"type": "tool_result", "tool_use_id": "t1", "content": "noon"}
    used = {"role": "assistant", "content": [use]}
    with running_teacher(tmp_path / "log", api="anthropic", api_key="k") as teacher:
        headers = {"x-api-key": "k", "anthropic-version": "2023-06-01"}

        def post(*turns: Any, sent: dict[str, str] = headers, **more: Any) -> tuple[int, str]:
            body = {"model": MODEL, "max_tokens": 8, "messages": list(turns) or [user], **more}
            with httpx.Client(trust_env=False, timeout=5) as client:
                answer = client.post(f"{teacher.url}/messages", json=body, headers=sent)
            return answer.status_code, (answer.json().get("error") or {}).get("type", "")

        assert post() == (200, "")
        assert post(user, used, {"role": "user", "content": [result]}) == (200, "")
        assert post(sent={"x-api-key": "k"}) == (400, "invalid_request_error")
        assert post(sent={"anthropic-version": "2023-06-01"}) == (401, "authentication_error")
        assert post(model="another") == (404, "not_found_error")
        for refused in (
            [{"role": "system", "content": "x"}],
            [{"role": "assistant", "content": "x"}],
            [{"role": "user", "content": ""}],
            [user, used],
            [user, used, user],
            [user, {"role": "user", "content": [result]}],
        ):
            assert post(*refused) == (400, "invalid_request_error"), refused
        for field in ({"seed": 1}, {"n": 1}, {"temperature": 1.5}, {"max_tokens": 0}):
            assert post(**field) == (400, "invalid_request_error"), field
        assert len(teacher.invoices()) == 2


def test_answers_vary_by_attempt_on_demand(tmp_path: Path) -> None:
    with running_teacher(tmp_path / "log", vary=True) as teacher:
        texts = {ask(teacher, "go").json()["choices"][0]["message"]["content"] for _ in range(4)}
    assert len(texts) == 4
    assert spoken("go", salt="2").text in texts


def test_a_folder_of_a_tokenizer_gives_the_same_tokenizer(tmp_path: Path) -> None:
    assert read_folder(write_folder(tmp_path / "model")) == tiny_chat_tokenizer()


def test_invoices_survive_kill_9(tmp_path: Path) -> None:
    log = tmp_path / "invoices.jsonl"
    client = httpx.Client(trust_env=False, timeout=5)
    with teacher_process(log, "--latency", "0.01") as (process, url):
        faults = [{"kind": "status", "match": "[item 2]", "attempts": [1]}]
        client.post(f"{url[:-3]}/control/faults", json=faults).raise_for_status()
        statuses = [
            client.post(
                f"{url}/chat/completions",
                json={"model": MODEL, "messages": [{"role": "user", "content": f"[item {n}]"}]},
            ).status_code
            for n in range(4)
        ]
        seen = client.get(f"{url[:-3]}/control/requests").json()["requests"]
        process.kill()
    assert statuses == [200, 200, 500, 200]
    assert len(seen) == 4
    assert [line.marker for line in read_invoices(log)] == ["item 0", "item 1", "item 3"]
