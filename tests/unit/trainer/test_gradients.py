"""The gradient of a step: what the formulas say, however the rows are packed and computed."""

from __future__ import annotations

import itertools
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import MistralConfig, MistralForCausalLM, Qwen3Config, Qwen3ForCausalLM

from services.trainer import attention, gradients, matrices, memory
from services.trainer.batches import collate
from services.trainer.data import Row
from services.trainer.gradients import Passes
from services.trainer.student import decoder_layers, open_folder
from stillhouse.contracts.spec import Training
from stillhouse.contracts.trainings import Environment, Plan
from tests.support.shards import tiny_student

CPU = torch.device("cpu")
LENGTHS = (40, 9, 2, 33, 33, 17)


def rows_of(*lengths: int, vocabulary: int = 150) -> list[Row]:
    random = np.random.default_rng(3)
    return [
        Row(f"row-{n}", 0, random.integers(4, vocabulary, length), max(1, length // 3), None)
        for n, length in enumerate(lengths)
    ]


def plan(tokens: int, **changed: Any) -> Plan:
    environment = Environment(
        torch=torch.__version__,
        device="cpu",
        dtype=changed.pop("dtype", "float32"),
        threads=1,
        cpu_capability="",
        matrices=changed.pop("matrices", matrices.NATIVE),
        deterministic=True,
        code="",
    )
    return Plan(
        training_id="t",
        micro_batch_tokens=tokens,
        environment=environment,
        started_at="",
        **changed,
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_student(tmp_path_factory.mktemp("models") / "tiny", layers=3)


def learnt(model: Any, rows: list[Row], settled: Plan) -> tuple[float, list[Tensor]]:
    model.zero_grad()
    loss = Passes(Training(loss="sft"), CPU, settled).gradient(model, rows)
    return loss, [parameter.grad.clone() for parameter in model.parameters()]


def plainly(model: Any, rows: list[Row]) -> tuple[float, list[Tensor]]:
    """Row by row through transformers' own attention and autograd's own everything."""
    model.zero_grad()
    model.set_attn_implementation("sdpa")
    tokens, total = sum(row.supervised for row in rows), 0.0
    for row in rows:
        ids = torch.from_numpy(row.ids)
        logits = model(input_ids=ids[None]).logits[0, row.prompt_tokens - 1 : -1]
        wanted = ids[row.prompt_tokens :]
        loss = torch.nn.functional.cross_entropy(logits, wanted, reduction="sum") / tokens
        loss.backward()
        total += float(loss.detach())
    attention.install(model)
    return total, [parameter.grad.clone() for parameter in model.parameters()]


def families(folder: Path) -> dict[str, Any]:
    small = {
        "vocab_size": 151,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
    }
    torch.manual_seed(5)
    made = {
        "untied, heads shared": Qwen3ForCausalLM(Qwen3Config(**small, tie_word_embeddings=False)),
        # Rows longer than the window see its end alone.
        "windowed": MistralForCausalLM(MistralConfig(**small, sliding_window=8)),
    }
    for model in made.values():
        attention.install(model.eval())
    return {"tied": open_folder(folder), **made}


@pytest.mark.parametrize("limit", [1, 60, 10_000])
@pytest.mark.parametrize("family", ["tied", "untied, heads shared", "windowed"])
def test_packed_rows_learn_what_each_row_learns_alone(
    folder: Path, family: str, limit: int
) -> None:
    model = families(folder)[family].double()
    rows = rows_of(*LENGTHS)
    wanted = plainly(model, rows)
    found = learnt(model, rows, plan(limit))
    assert found[0] == pytest.approx(wanted[0], rel=1e-9)
    for one, other in zip(found[1], wanted[1], strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("block", [1, 5, 16])
def test_a_window_is_looked_through_in_blocks_whatever_their_size(
    folder: Path, monkeypatch: pytest.MonkeyPatch, block: int
) -> None:
    """Rows of many windows need no mask of their length squared."""
    monkeypatch.setattr(attention, "_BLOCK", block)
    masks: list[int] = []
    attend = attention.scaled_dot_product_attention

    def seeing(*given: Any, **how: Any) -> Tensor:
        if how.get("attn_mask") is not None:
            masks.append(how["attn_mask"].numel())
        found: Tensor = attend(*given, **how)
        return found

    monkeypatch.setattr(attention, "scaled_dot_product_attention", seeing)
    model = families(folder)["windowed"].double()
    rows = rows_of(*LENGTHS)
    wanted = plainly(model, rows)
    found = learnt(model, rows, plan(60))
    assert found[0] == pytest.approx(wanted[0], rel=1e-9)
    for one, other in zip(found[1], wanted[1], strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-9)
    assert masks
    assert max(masks) <= block * (block + 8 - 1)


def test_two_micro_batches_at_most_are_put_together_at_once(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A step may have any number of them."""
    made: list[int] = []
    monkeypatch.setattr(
        gradients, "collate", lambda *given: (made.append(len(made)), collate(*given))[1]
    )
    used = itertools.count(1)
    ahead: list[int] = []
    with ThreadPoolExecutor(1) as inline:
        # Whatever was asked for has been put together when the next one is used.
        monkeypatch.setattr(gradients, "ThreadPoolExecutor", lambda *_, **__: nullcontext(inline))
        model, rows = open_folder(folder), rows_of(*[9] * 12)
        Passes(Training(loss="sft"), CPU, plan(9)).gradient(
            model,
            rows,
            between=lambda: ahead.append((inline.submit(len, made).result()) - next(used)),
        )
    assert len(made) == len(ahead) == 12
    assert max(ahead) == 1


@pytest.mark.parametrize("library", [matrices.NATIVE, matrices.ONEDNN])
def test_packed_logits_are_those_of_each_row_alone(folder: Path, library: str) -> None:
    model = open_folder(folder)
    rows = rows_of(*LENGTHS)
    packed = collate(rows, "sft", CPU)
    matrices.use(library)
    with torch.no_grad():
        together = model(
            input_ids=packed.input_ids,
            position_ids=packed.position_ids,
            documents=packed.documents,
            use_cache=False,
        ).logits[0]
        model.set_attn_implementation("sdpa")
        alone = [model(input_ids=torch.from_numpy(row.ids[:-1])[None]).logits[0] for row in rows]
    torch.testing.assert_close(together, torch.cat(alone), rtol=1e-5, atol=1e-5)


def test_a_row_does_not_see_the_rows_beside_it(folder: Path) -> None:
    model = open_folder(folder)
    one, two = rows_of(20, 30)
    other = Row("other", 0, two.ids[::-1].copy(), two.prompt_tokens, None)

    def first(*rows: Row) -> Tensor:
        packed = collate(rows, "sft", CPU)
        return model.model(
            input_ids=packed.input_ids,
            position_ids=packed.position_ids,
            documents=packed.documents,
        ).last_hidden_state[0, : one.fed]

    assert torch.equal(first(one, two), first(one, other))


def test_layers_computed_twice_give_the_same_bits_and_keep_less(folder: Path) -> None:
    model, rows = open_folder(folder), rows_of(*LENGTHS)
    # More than any machine has: each pass is too large.
    tight = plan(64, activation_bytes=1 << 60)
    kept: dict[str, int] = {}
    found = {}
    for name, settled in (("once", plan(64)), ("twice", tight)):
        saved: list[int] = []
        with torch.autograd.graph.saved_tensors_hooks(
            lambda tensor, saved=saved: (saved.append(tensor.nbytes), tensor)[1],  # type: ignore[misc]
            lambda tensor: tensor,
        ):
            found[name] = learnt(model, rows, settled)
        kept[name] = len(saved)
    assert found["once"][0] == found["twice"][0]
    for one, other in zip(found["once"][1], found["twice"][1], strict=True):
        assert torch.equal(one, other)
    assert kept["twice"] < kept["once"]
    assert not any(layer.training for layer in decoder_layers(model))


def test_nothing_reads_memory_that_it_did_not_write(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the filling that `deterministic` asks for, new memory is NaN."""
    model, rows = open_folder(folder), rows_of(*LENGTHS)
    found = {}
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", False)
    was = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        for filled in (False, True):
            torch.utils.deterministic.fill_uninitialized_memory = filled
            assert torch.empty(1000).isnan().all() == filled or not filled
            for dtype in ("float32", "bfloat16"):
                found[filled, dtype] = learnt(model, rows, plan(64, dtype=dtype))
    finally:
        torch.use_deterministic_algorithms(was)
    for dtype in ("float32", "bfloat16"):
        assert found[False, dtype][0] == found[True, dtype][0]
        for one, other in zip(found[False, dtype][1], found[True, dtype][1], strict=True):
            assert torch.equal(one, other)


def test_the_memory_that_is_left_is_what_the_system_says() -> None:
    said = dict(
        line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines() if ":" in line
    )
    total = int(said["MemTotal"].split()[0]) * 1024
    assert 0 < memory.available(CPU) <= total


def test_dropped_memory_is_kept_until_it_is_given_back() -> None:
    """In a process of its own: what is asked of the C library holds for all of one."""
    code = """
import gc, numpy
from pathlib import Path
from services.trainer import memory
def resident():
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096
memory.keep()
made = numpy.ones(8 << 20)
held = resident()
del made
kept = resident()
memory.give_back()
print(held, kept, resident())
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    held, kept, left = map(int, done.stdout.split())
    assert kept > held - (8 << 20)
    assert left < held - (56 << 20)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_rows_on_a_gpu_see_themselves_alone_too() -> None:
    device = torch.device("cuda")
    generator = torch.Generator().manual_seed(1)
    documents = attention.Documents.of([70, 5, 33], device)
    query = torch.randn(1, 4, 108, 32, generator=generator).to(device, torch.bfloat16)
    key, value = (
        torch.randn(1, 2, 108, 32, generator=generator).to(device, torch.bfloat16) for _ in range(2)
    )
    for window in (None, 16):
        found, _ = attention.attend(
            None, query, key, value, None, scaling=0.2, documents=documents, sliding_window=window
        )
        whole = (query.float(), key.float(), value.float())
        parts = zip(*(each.split([70, 5, 33], dim=2) for each in whole), strict=True)
        wanted = [
            attention.attend(None, *part, None, scaling=0.2, sliding_window=window)[0]
            for part in parts
        ]
        torch.testing.assert_close(found.float(), torch.cat(wanted, dim=1), rtol=2e-2, atol=2e-2)
