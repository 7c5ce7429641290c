"""Clean: refuse text that was damaged on its way, and normalise what is compared.

The text that is trained on is not edited: its ids are the teacher's, and text and ids must not
come apart. So damage is a rejection, and normalisation goes into the digest alone.
"""

from __future__ import annotations

import re
from dataclasses import replace

from services.dataset_builder import reasons
from services.dataset_builder.records import Draft, Recipe, Reject
from stillhouse.contracts.canonical import sha256_hex
from stillhouse.contracts.spec import normalised_text

REPLACEMENT = "\ufffd"
# Control characters but tab, line feed, carriage return; and lone surrogates, which no file holds.
_BROKEN = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ud800-\udfff]")


def clean(draft: Draft, recipe: Recipe) -> Draft:
    """Check the characters and take the digest of the normalised answer."""
    text = draft.text
    if draft.finish_reason == "length":
        text = text.rstrip(REPLACEMENT)  # cut in the middle of a character
    called = [part for c in draft.calls for part in (c.function.name, c.function.arguments)]
    whole = "\n".join([text, *called])
    found = _BROKEN.search(whole)
    if found:
        raise Reject(reasons.BROKEN_TEXT, f"control character U+{ord(found[0]):04X}")
    if REPLACEMENT in whole:
        raise Reject(reasons.BROKEN_TEXT, "bytes that are no UTF-8 (U+FFFD)")
    return replace(draft, text=text, answer_sha256=answer_sha256(text))


def answer_sha256(text: str) -> str:
    """Digest under which an answer is compared with the held-out ones."""
    return sha256_hex(normalised_text(text).encode())
