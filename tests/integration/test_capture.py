"""The capture endpoint as its users meet it: OpenAI's own SDK against the billing teacher."""

from __future__ import annotations

import dataclasses
import json
import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
import structlog
from aiohttp import web

from services.teacher_gateway.keys import create_key
from stillhouse.chassis.storage import ObjectStore
from tests.support.capture import (
    captured,
    capturing,
    lines,
    money,
    register,
    registration,
    upstream,
    wait_for_records,
)
from tests.support.gateway_api import Api, gateway_api
from tests.support.teacher import Fault, Teacher, running_teacher

CANARY = "the-canary-sings"


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Teacher]:
    log = tmp_path_factory.mktemp("teacher") / "invoices.jsonl"
    with running_teacher(log, api_key="upstream-key") as found:
        yield found


@pytest.fixture(scope="module")
def shared(
    tmp_path_factory: pytest.TempPathFactory, store: ObjectStore
) -> Iterator[tuple[Api, str]]:
    """One API for all tests here; each has a tenant of its own."""
    with (
        gateway_api(
            tmp_path_factory.mktemp("api"), store, "operator", SECRET_HOSTS="UPSTREAM_KEY@*"
        ) as api,
        capturing(api, environ={"UPSTREAM_KEY": "upstream-key"}) as address,
    ):
        yield api, address


@pytest.fixture
def api(shared: tuple[Api, str], tenant: str, teacher: Teacher) -> Api:
    """The API as a tenant sees it who has registered the teacher as `fast`."""
    common, address = shared
    key = create_key(common.engine, common.gateway.settings.key_pepper, tenant)
    api = dataclasses.replace(common, tenant=tenant, key=key)
    teacher.forgive()
    os.environ["UPSTREAM_KEY"] = "upstream-key"
    try:
        register(api, address, "fast", **registration(teacher.url, api_key={"env": "UPSTREAM_KEY"}))
    finally:
        del os.environ["UPSTREAM_KEY"]
    return api


@pytest.fixture
def address(shared: tuple[Api, str]) -> str:
    return shared[1]


