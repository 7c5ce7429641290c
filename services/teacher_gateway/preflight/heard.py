"""What a preflight heard of one teacher, before anything is judged."""

from __future__ import annotations

from dataclasses import dataclass, field

from services.teacher_gateway.depths import Found
from services.teacher_gateway.fitness import Unfit
from stillhouse.contracts.spec import Signal, Teacher


@dataclass(frozen=True)
class HeardAnswer:
    """One of the spec's prompts, answered."""

    prompt_tokens: int | None  # as the teacher counted them, if it did
    rendered_tokens: int  # as we do
    completion_tokens: int
    ended: bool
    ids_match: bool | None  # whether its token ids decode to its text; None: it has none
    ids_missing: bool  # they do not, since characters are listed and not tokens
    seconds: float | None  # none for one that was given along


@dataclass
class Heard:
    """All that one teacher said, or why it was not asked.

    `known`: the signal of a teacher that is not asked, by its route alone; `unusable`: of answers
    given along, those without the signal that the spec names;
    `batches_unknown`: why nobody knows whether its server has a batch API;
    `changes`: by how much log-probabilities move with a setting of the sampling, by its name;
    `unanswered`: why a question about log-probabilities has no answer, by the question's name.
    """

    teacher: Teacher
    number: int
    skipped: str = ""
    known: Signal | None = None
    batches_unknown: str = ""
    calls: int = 0
    found: Found | None = None
    unfit: Unfit | None = None
    disagreement: float | None = None
    changes: dict[str, float] = field(default_factory=dict)
    unanswered: dict[str, str] = field(default_factory=dict)
    answers: list[HeardAnswer] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)
    unusable: int = 0
    unasked: int = 0  # prompts for which there was no turn in time

    @property
    def place(self) -> str:
        """Where the teacher stands in the spec."""
        return f"teachers[{self.number}]"

    @property
    def mismatched(self) -> int:
        """Prompts that the teacher counted otherwise than we do."""
        return sum(answer.prompt_tokens != answer.rendered_tokens for answer in self.counted)

    @property
    def counted(self) -> list[HeardAnswer]:
        """Answers that say how many tokens their prompts had."""
        return [answer for answer in self.answers if answer.prompt_tokens is not None]
