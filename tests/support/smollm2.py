"""The demo teacher's real tokenizer, as a folder and as `ChatTokenizer`; made once a session."""

from __future__ import annotations

import atexit
import functools
import os
import shutil
import tempfile
from pathlib import Path

from stillhouse.contracts.chat import ChatTokenizer
from tests.support.tiny_tokenizer import read_folder


@functools.cache
def smollm2_tokenizer_folder() -> Path:
    """Write the tokenizer that the teacher's GGUF holds (ten seconds); return its folder."""
    from stillhouse.embedded.teacher import gguf_path

    os.environ["HF_HUB_OFFLINE"] = "1"
    from transformers import AutoTokenizer

    source = gguf_path()
    folder = Path(tempfile.mkdtemp(prefix="smollm2-tokenizer-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    AutoTokenizer.from_pretrained(str(source.parent), gguf_file=source.name).save_pretrained(folder)
    return folder


@functools.cache
def smollm2_chat_tokenizer() -> ChatTokenizer:
    return read_folder(smollm2_tokenizer_folder())