@pytest.fixture
def client(api: Api, address: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{address}/v1", api_key=api.key, max_retries=0) as found:
        yield found


def ask(client: openai.OpenAI, text: str = "Say something.", **more: Any) -> Any:
    return client.chat.completions.create(
        model="fast", messages=[{"role": "user", "content": text}], max_tokens=24, **more
    )


def test_the_sdk_gets_the_teachers_answer_and_it_is_recorded_once(
    api: Api, address: str, client: openai.OpenAI, teacher: Teacher, store: ObjectStore
) -> None:
    before = teacher.invoiced_microusd()
    answer = ask(client, metadata={"app": "support"}, store=True, logprobs=True, top_logprobs=3)
    assert answer.choices[0].message.content
    assert len(answer.choices[0].logprobs.content[0].top_logprobs) == 3
    assert answer.model == teacher.model
    assert teacher.requests[-1]["authorization"]
    assert {"metadata", "store"} & set(teacher.requests[-1]["fields"]) == set()

    found = wait_for_records(api, address, 1)
    assert found["tags"] == {"app": {"support": 1}}
    (line,) = lines(api.engine, store, api.tenant)
    assert line["answer"] == json.loads(answer.model_dump_json(exclude_unset=True))
    assert line["request"]["messages"] == [{"role": "user", "content": "Say something."}]
    assert line["request"]["model"] == "fast"
    assert line["tags"] == {"app": "support"}
    spent = money(api.engine, api.tenant, "fast")
    assert spent.of("answers") == teacher.invoiced_microusd() - before > 0
    assert spent.spent == line["microusd"] == spent.of("answers")


@pytest.mark.parametrize("asked", [False, True], ids=["usage not asked for", "usage asked for"])
def test_the_sdk_streams_an_answer_which_is_put_together_in_its_record(
    api: Api,
    address: str,
    client: openai.OpenAI,
    teacher: Teacher,
    store: ObjectStore,
    asked: bool,
) -> None:
    before = teacher.invoiced_microusd()
    more: dict[str, Any] = {"stream_options": {"include_usage": True}} if asked else {}
    chunks = list(ask(client, "Stream it.", stream=True, logprobs=True, **more))
    text = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
    assert text
    assert [bool(chunk.choices) for chunk in chunks].count(False) == asked
    assert (chunks[-1].usage is not None) == asked

    wait_for_records(api, address, 1)
    (line,) = lines(api.engine, store, api.tenant)
    choice = line["answer"]["choices"][0]
    assert line["streamed"]
    assert line["answer"]["object"] == "chat.completion"
    assert choice["message"]["content"] == text
    ended = [c.choices[0].finish_reason for c in chunks if c.choices]
    assert choice["finish_reason"] == ended[-1] is not None
    assert len(choice["logprobs"]["content"]) == line["answer"]["usage"]["completion_tokens"]
    assert money(api.engine, api.tenant, "fast").spent == teacher.invoiced_microusd() - before


@pytest.mark.parametrize("kind", ["tool_call", "reasoning"])
def test_calls_of_tools_and_reasoning_survive_a_stream(
    api: Api,
    address: str,
    client: openai.OpenAI,
    teacher: Teacher,
    store: ObjectStore,
    kind: Any,
) -> None:
    teacher.script(Fault(kind))
    function = {"name": "look_up", "parameters": {"type": "object"}}
    tools = [{"type": "function", "function": function}]
    list(ask(client, "Use it.", stream=True, tools=tools))
    whole = ask(client, "Use it.", tools=tools)
    wait_for_records(api, address, 2)
    messages = [
        line["answer"]["choices"][0]["message"] for line in lines(api.engine, store, api.tenant)
    ]
    said = json.loads(whole.choices[0].message.model_dump_json(exclude_unset=True))
    assert messages == [said, said]


def test_the_sdk_lists_models_and_asks_for_one(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["fast"]
    assert client.models.retrieve("fast").id == "fast"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("other")


def test_errors_are_those_of_the_sdk(
    api: Api, address: str, client: openai.OpenAI, teacher: Teacher
) -> None:
    with pytest.raises(openai.NotFoundError, match="no registered teacher 'other'"):
        client.chat.completions.create(model="other", messages=[{"role": "user", "content": "x"}])
    wrong = f"{api.key[:-4]}{'0' * 4}"
    for key in (wrong, "sk-else", "' OR '1'='1"):
        with pytest.raises(openai.AuthenticationError):
            ask(openai.OpenAI(base_url=f"{address}/v1", api_key=key, max_retries=0))
    with pytest.raises(openai.BadRequestError, match="max_tokens"):
        client.chat.completions.create(model="fast", messages=[], max_tokens=-1)
    with pytest.raises(openai.BadRequestError, match="at most 16 tags"):
        ask(client, metadata={f"tag{n}": "x" for n in range(17)})

    teacher.script(Fault("rate_limited", match="[limited]", retry_after=7))
    with pytest.raises(openai.RateLimitError) as limited:
        ask(client, "[limited]")
    assert limited.value.response.headers["Retry-After"] == "7"
    assert limited.value.code == "rate_limit_exceeded"
    teacher.script(Fault("status", match="[broken]", status=503))
    with pytest.raises(openai.InternalServerError, match="had an error"):
        ask(client, "[broken]")
    with pytest.raises(openai.BadRequestError, match="top_logprobs"):
        ask(client, logprobs=True, top_logprobs=65)
    found = wait_for_records(api, address, 0, failures=3)
    assert found["reasons"] == {
        "refused_by_teacher": 1,
        "teacher_error": 1,
        "teacher_rate_limited": 1,
    }
    assert money(api.engine, api.tenant, "fast").spent == 0


def test_the_operators_wrong_key_is_not_the_callers(address: str, api: Api) -> None:
    async def refuse(_: web.Request) -> web.Response:
        return web.json_response(
            {"error": {"message": "Incorrect API key: sk-...1234"}}, status=401
        )

    with (
        upstream(refuse) as url,
        openai.OpenAI(base_url=f"{address}/v1", api_key=api.key, max_retries=0) as client,
    ):
        register(api, address, "fast", **registration(url))
        with pytest.raises(openai.InternalServerError, match="operator should check") as found:
            ask(client)
    assert "1234" not in str(found.value)


def test_the_operators_key_does_not_reach_a_caller_by_an_error(
    client: openai.OpenAI, teacher: Teacher
) -> None:
    teacher.script(Fault("echoes_key", match="[echo]"))
    with pytest.raises(openai.BadRequestError) as error:
        ask(client, "[echo] Hello")
    assert "no such plan for [key]" in str(error.value)
    assert "upstream-key" not in str(error.value)


def test_a_retry_of_the_sdk_is_a_call_of_its_own(api: Api, address: str, teacher: Teacher) -> None:
    teacher.script(Fault("status", match="[twice]", attempts=(1,)))
    with openai.OpenAI(base_url=f"{address}/v1", api_key=api.key, max_retries=1) as client:
        assert ask(client, "[twice]").choices[0].message.content
    wait_for_records(api, address, 1, failures=1)


def test_nobody_calls_another_tenants_teacher(
    api: Api, address: str, shared: tuple[Api, str]
) -> None:
    other = openai.OpenAI(base_url=f"{address}/v1", api_key=shared[0].key, max_retries=0)
    with pytest.raises(openai.NotFoundError):
        ask(other)
    assert list(other.models.list()) == []
    assert captured(shared[0], address)["records"] == 0


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"Host": "evil.example"}, 400),
        ({"Host": "localhost/x?"}, 400),
        ({"Content-Encoding": "gzip"}, 415),
        ({"Authorization": ""}, 401),
    ],
)
def test_what_is_wrong_about_a_request_is_told_in_openais_form(
    api: Api, address: str, headers: dict[str, str], status: int
) -> None:
    answer = httpx.post(
        f"{address}/v1/chat/completions",
        json={"model": "fast", "messages": []},
        headers={**api.headers(), **headers},
    )
    assert answer.status_code == status
    assert set(answer.json()["error"]) == {"message", "type", "param", "code"}


