"""Which prompt goes where: to which teacher, into which split, in which batch.

Whether a prompt is held out, and which of several teachers it goes to, depends on the prompt and
the spec alone, so it is decided the same in every file that holds it. Validation batches come
first, then test, then train. A batch belongs to one teacher; within a split the teachers' batches
come in turns by their shares, so that any stretch of them is a mixture like the whole. The
samples of one prompt are in different batches.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

from services.teacher_gateway.prompts.file import Prompt, PromptsRefused
from services.teacher_gateway.prompts.lines import (
    NO_TEACHER,
    LineRefused,
    PromptLine,
    TeacherOf,
    answer_of,
    tags_of,
)
from stillhouse.contracts.canonical import sha256_hex
from stillhouse.contracts.events import Split
from stillhouse.contracts.spec import Batches, Spec, heldout_split

# The order of the batches, in which `Batches.split_of` reads it back.
ORDER: tuple[Split, ...] = ("validation", "test", "train")

MAX_BATCH_BYTES = 256 << 20


@dataclass(frozen=True, slots=True)
class Slot:
    """One item to be: a prompt and a sample number."""

    prompt: Prompt
    sample: int


@dataclass(frozen=True)
class Plan:
    """The batches in their order, and who answers each."""

    batches: list[list[Slot]]
    teachers: list[str]
    numbers: Batches

    @property
    def items(self) -> int:
        return sum(len(batch) for batch in self.batches)


def teacher_of(spec: Spec) -> TeacherOf:
    """Return what decides who answers a prompt: by tags, else by shares, else whoever is left."""
    teachers, seed = spec.teachers, spec.training.seed
    tagged = [teacher for teacher in teachers if teacher.tags is not None]
    shares = _shares(spec)
    rest = next((t.name for t in teachers if t.weight is None and t.tags is None), None)
    given = any(teacher.answers for teacher in teachers)

    def choose(line: PromptLine, sha256: str) -> str:
        if given:
            answer_of(line)
        if tagged:
            tags = tags_of(line)
            for teacher in tagged:
                if (teacher.tags or {}).items() <= tags.items():
                    return teacher.name
        if shares:
            point = _point(f"{seed}:teacher:{sha256}")
            return next(name for name, end in shares if point < end)
        if rest is None:
            found = ", ".join(f"{k}={v}" for k, v in sorted(tags_of(line).items())) or "none"
            raise LineRefused(NO_TEACHER, f"no teacher has its tags, which are {found}")
        return rest

    return choose


def _shares(spec: Spec) -> list[tuple[str, float]]:
    """Where the share of each teacher with a weight ends between 0 and 1."""
    weighted = [(t.name, t.weight) for t in spec.teachers if t.weight is not None]
    ends = list(accumulate(weight for _, weight in weighted))
    names = [name for name, _ in weighted]
    # The last ends at 1 exactly, also where the division would round to less.
    return list(
        zip(names, [*(end / ends[-1] for end in ends[:-1]), 1.0][: len(names)], strict=True)
    )


def _point(key: str) -> float:
    """A number from 0 up to 1, by hash."""
    return int(sha256_hex(key.encode())[:12], 16) / 16**12


def plan(prompts: Sequence[Prompt], spec: Spec) -> Plan:
    """Group the prompts. Raises PromptsRefused when a split would stay empty."""
    seed, share = spec.training.seed, spec.prompts.heldout
    parts: dict[Split, list[Prompt]] = {split: [] for split in ORDER}
    for prompt in prompts:
        parts[heldout_split(prompt.sha256, share, seed)].append(prompt)
    empty = [split for split in ORDER if not parts[split]]
    if empty:
        raise PromptsRefused(
            f"of {len(prompts)} prompts none falls to {' and none to '.join(empty)} with "
            f"`prompts.heldout: {share:g}` (half of it each for validation and test): give more "
            "prompts, or raise `prompts.heldout`",
            reason="split_empty",
        )
    mixed = {split: _mix(parts[split], spec) for split in ORDER}
    batches = [batch for split in ORDER for batch in mixed[split]]
    _check_bytes(batches)
    return Plan(
        batches=batches,
        teachers=[batch[0].prompt.teacher for batch in batches],
        numbers=Batches(**{split: len(mixed[split]) for split in ORDER}),
    )


def _mix(prompts: list[Prompt], spec: Spec) -> list[list[Slot]]:
    """Batches of one teacher each, in turns: the j-th of n stands at (j + 1/2) / n."""
    asked, seed = spec.prompts, spec.training.seed
    placed: list[tuple[float, int, list[Slot]]] = []
    for order, teacher in enumerate(spec.teachers):
        own = [prompt for prompt in prompts if prompt.teacher == teacher.name]
        batches = _group(own, asked.samples, asked.batch, seed)
        placed += [((j + 0.5) / len(batches), order, batch) for j, batch in enumerate(batches)]
    return [batch for _, _, batch in sorted(placed, key=lambda entry: entry[:2])]


def _check_bytes(batches: Sequence[Sequence[Slot]]) -> None:
    """A worker holds a batch whole: prompts are small, and answers given along may not be."""
    largest = max(sum(slot.prompt.length for slot in batch) for batch in batches)
    if largest > MAX_BATCH_BYTES:
        raise PromptsRefused(
            f"a batch would have {largest} bytes of prompts with their answers, expected at most "
            f"{MAX_BATCH_BYTES}: lower `prompts.batch`",
            reason="batch_too_large",
        )


def _group(prompts: list[Prompt], samples: int, size: int, seed: int) -> list[list[Slot]]:
    ordered = sorted(
        prompts, key=lambda prompt: sha256_hex(f"{seed}:order:{prompt.sha256}".encode())
    )
    rounds = [[Slot(prompt, sample) for prompt in ordered] for sample in range(samples)]
    if len(ordered) >= size:
        # The same order in each round: two samples of a prompt are further apart than a batch.
        rounds = [[slot for one_round in rounds for slot in one_round]]
    return [r[start : start + size] for r in rounds for start in range(0, len(r), size)]
