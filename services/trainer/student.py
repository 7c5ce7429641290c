"""The student: where its weights come from, how it loses layers, how it is opened again.

Weights come from a folder that the spec names (checked by `chassis.model_folder`) or from a
checkpoint. Only safetensors are read and no code of a model is run.

Pruning keeps the layers that change their input most. Block influence of a layer is one minus the
mean cosine between what goes in and what comes out, over the tokens of some rendered train
prompts (ShortGPT, arXiv 2403.03853).
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from services.trainer import attention
from stillhouse.chassis.errors import PermanentError
from stillhouse.chassis.model_folder import (
    ARCHITECTURES,
    CONFIG_FIELDS,
    stage,
)
from stillhouse.chassis.model_opening import open_model
from stillhouse.chassis.references import Sources, opened

WEIGHTS_UNREADABLE = "weights_unreadable"
STUDENT_REFUSED = "student_refused"

CALIBRATION_TOKENS = 1024


def open_reference(
    reference: str,
    sources: Sources,
    scratch: Path,
    *,
    pin: str | None = None,
    watching: Callable[[int, int], None] = lambda _done, _total: None,
) -> nn.Module:
    """Open weights that a spec names. `scratch` takes a folder with the checked config beside
    links to the tensors; `watching` is told how far they are fetched. Raises PermanentError where
    they are refused or do not load."""
    with opened(reference, sources, pin=pin, watching=watching) as folder:
        try:
            stage(folder, scratch)
            return open_folder(scratch)
        finally:
            shutil.rmtree(scratch, ignore_errors=True)


def open_folder(folder: Path) -> nn.Module:
    """Load a causal language model in float32, ready to be trained, on the CPU.

    Raises PermanentError where config and tensors do not fit each other exactly: a tensor that is
    missing would be random.
    """
    model = open_model(folder, reason=WEIGHTS_UNREADABLE)
    if type(model).__name__ not in ARCHITECTURES or output_layer(model).bias is not None:
        raise PermanentError(
            f"expected a model of {', '.join(ARCHITECTURES)} whose output layer has no bias, found "
            f"{type(model).__name__}",
            reason=STUDENT_REFUSED,
        )
    model.config.use_cache = False
    attention.install(model)
    for parameter in model.parameters():
        # What was mapped from a file becomes memory of our own, which training overwrites.
        parameter.data = parameter.data.clone()
    # Dropout is off: its randomness would have to be stored to resume.
    return model.eval().requires_grad_(True)


def open_teacher(
    reference: str,
    sources: Sources,
    scratch: Path,
    student: nn.Module,
    *,
    pin: str | None = None,
    watching: Callable[[int, int], None] = lambda _done, _total: None,
) -> nn.Module:
    """Open the teacher's weights for losses over its whole distribution: nothing of it learns.

    Raises PermanentError where its vocabulary is another one than the student's.
    """
    teacher = open_reference(reference, sources, scratch, pin=pin, watching=watching)
    teacher.requires_grad_(False)
    if vocabulary(teacher) != vocabulary(student):
        raise PermanentError(
            f"the teacher {reference} has a vocabulary of {vocabulary(teacher)} and the student "
            f"{vocabulary(student)}: `training.distribution: weights` compares them id by id; "
            "take a student of the teacher's family, or `distribution: stored`",
            reason=STUDENT_REFUSED,
        )
    return teacher


def output_layer(model: nn.Module) -> Any:
    return model.get_output_embeddings()


def vocabulary(model: nn.Module) -> int:
    return int(output_layer(model).weight.shape[0])


def decoder_layers(model: nn.Module) -> nn.ModuleList:
    return model.model.layers


@contextmanager
def computed_twice(model: nn.Module, wanted: bool) -> Iterator[None]:
    """Within, the layers keep their inputs alone and are computed again in the backward pass:
    less memory, about a third more work, the same bits."""
    if not wanted:
        yield
        return
    layers = decoder_layers(model)
    for layer in layers:
        layer._gradient_checkpointing_func = partial(
            checkpoint, use_reentrant=False, preserve_rng_state=False
        )
        # Of the layer alone, not of what it holds: dropout stays off.
        layer.gradient_checkpointing = layer.training = True
    try:
        yield
    finally:
        for layer in layers:
            layer.gradient_checkpointing = layer.training = False


@torch.no_grad()  # type: ignore[untyped-decorator]
def block_influence(model: nn.Module, prompts: Sequence[Sequence[int]]) -> list[float]:
    """Influence of each layer over the tokens of the prompts; each prompt goes through alone."""
    layers = decoder_layers(model)
    sums, tokens = [0.0] * len(layers), 0
    entered: dict[int, Tensor] = {}

    def before(index: int) -> Any:
        def hook(_: nn.Module, arguments: tuple[Tensor, ...], named: dict[str, Tensor]) -> None:
            entered[index] = arguments[0] if arguments else named["hidden_states"]

        return hook

    def after(index: int) -> Any:
        def hook(_: nn.Module, __: Any, result: Any) -> None:
            left = result[0] if isinstance(result, tuple) else result
            cosine = torch.cosine_similarity(entered.pop(index).double(), left.double(), dim=-1)
            sums[index] += float((1 - cosine).sum())

        return hook

    hooks = []
    for index, layer in enumerate(layers):
        hooks.append(layer.register_forward_pre_hook(before(index), with_kwargs=True))
        hooks.append(layer.register_forward_hook(after(index)))
    try:
        for prompt in prompts:
            ids = torch.tensor([list(prompt)], device=output_layer(model).weight.device)
            model.model(input_ids=ids, use_cache=False)
            tokens += len(prompt)
    finally:
        for hook in hooks:
            hook.remove()
    if tokens == 0:
        raise PermanentError(
            "no train prompt to calibrate pruning on", reason="no_calibration_prompts"
        )
    return [total / tokens for total in sums]


def layers_to_keep(influence: Sequence[float], count: int) -> list[int]:
    """The `count` most influential layers, in their order; of equals the earlier."""
    if not 1 <= count <= len(influence):
        raise PermanentError(
            f"`student.layers`: expected 1 to {len(influence)}, the layers that `of` has, found "
            f"{count}",
            reason=STUDENT_REFUSED,
        )
    ranked = sorted(range(len(influence)), key=lambda index: (-influence[index], index))
    return sorted(ranked[:count])


def prune(model: nn.Module, keep: Sequence[int]) -> None:
    """Leave only these layers, renumbered, with a config that says so."""
    kept = nn.ModuleList([decoder_layers(model)[index] for index in keep])
    for index, layer in enumerate(kept):
        layer.self_attn.layer_idx = index
    model.model.layers = kept
    config: Any = model.config
    if getattr(config, "layer_types", None):
        config.layer_types = [config.layer_types[index] for index in keep]
    if getattr(config, "max_window_layers", None):
        config.max_window_layers = min(config.max_window_layers, len(keep))
    config.num_hidden_layers = len(keep)
    model.tie_weights()


def write_model(model: nn.Module, folder: Path) -> list[str]:
    """Write config.json and model.safetensors as `from_pretrained` reads them; return the names.

    A head that is the embedding is stored once.
    """
    config: Any = model.config
    fields = {k: v for k, v in config.to_dict().items() if k in CONFIG_FIELDS and v is not None}
    fields |= {"architectures": [type(model).__name__], "dtype": "float32", "use_cache": True}
    write_json(folder / "config.json", fields)
    # named_parameters yields a tied parameter once, under the embedding's name.
    tensors = {name: p.detach().contiguous() for name, p in model.named_parameters()}
    write_tensors(tensors, folder / "model.safetensors")
    return ["config.json", "model.safetensors"]


def write_tensors(tensors: Mapping[str, Tensor], path: Path) -> None:
    """Write a safetensors file. Raises OSError with its number where the disk took it not:
    safetensors tells a full disk in words only."""
    try:
        save_file(dict(tensors), path, metadata={"format": "pt"})
    except SafetensorError as error:
        number = re.search(r"\(os error (\d+)\)", str(error))
        if number is None:
            raise
        raise OSError(int(number[1]), f"{path} was not written: {error}") from error


def write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n")