@pytest.mark.parametrize(
    "body",
    [
        b"", b"no json", b"[]", b'{"messages": []}', b'{"model": 7}', b'{"model": "fast", "n": 0}',
        b'{"model": "fast", "x": "\xff"}', b'{"model": "\\ud800"}', b'{"model": "a\\u0000b"}',
        b'{"model": "fast", "metadata": {"a": 1}}', b'{"model": "fast", "stream": "yes"}',
        b'{"model": "fast", "max_tokens": 99999999999999999999}',
        b'{"model": "fast", "x": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
    ],
)  # fmt: skip
def test_a_body_that_cannot_be_used_is_refused_and_never_a_500(
    api: Api, address: str, body: bytes
) -> None:
    answer = httpx.post(f"{address}/v1/chat/completions", content=body, headers=api.headers())
    assert answer.status_code in (400, 402, 404), answer.text
    assert answer.json()["error"]["message"]


def test_of_two_equal_keys_the_teacher_sees_the_one_that_was_judged(
    api: Api, address: str, teacher: Teacher
) -> None:
    body = b'{"model": "other", "model": "fast", "max_tokens": 999, "max_tokens": 5, '
    body += b'"messages": [{"role": "user", "content": "Twice."}]}'
    answer = httpx.post(f"{address}/v1/chat/completions", content=body, headers=api.headers())
    assert answer.status_code == 200
    assert teacher.requests[-1]["max_tokens"] == 5


def test_a_body_beyond_the_limit_is_refused_announced_or_not(api: Api, address: str) -> None:
    big = api.gateway.settings.capture_max_body_bytes + 1

    def pieces() -> Iterator[bytes]:
        for _ in range(big // 65_536 + 1):
            yield b"a" * 65_536

    for body in (b"a" * big, pieces()):
        answer = httpx.post(f"{address}/v1/chat/completions", content=body, headers=api.headers())
        assert (answer.status_code, answer.json()["error"]["code"]) == (413, "too_large")


def test_a_legacy_completion_is_passed_on_and_recorded_as_none_of_a_chat(
    api: Api, address: str, store: ObjectStore
) -> None:
    async def complete(request: web.Request) -> web.Response:
        body = await request.json()
        choice = {"index": 0, "text": body["prompt"] + "!", "finish_reason": "stop"}
        usage = {"prompt_tokens": 2, "completion_tokens": 1}
        return web.json_response({"id": "c", "choices": [choice], "usage": usage})

    with upstream(complete, "/v1/completions") as url:
        register(api, address, "legacy", **registration(url))
        with openai.OpenAI(base_url=f"{address}/v1", api_key=api.key, max_retries=0) as client:
            answer = client.completions.create(model="legacy", prompt="Hello")
    assert answer.choices[0].text == "Hello!"
    wait_for_records(api, address, 1)
    (line,) = lines(api.engine, store, api.tenant)
    assert line["kind"] == "text"


def test_no_text_of_a_prompt_or_an_answer_is_logged_or_shown(
    api: Api, address: str, client: openai.OpenAI, teacher: Teacher, caplog: Any
) -> None:
    structlog.configure(logger_factory=structlog.stdlib.LoggerFactory())
    try:
        with caplog.at_level(logging.DEBUG):
            teacher.script(Fault("no_done", match="[half]"), Fault("invalid_json", match="[bad]"))
            ask(client, CANARY)
            with pytest.raises(openai.APIError):
                list(ask(client, f"[half] {CANARY}", stream=True))
            with pytest.raises(openai.APIError):
                ask(client, f"[bad] {CANARY}")
            seen = wait_for_records(api, address, 1, failures=2)
    finally:
        structlog.reset_defaults()
    own = [r.getMessage() for r in caplog.records if not r.name.startswith(("openai", "httpcore"))]
    assert CANARY not in json.dumps(seen) + "\n".join(own)


def test_a_changed_registration_holds_at_once_and_a_removed_one_too(
    api: Api, address: str, client: openai.OpenAI, teacher: Teacher, tmp_path: Path
) -> None:
    with running_teacher(tmp_path / "other.jsonl", model="other-model") as other:
        register(api, address, "fast", **registration(other.url, model="other-model"))
        assert ask(client).model == "other-model"
        assert "UPSTREAM_KEY" not in json.dumps(other.requests)
        assert not other.requests[-1]["authorization"], "the key stays with its host"
        gone = httpx.delete(f"{address}/v1/teachers/fast", headers=api.headers())
        assert gone.status_code == 204
        with pytest.raises(openai.NotFoundError):
            ask(client)
    assert httpx.delete(f"{address}/v1/teachers/fast", headers=api.headers()).status_code == 404
