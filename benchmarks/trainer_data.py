"""The same model and rows for every trainer of `benchmarks.trainer`, made once as plain files."""

import json
from pathlib import Path

import numpy as np

# What is learnt from: rows of LENGTH tokens, the first PROMPT of them not supervised.
LENGTH, PROMPT, ROWS, SLOTS = 256, 64, 8, 16
SHAPES = {
    # The head is three quarters of this model, as in students of 10M to 100M parameters.
    "head-heavy": {
        "vocab_size": 49_152,
        "hidden_size": 256,
        "intermediate_size": 768,
        "num_hidden_layers": 6,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    },
    # The head is a tenth, as in students of a billion parameters.
    "head-light": {
        "vocab_size": 4_096,
        "hidden_size": 384,
        "intermediate_size": 1_024,
        "num_hidden_layers": 8,
        "num_attention_heads": 6,
        "num_key_value_heads": 3,
    },
}


def write(folder: Path, shape: str, steps: int) -> None:
    """Write random weights of student and teacher, and the rows of so many steps."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    said = SHAPES[shape]
    config = LlamaConfig(
        **said, max_position_embeddings=512, tie_word_embeddings=True, dtype="float32"
    )
    for name, seed in (("model", 7), ("teacher", 8)):
        torch.manual_seed(seed)
        LlamaForCausalLM(config).save_pretrained(folder / name)
    generator = np.random.default_rng(7)
    vocabulary, count = said["vocab_size"], steps * ROWS
    ids = generator.integers(4, vocabulary, (count, LENGTH))
    supervised = LENGTH - PROMPT
    kept = np.stack(
        [
            [generator.choice(vocabulary, SLOTS, replace=False) for _ in range(supervised)]
            for _ in range(count)
        ]
    )
    kept[:, :, 0] = ids[:, PROMPT:]  # the teacher sampled its likeliest
    scores = np.sort(generator.normal(0, 3, (count, supervised, SLOTS + 1)), axis=-1)[..., ::-1]
    logp = scores - np.log(np.exp(scores).sum(-1, keepdims=True))
    np.savez(folder / "rows.npz", ids=ids, kept=kept, logp=logp[..., :-1], tail=logp[..., -1])
    (folder / "shape.json").write_text(json.dumps({"steps": steps, "shape": shape}))
