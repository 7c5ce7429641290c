"""Registered teachers by REST and command line, and prompts out of what was recorded."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import httpx
import pytest

from services.teacher_gateway.accept import accept_pipeline
from services.teacher_gateway.capture.read import captured_lines, check_captured, open_captured
from services.teacher_gateway.database import now, reading
from services.teacher_gateway.keys import create_key
from services.teacher_gateway.prompts.file import PromptsRefused
from stillhouse.chassis.storage import ObjectStore
from stillhouse.cli import main as command_line
from stillhouse.contracts.spec import Captured
from tests.support.capture import (
    HTTP,
    capturing,
    completion,
    held_teacher,
    register,
    registration,
    wait_for_records,
)
from tests.support.gateway_api import Api, asgi_client, gateway_api, pipeline, posted_spec, serving
from tests.support.gateway_api import submit as submitted
from tests.support.teacher import Fault, running_teacher

URL = "http://127.0.0.1:9/v1"


@pytest.fixture
def either(tmp_path: Path, store: ObjectStore, tenant: str, database_url: str) -> Iterator[Api]:
    with gateway_api(tmp_path, store, tenant, DATABASE_URL=database_url) as found:
        yield found


@pytest.fixture
def api(tmp_path: Path, store: ObjectStore, tenant: str) -> Iterator[Api]:
    with gateway_api(tmp_path, store, tenant, SECRET_HOSTS="NOT_SET_ANYWHERE@*") as found:
        yield found


def call(api: Api, method: str, path: str, **request: Any) -> httpx.Response:
    async def ask() -> httpx.Response:
        async with asgi_client(api) as client:
            return await client.request(method, path, **request)

    return asyncio.run(ask())


def test_a_teacher_is_registered_read_changed_listed_and_removed(either: Api) -> None:
    api = either
    made = call(api, "PUT", "/v1/teachers/fast", json=registration(URL))
    assert made.status_code == 201, made.text
    found = made.json()
    assert found["verdict"]["outcome"] in ("allow", "allow_with_duties")
    assert (found["account"], found["cost"]["budget_usd"]) == ("teacher-fast", 10)
    again = call(api, "PUT", "/v1/teachers/fast", json=registration(URL, budget_usd=3, name="fast"))
    assert (again.status_code, again.json()["cost"]["budget_usd"]) == (200, 3)
    assert call(api, "GET", "/v1/teachers/fast").json() == again.json()
    assert [t["name"] for t in call(api, "GET", "/v1/teachers").json()["items"]] == ["fast"]
    charges = call(api, "GET", "/v1/accounts/teacher-fast/charges")
    assert (charges.status_code, charges.json()["items"]) == (200, [])
    assert call(api, "DELETE", "/v1/teachers/fast").status_code == 204
    assert call(api, "GET", "/v1/teachers/fast").status_code == 404
    assert call(api, "GET", "/v1/teachers").json()["items"] == []


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"terms": "openai-api"}, "openai"),
        ({"terms": "nobody-knows"}, "not in the catalogue"),
        ({"url": "http://169.254.169.254/v1"}, "never a teacher's address"),
        ({"url": "http://user:pass@127.0.0.1/v1"}, "must begin with http"),
        ({"api_key": "sk-literal"}, "found a literal"),
        ({"api_key": {"env": "NOT_SET_ANYWHERE"}}, "has no NOT_SET_ANYWHERE"),
        ({"api_key": {"env": "NOBODY_S_KEY"}}, "has not allowed NOBODY_S_KEY"),
        ({"api_key": {"env": "HF_TOKEN"}}, "never sent to a teacher"),
        ({"api_key": {"env": "TEACHER_GATEWAY_KEY_PEPPER"}}, "TEACHER_GATEWAY_KEY_PEPPER"),
        ({"url": None}, "expected one route"),
        ({"api": "anthropic"}, "callers speak that API"),
        ({"batch_api": True}, "for a pipeline's teacher"),
        ({"limits": {"requests_per_minute": 5}}, "its own 429"),
        ({"budget_usd": -1}, "greater than or equal to 0"),
        ({"budget": 1}, "did you mean `budget_usd`"),
        ({"on_disconnect": "explode"}, "'finish' or 'abort'"),
        ({"name": "slow"}, "leave `name` out"),
        ({"weights": "file:/x"}, "expected one route"),
    ],
)
def test_what_cannot_be_a_teacher_is_refused_in_a_sentence(
    api: Api, changes: dict[str, Any], said: str
) -> None:
    body = {k: v for k, v in {**registration(URL), **changes}.items() if v is not None}
    answer = call(api, "PUT", "/v1/teachers/fast", json=body)
    assert answer.status_code == 422, answer.text
    assert said in answer.json()["detail"]
    assert "sk-literal" not in answer.text
    assert call(api, "GET", "/v1/teachers").json()["items"] == []


def test_a_deployed_gateway_sends_no_key_to_a_host_that_nobody_named(
    tmp_path: Path, store: ObjectStore, tenant: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SOME_KEY", "secret")
    with gateway_api(
        tmp_path, store, tenant, PROFILE="deployed", SECRET_HOSTS="SOME_KEY@llm.example.com"
    ) as api:
        body = registration("https://evil.example/v1", api_key={"env": "SOME_KEY"})
        refused = call(api, "PUT", "/v1/teachers/fast", json=body)
        assert (refused.status_code, "SECRET_HOSTS" in refused.json()["detail"]) == (422, True)
        taken = call(
            api,
            "PUT",
            "/v1/teachers/fast",
            json={**body, "url": "https://llm.example.com/v1"},
        )
        assert taken.status_code == 201
        assert "secret" not in taken.text
        private = call(api, "PUT", "/v1/teachers/near", json=registration("http://10.0.0.1/v1"))
        assert (private.status_code, "not a public" in private.json()["detail"]) == (422, True)


def test_teachers_belong_to_their_tenant(api: Api) -> None:
    assert call(api, "PUT", "/v1/teachers/fast", json=registration(URL)).status_code == 201
    key = create_key(api.engine, api.gateway.settings.key_pepper, "someone-else")
    theirs = {"headers": {"Authorization": f"Bearer {key}"}}
    assert call(api, "GET", "/v1/teachers", **theirs).json()["items"] == []
    for method in ("GET", "DELETE"):
        there = call(api, method, "/v1/teachers/fast", **theirs)
        none = call(api, method, "/v1/teachers/none", **theirs)
        assert (there.status_code, there.content) == (404, none.content)
    assert call(api, "GET", "/v1/captured", **theirs).json()["records"] == 0


def test_the_command_line_adds_lists_and_removes(
    api: Api, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def run(*words: str) -> tuple[int, str, str]:
        monkeypatch.setattr("sys.argv", ["stillhouse", *words])
        with pytest.raises(SystemExit) as ended:
            command_line.main()
        out, err = capsys.readouterr()
        return int(ended.value.code or 0), out, err

    file = tmp_path / "teacher.yaml"
    file.write_text(
        f"name: fast\nurl: {URL}\nmodel: m\nterms: smollm2@self-hosted\n"
        "usd_per_million: {input: 1, output: 2}\nbudget_usd: 5\n"
    )
    with serving(api.app) as url:
        monkeypatch.setenv("STILLHOUSE_URL", url)
        monkeypatch.setenv("STILLHOUSE_API_KEY", api.key)
        assert "no teachers yet" in run("teachers", "list")[1]
        code, out, err = run("teachers", "add", str(file))
        assert (code, "fast is registered" in out, f"{url}/v1" in err) == (0, True, True)
        assert "fast" in run("teachers", "list")[1]
        (shown,) = json.loads(run("teachers", "list", "--json")[1])
        assert shown["budget_usd"] == 5
        assert run("teachers", "remove", "fast")[0] == 0
        code, _, err = run("teachers", "remove", "fast")
        assert (code, err) == (1, "stillhouse: there is no such teacher\n")
        file.write_text("url: x\n")
        assert "has no `name`" in run("teachers", "add", str(file))[2]


# Prompts


def chosen(api: Api, store: ObjectStore, **captured: Any) -> list[dict[str, Any]]:
    wanted = Captured.model_validate(captured)
    return [json.loads(line) for line in captured_lines(wanted, api.tenant, api.engine, store)]


def test_prompts_are_chosen_by_tags_teacher_and_time(
    either: Api, store: ObjectStore, tmp_path: Path
) -> None:
    api = either
    with running_teacher(tmp_path / "invoices.jsonl") as teacher, capturing(api) as address:
        teacher.script(Fault("no_done", match="broken"), Fault("status", match="refused"))
        for name in ("fast", "slow"):
            register(api, address, name, **registration(teacher.url))

        def ask(text: str, name: str = "fast", **body: Any) -> None:
            asked = {"messages": [{"role": "user", "content": text}], "max_tokens": 8, **body}
            url = f"{address}/v1/chat/completions"
            HTTP.post(url, json={"model": name, **asked}, headers=api.headers())

        ask("one", metadata={"app": "support", "team": "a"})
        ask("two", metadata={"app": "support"})
        ask("three", "slow", metadata={"app": "shop"}, stream=True)
        ask("broken", metadata={"app": "support"}, stream=True)
        ask("refused", metadata={"app": "support"})
        wait_for_records(api, address, 3, failures=2)
        middle = datetime.now(UTC)
        ask("four", metadata={"app": "support"})
        wait_for_records(api, address, 4, failures=2)
        with reading(api.engine) as session:
            before_five = now(session)
        ask("five", metadata={"app": "support"})
        wait_for_records(api, address, 5, failures=2)

    def texts(**captured: Any) -> set[str]:
        return {line["messages"][-1]["content"] for line in chosen(api, store, **captured)}

    assert texts(tag={"app": "support"}) == {"one", "two", "four", "five"}
    assert texts(tag={"app": "support", "team": "a"}) == {"one"}
    assert texts(tag={"app": "nowhere"}) == set()
    assert texts(teacher="slow") == {"three"}
    assert texts(since=middle.isoformat(), tag={"app": "support"}) == {"four", "five"}
    assert texts(until=middle.isoformat()) == {"one", "two", "three"}
    (line,) = chosen(api, store, tag={"team": "a"})
    assert line["tags"] == {"app": "support", "team": "a"}
    assert "answer" not in line
    # Reading again gives the same, though more was recorded meanwhile.
    wanted = Captured.model_validate({"tag": {"app": "support"}})
    with open_captured(
        wanted, api.tenant, api.engine, store, tmp_path, 1 << 20, stored_before=before_five
    ) as file:
        assert len(file.readlines()) == 3
    with pytest.raises(PromptsRefused, match="over 100 bytes"):
        open_captured(wanted, api.tenant, api.engine, store, tmp_path, 100)
    with pytest.raises(PromptsRefused, match="no recorded exchange"):
        open_captured(
            Captured.model_validate({"tag": {"app": "nowhere"}}),
            api.tenant,
            api.engine,
            store,
            tmp_path,
            1 << 20,
        )


def test_conversations_are_brought_into_the_form_of_prompts(api: Api, store: ObjectStore) -> None:
    function = {"name": "look", "parameters": {"type": "object"}}
    image = {"type": "image_url", "image_url": {"url": "https://x.example/a.png"}}
    asked: list[dict[str, Any]] = [
        {
            "messages": [
                {"role": "developer", "content": "Be short."},
                {"role": "user", "content": [{"type": "text", "text": t} for t in "ab"]},
                {"role": "assistant", "content": "c", "refusal": None, "annotations": []},
                {"role": "user", "content": "d", "name": "ann"},
            ],
            "functions": [function],
        },
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "x"}, image]}]},
    ]  # fmt: skip
    with held_teacher() as teacher, capturing(api) as address:
        teacher.go.set()
        register(api, address, "fast", **registration(teacher.url))
        url = f"{address}/v1/chat/completions"
        for body in asked:
            HTTP.post(url, json={"model": "fast", **body}, headers=api.headers())
        wait_for_records(api, address, 2)
    found = {len(line["messages"]): line for line in chosen(api, store)}
    assert found[4]["messages"] == [
        {"role": "system", "content": "Be short."},
        {"role": "user", "content": "ab"},
        {"role": "assistant", "content": "c"},
        {"role": "user", "content": "d", "name": "ann"},
    ]
    assert found[4]["tools"] == [{"type": "function", "function": function}]
    assert isinstance(found[1]["messages"][0]["content"], list), "refused later, by its name"


def test_answers_are_given_with_their_log_probabilities_where_these_are_raw(
    api: Api, store: ObjectStore
) -> None:
    with held_teacher() as teacher, capturing(api) as address:
        teacher.go.set()
        teacher.body = completion("Yes.")
        teacher.body["choices"][0]["logprobs"] = {"content": [{"token": "Yes.", "logprob": -0.1}]}
        register(api, address, "fast", **registration(teacher.url))
        changed: dict[str, dict[str, Any]] = {
            "raw": {},
            "warm": {"temperature": 0.7},
            "cut": {"top_p": 0.5},
            "biased": {"logit_bias": {"5": 100}},
            "shaped": {"response_format": {"type": "json_object"}},
            "stopped": {"stop": ["."]},
        }
        for name, more in changed.items():
            asked = {"messages": [{"role": "user", "content": name}], **more}
            HTTP.post(
                f"{address}/v1/chat/completions",
                json={"model": "fast", **asked},
                headers=api.headers(),
            )
        wait_for_records(api, address, 6)
        terms = registration(teacher.url)["terms"]
        # The same teacher under other terms: whose answers these are must be said.
        register(api, address, "other", **registration(teacher.url, terms="own-weights"))
        body = {"model": "other", "messages": [{"role": "user", "content": "theirs"}]}
        url = f"{address}/v1/chat/completions"
        HTTP.post(url, json=body, headers=api.headers())
        wait_for_records(api, address, 7)
    found = {
        line["messages"][0]["content"]: line["answer"]["choices"][0]
        for line in chosen(api, store, answers=True, teacher="fast")
    }
    assert {name: "logprobs" in choice for name, choice in found.items()} == {
        "raw": True,
        "warm": False,
        "cut": False,
        "biased": False,
        "shaped": False,
        "stopped": True,
    }
    # Its own stop text may have ended it, which is no end of a turn.
    ends = {name: choice["finish_reason"] for name, choice in found.items()}
    assert ends == {**dict.fromkeys(changed, "stop"), "stopped": "length"}

    def check(terms: str | None, **captured: Any) -> None:
        check_captured(Captured.model_validate(captured), api.tenant, api.engine, terms=terms)

    check(terms, answers=True, teacher="fast")
    with pytest.raises(PromptsRefused, match="fast, other: name one"):
        check(terms, answers=True)
    with pytest.raises(PromptsRefused, match="under the terms own-weights"):
        check(terms, answers=True, teacher="other")
    check(None)
    with pytest.raises(PromptsRefused, match="nothing was recorded"):
        check(None, teacher="third")
    with pytest.raises(PromptsRefused, match="nothing was recorded"):
        check(None, until=(datetime.now(UTC) - timedelta(days=1)).isoformat())


def test_a_pipeline_starts_from_what_was_recorded(
    api: Api, store: ObjectStore, tmp_path: Path
) -> None:
    with running_teacher(tmp_path / "invoices.jsonl") as teacher, capturing(api) as address:
        register(api, address, "fast", **registration(teacher.url))
        url = f"{address}/v1/chat/completions"
        for number in range(12):
            asked = [{"role": "user", "content": f"What is the number {number % 10}?"}]
            body = {"model": "fast", "max_tokens": 8, "metadata": {"app": "support"}}
            HTTP.post(url, json={**body, "messages": asked}, headers=api.headers())
        wait_for_records(api, address, 12)
    spec = posted_spec(api.files)
    spec["prompts"] = {"captured": {"tag": {"app": "support"}}, "heldout": 0.4, "batch": 4}
    pipeline_id = submitted(api, spec)
    accept_pipeline(api.context(), pipeline_id)
    found = pipeline(api, pipeline_id)
    assert found.state == "running", found.reason
    assert found.items == 10, "two came twice"
    spec["prompts"] = {"captured": {"tag": {"app": "nowhere"}}}
    refused = call(api, "POST", "/v1/pipelines?check=true", json=spec)
    assert (refused.status_code, "GET /v1/captured" in refused.json()["detail"]) == (422, True)
