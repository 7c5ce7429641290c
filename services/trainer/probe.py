"""What suits this machine: measured on the student's own layers before step 0, then in the plan.

Two layers stand for all of them: they are alike, and a probe must not take longer than it saves.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import embedding

from services.trainer import matrices, memory, student
from services.trainer.attention import Documents
from services.trainer.head import learn_head
from services.trainer.losses import TokenTargets
from services.trainer.settings import TrainerSettings
from stillhouse.contracts.trainings import Environment

# More tokens at once read weights and their gradients less often; on a CPU little is left to gain
# beyond this, and twice as many take twice the memory.
CPU_TOKENS, LEAST_CPU_TOKENS = 1024, 256
CUDA_TOKENS = (4096, 8192, 16384, 32768, 65536)
# bfloat16 costs digits: taken only where all of a step gets this much faster.
CLEARLY = 1.15
# A larger micro-batch takes more memory: only where it is this much faster.
_WORTH = 1.03
_LAYERS, _ROW, _TOKENS, _HEAD_TOKENS = 2, 256, 512, 256
# What AdamW will hold beside weights and gradients, in bytes a parameter.
_MOMENTS = 8


@dataclass(frozen=True)
class Suited:
    """activation_bytes: what one token of a micro-batch keeps until the backward pass."""

    dtype: str
    micro_batch_tokens: int
    activation_bytes: int


def suited(
    model: Any, layers: int, device: torch.device, settings: TrainerSettings, here: Environment
) -> Suited:
    """Measure a student that will have so many layers; what the settings say is not measured."""
    matrices.use(here.matrices)
    try:
        dtype = here.dtype
        if settings.dtype == "auto" and device.type == "cpu":
            dtype = _faster(model, layers, device)
        activations = _activation_bytes(model, layers, device, dtype)
        tokens = settings.micro_batch_tokens
        if tokens is None and device.type == "cpu":
            tokens = _fitting(activations, memory.available(device))
        elif tokens is None:
            tokens = _quickest(model, device, dtype)
        return Suited(dtype, tokens, activations)
    finally:
        model.zero_grad(set_to_none=True)
        gc.collect()


def _fitting(activation_bytes: int, available: int) -> int:
    tokens = CPU_TOKENS
    while tokens > LEAST_CPU_TOKENS and tokens * activation_bytes > available // 4:
        tokens //= 2
    return tokens


def _faster(model: Any, layers: int, device: torch.device) -> str:
    if not (torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()):
        return "float32"  # it would be computed with float32 and rounded
    head = _least(lambda: _head_pass(model, _HEAD_TOKENS, device)) / _HEAD_TOKENS
    seconds = {}
    with _few_layers(model) as few:
        for dtype in ("float32", "bfloat16"):
            taken = _least(lambda dtype=dtype: _layers_pass(model, _TOKENS, device, dtype))  # type: ignore[misc]
            seconds[dtype] = taken / _TOKENS * layers / few + head
    return choose(seconds)


def choose(seconds: Mapping[str, float]) -> str:
    """Of the seconds that a token takes, by dtype."""
    return "bfloat16" if seconds["float32"] > CLEARLY * seconds["bfloat16"] else "float32"


def _quickest(model: Any, device: torch.device, dtype: str) -> int:
    """On a GPU: by trying, up to what its memory takes with the optimiser's state beside it."""
    moments = _MOMENTS * sum(parameter.numel() for parameter in model.parameters())
    _, total = torch.cuda.mem_get_info(device)

    def seconds(tokens: int) -> float | None:
        def both() -> None:
            _layers_pass(model, tokens, device, dtype)
            _head_pass(model, tokens, device)
            torch.cuda.synchronize(device)

        torch.cuda.reset_peak_memory_stats(device)
        try:
            taken = _least(both, time.perf_counter)
        except torch.OutOfMemoryError:
            return None
        finally:
            torch.cuda.empty_cache()
        fits = torch.cuda.max_memory_allocated(device) + moments < 0.85 * total
        return taken if fits else None

    return quickest(CUDA_TOKENS, seconds)


def quickest(sizes: tuple[int, ...], seconds: Callable[[int], float | None]) -> int:
    """The smallest size than which no larger one that fits is worth its memory; the first one if
    none fits. `seconds` says None where a size does not fit."""
    best, rate = sizes[0], 0.0
    for tokens in sizes:
        taken = seconds(tokens)
        if taken is None:
            break
        if tokens / taken > _WORTH * rate:
            best, rate = tokens, tokens / taken
    return best


def _activation_bytes(model: Any, layers: int, device: torch.device, dtype: str) -> int:
    """What more tokens keep: weights, and their copies in bfloat16, are kept once for them all."""
    with _few_layers(model) as few:
        once, twice = (_kept_bytes(model, n * _TOKENS, device, dtype) for n in (1, 2))
    return round((twice - once) / _TOKENS * layers / few)


def _kept_bytes(model: Any, tokens: int, device: torch.device, dtype: str) -> int:
    """What a forward pass keeps for the backward one."""
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        _hidden(model, tokens, device, dtype)
    return sum(kept.values())


@contextmanager
def _few_layers(model: Any) -> Iterator[int]:
    layers = student.decoder_layers(model)
    model.model.layers = layers[:_LAYERS]
    try:
        yield len(model.model.layers)
    finally:
        model.model.layers = layers


def _layers_pass(model: Any, tokens: int, device: torch.device, dtype: str) -> None:
    _hidden(model, tokens, device, dtype).float().sum().backward()


def _hidden(model: Any, tokens: int, device: torch.device, dtype: str) -> Tensor:
    documents = Documents.of([_ROW] * (tokens // _ROW), device)
    ids = torch.arange(tokens, device=device)[None] % student.vocabulary(model)
    words = embedding(ids, model.get_input_embeddings().weight.detach()).requires_grad_()
    with torch.autocast(device.type, torch.bfloat16, enabled=dtype == "bfloat16"):
        found: Tensor = model.model(
            inputs_embeds=words,
            position_ids=torch.arange(tokens, device=device)[None] % _ROW,
            documents=documents,
            use_cache=False,
        ).last_hidden_state
    return found


def _head_pass(model: Any, tokens: int, device: torch.device) -> None:
    weight = student.output_layer(model).weight
    hidden = torch.ones(tokens, weight.shape[1], device=device)
    targets = TokenTargets(torch.zeros(tokens, dtype=torch.int64, device=device))
    learn_head(hidden, weight, targets, scale=1 / tokens)


def _least(work: Callable[[], None], clock: Callable[[], float] = time.process_time) -> float:
    """The least seconds of two; a first one, which warms up, does not count."""
    work()
    taken = []
    for _ in range(2):
        started = clock()
        work()
        taken.append(clock() - started)
    return min(taken)
