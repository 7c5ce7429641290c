"""Folders of weights that a spec names: where they may lie, and what is refused unread.

A folder comes from whoever posts a pipeline, so its path must lie below a folder that the
operator named, its tensors must be safetensors (pickles run code), and its config must name an
architecture that transformers itself implements. Nothing here imports torch: the gateway checks
at acceptance what trainer and evaluator open later.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from stillhouse.chassis.errors import PermanentError
from stillhouse.chassis.origins import CONFIG, INDEX
from stillhouse.contracts.spec import file_path

# Decoders whose layers stand in `model.model.layers`, with the `model_type` of their config.
ARCHITECTURES: Mapping[str, str] = {
    "LlamaForCausalLM": "llama",
    "MistralForCausalLM": "mistral",
    "Qwen2ForCausalLM": "qwen2",
    "Qwen3ForCausalLM": "qwen3",
}

# Largest values that a config may name, far above any model of these architectures: a forged
# config must not make a worker allocate without end.
_LIMITS = {
    "vocab_size": 1 << 20,
    "hidden_size": 1 << 16,
    "intermediate_size": 1 << 18,
    "num_hidden_layers": 1000,
    "num_attention_heads": 1024,
}
MAX_JSON_BYTES = 64 << 20

# All that the config classes of these architectures read. Other fields are left out before
# transformers sees the config: some name code or kernels to fetch.
CONFIG_FIELDS = frozenset(
    {
        "architectures",
        "attention_bias",
        "attention_dropout",
        "bos_token_id",
        "dtype",
        "eos_token_id",
        "head_dim",
        "hidden_act",
        "hidden_size",
        "initializer_range",
        "intermediate_size",
        "layer_types",
        "max_position_embeddings",
        "max_window_layers",
        "mlp_bias",
        "model_type",
        "num_attention_heads",
        "num_hidden_layers",
        "num_key_value_heads",
        "pad_token_id",
        "pretraining_tp",
        "rms_norm_eps",
        "rope_parameters",
        "rope_scaling",
        "rope_theta",
        "sliding_window",
        "tie_word_embeddings",
        "transformers_version",
        "use_cache",
        "use_sliding_window",
        "vocab_size",
    }
)

FOLDER_REFUSED = "model_folder_refused"
FOLDER_MISSING = "model_folder_missing"
CONFIG_REFUSED = "model_config_refused"
WEIGHTS_REFUSED = "model_weights_refused"


def resolve_folder(reference: str, file_roots: Sequence[Path]) -> Path:
    """Return the folder of a `file:` reference, with all links followed.

    Raises PermanentError where it is not an existing folder below one of `file_roots`, or where
    one of its entries is a link that leads out of them.
    """
    path = Path(file_path(reference))
    roots = [root.resolve() for root in file_roots]
    folder = path.resolve()
    # Judged before the disk is asked whether it exists, so that nobody can probe for files.
    if not path.is_absolute() or not _below(folder, roots):
        named = ", ".join(map(str, file_roots)) or "none"
        raise PermanentError(
            f"{reference} is not below a folder that this service may read (FILE_ROOTS: {named}): "
            "move the weights there, or have the operator add their folder",
            reason=FOLDER_REFUSED,
        )
    if not folder.is_dir():
        raise PermanentError(
            f"{reference} is not a folder: expected one with config.json and *.safetensors",
            reason=FOLDER_MISSING,
        )
    for entry in sorted(folder.iterdir()):
        if entry.is_symlink() and not _below(entry.resolve(), roots):
            raise PermanentError(
                f"{reference}: {entry.name} is a link that leads out of the folders that this "
                "service may read: put the file itself there",
                reason=FOLDER_REFUSED,
            )
    return folder


def read_json(folder: Path, name: str) -> dict[str, Any]:
    """Read one of the folder's JSON files. Raises PermanentError that names it."""
    path = folder / name
    try:
        if path.stat().st_size > MAX_JSON_BYTES:
            raise PermanentError(
                f"{path} has over {MAX_JSON_BYTES} bytes: that is no {name}",
                reason=CONFIG_REFUSED,
            )
        value = json.loads(path.read_text("utf-8"))
    except FileNotFoundError as error:
        raise PermanentError(
            f"{path} is missing: expected a folder as save_pretrained writes it",
            reason=FOLDER_MISSING,
        ) from error
    except ValueError as error:
        raise PermanentError(f"{path} is not JSON: {error}", reason=CONFIG_REFUSED) from error
    if not isinstance(value, dict):
        raise PermanentError(f"{path}: expected a JSON object", reason=CONFIG_REFUSED)
    return value


