"""A byte-level tokenizer with a ChatML template, made in code: 256 bytes and two special tokens.

The id of a byte is its value, so a test can read ids; `write_folder` lays the files out as a
`from_pretrained` folder does, where the gateway looks for a teacher's tokenizer.
"""

from __future__ import annotations

import functools
import json
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from stillhouse.contracts.chat import ChatTokenizer

START, END = "<|im_start|>", "<|im_end|>"
START_ID, END_ID = 256, 257
VOCABULARY = 258

CHATML = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


def byte_characters() -> list[str]:
    """The printable character that byte-level tokenizers write for each byte (GPT-2's table)."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    found = {byte: chr(byte) for byte in printable}
    spare = 256
    for byte in range(256):
        if byte not in found:
            found[byte] = chr(spare)
            spare += 1
    return [found[byte] for byte in range(256)]


@functools.cache
def tiny_chat_tokenizer() -> ChatTokenizer:
    tokenizer = Tokenizer(
        models.BPE(vocab={c: i for i, c in enumerate(byte_characters())}, merges=[])
    )
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(START, special=True), AddedToken(END, special=True)])
    return ChatTokenizer(
        tokenizer_json=tokenizer.to_str(), chat_template=CHATML, bos_token=START, eos_token=END
    )


def write_folder(folder: Path) -> Path:
    """Write tokenizer.json and tokenizer_config.json; return the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    chat = tiny_chat_tokenizer()
    (folder / "tokenizer.json").write_text(chat.tokenizer_json)
    (folder / "tokenizer_config.json").write_text(
        json.dumps(
            {
                "tokenizer_class": "PreTrainedTokenizerFast",
                "chat_template": chat.chat_template,
                "bos_token": chat.bos_token,
                "eos_token": chat.eos_token,
                "pad_token": chat.eos_token,
            },
            indent=2,
        )
    )
    return folder


def read_folder(folder: Path) -> ChatTokenizer:
    """Read such a folder, or that of a published model."""
    config = json.loads((folder / "tokenizer_config.json").read_text())
    separate = folder / "chat_template.jinja"
    template = separate.read_text() if separate.exists() else config["chat_template"]

    def text(name: str) -> str | None:
        value = config.get(name)
        found = value["content"] if isinstance(value, dict) else value
        return None if found is None else str(found)

    return ChatTokenizer(
        tokenizer_json=(folder / "tokenizer.json").read_text(),
        chat_template=template,
        bos_token=text("bos_token"),
        eos_token=text("eos_token") or "",
    )


def token_bytes(chat: ChatTokenizer) -> list[bytes]:
    """What each id adds to an answer's text; empty for special tokens."""
    back = {c: byte for byte, c in enumerate(byte_characters())}
    found = []
    special = set(chat.tokenizer.get_added_tokens_decoder())
    for token_id in range(chat.vocabulary):
        token = chat.tokenizer.id_to_token(token_id)
        if token is None or token_id in special:
            found.append(b"")
        elif all(c in back for c in token):
            found.append(bytes(back[c] for c in token))
        else:
            found.append(chat.decode([token_id]).encode())
    return found
