"""What a user reads when a spec is wrong."""

from __future__ import annotations

import json

import pytest

from services.teacher_gateway.posted import MAX_DEPTH, read_spec
from services.teacher_gateway.problems import ProblemError

YAML = """version: 1
name: demo
teachers:
  - name: t
    url: http://127.0.0.1:1/v1
    model: m
    terms: smollm2@self-hosted
    usd_per_million: {input: 0.1, output: 0.2}
prompts: {from: file:/x/prompts.jsonl}
student: {layers: 20, of: file:/x/w}
budget: {teacher_usd: 1}
"""


def refusal(body: bytes | str, media: str | None = "application/yaml") -> ProblemError:
    data = body.encode() if isinstance(body, str) else body
    with pytest.raises(ProblemError) as caught:
        read_spec(data, media)
    return caught.value


@pytest.mark.parametrize("media", ["application/yaml", "application/x-yaml; charset=utf-8"])
def test_yaml_and_json_of_a_spec_are_the_same_spec(media: str) -> None:
    import yaml

    as_json = json.dumps(yaml.safe_load(YAML)).encode()
    assert read_spec(YAML.encode(), media) == read_spec(as_json, "application/json")


@pytest.mark.parametrize(
    ("old", "new", "fields", "said"),
    [
        ("    model: m\n", "", ["teachers[0].model"], "`teachers[0].model` is missing"),
        (
            "budget:",
            "buget:",
            ["budget", "buget"],
            "`budget` is missing; `buget` is not a field here: did you mean `budget`?",
        ),
        (
            "name: demo",
            "name: My Demo",
            ["name"],
            "`name` must be of small letters, digits and hyphens, 63 at most, such as "
            "`support-0-6b`",
        ),
        ("version: 1", "version: 2", ["version"], "`version` must be 1, found 2"),
        (
            "{teacher_usd: 1}",
            "{teacher_usd: cheap}",
            ["budget.teacher_usd"],
            "`budget.teacher_usd` should be a valid number, unable to parse string as a number, "
            "found 'cheap'",
        ),
        (
            "url: http://127.0.0.1:1/v1",
            "url: 127.0.0.1:1/v1",
            ["teachers[0].url"],
            "`teachers[0].url` must begin with http:// or https:// and hold no user or password, "
            "such as http://127.0.0.1:8080/v1",
        ),
        (
            "file:/x/prompts.jsonl",
            "s3://bucket",
            ["prompts.from"],
            "`prompts.from` expected s3://bucket/key, found 's3://bucket'",
        ),
        (
            "layers: 20, ",
            "",
            ["student"],
            "`student` `layers` and `of` go together: how many layers to keep, of which weights",
        ),
        (
            "budget:",
            "signal: {kind: text}\nbudget:",
            [""],
            "`training.loss: forward_kl` needs log-probabilities and `signal.kind: text` has "
            "none: use `signal.kind: topk`, or `training.loss: sft`",
        ),
        (
            "budget:",
            "gates: []\nevaluation: {tasks: []}\nbudget:",
            [""],
            "not built yet: `gates`: leave it out; the report shows every figure; "
            "`evaluation.tasks`: leave it out",
        ),
        (
            "budget:",
            "evaluation: {controls: []}\nbudget:",
            ["evaluation.controls"],
            "`evaluation.controls` expected at least one control: the untrained student is always "
            "measured; leave `controls` out, or write `[untrained]`",
        ),
        (
            "    model: m\n",
            "    model: m\n    api_key: sk-secret\n",
            ["teachers[0].api_key"],
            "`teachers[0].api_key` expected a reference such as {env: MY_KEY}, found a literal: "
            "put the key into a variable of the gateway's environment",
        ),
        ("teachers:\n  - name: t\n", "teachers:\n  name: t\n", None, "the body is not YAML"),
    ],
)
def test_a_typical_mistake_is_told_with_its_place_and_what_to_do(
    old: str, new: str, fields: list[str] | None, said: str
) -> None:
    assert YAML.count(old) == 1
    found = refusal(YAML.replace(old, new)).problem
    assert found.status == 422
    assert said in found.detail
    if fields is not None:
        assert [error.field for error in found.errors] == fields


def test_a_misplaced_secret_is_not_repeated() -> None:
    wrong = YAML.replace("    model: m\n", "    model: m\n    api_key: {env: sk-secret}\n")
    problem = refusal(wrong).problem
    assert "sk-secret" not in problem.model_dump_json()
    assert "name of a variable in capitals" in problem.detail


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ('{"version": 1, "version": 1}', "the key 'version' stands there twice"),
        ('{"version": NaN}', "NaN is not a number of JSON"),
        ("[" * (MAX_DEPTH + 1), f"nested more than {MAX_DEPTH} levels"),
        ('{"a": "' + "[" * 100 + '"}', "`version` is missing"),
        ('{"version": 1', "line 1, column 14"),
        ('"x"', "expected a mapping"),
        (b"\xff\xfe", "not UTF-8"),
        ('{"version": ' + "9" * 5000 + "}", "4300 digits"),
        ('{"version": 1, "name": "\\ud800"}', "`name` should be a valid string"),
    ],
)
def test_ambiguous_or_hostile_json_is_refused(body: bytes | str, said: str) -> None:
    problem = refusal(body, "application/json").problem
    assert (problem.status, said in problem.detail) == (422, True), problem.detail


@pytest.mark.parametrize(
    ("body", "said"),
    [
        (YAML + "name: again\n", "line 12: the key 'name' stands there twice"),
        ("a: &a [x]\nb: [*a, *a]\n", "anchors and aliases"),
        ("a: &a {b: 1}\nc: {<<: *a}\n", "anchors and aliases"),
        ("a: !!python/object/apply:os.system [id]\n", "could not determine a constructor"),
        ("[" * (MAX_DEPTH + 1), f"nested more than {MAX_DEPTH} levels"),
        ("a:\n\t- b\n", "line 2, column 1"),
        ("? [a]\n: 1\n", "found unhashable key"),
        ("", "expected a mapping with `version: 1` at the top, found nothing"),
    ],
)
def test_ambiguous_or_hostile_yaml_is_refused(body: str, said: str) -> None:
    problem = refusal(body).problem
    assert (problem.status, said in problem.detail) == (422, True), problem.detail


def test_dates_stay_text_in_yaml() -> None:
    dated = YAML.replace("model: m", "model: 2026-01-01")
    assert read_spec(dated.encode(), "application/yaml").teachers[0].model == "2026-01-01"


@pytest.mark.parametrize("media", [None, "text/plain", "multipart/form-data"])
def test_another_media_type_is_refused(media: str | None) -> None:
    assert refusal(YAML, media).problem.status == 415
