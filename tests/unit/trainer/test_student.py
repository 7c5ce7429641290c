"""The student: pruned as its formula says, and a folder that anyone can load."""

from __future__ import annotations

import errno
import json
import resource
import signal
from pathlib import Path
from typing import Any

import pytest
import torch

from services.trainer.optim import Optimizer
from services.trainer.settings import TrainerSettings
from services.trainer.student import (
    block_influence,
    layers_to_keep,
    open_folder,
    open_reference,
    prune,
    write_model,
    write_tensors,
)
from stillhouse.chassis.errors import PermanentError
from stillhouse.chassis.model_folder import CONFIG_FIELDS
from stillhouse.chassis.references import Sources, sources_of
from stillhouse.contracts.spec import Training
from tests.support.shards import tiny_student

PROMPTS = [[1, 2, 3, 4], [9, 8, 7]]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tiny_student(tmp_path / "tiny", layers=4)


def test_influence_is_one_minus_the_mean_cosine_of_what_enters_and_leaves(folder: Path) -> None:
    model = open_folder(folder)
    found = block_influence(model, PROMPTS)
    sums = torch.zeros(4, dtype=torch.float64)
    for prompt in PROMPTS:
        states = model.model(
            input_ids=torch.tensor([prompt]), output_hidden_states=True
        ).hidden_states
        # The last of transformers' states is behind the final norm, so the last layer is left out.
        for index in range(3):
            cosine = torch.cosine_similarity(
                states[index].double(), states[index + 1].double(), dim=-1
            )
            sums[index] += (1 - cosine).sum()
    assert found[:3] == pytest.approx((sums[:3] / 7).tolist())
    assert found[3] > 0


def test_a_layer_that_does_nothing_goes_first(folder: Path) -> None:
    model = open_folder(folder)
    with torch.no_grad():
        model.model.layers[2].self_attn.o_proj.weight.zero_()
        model.model.layers[2].mlp.down_proj.weight.zero_()
    expected = model(input_ids=torch.tensor(PROMPTS[:1])).logits
    keep = layers_to_keep(block_influence(model, PROMPTS), 3)
    assert keep == [0, 1, 3]
    prune(model, keep)
    assert torch.equal(model(input_ids=torch.tensor(PROMPTS[:1])).logits, expected)


def test_equal_influence_keeps_the_earlier_layer() -> None:
    assert layers_to_keep([0.1, 0.3, 0.3, 0.3], 2) == [1, 2]


@pytest.mark.parametrize("count", [0, 5])
def test_a_number_of_layers_that_there_is_not_is_refused(count: int) -> None:
    with pytest.raises(PermanentError, match="expected 1 to 4"):
        layers_to_keep([0.1] * 4, count)


def test_a_pruned_student_loads_with_from_pretrained(folder: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    model = open_folder(folder)
    prune(model, [0, 2, 3])
    out = tmp_path / "out"
    out.mkdir()
    write_model(model, out)
    ids = torch.tensor([[1, 2, 3, 4, 5]])
    loaded, info = AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
    assert not any(info.values())
    assert loaded.config.num_hidden_layers == 3
    assert torch.equal(loaded(input_ids=ids).logits, model(input_ids=ids).logits)
    generated = loaded.generate(ids, max_new_tokens=4, do_sample=False)  # layers are renumbered
    assert generated.shape == (1, 9)
    assert loaded.get_output_embeddings().weight is loaded.get_input_embeddings().weight
    config = json.loads((out / "config.json").read_text())
    assert config.keys() <= CONFIG_FIELDS
    assert config["architectures"] == ["LlamaForCausalLM"]


def below(folder: Path) -> Sources:
    return sources_of(TrainerSettings(broker_url="memory://", file_roots=str(folder)), {})


@pytest.mark.parametrize("kind", ["Qwen2", "Qwen3", "Mistral"])
def test_other_architectures_are_pruned_too(kind: str, tmp_path: Path) -> None:
    import transformers

    config = getattr(transformers, f"{kind}Config")(
        vocab_size=64,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=3,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
    )
    getattr(transformers, f"{kind}ForCausalLM")(config).save_pretrained(tmp_path / "whole")
    model = open_reference(f"file:{tmp_path / 'whole'}", below(tmp_path), tmp_path / "scratch")
    prune(model, [0, 2])
    out = tmp_path / "out"
    out.mkdir()
    write_model(model, out)
    again = open_folder(out)
    ids = torch.tensor([[1, 2, 3]])
    assert torch.equal(again(input_ids=ids).logits, model(input_ids=ids).logits)


def test_fields_that_name_code_never_reach_transformers(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = json.loads((folder / "config.json").read_text())
    config |= {"_attn_implementation": "someone/kernel", "attn_implementation": "someone/kernel"}
    (folder / "config.json").write_text(json.dumps(config))
    seen: dict[str, Any] = {}

    def look(scratch: Path) -> Any:
        seen.update(json.loads((scratch / "config.json").read_text()))
        return open_folder(scratch)

    monkeypatch.setattr("services.trainer.student.open_folder", look)
    open_reference(f"file:{folder}", below(tmp_path), tmp_path / "scratch")
    assert seen
    assert not any("attn_implementation" in name for name in seen)


def test_an_index_that_leads_out_of_the_folder_is_refused(folder: Path, tmp_path: Path) -> None:
    index = {"weight_map": {"model.norm.weight": "../other/model.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(PermanentError, match="expected files beside it"):
        open_reference(f"file:{folder}", below(tmp_path), tmp_path / "scratch")


def test_an_optimiser_goes_on_from_its_saved_state_in_the_same_bits(folder: Path) -> None:
    def step(model: Any, optimizer: Optimizer, number: int) -> None:
        torch.manual_seed(number)
        for parameter in model.parameters():
            parameter.grad = torch.randn_like(parameter)
        optimizer.clip()
        optimizer.step(1e-3)

    training = Training(weight_decay=0.1)
    straight, first = open_folder(folder), open_folder(folder)
    optimizer, before = Optimizer(straight, training), Optimizer(first, training)
    for number in range(6):
        step(straight, optimizer, number)
    for number in range(3):
        step(first, before, number)
    saved = {name: value.clone() for name, value in before.state().items()}
    after = Optimizer(first, training)
    after.load(saved, 3)
    for number in range(3, 6):
        step(first, after, number)
    for a, b in zip(straight.parameters(), first.parameters(), strict=True):
        assert torch.equal(a, b)


def test_an_optimiser_refuses_the_state_of_another_model(folder: Path, tmp_path: Path) -> None:
    other = tiny_student(tmp_path / "other", layers=2)
    model = open_folder(other)
    optimizer = Optimizer(model, Training())
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step(1e-3)
    with pytest.raises(PermanentError, match="do not fit"):
        Optimizer(open_folder(folder), Training()).load(optimizer.state(), 1)


def test_a_disk_that_takes_no_more_is_an_os_error(tmp_path: Path) -> None:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    heed = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, before[1]))
    try:
        with pytest.raises(OSError, match="was not written") as caught:
            write_tensors({"a": torch.zeros(1 << 16)}, tmp_path / "a.safetensors")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, heed)
    assert caught.value.errno == errno.EFBIG
