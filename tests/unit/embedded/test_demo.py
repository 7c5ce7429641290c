"""The demo's prompts and spec are what acceptance takes."""

import json
from pathlib import Path
from string import Template

import yaml

from stillhouse.contracts.spec import Spec

DEMO = Path(__file__).parents[3] / "demo"


def test_there_are_about_two_hundred_different_prompts():
    rows = [json.loads(line) for line in (DEMO / "prompts.jsonl").read_text().splitlines()]
    asked = [row["messages"][0]["content"] for row in rows]
    assert len(set(asked)) == len(asked) == 200
    assert all(len(question) < 100 for question in asked)


def test_the_spec_is_valid_once_its_places_are_filled():
    filled = Template((DEMO / "pipeline.yaml").read_text()).substitute(
        teacher_url="http://127.0.0.1:8090/v1",
        teacher_weights="/models/smollm2-135m-instruct",
        prompts="/demo/prompts.jsonl",
    )
    spec = Spec.model_validate(yaml.safe_load(filled))
    assert spec.start == "after_student"
    assert spec.student.layers == 22
