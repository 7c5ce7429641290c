"""Create, check, list, read and cancel pipelines over HTTP."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml
from sqlalchemy import select

from services.teacher_gateway.database import reading, transaction
from services.teacher_gateway.keys import create_key
from services.teacher_gateway.models import Audit, Batch, Pipeline, TeacherEndpoint
from stillhouse.chassis.storage import ObjectStore
from tests.support.gateway_api import Api, asgi_client, posted_spec, weights_folder, write_prompts


def pipelines(api: Api) -> list[Pipeline]:
    with reading(api.engine) as session:
        return list(session.scalars(select(Pipeline)))


def test_a_spec_becomes_a_pipeline_that_waits_for_acceptance(
    client: httpx.Client, small: Api
) -> None:
    spec = posted_spec(small.files, budget={"teacher_usd": 0.0000019})
    trace = f"00-{'a' * 32}-{'b' * 16}-01"
    answer = client.post("/v1/pipelines", json=spec, headers={"traceparent": trace})
    assert answer.status_code == 202
    pipeline_id = answer.json()["pipeline_id"]
    assert answer.headers["Location"] == f"/v1/pipelines/{pipeline_id}"
    [stored] = pipelines(small)
    assert (stored.state, stored.tenant_id, stored.traceparent) == (
        "accepting",
        small.tenant,
        trace,
    )
    assert stored.budget_microusd == 1, "a budget is rounded down"
    assert stored.next_attempt_at is not None
    view = client.get(answer.headers["Location"]).json()
    assert {name: view[name] for name in ("name", "state", "items", "rows", "rejections")} == {
        "name": "tiny",
        "state": "accepting",
        "items": 0,
        "rows": 0,
        "rejections": {},
    }
    assert {stage["state"] for stage in view["stages"].values()} == {"waiting"}
    assert view["created_at"].endswith("Z")
    with reading(small.engine) as session:
        [audit] = session.scalars(select(Audit).where(Audit.action == "pipeline.created"))
    assert (audit.target, audit.actor) == (pipeline_id, small.key.split("_")[1])


def test_yaml_is_taken_too(client: httpx.Client, small: Api) -> None:
    body = yaml.safe_dump(posted_spec(small.files))
    answer = client.post(
        "/v1/pipelines", content=body, headers={"Content-Type": "application/yaml"}
    )
    assert answer.status_code == 202


def test_a_repeated_key_gets_the_same_answer_and_another_spec_is_refused(
    client: httpx.Client, small: Api
) -> None:
    spec, key = posted_spec(small.files), {"Idempotency-Key": "once"}
    first = client.post("/v1/pipelines", json=spec, headers=key)
    # A repetition is answered even where the spec would be refused by now.
    (small.files / "prompts.jsonl").unlink()
    again = client.post("/v1/pipelines", json=spec, headers=key)
    assert (again.status_code, again.content) == (first.status_code, first.content)
    assert again.headers["Location"] == first.headers["Location"]
    write_prompts(small.files / "prompts.jsonl")
    other = client.post("/v1/pipelines", json=spec | {"name": "other"}, headers=key)
    assert other.status_code == 422
    assert other.json()["type"] == "urn:stillhouse:problem:idempotency-key-reused"
    wrong = client.post("/v1/pipelines", json=spec, headers={"Idempotency-Key": "x" * 201})
    assert wrong.json()["type"] == "urn:stillhouse:problem:idempotency-key"
    assert len(pipelines(small)) == 1


def test_two_tenants_may_use_the_same_key(client: httpx.Client, small: Api) -> None:
    other = create_key(small.engine, small.gateway.settings.key_pepper, "neighbour")
    spec, key = posted_spec(small.files), {"Idempotency-Key": "once"}
    mine = client.post("/v1/pipelines", json=spec, headers=key)
    theirs = client.post(
        "/v1/pipelines", json=spec, headers={**key, "Authorization": f"Bearer {other}"}
    )
    assert (mine.status_code, theirs.status_code) == (202, 202)
    assert mine.json()["pipeline_id"] != theirs.json()["pipeline_id"]


def test_a_race_on_one_key_makes_one_pipeline(api: Api) -> None:
    spec = posted_spec(api.files)

    async def race() -> list[httpx.Response]:
        async with asgi_client(api, **{"Idempotency-Key": "race"}) as client:
            posts = [client.post("/v1/pipelines", json=spec) for _ in range(12)]
            return await asyncio.gather(*posts)

    answers = asyncio.run(race())
    assert {answer.status_code for answer in answers} == {202}
    assert len({answer.content for answer in answers}) == 1
    assert len(pipelines(api)) == 1


@pytest.mark.parametrize("query", ["", "?check=true"])
def test_a_call_longer_than_this_gateway_allows_is_refused_by_name(
    query: str, client: httpx.Client, small: Api
) -> None:
    spec = posted_spec(small.files)
    spec["teachers"][0]["limits"] = {"timeout_seconds": 61}
    answer = client.post(f"/v1/pipelines{query}", json=spec)
    assert answer.status_code == 422
    [error] = answer.json()["errors"]
    assert error["field"] == "teachers[0].limits.timeout_seconds"
    assert "60 seconds at most" in error["message"]
    assert pipelines(small) == []
    for limits in ({"timeout_seconds": 60}, {}):
        spec["teachers"][0]["limits"] = limits
        assert client.post(f"/v1/pipelines{query}", json=spec).is_success


def test_a_check_creates_nothing_and_tells_what_would_come(
    client: httpx.Client, small: Api
) -> None:
    with (small.files / "prompts.jsonl").open("w") as file:
        for n in range(60):
            file.write(json.dumps({"prompt": f"Question {n}"}) + "\n")
        file.write('{"prompt": "question 7"}\nnonsense\n')
    spec = posted_spec(small.files)
    answer = client.post("/v1/pipelines?check=true", json=spec)
    assert answer.status_code == 200, answer.text
    found = answer.json()
    assert found["prompts"]["prompts"] == 60
    assert found["prompts"]["rejections"] == {"duplicate_prompt": 1, "invalid_prompt": 1}
    assert found["prompts"]["items"] == 60
    assert [v["outcome"] for v in found["verdicts"]] == ["allow"] * 3
    assert found["tokenizer"]["vocabulary"] == 258
    # 60 x 16 answered tokens at 2 USD a million, and the prompts' at 1.
    assert found["worst_case_usd"] == pytest.approx((960 * 2 + found["prompt_tokens"]) / 1e6)
    assert pipelines(small) == []


def test_a_check_refuses_what_acceptance_would(client: httpx.Client, small: Api) -> None:
    spec = posted_spec(small.files)
    other = weights_folder(small.files / "other")
    values = json.loads((other / "tokenizer.json").read_text())
    values["model"]["vocab"] |= {"A": 66, "B": 65}
    (other / "tokenizer.json").write_text(json.dumps(values))
    spec["teachers"][0]["reference"] = f"file:{other}"
    answer = client.post("/v1/pipelines?check=true", json=spec)
    assert answer.status_code == 422
    assert "is not the teacher's" in answer.json()["detail"]
    (small.files / "prompts.jsonl").write_text("")
    answer = client.post("/v1/pipelines?check=true", json=posted_spec(small.files))
    assert "the file of prompts is empty" in answer.json()["detail"]


@pytest.mark.parametrize(
    ("change", "field", "said"),
    [
        (
            lambda s: s["teachers"][0].update(terms="gpt-9@api"),
            "teachers[0].terms",
            "unknown terms are denied",
        ),
        (
            lambda s: s["teachers"][0].update(url="https://api.openai.com/v1"),
            "teachers[0].terms",
            "the route decides the terms",
        ),
        (lambda s: s["student"].update(terms="nobodys"), "student.terms", "not in the catalogue"),
        (
            lambda s: s["teachers"][0].update(url="http://169.254.169.254/latest"),
            "teachers[0].url",
            "169.254.169.254",
        ),
        (
            lambda s: s["teachers"][0].update(api_key={"env": "TEACHER_GATEWAY_KEY_PEPPER"}),
            "teachers[0].api_key",
            "the stack's own",
        ),
        (
            lambda s: s["prompts"].update({"from": "file:/etc/passwd"}),
            "prompts.from",
            "outside the folders",
        ),
        (
            lambda s: s["prompts"].update({"from": f"upload:{'0' * 64}"}),
            "prompts.from",
            "nothing was uploaded",
        ),
        (
            lambda s: s["prompts"].update({"from": "upload:x"}),
            "prompts.from",
            "64 hex digits",
        ),
        (lambda s: s.update(gates=[{"approval": "legal"}]), "", "not built yet: `gates`"),
    ],
)
def test_what_can_be_refused_at_once_is_and_leaves_nothing(
    client: httpx.Client, small: Api, change: Any, field: str, said: str
) -> None:
    spec = posted_spec(small.files)
    change(spec)
    answer = client.post("/v1/pipelines", json=spec)
    assert answer.status_code == 422, answer.text
    assert answer.headers["content-type"] == "application/problem+json"
    problem = answer.json()
    assert said in problem["detail"]
    assert field in [error["field"] for error in problem["errors"]]
    assert pipelines(small) == []


def test_pages_name_every_pipeline_once_newest_first(api: Api) -> None:
    spec = posted_spec(api.files)

    async def walk() -> tuple[list[str], list[list[str]]]:
        async with asgi_client(api) as client:
            made = [
                (await client.post("/v1/pipelines", json=spec)).json()["pipeline_id"]
                for _ in range(7)
            ]
            pages: list[list[str]] = []
            query: dict[str, Any] = {"limit": 3}
            while True:
                page = (await client.get("/v1/pipelines", params=query)).json()
                pages.append([item["pipeline_id"] for item in page["items"]])
                if page["next"] is None:
                    return made, pages
                query["after"] = page["next"]

    made, pages = asyncio.run(walk())
    assert [len(page) for page in pages] == [3, 3, 1]
    assert [pipeline for page in pages for pipeline in page] == made[::-1]


def test_another_tenants_pipeline_is_as_absent_as_none(client: httpx.Client, small: Api) -> None:
    pipeline = client.post("/v1/pipelines", json=posted_spec(small.files)).json()["pipeline_id"]
    stranger = create_key(small.engine, small.gateway.settings.key_pepper, "stranger")
    theirs = {"Authorization": f"Bearer {stranger}"}
    paths = ["", "/events", "/rejections", "/samples", "/report", "/student", "/charges"]
    paths += ["/student/files/config.json"]
    for path in paths:
        found = client.get(f"/v1/pipelines/{pipeline}{path}", headers=theirs)
        for none in ("pl-000000000000000000000000", "x%00y", "A" * 70):
            absent = client.get(f"/v1/pipelines/{none}{path}", headers=theirs)
            assert (found.status_code, found.content) == (404, absent.content), (path, none)
    cancelled = client.post(f"/v1/pipelines/{pipeline}/cancel", headers=theirs)
    assert cancelled.status_code == 404
    assert client.get("/v1/pipelines", headers=theirs).json() == {"items": [], "next": None}
    cursor = client.get("/v1/pipelines", params={"after": pipeline}, headers=theirs)
    nowhere = client.get("/v1/pipelines", params={"after": "pl-0"}, headers=theirs)
    assert (cursor.status_code, cursor.content) == (422, nowhere.content)
    assert pipelines(small)[0].state == "accepting"


def test_cancelling_ends_a_waiting_pipeline_and_may_be_repeated(
    client: httpx.Client, small: Api
) -> None:
    pipeline = client.post("/v1/pipelines", json=posted_spec(small.files)).json()["pipeline_id"]
    first = client.post(f"/v1/pipelines/{pipeline}/cancel")
    again = client.post(f"/v1/pipelines/{pipeline}/cancel")
    assert (first.status_code, first.json()["state"]) == (200, "cancelled")
    assert again.json() == first.json()
    assert first.json()["ended_at"] is not None
    with reading(small.engine) as session:
        actions = list(session.scalars(select(Audit.action)))
    assert actions.count("pipeline.cancelled") == 1


def test_no_route_speaks_without_a_valid_key(client: httpx.Client, small: Api) -> None:
    document = client.get("/openapi.json").json()
    wrong = [None, "", "Bearer nonsense", f"Bearer sth_{'0' * 12}_{'0' * 64}", f"Token {small.key}"]
    asked = 0
    bare = httpx.Client(base_url=client.base_url)
    for path, methods in document["paths"].items():
        if not path.startswith("/v1"):
            continue
        url = path.replace("{pipeline_id}", "pl-x").replace("{sha256}", "0" * 64)
        for method in methods:
            for header in wrong:
                headers = {} if header is None else {"Authorization": header}
                answer = bare.request(method.upper(), url.replace("{name}", "x"), headers=headers)
                assert answer.status_code == 401, (method, path, header, answer.text)
                assert answer.headers["www-authenticate"] == "Bearer"
                assert answer.json()["type"] == "urn:stillhouse:problem:unauthorized"
                asked += 1
    bare.close()
    assert asked == 20 * len(wrong)


def test_mistakes_in_the_request_are_problems(client: httpx.Client) -> None:
    cases = [
        ("GET", "/v1/nothing", 404, "not-found"),
        ("DELETE", "/v1/pipelines", 405, "method-not-allowed"),
        ("GET", "/v1/pipelines?limit=0", 422, "invalid-request"),
        ("GET", "/v1/pipelines?limit=99999999999999999999", 422, "invalid-request"),
        ("GET", "/v1/pipelines/pl-x/events?after=99999999999999999999", 422, "invalid-request"),
        ("GET", "/v1/pipelines/pl-x/rejections?reason=%00", 422, "invalid-request"),
        ("GET", "/v1/pipelines/pl-x/samples?split=all", 422, "invalid-request"),
        ("PUT", "/v1/uploads/xyz", 422, "invalid-request"),
        ("POST", "/v1/pipelines", 415, "media-type"),
        ("POST", "/v1/pipelines?check=maybe", 422, "invalid-request"),
        ("POST", "/v1/pipelines?probe=true", 422, "probe-without-check"),
        ("GET", "/v1/pipelines/", 404, "not-found"),
    ]
    for method, url, status, name in cases:
        answer = client.request(method, url)
        assert answer.status_code == status, (method, url, answer.text)
        assert answer.headers["content-type"] == "application/problem+json"
        problem = answer.json()
        assert problem["type"] == f"urn:stillhouse:problem:{name}"
        assert problem["status"] == status
        assert problem["detail"]


def test_a_ten_megabyte_body_is_answered_and_the_connection_goes_on(
    client: httpx.Client, small: Api
) -> None:
    spec = posted_spec(small.files)
    spec["teachers"][0]["model"] = "x" * 10_000_000
    body = json.dumps(spec).encode()
    kind = {"Content-Type": "application/json"}
    announced = client.post("/v1/pipelines", content=body, headers=kind)
    pieces = (body[n : n + 65536] for n in range(0, len(body), 65536))
    chunked = client.post("/v1/pipelines", content=pieces, headers=kind)
    for answer in (announced, chunked):
        assert answer.status_code == 413
        assert answer.json()["type"] == "urn:stillhouse:problem:too-large"
    assert client.get("/v1/pipelines").status_code == 200


def test_a_wrong_host_is_refused(client: httpx.Client) -> None:
    answer = client.get("/v1/pipelines", headers={"Host": "evil.example"})
    assert (answer.status_code, answer.json()["type"]) == (400, "urn:stillhouse:problem:host")
    assert client.get("/healthz", headers={"Host": "10.0.0.9"}).json() == {"status": "ok"}


def test_a_store_that_is_away_is_a_503_and_only_where_it_is_needed(
    tmp_path: Path, tenant: str, small: Api
) -> None:
    import dataclasses

    away = ObjectStore(
        bucket="b",
        endpoint_url="http://127.0.0.1:1",
        access_key="a",
        secret_key="s",
        connect_timeout=1,
        attempts=1,
    )
    broken = dataclasses.replace(
        small, gateway=dataclasses.replace(small.gateway, store=away, probe=away)
    )
    spec = posted_spec(small.files)
    uploaded = spec | {"prompts": spec["prompts"] | {"from": f"upload:{'0' * 64}"}}

    async def ask() -> list[httpx.Response]:
        async with asgi_client(broken) as client:
            return [
                await client.get("/readyz"),
                await client.post("/v1/pipelines", json=uploaded),
                await client.get("/healthz"),
                await client.post("/v1/pipelines", json=spec),
                await client.get("/v1/pipelines"),
            ]

    answers = asyncio.run(ask())
    assert [answer.status_code for answer in answers] == [503, 503, 200, 202, 200]
    assert "the object store" in answers[1].json()["detail"]
    assert answers[1].headers["Retry-After"] == "5"


def test_a_database_without_tables_is_not_ready(small: Api, tmp_path: Path) -> None:
    import dataclasses

    from services.teacher_gateway.database import open_engine

    empty = open_engine(f"sqlite:///{tmp_path / 'empty.sqlite3'}")
    broken = dataclasses.replace(small, gateway=dataclasses.replace(small.gateway, engine=empty))

    async def ask() -> list[httpx.Response]:
        async with asgi_client(broken) as client:
            return [await client.get("/readyz"), await client.get("/v1/pipelines")]

    answers = asyncio.run(ask())
    empty.dispose()
    assert [answer.status_code for answer in answers] == [503, 503]
    assert "services.teacher_gateway migrate" in answers[0].json()["detail"]
    assert "the database" in answers[1].json()["detail"]


def test_a_defect_is_a_problem_with_a_number_and_no_internals(
    small: Api, monkeypatch: pytest.MonkeyPatch
) -> None:
    from services.teacher_gateway.routes import pipelines as module

    def broken(*_: object) -> None:
        raise ZeroDivisionError("secret internals")

    monkeypatch.setattr(module, "_summary", broken)

    async def ask() -> httpx.Response:
        async with asgi_client(small) as client:
            await client.post("/v1/pipelines", json=posted_spec(small.files))
            return await client.get("/v1/pipelines")

    answer = asyncio.run(ask())
    assert answer.status_code == 500
    assert answer.headers["content-type"] == "application/problem+json"
    assert "under the number" in answer.json()["detail"]
    assert "secret" not in answer.text


def test_requests_are_counted_by_the_route_and_not_by_the_id(client: httpx.Client) -> None:
    client.get("/v1/pipelines/pl-one")
    client.get("/v1/pipelines/pl-two")
    client.get("/wp-admin/setup.php")
    text = client.get("/metrics").text
    counted = [line for line in text.splitlines() if "gateway_requests_total{" in line]
    assert any('route="/v1/pipelines/{pipeline_id}"' in line for line in counted)
    assert any('route="unmatched"' in line for line in counted)
    assert not any("pl-one" in line or "wp-admin" in line for line in text.splitlines())


def test_a_pipeline_whose_teacher_is_away_says_so(client: httpx.Client, small: Api) -> None:
    url = client.post("/v1/pipelines", json=posted_spec(small.files)).headers["Location"]
    pipeline_id = url.rsplit("/", 1)[1]
    assert client.get(url).json()["stages"]["collect"]["figures"] == {}
    with transaction(small.engine) as session:
        session.add(TeacherEndpoint(endpoint="open", away=1))
        batches = [
            ("waiting", 3, "closed"),
            ("waiting", 0, "closed"),
            ("waiting", 0, "open"),  # it is not even sent
            ("closed", 2, "open"),
        ]
        for number, (state, away, endpoint) in enumerate(batches):
            session.add(
                Batch(
                    pipeline_id=pipeline_id,
                    batch=number,
                    tenant_id=small.tenant,
                    split="train",
                    teacher="billing",
                    items=1,
                    prompts="{}",
                    state=state,
                    away=away,
                    endpoint=endpoint,
                )
            )
    assert client.get(url).json()["stages"]["collect"]["figures"] == {"batches_teacher_away": 2}
