"""The two families of errors that a job may raise, and what becomes of each.

    StillhouseError
    |- RetryableError    the world was in the way (broker, store, time-out): the job ends, its
    |  |                 message is acknowledged, and re-drive sends the input again
    |  `- StoreUnavailable
    |     `- StoreRefused  wrong or expired keys, wrong clock, no such bucket: operator's
    `- PermanentError    trying again cannot help (bad input, missing artifact, digest mismatch):
       |                 the job publishes `stage.failed` with `fatal`
       |- DigestMismatch
       `- MissingObject

A message says what was expected, what was found, and what to do.
"""

from __future__ import annotations


class StillhouseError(Exception):
    """Base of all errors that this project raises on purpose."""


class RetryableError(StillhouseError):
    """The same work may succeed later."""


class StoreUnavailable(RetryableError):
    """The object store did not answer, or answered that it cannot now."""


class StoreRefused(StoreUnavailable):
    """The object store answered that these keys, this clock or this bucket will not do. It is no
    fault of a pipeline, so the work waits until an operator has mended it."""


class PermanentError(StillhouseError):
    """The same work can never succeed. `reason` is a short name for counting."""

    def __init__(self, detail: str, *, reason: str = "permanent_error") -> None:
        super().__init__(detail)
        self.reason = reason


class DigestMismatch(PermanentError):
    """An object is not what its manifest says: it was damaged or replaced."""

    def __init__(self, detail: str) -> None:
        super().__init__(detail, reason="digest_mismatch")


class MissingObject(PermanentError):
    """An object that a manifest names is not in the store."""

    def __init__(self, detail: str) -> None:
        super().__init__(detail, reason="missing_object")
