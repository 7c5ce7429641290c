"""What is measured before step 0, what is chosen from it, and that nothing is left behind."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from services.trainer import matrices, memory, plan, probe, work
from services.trainer.data import Row
from services.trainer.settings import TrainerSettings
from services.trainer.student import decoder_layers, open_folder
from stillhouse.contracts.trainings import Plan
from tests.support.shards import tiny_student

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_student(tmp_path_factory.mktemp("models") / "tiny", layers=4)


def settings(**changed: object) -> TrainerSettings:
    return TrainerSettings(broker_url="memory://", device="cpu", **changed)  # type: ignore[arg-type]


def test_a_probe_leaves_the_student_as_it_was(folder: Path) -> None:
    model = open_folder(folder)
    before = {name: each.clone() for name, each in model.state_dict().items()}
    said = settings()
    found = probe.suited(model, 4, CPU, said, plan.environment(CPU, said))
    assert found.dtype in ("float32", "bfloat16")
    assert found.micro_batch_tokens == probe.CPU_TOKENS
    assert len(decoder_layers(model)) == 4
    assert all(parameter.grad is None for parameter in model.parameters())
    assert all(torch.equal(each, before[name]) for name, each in model.state_dict().items())


def test_what_the_operator_says_is_not_measured(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(probe, "_faster")
    said = settings(dtype="bfloat16", micro_batch_tokens=77)
    found = probe.suited(open_folder(folder), 4, CPU, said, plan.environment(CPU, said))
    assert (found.dtype, found.micro_batch_tokens) == ("bfloat16", 77)


def test_what_a_token_keeps_grows_with_the_layers(folder: Path) -> None:
    said = settings(dtype="float32")
    here = plan.environment(CPU, said)
    model = open_folder(folder)
    found = [probe.suited(model, n, CPU, said, here).activation_bytes for n in (2, 4)]
    assert found[1] == pytest.approx(2 * found[0], abs=1)
    hidden = model.config.hidden_size
    # Each layer keeps at least its two inputs to norms, its queries and what its MLP multiplies.
    assert found[0] >= 2 * 4 * (4 * hidden + 2 * model.config.intermediate_size)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_weights_and_their_copies_are_not_counted_as_a_tokens(
    folder: Path, monkeypatch: pytest.MonkeyPatch, dtype: str
) -> None:
    """They are there once, however many tokens there are."""
    model = open_folder(folder)
    found = []
    for tokens in (256, 1024):
        monkeypatch.setattr(probe, "_TOKENS", tokens)
        monkeypatch.setattr(probe, "_ROW", tokens // 2)
        found.append(probe._activation_bytes(model, 4, CPU, dtype))
    assert found[0] == pytest.approx(found[1], rel=1e-3)


def test_bfloat16_is_chosen_only_where_it_is_clearly_faster() -> None:
    assert probe.choose({"float32": 1.5, "bfloat16": 1.0}) == "bfloat16"
    assert probe.choose({"float32": 1.1, "bfloat16": 1.0}) == "float32"
    assert probe.choose({"float32": 0.5, "bfloat16": 1.0}) == "float32"


def test_a_processor_without_bfloat16_is_not_probed(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"):
        monkeypatch.setattr(torch.cpu, name, lambda: False)
    monkeypatch.delattr(probe, "_least")
    said = settings()
    found = probe.suited(open_folder(folder), 4, CPU, said, plan.environment(CPU, said))
    assert found.dtype == "float32"


@pytest.mark.parametrize(
    ("activations", "available", "tokens"),
    [(0, 0, 1024), (1 << 10, 1 << 30, 1024), (1 << 20, 1 << 31, 512), (1 << 30, 1 << 30, 256)],
)
def test_a_micro_batch_on_a_cpu_takes_a_quarter_of_the_memory_at_most(
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    activations: int,
    available: int,
    tokens: int,
) -> None:
    monkeypatch.setattr(memory, "available", lambda _: available)
    monkeypatch.setattr(probe, "_activation_bytes", lambda *_: activations)
    said = settings(dtype="float32")
    found = probe.suited(open_folder(folder), 4, CPU, said, plan.environment(CPU, said))
    assert found.micro_batch_tokens == tokens


@pytest.mark.parametrize(
    ("seconds", "size"),
    [
        ({1: 1.0, 2: 1.9, 4: 3.79, 8: None}, 2),  # 4 is faster by less than its memory is worth
        ({1: 1.0, 2: 1.5, 4: 2.0, 8: 2.5}, 8),
        ({1: 1.0, 2: None, 4: 0.1, 8: 0.1}, 1),  # nothing larger is tried
        ({1: None, 2: None, 4: None, 8: None}, 1),
    ],
)
def test_the_smallest_of_the_fastest_sizes_is_taken(
    seconds: dict[int, float | None], size: int
) -> None:
    assert probe.quickest((1, 2, 4, 8), lambda tokens: seconds[tokens]) == size


def test_a_library_that_rounds_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    matrices.usable.cache_clear()
    honest = matrices._products

    def rounded(one: torch.Tensor, other: torch.Tensor) -> list[torch.Tensor]:
        return honest(one.bfloat16().float(), other)

    try:
        with monkeypatch.context() as patched:
            patched.setattr(matrices, "_products", rounded)
            assert not matrices.usable()
            matrices.use(matrices.ONEDNN)  # a plan from elsewhere
            assert torch.backends.mkldnn.matmul.fp32_precision == "ieee"
    finally:
        matrices.usable.cache_clear()


def test_a_plan_keeps_its_library_where_it_can_be_had(monkeypatch: pytest.MonkeyPatch) -> None:
    here = plan.environment(CPU, settings()).model_copy(update={"matrices": matrices.NATIVE})
    planned = here.model_copy(update={"matrices": matrices.ONEDNN, "dtype": "bfloat16"})
    settled = Plan(training_id="t", micro_batch_tokens=1, environment=planned, started_at="")
    monkeypatch.setattr(matrices, "usable", lambda: True)
    assert plan.as_planned(here, settled) == planned
    monkeypatch.setattr(matrices, "usable", lambda: False)
    assert plan.as_planned(here, settled) != planned  # its bits are not those of the plan


def test_the_operations_counted_are_those_that_torch_counts(folder: Path) -> None:
    model = open_folder(folder)
    random = np.random.default_rng(1)
    rows = [Row(str(n), 0, random.integers(4, 99, n), 1, None) for n in (20, 31)]
    model.set_attn_implementation("eager")  # torch counts no operation of a CPU's fused attention
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        for row in rows:
            model(input_ids=torch.from_numpy(row.ids[:-1])[None], use_cache=False)
    found = work.step_flops(model, rows) / 3
    # torch counts the scores above the diagonal too; they are skipped.
    attention = model.config.num_attention_heads * decoder_layers(model)[0].self_attn.head_dim
    skipped = 2 * 4 * attention * sum(row.fed**2 for row in rows)
    assert counter.get_total_flops() == found + skipped
    taught = work.step_flops(model, rows, teacher=model)
    assert taught == pytest.approx(4 * found)
    assert work.peak_flops(CPU, "float32", "native") > 1e6
