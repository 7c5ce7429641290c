"""Which prompt goes where: split by hash, ordered by seed, grouped into batches.

Whether a prompt is held out depends on its text, the share and the seed alone, so it is decided
the same in every file that holds it. Validation batches come first, then test, then train; the
samples of one prompt are in different batches.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from services.teacher_gateway.prompts import Prompt, PromptsRefused
from stillhouse.contracts.canonical import sha256_hex
from stillhouse.contracts.events import Split
from stillhouse.contracts.spec import Batches, Spec, heldout_split

# The order of the batches, in which `Batches.split_of` reads it back.
ORDER: tuple[Split, ...] = ("validation", "test", "train")


@dataclass(frozen=True, slots=True)
class Slot:
    """One item to be: a prompt and a sample number."""

    prompt: Prompt
    sample: int


@dataclass(frozen=True)
class Plan:
    batches: list[list[Slot]]
    numbers: Batches

    @property
    def items(self) -> int:
        return sum(len(batch) for batch in self.batches)


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
    asked = spec.prompts
    grouped = {split: _group(parts[split], asked.samples, asked.batch, seed) for split in ORDER}
    return Plan(
        batches=[batch for split in ORDER for batch in grouped[split]],
        numbers=Batches(**{split: len(grouped[split]) for split in ORDER}),
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
