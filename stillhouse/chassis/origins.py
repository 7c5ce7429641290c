"""What a place gives from which weights are fetched: a list of files with sizes, and their bytes.

Only what a model folder may hold is ever named here: configuration, tokenizer and safetensors.
Pickles and code are not fetched, so they cannot be opened.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Protocol

from stillhouse.chassis.errors import PermanentError, RetryableError

CONFIG = "config.json"
WHOLE_WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
# Everything of a model folder but its tensors.
SMALL_FILES = frozenset(
    {
        CONFIG,
        INDEX,
        "chat_template.jinja",
        "generation_config.json",
        "special_tokens_map.json",
        "tokenizer.json",
        "tokenizer_config.json",
    }
)
_TENSORS = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,199}\.safetensors")

ORIGIN_REFUSED = "reference_refused"
ORIGIN_MISSING = "reference_missing"
ORIGIN_CHANGED = "reference_changed"


class OriginUnavailable(RetryableError):
    """The place did not answer: the same may be fetched later."""


class OriginRefused(PermanentError):
    """The place may not be read, holds nothing of that name, or holds what is not expected."""


@dataclass(frozen=True)
class RemoteFile:
    """A file as its place lists it. `version` changes when its bytes do; a digest where the place
    tells one (`git_sha1` is git's, of a header and the bytes)."""

    name: str
    size: int
    version: str
    sha256: str | None = None
    git_sha1: str | None = None

    @property
    def has_digest(self) -> bool:
        return self.sha256 is not None or self.git_sha1 is not None


class Origin(Protocol):
    """One reference, looked at once; safe to read from several threads."""

    @property
    def reference(self) -> str: ...

    def pin(self) -> str:
        """Name the present content: equal pins are equal bytes."""
        ...

    def files(self) -> Mapping[str, RemoteFile]:
        """List what a model folder may hold of what is there."""
        ...

    def read(self, file: RemoteFile, start: int) -> Iterator[bytes]:
        """Yield a file from a byte on. Raises OriginUnavailable where it may go on later."""
        ...


def may_be_fetched(name: str) -> bool:
    """Whether a file has a place in a model folder."""
    return name in SMALL_FILES or _TENSORS.fullmatch(name) is not None