def check_config(config: Mapping[str, Any]) -> str:
    """Return the architecture that a config.json names. Raises PermanentError where it is
    unknown, needs code of its own, is quantised, or where a size is out of bounds."""
    if "auto_map" in config:
        raise PermanentError(
            "config.json names code of its own (auto_map), which is never run: use weights of "
            f"{', '.join(ARCHITECTURES)}",
            reason=CONFIG_REFUSED,
        )
    named = config.get("architectures")
    architecture = str(named[0]) if isinstance(named, list) and len(named) == 1 else ""
    if architecture not in ARCHITECTURES or config.get("model_type") != ARCHITECTURES[architecture]:
        raise PermanentError(
            f"config.json: expected one architecture of {', '.join(ARCHITECTURES)} with its "
            f"model_type, found architectures {named!r} and model_type "
            f"{config.get('model_type')!r}",
            reason=CONFIG_REFUSED,
        )
    if config.get("quantization_config") is not None:
        raise PermanentError(
            "config.json: quantised weights cannot be trained or compared: give float weights",
            reason=CONFIG_REFUSED,
        )
    for field, most in _LIMITS.items():
        value = config.get(field)
        if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= most:
            raise PermanentError(
                f"config.json: expected {field} of 1 to {most}, found {value!r}",
                reason=CONFIG_REFUSED,
            )
    return architecture


def weight_files(folder: Path) -> list[Path]:
    """Return the safetensors files of a folder. Raises PermanentError where there is none."""
    found = sorted(folder.glob("*.safetensors"))
    if not found:
        raise PermanentError(
            f"{folder} has no *.safetensors: other formats can run code when they are opened; "
            "save the weights again with save_pretrained",
            reason=WEIGHTS_REFUSED,
        )
    return found


def check_model_folder(folder: Path) -> dict[str, Any]:
    """Return the config of a folder that may be loaded: safetensors, a known architecture."""
    config = read_json(folder, CONFIG)
    check_config(config)
    weight_files(folder)
    return config


def stage(folder: Path, scratch: Path) -> None:
    """Lay out in `scratch` what may be loaded: the config's known fields, links to the
    safetensors, and their index where there is one. Raises PermanentError."""
    config = check_model_folder(folder)
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir(parents=True)
    known = {name: config[name] for name in sorted(config.keys() & CONFIG_FIELDS)}
    (scratch / "config.json").write_text(json.dumps(known))
    for path in weight_files(folder):
        (scratch / path.name).symlink_to(path.resolve())
    if (folder / INDEX).exists():
        (scratch / INDEX).write_text(json.dumps(checked_index(folder)))


def checked_index(folder: Path) -> dict[str, Any]:
    """Read the index of a folder, which may name files of that folder only."""
    index = read_json(folder, INDEX)
    named = index.get("weight_map")
    files = set(map(str, named.values())) if isinstance(named, dict) else {""}
    if wrong := sorted(name for name in files if not name or Path(name).name != name):
        raise PermanentError(
            f"{folder / INDEX} names {wrong[:3]}: expected files beside it",
            reason=WEIGHTS_REFUSED,
        )
    return index


def _below(path: Path, roots: Sequence[Path]) -> bool:
    return any(path.is_relative_to(root) for root in roots)
