"""What may go wrong here beside the chassis's families of errors."""

from __future__ import annotations

from stillhouse.chassis.errors import StillhouseError


class AttemptFailed(StillhouseError):
    """An attempt to build a shard failed; its error is stored, and another attempt may follow."""
