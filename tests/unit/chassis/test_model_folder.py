"""Folders of weights: only below the operator's folders, only safetensors, only known models."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from stillhouse.chassis import model_folder as m
from stillhouse.chassis.errors import PermanentError

CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 300,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
}


@pytest.fixture
def root(tmp_path: Path) -> Path:
    folder = tmp_path / "models" / "tiny"
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(CONFIG))
    (folder / "model.safetensors").write_bytes(b"")
    return tmp_path / "models"


def _reason(reference: str, *roots: Path) -> str:
    with pytest.raises(PermanentError) as found:
        m.resolve_folder(reference, roots)
    return found.value.reason


@pytest.mark.parametrize("form", ["file:{}", "file://{}"])
def test_a_folder_below_a_root_is_found(root: Path, form: str) -> None:
    folder = m.resolve_folder(form.format(root / "tiny"), [root])
    assert folder == root / "tiny"
    assert m.check_model_folder(folder) == CONFIG


def test_a_folder_elsewhere_is_refused_whether_or_not_it_exists(root: Path) -> None:
    assert _reason(f"file:{root.parent}", root) == m.FOLDER_REFUSED
    assert _reason(f"file:{root}/../absent", root) == m.FOLDER_REFUSED
    assert _reason("file:tiny", root) == m.FOLDER_REFUSED
    assert _reason(f"file:{root}/tiny") == m.FOLDER_REFUSED


def test_an_absent_folder_is_named_as_such(root: Path) -> None:
    assert _reason(f"file:{root}/absent", root) == m.FOLDER_MISSING


def test_links_that_lead_out_are_refused(root: Path) -> None:
    outside = root.parent / "secret.json"
    outside.write_text("{}")
    (root / "way-out").symlink_to(root.parent)
    assert _reason(f"file:{root}/way-out", root) == m.FOLDER_REFUSED
    (root / "tiny" / "tokenizer.json").symlink_to(outside)
    assert _reason(f"file:{root}/tiny", root) == m.FOLDER_REFUSED


def test_links_that_stay_inside_are_followed(root: Path) -> None:
    (root / "latest").symlink_to(root / "tiny")
    assert m.resolve_folder(f"file:{root}/latest", [root]) == root / "tiny"


@pytest.mark.parametrize(
    "change",
    [
        {"auto_map": {"AutoModelForCausalLM": "modeling.Mine"}},
        {"architectures": ["MyModel"]},
        {"architectures": ["LlamaForCausalLM", "MyModel"]},
        {"architectures": None},
        {"model_type": "mine"},
        {"quantization_config": {"bits": 4}},
        {"vocab_size": 10**9},
        {"hidden_size": True},
        {"num_hidden_layers": "2"},
    ],
)
def test_a_config_that_is_not_known_to_be_safe_is_refused(change: dict[str, Any]) -> None:
    assert m.check_config(CONFIG) == "LlamaForCausalLM"
    with pytest.raises(PermanentError, match=r"config\.json"):
        m.check_config(CONFIG | change)


def test_pickled_weights_are_refused(root: Path) -> None:
    (root / "tiny" / "model.safetensors").rename(root / "tiny" / "pytorch_model.bin")
    with pytest.raises(PermanentError, match="save the weights again"):
        m.check_model_folder(root / "tiny")


def test_a_config_that_is_not_json_is_refused(root: Path) -> None:
    (root / "tiny" / "config.json").write_text("[1]")
    with pytest.raises(PermanentError, match="expected a JSON object"):
        m.check_model_folder(root / "tiny")
    (root / "tiny" / "config.json").write_text("{")
    with pytest.raises(PermanentError, match="not JSON"):
        m.check_model_folder(root / "tiny")


def test_what_is_loaded_is_the_known_part_of_a_folder(root: Path) -> None:
    """Fields that name code or kernels, and files that are no tensors, stay outside."""
    folder, scratch = root / "tiny", root.parent / "scratch"
    (folder / "config.json").write_text(json.dumps(CONFIG | {"_attn_implementation": "a/kernel"}))
    (folder / "modeling.py").write_text("")
    for _ in range(2):
        m.stage(folder, scratch)
    assert sorted(path.name for path in scratch.iterdir()) == ["config.json", "model.safetensors"]
    assert json.loads((scratch / "config.json").read_text()) == CONFIG


@pytest.mark.parametrize("name", ["../../secret.safetensors", "/etc/passwd", "", 7])
def test_an_index_names_files_beside_it_only(root: Path, name: object) -> None:
    folder, scratch = root / "tiny", root.parent / "scratch"
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "model.safetensors"}}))
    m.stage(folder, scratch)
    assert (scratch / index.name).exists()
    index.write_text(json.dumps({"weight_map": {"a": name} if name != 7 else [name]}))
    with pytest.raises(PermanentError, match="files beside it"):
        m.stage(folder, scratch)
