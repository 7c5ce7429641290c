"""What one call of a teacher ended in, whichever route it took."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Usage:
    """What the teacher bills, in its own count."""

    prompt_tokens: int
    completion_tokens: int


@dataclass(frozen=True)
class Answered:
    """An answer. `body` is the response's JSON text as it came."""

    body: str
    usage: Usage


@dataclass(frozen=True)
class Retry:
    """No answer now, perhaps later; `after` are the seconds that the teacher asked for.

    `lost`: the teacher may have computed and billed an answer that did not arrive. `away`: it is
    perhaps not this item: as if nobody were there, or had no time for anybody.
    """

    reason: str
    detail: str
    after: float | None = None
    lost: bool = False
    away: bool = False


@dataclass(frozen=True)
class Reject:
    """No answer to this item, ever. `usage` is what was billed for it, where that is known;
    `lost` where something may have been billed and nobody knows what."""

    reason: str
    detail: str
    usage: Usage | None = None
    lost: bool = False


Outcome = Answered | Retry | Reject
