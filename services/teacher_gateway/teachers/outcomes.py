"""One call of a teacher and what it ended in, whichever route it takes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from stillhouse.contracts.chat import Message, Tools


@dataclass(frozen=True)
class Usage:
    """What the teacher bills, in its own count."""

    prompt_tokens: int
    completion_tokens: int


@dataclass(frozen=True)
class Answered:
    """An answer. `body` is the JSON text of a chat completion."""

    body: str
    usage: Usage


@dataclass(frozen=True)
class Retry:
    """No answer now, perhaps later; `after` are the seconds that the teacher asked for.

    `lost`: the teacher may have computed and billed an answer that did not arrive. `away`: it is
    perhaps not this item: as if nobody were there, or had no time for anybody. `waited`: the
    seconds after which we gave up by the deadline that the caller set; None where the other side
    decided, or a time that holds for every call.
    """

    reason: str
    detail: str
    after: float | None = None
    lost: bool = False
    away: bool = False
    waited: float | None = None


@dataclass(frozen=True)
class Reject:
    """No answer to this item, ever. `usage` is what was billed for it, where that is known;
    `lost` where something may have been billed and nobody knows what."""

    reason: str
    detail: str
    usage: Usage | None = None
    lost: bool = False


Outcome = Answered | Retry | Reject


@dataclass(frozen=True)
class Call:
    """One question to a teacher. `seed_of` names it, so that asking again says the same where the
    route honours seeds; `given` is the answer that the user gave along (a chat completion).
    `max_tokens`, `temperature` and `top_p` stand instead of the signal's where they are set."""

    messages: list[Message]
    seed_of: str
    tools: Tools | None = None
    max_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    given: str | None = None


class TeacherClient(Protocol):
    """A teacher by one route; `routes.open_teacher` makes them."""

    async def ask(self, call: Call, *, deadline: float) -> Outcome:
        """Make one call, `deadline` seconds at most."""
