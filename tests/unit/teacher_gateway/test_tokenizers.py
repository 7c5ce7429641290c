"""The teacher's tokenizer, from a folder of weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from services.teacher_gateway.tokenizers import find_tokenizer
from stillhouse.chassis.errors import PermanentError
from stillhouse.contracts.chat import Message
from stillhouse.contracts.spec import Spec
from tests.support.gateway_api import posted_spec, weights_folder
from tests.support.references import file_sources
from tests.support.tiny_tokenizer import CHATML, END_ID, tiny_chat_tokenizer


def spec(files: Path, reference: str | None = None, **student: Any) -> Spec:
    posted = posted_spec(files)
    posted["teachers"][0]["reference"] = reference
    posted["student"] |= student
    return Spec.model_validate(posted)


def refused(files: Path, asked: Spec) -> PermanentError:
    with pytest.raises(PermanentError) as caught:
        find_tokenizer(asked, file_sources(files))
    return caught.value


def edit(path: Path, **changes: Any) -> None:
    values = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({k: v for k, v in values.items() if v is not None}))


def test_the_students_weights_give_the_tokenizer_where_the_teacher_has_none(tmp_path: Path) -> None:
    found = find_tokenizer(spec(tmp_path), file_sources(tmp_path))
    assert found.source == f"file:{tmp_path / 'weights'}"
    messages = [Message(role="user", content="hi")]
    assert found.chat.encode_prompt(messages) == tiny_chat_tokenizer().encode_prompt(messages)
    assert found.chat.eos_id == END_ID


def test_a_tokenizer_written_in_another_form_is_the_same_one(tmp_path: Path) -> None:
    teacher = weights_folder(tmp_path / "teacher")
    path = teacher / "tokenizer.json"
    values = dict(reversed(json.loads(path.read_text()).items()))
    values["truncation"] = {
        "direction": "Right",
        "max_length": 2,
        "strategy": "LongestFirst",
        "stride": 0,
    }
    path.write_text(json.dumps(values, indent=4))
    found = find_tokenizer(spec(tmp_path, f"file:{teacher}"), file_sources(tmp_path))
    assert found.source == f"file:{teacher}"
    assert len(found.chat.encode_text("longer than two")) > 2


def test_a_student_with_another_tokenizer_is_refused_by_both_names(tmp_path: Path) -> None:
    teacher = weights_folder(tmp_path / "teacher")
    values = json.loads((teacher / "tokenizer.json").read_text())
    values["model"]["vocab"] |= {"A": 66, "B": 65}
    (teacher / "tokenizer.json").write_text(json.dumps(values))
    error = refused(tmp_path, spec(tmp_path, f"file:{teacher}"))
    assert error.reason == "tokenizer_mismatch"
    assert f"file:{teacher}" in str(error)
    assert f"file:{tmp_path / 'weights'}" in str(error)
    assert "take student weights with the teacher's tokenizer" in str(error)


def test_a_separate_template_wins_over_the_one_in_the_config(tmp_path: Path) -> None:
    asked = spec(tmp_path)
    (tmp_path / "weights" / "chat_template.jinja").write_text("{{ messages[0]['content'] }}!")
    found = find_tokenizer(asked, file_sources(tmp_path))
    assert found.chat.render([Message(role="user", content="hi")]) == "hi!"


def test_the_default_of_several_templates_is_taken(tmp_path: Path) -> None:
    asked = spec(tmp_path)
    named = [{"name": "tool_use", "template": "x"}, {"name": "default", "template": CHATML}]
    edit(tmp_path / "weights" / "tokenizer_config.json", chat_template=named)
    assert find_tokenizer(asked, file_sources(tmp_path)).chat.chat_template == CHATML


@pytest.mark.parametrize(
    ("file", "changes", "said"),
    [
        ("tokenizer_config.json", {"chat_template": None}, "has no chat template"),
        ("tokenizer_config.json", {"chat_template": "{% if %}"}, "does not parse"),
        ("tokenizer_config.json", {"eos_token": None}, "names no `eos_token`"),
        ("tokenizer_config.json", {"eos_token": {"content": "<|no|>"}}, "has no token '<|no|>'"),
        ("tokenizer.json", {"model": {"type": "Nonsense"}}, "cannot be used"),
        ("config.json", {"vocab_size": 100}, "has 258 tokens and the student"),
        ("config.json", {"num_hidden_layers": 1}, "asks for 2 layers"),
        ("config.json", {"auto_map": {}}, "code of its own"),
    ],
)
def test_weights_that_cannot_be_used_are_refused_with_what_is_wrong(
    tmp_path: Path, file: str, changes: dict[str, Any], said: str
) -> None:
    asked = spec(tmp_path)
    edit(tmp_path / "weights" / file, **changes)
    assert said in str(refused(tmp_path, asked))


def test_a_folder_outside_or_a_link_that_leads_out_is_refused(tmp_path: Path) -> None:
    inside, outside = tmp_path / "in", tmp_path / "out"
    inside.mkdir()
    asked = spec(inside)
    assert "not below a folder" in str(refused(outside, asked))
    weights = inside / "weights"
    weights_folder(outside)
    (weights / "tokenizer.json").unlink()
    (weights / "tokenizer.json").symlink_to(outside / "tokenizer.json")
    assert "leads out of the folders" in str(refused(inside, asked))


# Several teachers


def taught(files: Path, *references: str | None, kind: str = "topk", weights: bool = False) -> Spec:
    posted = posted_spec(files)
    [plain] = posted["teachers"]
    posted["teachers"] = [
        {**plain, "name": f"t{n}", "weight": 1, "reference": reference}
        for n, reference in enumerate(references)
    ]
    if weights:
        for teacher in posted["teachers"]:
            teacher["weights"] = teacher.pop("reference")
            del teacher["url"]
    loss = "sft" if kind == "text" else "forward_kl"
    return Spec.model_validate({**posted, "signal": {"kind": kind}, "training": {"loss": loss}})


def other_tokenizer(folder: Path) -> str:
    weights_folder(folder)
    values = json.loads((folder / "tokenizer.json").read_text())
    values["model"]["vocab"] |= {"A": 66, "B": 65}
    (folder / "tokenizer.json").write_text(json.dumps(values))
    return f"file:{folder}"


def test_the_same_weights_behind_all_teachers_are_the_reference(tmp_path: Path) -> None:
    own, copy = f"file:{tmp_path / 'weights'}", f"file:{weights_folder(tmp_path / 'copy')}"
    sources = file_sources(tmp_path)
    assert find_tokenizer(taught(tmp_path, copy, copy), sources).reference == copy
    assert find_tokenizer(taught(tmp_path, own), sources).reference == own
    for mixed in ((own, copy), (copy, None), (None,)):
        found = find_tokenizer(taught(tmp_path, *mixed), sources)
        assert found.reference is None
        assert found.text_only == frozenset()


@pytest.mark.parametrize("weights", [False, True])
def test_only_text_is_learnt_of_a_teacher_with_another_tokenizer(
    tmp_path: Path, weights: bool
) -> None:
    other = other_tokenizer(tmp_path / "other")
    own = f"file:{weights_folder(tmp_path / 'teacher')}"
    error = refused(tmp_path, taught(tmp_path, own, other, weights=weights))
    assert error.reason == "tokenizer_mismatch"
    assert other in str(error)
    for kind in ("text", "auto"):
        asked = taught(tmp_path, own, other, kind=kind, weights=weights)
        found = find_tokenizer(asked, file_sources(tmp_path))
        assert (found.source, found.text_only) == (own, {"t1"})
    alone = find_tokenizer(taught(tmp_path, other, kind="text"), file_sources(tmp_path))
    assert (alone.source, alone.reference) == (f"file:{tmp_path / 'weights'}", None)


# A teacher whose weights the trainer holds


def compared(files: Path, reference: str, kind: str = "topk") -> Spec:
    posted = posted_spec(files)
    posted["teachers"][0]["reference"] = reference
    training = {"loss": "reverse_kl", "distribution": "weights"}
    return Spec.model_validate({**posted, "signal": {"kind": kind}, "training": training})


@pytest.mark.parametrize("kind", ["topk", "text", "auto"])
def test_a_teacher_that_is_compared_in_full_has_the_students_tokenizer(
    tmp_path: Path, kind: str
) -> None:
    other = other_tokenizer(tmp_path / "other")
    error = refused(tmp_path, compared(tmp_path, other, kind))
    assert error.reason == "tokenizer_mismatch"
    assert other in str(error)
    assert f"file:{tmp_path / 'weights'}" in str(error)
    assert "`training.loss: sft` with `signal.kind: text`" in str(error)


@pytest.mark.parametrize("kind", ["topk", "text", "auto"])
def test_a_teacher_that_is_compared_in_full_has_an_output_layer_of_the_students_size(
    tmp_path: Path, kind: str
) -> None:
    padded = f"file:{weights_folder(tmp_path / 'padded', vocabulary=264)}"
    error = refused(tmp_path, compared(tmp_path, padded, kind))
    assert error.reason == "vocabulary_mismatch"
    assert f"{padded} has an output layer for 264 ids" in str(error)
    assert f"file:{tmp_path / 'weights'} for 258" in str(error)
    assert "leave `distribution` out" in str(error)
    stored = find_tokenizer(spec(tmp_path, padded), file_sources(tmp_path))
    assert stored.reference == padded, "padding matters to nobody else"
    for same in (f"file:{weights_folder(tmp_path / 'same')}", f"file:{tmp_path / 'weights'}"):
        found = find_tokenizer(compared(tmp_path, same, kind), file_sources(tmp_path))
        assert found.reference == same


def test_teachers_whose_signals_are_learnt_share_one_template(tmp_path: Path) -> None:
    one, two = (weights_folder(tmp_path / name) for name in ("one", "two"))
    (two / "chat_template.jinja").write_text(CHATML + " ")
    references = (f"file:{one}", f"file:{two}")
    error = refused(tmp_path, taught(tmp_path, *references))
    assert "chat templates" in str(error)
    found = find_tokenizer(taught(tmp_path, *references, kind="text"), file_sources(tmp_path))
    assert found.source == f"file:{one}"
