"""A tiny random Llama whose answers are printable, so that its generated text makes rows.

folder = speaking_weights(tmp_path / "teacher")      # a from_pretrained folder
"""

from __future__ import annotations

import json
from pathlib import Path

from tests.support.tiny_tokenizer import END_ID, VOCABULARY, write_folder

HIDDEN = 32
_PRINTABLE = [10, *range(32, 127)]


def speaking_weights(
    folder: Path, *, seed: int = 0, padded: int = 0, end: float = 1.5, positions: int = 512
) -> Path:
    """Write weights that say ASCII and end after about ten tokens.

    One hidden feature is held constant by every embedding, and the head reads from it which ids
    are likely: `end` is how likely the end of turn is. Everything else is random by `seed`.
    `padded` are ids beyond the tokenizer, about as likely as the others.
    """
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=VOCABULARY + padded,
        hidden_size=HIDDEN,
        intermediate_size=2 * HIDDEN,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=positions,
        tie_word_embeddings=False,
        bos_token_id=256,
        eos_token_id=END_ID,
        pad_token_id=END_ID,
        initializer_range=0.2,
        dtype="float32",
    )
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        model = LlamaForCausalLM(config)
        model.model.embed_tokens.weight[:, 0] = 3.0
        head = model.lm_head.weight
        head *= 2
        head[:, 0] = -8.0
        head[_PRINTABLE, 0] = 0.0
        head[END_ID, 0] = end
        head[VOCABULARY:, 0] = 0.0
    model.save_pretrained(folder)
    # The template's own end of turn is not all that may end an answer.
    path = folder / "generation_config.json"
    written = json.loads(path.read_text())
    path.write_text(json.dumps({**written, "eos_token_id": [END_ID]}))
    return write_folder(folder)
