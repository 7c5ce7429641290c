"""Which token is which: control tokens, and the ids of bytes where a teacher gives no ids.

Only byte-level vocabularies (GPT-2's scheme: Llama 3, Qwen, Mistral, SmolLM2, ...) can be read
from bytes: with sentence pieces the first token of an answer has two ids for the same bytes, with
and without its space, and a wrong choice would train on ids that the teacher never sampled.
"""

from __future__ import annotations

import json
from functools import cached_property

from stillhouse.contracts.chat import ChatTokenizer


class Vocabulary:
    """The tokens of one `ChatTokenizer`, read once and only as far as they are asked for."""

    def __init__(self, chat: ChatTokenizer) -> None:
        self._chat = chat

    @cached_property
    def size(self) -> int:
        return self._chat.vocabulary

    @property
    def eos_id(self) -> int:
        return self._chat.eos_id

    @cached_property
    def control(self) -> frozenset[int]:
        """Ids that are no text: an answer holds none but the one that ends it."""
        return frozenset(self.control_by_text.values()) | {self._chat.eos_id}

    @cached_property
    def control_by_text(self) -> dict[str, int]:
        added = self._chat.tokenizer.get_added_tokens_decoder()
        return {token.content: i for i, token in sorted(added.items()) if token.special}

    @cached_property
    def pieces(self) -> dict[int, bytes] | None:
        """Bytes of the text tokens by their ids, in the order of ids; None where the vocabulary
        is not byte-level."""
        if not _is_byte_level(json.loads(self._chat.tokenizer_json)):
            return None
        back = {character: byte for byte, character in enumerate(_byte_characters())}
        added = self._chat.tokenizer.get_added_tokens_decoder()
        found: dict[int, bytes] = {}
        vocabulary = self._chat.tokenizer.get_vocab(with_added_tokens=True)
        for token, i in sorted(vocabulary.items(), key=lambda pair: pair[1]):
            if i in self.control:
                continue
            if i in added:
                found[i] = token.encode()
            elif all(character in back for character in token):
                found[i] = bytes(back[character] for character in token)
            # Anything else is not of this scheme, and no answer can hold it.
        return found

    @cached_property
    def by_bytes(self) -> dict[bytes, int] | None:
        """Ids of the text tokens by their bytes; None where bytes do not decide."""
        if self.pieces is None:
            return None
        found: dict[bytes, int] = {}
        for i, data in self.pieces.items():
            found.setdefault(data, i)
        return found


def _is_byte_level(tokenizer: dict[str, object]) -> bool:
    return "ByteLevel" in _types(tokenizer.get("decoder"))


def _types(part: object) -> set[str]:
    """Names of a component and of those that a Sequence holds."""
    if not isinstance(part, dict):
        return set()
    inner = part.get("decoders")
    found = {str(part.get("type"))}
    for each in inner if isinstance(inner, list) else []:
        found |= _types(each)
    return found


def _byte_characters() -> list[str]:
    """The printable character that byte-level vocabularies write for each byte (GPT-2's table)."""
    printable = {*range(33, 127), *range(161, 173), *range(174, 256)}
    spare = iter(range(256, 512))
    return [chr(byte if byte in printable else next(spare)) for byte in range(256)]
