"""Acceptance where prompts say more than a question: tags, functions, answers, Parquet."""

from __future__ import annotations

import io
import json
import secrets
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from services.teacher_gateway.accept import accept_pipeline
from services.teacher_gateway.admission import survey
from services.teacher_gateway.problems import ProblemError
from stillhouse.chassis.storage import ObjectStore
from stillhouse.contracts.artifacts import ObjectRef, upload_key
from stillhouse.contracts.canonical import sha256_hex
from stillhouse.contracts.spec import ResolvedSpec, Spec
from stillhouse.embedded.parts import Store
from tests.integration.gateway_api.test_accept import batches, check_accepted, items, resolved_of
from tests.support.gateway_api import Api, gateway_api, pipeline, posted_spec, submit
from tests.support.shards import store_of

TOOL = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}
# Writes what a prompt offers, and the calls of earlier turns.
TEMPLATE = (
    "{% if tools %}{{ tools | tojson }}\n{% endif %}"
    "{% for message in messages %}{{ '<|im_start|>' + message.role + '\n' + message.content }}"
    "{% if message.tool_calls is defined %}{{ message.tool_calls | tojson }}{% endif %}"
    "{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def spec_of(api: Api, *teachers: dict[str, Any], **changes: Any) -> dict[str, Any]:
    spec = posted_spec(api.files, **changes)
    [plain] = spec["teachers"]
    spec["teachers"] = [{**plain, "name": f"t{n}", **own} for n, own in enumerate(teachers)]
    for teacher in spec["teachers"]:
        if "answers" in teacher:
            del teacher["url"], teacher["reference"]
            teacher["usd_per_million"] = {"input": 0, "output": 0}
    return spec


def write_lines(api: Api, lines: list[dict[str, Any]]) -> None:
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (api.files / "prompts.jsonl").write_text(text)


def use_template(api: Api, template: str) -> None:
    (api.files / "weights" / "chat_template.jinja").write_text(template)


def accepted(api: Api, spec: dict[str, Any], expected: int) -> ResolvedSpec:
    pipeline_id = submit(api, spec)
    accept_pipeline(api.context(), pipeline_id)
    found = pipeline(api, pipeline_id)
    assert found.state == "running", found.reason
    return check_accepted(api, pipeline_id, expected)


def prompts_of(api: Api, resolved: ResolvedSpec) -> dict[int, list[dict[str, Any]]]:
    found = {}
    for row in batches(api, resolved.pipeline_id):
        assert row.teacher == resolved.batch_teachers[row.batch]
        data = api.gateway.store.get(ObjectRef.model_validate_json(row.prompts))
        found[row.batch] = pq.read_table(io.BytesIO(data)).to_pylist()
    return found


def rejections(api: Api, pipeline_id: str) -> dict[str | None, int]:
    return Counter(i.reason for i in items(api, pipeline_id) if i.batch is None)


def test_prompts_go_to_their_teachers_batch_by_batch(api: Api) -> None:
    kinds: tuple[dict[str, str], ...] = ({"lang": "de"}, {"lang": "fr"}, {})
    write_lines(
        api, [{"prompt": f"[{n % 3}] Question {n}", "tags": kinds[n % 3]} for n in range(90)]
    )
    spec = spec_of(api, {"tags": {"lang": "de"}}, {"tags": {"lang": "fr"}})
    resolved = accepted(api, spec, 60)
    assert rejections(api, resolved.pipeline_id) == {"no_teacher": 30}
    assert resolved.rejected == 30
    for batch, rows in prompts_of(api, resolved).items():
        kind = {json.loads(row["messages"])[0]["content"][:3] for row in rows}
        assert kind == {f"[{resolved.batch_teachers[batch][1]}]"}
    train = resolved.batch_teachers[resolved.batches.heldout :]
    assert set(train) == {"t0", "t1"}
    assert set(resolved.signals) == {"t0", "t1"}
    assert train[:4].count("t0") == 2, "the teachers take turns"


def test_functions_go_with_their_prompts(small: Api) -> None:
    spec = spec_of(small, {})
    use_template(small, TEMPLATE)
    call = {"id": "1", "type": "function", "function": {"name": "weather", "arguments": "{}"}}
    turns = [{"role": "assistant", "tool_calls": [call]}, {"role": "tool", "content": "21 C"}]
    lines: list[dict[str, Any]] = [
        {"messages": [{"role": "user", "content": f"Question {n}"}, *turns], "tools": [TOOL]}
        for n in range(60)
    ]
    # The same question without the function is another prompt.
    lines += [{"messages": line["messages"]} for line in lines[:2]]
    write_lines(small, lines)
    resolved = accepted(small, spec, 62)
    rows = [row for found in prompts_of(small, resolved).values() for row in found]
    assert Counter(row["tools"] and json.dumps(json.loads(row["tools"])) for row in rows) == {
        json.dumps([TOOL]): 60,
        None: 2,
    }
    for row in rows:
        [_, assistant, tool] = json.loads(row["messages"])
        assert (assistant["tool_calls"], tool["content"]) == ([call], "21 C")
        assert "content" not in assistant


def test_functions_that_the_students_template_would_leave_out_are_refused(small: Api) -> None:
    write_lines(
        small,
        [
            {"prompt": f"Question {n}", **({"tools": [TOOL]} if n % 10 == 0 else {})}
            for n in range(60)
        ],
    )
    resolved = accepted(small, spec_of(small, {}), 54)
    assert rejections(small, resolved.pipeline_id) == {"template_refused": 6}
    [detail, *_] = [i.detail for i in items(small, resolved.pipeline_id) if i.batch is None]
    assert detail.endswith("the chat template does not write the `tools` of a prompt")


def test_answers_that_are_given_stand_beside_their_prompts(small: Api) -> None:
    body = {
        "object": "chat.completion",
        "choices": [{"message": {"role": "assistant", "content": "x"}, "finish_reason": "length"}],
    }
    lines: list[dict[str, Any]] = [
        {"prompt": f"Question {n}", "answer": f"Answer {n}"} for n in range(60)
    ]
    lines += [{"prompt": "a completion", "answer": body}, {"prompt": "none"}]
    lines += [{"prompt": "no answer", "answer": {"text": "x"}}, lines[0]]
    write_lines(small, lines)
    spec = spec_of(small, {"answers": "given"}, signal={"kind": "text"}, training={"loss": "sft"})
    resolved = accepted(small, spec, 61)
    assert rejections(small, resolved.pipeline_id) == {
        "answer_missing": 1,
        "answer_invalid": 1,
        "duplicate_prompt": 1,
    }
    assert "teacher:t0" in {verdict.subject for verdict in resolved.verdicts}
    rows = [row for found in prompts_of(small, resolved).values() for row in found]
    for row in rows:
        [message], answer = json.loads(row["messages"]), json.loads(row["answer"])
        said = answer["choices"][0]["message"]["content"]
        if message["content"] == "a completion":
            assert answer == body
        else:
            assert said == message["content"].replace("Question", "Answer")


def test_answers_are_left_where_they_are_when_a_teacher_is_asked(small: Api) -> None:
    write_lines(small, [{"prompt": f"Question {n}", "answer": ["gold"]} for n in range(60)])
    resolved = accepted(small, spec_of(small, {}), 60)
    rows = [row for found in prompts_of(small, resolved).values() for row in found]
    assert {row["answer"] for row in rows} == {None}


@pytest.mark.parametrize("uploaded", [False, True])
def test_parquet_is_told_by_its_content(small: Api, uploaded: bool) -> None:
    table = pa.table(
        {
            "messages": [[{"role": "user", "content": f"Question {n}"}] for n in range(60)]
            + [[{"role": "user", "content": " "}]],
            "unread": list(range(61)),
        }
    )
    pq.write_table(table, small.files / "prompts.jsonl")
    spec = spec_of(small, {})
    if uploaded:
        data = (small.files / "prompts.jsonl").read_bytes()
        digest = sha256_hex(data)
        small.gateway.store.put_new(upload_key(small.tenant, digest), data)
        spec["prompts"]["from"] = f"upload:{digest}"
    resolved = accepted(small, spec, 60)
    assert rejections(small, resolved.pipeline_id) == {"blank_prompt": 1}
    assert {i.item_id for i in items(small, resolved.pipeline_id) if i.batch is None} == {"line-61"}


def test_parquet_without_prompts_fails_the_pipeline_with_what_was_found(small: Api) -> None:
    pq.write_table(pa.table({"question": ["x"]}), small.files / "prompts.jsonl")
    pipeline_id = submit(small, spec_of(small, {}))
    accept_pipeline(small.context(), pipeline_id)
    found = pipeline(small, pipeline_id)
    assert found.state == "failed"
    assert "column `prompt` or `messages`, found question" in str(found.reason)


def test_prompts_are_taken_from_a_bucket_that_the_operator_named(
    tmp_path: Path, store: ObjectStore, store_part: Store, tenant: str
) -> None:
    bucket = store_of(replace(store_part, bucket=f"prompts-{secrets.token_hex(4)}"))
    bucket._client.create_bucket(Bucket=bucket.bucket)
    data = "".join(json.dumps({"prompt": f"Question {n}"}) + "\n" for n in range(60))
    bucket._client.put_object(Bucket=bucket.bucket, Key="a/prompts.jsonl", Body=data.encode())
    fields = {
        "STORE_ENDPOINT_URL": store_part.endpoint_url,
        "STORE_BUCKET": store_part.bucket,
        "STORE_ACCESS_KEY": store_part.access_key,
        "STORE_SECRET_KEY": store_part.secret_key,
        "S3_BUCKETS": bucket.bucket,
    }
    with gateway_api(tmp_path, store, tenant, **fields) as api:
        spec = spec_of(api, {})
        spec["prompts"]["from"] = f"s3://{bucket.bucket}/a/prompts.jsonl"
        accepted(api, spec, 60)
        spec["prompts"]["from"] = f"s3://{bucket.bucket}/b/prompts.jsonl"
        with pytest.raises(ProblemError, match="does not exist"):
            surveyed(api, spec)
    bucket.delete("a/prompts.jsonl")
    bucket._client.delete_bucket(Bucket=bucket.bucket)


# A check before anything is created


def surveyed(api: Api, spec: dict[str, Any]) -> Any:
    gateway = api.gateway
    return survey(
        Spec.model_validate(spec),
        api.tenant,
        gateway.settings,
        gateway.catalogue,
        gateway.store,
        api.engine,
    )


def test_the_worst_case_is_that_of_each_teachers_price(small: Api) -> None:
    write_lines(
        small,
        [{"prompt": f"Question {n:02}", "tags": {"n": str(n % 3)}} for n in range(60)],
    )
    dear = {"tags": {"n": "0"}, "usd_per_million": {"input": 100, "output": 1000}}
    cheap = {"usd_per_million": {"input": 0, "output": 1}}
    found = surveyed(small, spec_of(small, dear, cheap))
    each = found.prompt_tokens // 60
    # 20 prompts to one, 40 to the other; 16 answer tokens at most.
    assert found.worst_case_microusd == 20 * (each * 100 + 16 * 1000) + 40 * 16


def test_traffic_that_nobody_recorded_is_refused_by_its_field(small: Api) -> None:
    spec = spec_of(small, {})
    spec["prompts"] = {"captured": {"tag": {"team": "a"}}, "heldout": 0.3}
    with pytest.raises(ProblemError) as caught:
        surveyed(small, spec)
    assert caught.value.problem.errors is not None
    assert caught.value.problem.errors[0].field == "prompts.captured"
    assert "nothing was recorded" in str(caught.value)


def test_the_weights_of_all_teachers_are_what_the_student_is_measured_against(small: Api) -> None:
    write_lines(small, [{"prompt": f"Question {n}"} for n in range(60)])
    same = spec_of(small, {"weight": 1}, {"weight": 1})
    weights = f"file:{small.files / 'weights'}"
    assert resolved_of(small, accepted(small, same, 60).pipeline_id).reference == weights
    same["teachers"][1]["reference"] = None
    assert accepted(small, same, 60).reference is None
