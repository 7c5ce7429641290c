"""Which held-out rows are measured, and in which parts.

The suite of a dataset follows from its frozen `heldout.json` alone, so every worker cuts it in
the same way: ranges of the validation rows first, then of the test rows, then one part of answers
to test prompts. Part numbers are the same for every checkpoint and for the teacher's reference.
"""

from __future__ import annotations

import io
import json
from dataclasses import dataclass
from typing import Any, Literal

import pyarrow.parquet as pq

from services.evaluator.reasons import HELDOUT_ROW_MALFORMED, NO_SUCH_PART
from stillhouse.chassis.errors import PermanentError
from stillhouse.chassis.storage import ObjectStore
from stillhouse.contracts.artifacts import ObjectRef
from stillhouse.contracts.events import Split
from stillhouse.contracts.shards import SHARD_SCHEMA, Heldout
from stillhouse.contracts.signals import StoredTopK


@dataclass(frozen=True)
class Row:
    """A held-out row: the teacher's tokens and what it thought of them.

    Ids `prompt_tokens` .. end are supervised; `signal` has one position for each of them and is
    None where the row is text only. So it is where the row holds counts of drawn ids (`drawn`):
    they are unbiased in a mean that is trained on, and a divergence from them is not.
    """

    row_id: str
    prompt_id: str
    prompt: str
    answer: str
    finish_reason: str
    ids: tuple[int, ...]
    prompt_tokens: int
    signal: StoredTopK | None
    drawn: bool = False

    @property
    def supervised(self) -> int:
        return len(self.ids) - self.prompt_tokens


@dataclass(frozen=True)
class Part:
    """Work of one job: rows `start` .. `stop` of a split, or all the answers to its prompts."""

    number: int
    split: Split
    kind: Literal["rows", "answers"]
    start: int
    stop: int


def plan_parts(validation: int, test: int, rows_per_part: int) -> list[Part]:
    """Cut a number of validation and test rows into parts."""
    parts: list[Part] = []
    counts: tuple[tuple[Split, int], ...] = (("validation", validation), ("test", test))
    for split, count in counts:
        for start in range(0, count, rows_per_part):
            stop = min(start + rows_per_part, count)
            parts.append(Part(len(parts), split, "rows", start, stop))
    parts.append(Part(len(parts), "test", "answers", 0, test))
    return parts


@dataclass(frozen=True)
class Suite:
    """The parts over one dataset's held-out rows."""

    heldout: Heldout
    heldout_ref: ObjectRef
    parts: tuple[Part, ...]

    @classmethod
    def of(cls, heldout: Heldout, ref: ObjectRef, rows_per_part: int) -> Suite:
        rows = {"validation": 0, "test": 0, "train": 0}
        for entry in heldout.shards:
            rows[entry.split] += entry.rows
        parts = plan_parts(rows["validation"], rows["test"], rows_per_part)
        return cls(heldout, ref, tuple(parts))

    def of_split(self, split: Split) -> list[Part]:
        return [part for part in self.parts if part.split == split]

    def part(self, number: int) -> Part:
        if not 0 <= number < len(self.parts):
            raise PermanentError(
                f"expected a part below {len(self.parts)}, found {number}", reason=NO_SUCH_PART
            )
        return self.parts[number]

    def load_rows(self, store: ObjectStore, split: Split) -> list[Row]:
        """Read the rows of a split, in the order of shards and of rows in them."""
        rows: list[Row] = []
        for entry in sorted(self.heldout.shards, key=lambda entry: entry.batch):
            if entry.split == split and entry.rows:
                rows += read_shard(store.get(entry.shard), entry.shard.key)
        return rows


def read_shard(data: bytes, key: str) -> list[Row]:
    """Read the rows of a shard. Raises PermanentError for what does not fit the format."""
    table = pq.read_table(io.BytesIO(data), columns=SHARD_SCHEMA.names)
    return [_row(record, key) for record in table.to_pylist()]


def _row(record: dict[str, Any], key: str) -> Row:
    ids, prompt_tokens = tuple(record["input_ids"]), int(record["prompt_tokens"])
    supervised = len(ids) - prompt_tokens
    # The first supervised position needs at least one id before it.
    if prompt_tokens < 1 or supervised < 1 or supervised != record["supervised_tokens"]:
        raise PermanentError(
            f"{key}: row {record['row_id']} has {len(ids)} ids, {prompt_tokens} of the prompt and "
            f"{record['supervised_tokens']} supervised, which does not add up",
            reason=HELDOUT_ROW_MALFORMED,
        )
    messages = json.loads(record["messages"])
    return Row(
        row_id=record["row_id"],
        prompt_id=record["prompt_id"],
        prompt=str(messages[-1]["content"]) if messages else "",
        answer=record["answer"],
        finish_reason=record["finish_reason"],
        ids=ids,
        prompt_tokens=prompt_tokens,
        signal=_signal(record),
        drawn=record["signal"] == "counts",
    )


def _signal(record: dict[str, Any]) -> StoredTopK | None:
    if record["signal"] != "topk":
        return None
    return StoredTopK(
        slots=int(record["signal_slots"]),
        ids=record["signal_ids"],
        first=record["signal_first"],
        rest=record["signal_rest"],
        tail=record["signal_tail"],
    )


def first_of_each_prompt(rows: list[Row], count: int) -> list[Row]:
    """Return the first row of each of the first `count` prompts."""
    found: dict[str, Row] = {}
    for row in rows:
        if len(found) == count:
            break
        found.setdefault(row.prompt_id, row)
    return list(found.values())[:count]
