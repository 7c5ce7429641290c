"""Opens a staged folder of weights with transformers, for whoever computes with them.

Only safetensors are read, and no code of a model is run; `model_folder` says what is refused
unread. Nothing heavy is imported before a model is opened: call it in the process that computes.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from stillhouse.chassis.errors import PermanentError, RetryableError
from stillhouse.chassis.model_folder import WEIGHTS_REFUSED


def open_model(
    folder: Path,
    *,
    name: str | None = None,
    dtype: str = "float32",
    reason: str = WEIGHTS_REFUSED,
) -> Any:
    """Load a causal language model on the CPU, `dtype` by its torch name.

    `name` is what people know the folder by. Raises PermanentError (`reason`) where config and
    tensors do not fit each other exactly: a tensor that is missing would be random.
    """
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    name = name or str(folder)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        model, found = AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=dtype,
            attn_implementation="sdpa",
            local_files_only=True,
            use_safetensors=True,
            trust_remote_code=False,
            output_loading_info=True,
        )
    except FileNotFoundError as error:
        raise RetryableError(f"{name} went away while it was opened: {error}") from error
    except MemoryError:
        raise
    except Exception as error:  # what a damaged file raises is not documented
        raise PermanentError(f"{name} does not load as a model: {error}", reason=reason) from error
    wrong = {kind: sorted(map(str, keys)) for kind, keys in found.items() if keys}
    if wrong:
        raise PermanentError(
            f"{name}: weights and config.json do not fit each other: {str(wrong)[:500]}",
            reason=reason,
        )
    return model
