from __future__ import annotations

import hashlib
from pathlib import Path

import httpx
import pytest

from stillhouse.cli import specs
from stillhouse.cli.client import Client
from stillhouse.contracts.spec import Spec


def test_the_template_is_a_valid_spec(tmp_path: Path) -> None:
    path = tmp_path / "pipeline.yaml"
    path.write_text(specs.template())

    Spec.model_validate(specs.load(path))


def test_the_demos_spec_is_valid_once_its_names_are_filled_in(tmp_path: Path) -> None:
    text = (Path(__file__).parents[3] / "demo" / "pipeline.yaml").read_text()
    for name, value in {
        "teacher_url": "http://h/v1",
        "teacher_weights": "/w",
        "prompts": "/p",
    }.items():
        text = text.replace("${" + name + "}", value)
    (tmp_path / "pipeline.yaml").write_text(text)

    Spec.model_validate(specs.load(tmp_path / "pipeline.yaml"))


def test_relative_files_are_looked_for_beside_the_spec(tmp_path: Path) -> None:
    path = tmp_path / "a.yaml"
    path.write_text(
        "prompts: {from: 'file:in/prompts.jsonl'}\n"
        "student: {of: file:///models/x}\n"
        "teachers: [{reference: 'file:w'}]\n"
    )

    assert specs.load(path) == {
        "prompts": {"from": f"file:{tmp_path}/in/prompts.jsonl"},
        "student": {"of": "file:/models/x"},
        "teachers": [{"reference": f"file:{tmp_path}/w"}],
    }


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("a: [1\n", "line 2, column 1"),
        ("a: 1\nb: 2\na: 3\n", "line 3, column 1: `a` stands there twice"),
        ("- a\n", "expected a mapping"),
        ("", "expected a mapping"),
        ("a: 2026-01-01\n", "cannot carry"),
        ("a: .nan\n", "cannot carry"),
        ("a: !!python/object:os.system x\n", "is not YAML"),
    ],
)
def test_an_unreadable_spec_says_where(tmp_path: Path, text: str, said: str) -> None:
    path = tmp_path / "a.yaml"
    path.write_text(text)

    with pytest.raises(specs.SpecFileError) as caught:
        specs.load(path)

    assert said in str(caught.value)
    assert str(path) in str(caught.value)


def test_a_missing_spec_names_init(tmp_path: Path) -> None:
    with pytest.raises(specs.SpecFileError, match="stillhouse init"):
        specs.load(tmp_path / "none.yaml")


def test_local_prompts_are_uploaded_and_named_by_digest(tmp_path: Path) -> None:
    prompts = tmp_path / "p.jsonl"
    prompts.write_text('{"prompt": "hello"}\n')
    digest = hashlib.sha256(prompts.read_bytes()).hexdigest()
    paths = []

    def answer(request: httpx.Request) -> httpx.Response:
        paths.append(request.url.path)
        return httpx.Response(201, json={})

    spec = {"prompts": {"from": f"file:{prompts}", "batch": 4}, "name": "a"}
    with Client("http://h", "k", transport=httpx.MockTransport(answer)) as client:
        sent = specs.upload_inputs(client, spec)

    assert sent == {"prompts": {"from": f"upload:{digest}", "batch": 4}, "name": "a"}
    assert paths == [f"/v1/uploads/{digest}"]


@pytest.mark.parametrize("spec", [{}, {"prompts": 3}, {"prompts": {"from": "upload:ab"}}])
def test_what_names_no_local_prompts_is_sent_as_it_is(spec: dict[str, object]) -> None:
    def answer(_request: httpx.Request) -> httpx.Response:
        raise AssertionError("nothing is to be uploaded")

    with Client("http://h", "k", transport=httpx.MockTransport(answer)) as client:
        assert specs.upload_inputs(client, spec) == spec


def test_prompts_that_are_not_there_are_named(tmp_path: Path) -> None:
    with (
        Client("http://h", "k", transport=httpx.MockTransport(lambda _: httpx.Response(201))) as c,
        pytest.raises(specs.SpecFileError, match=r"no file .*none\.jsonl"),
    ):
        specs.upload_inputs(c, {"prompts": {"from": f"file:{tmp_path}/none.jsonl"}})
