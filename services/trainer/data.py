"""Which rows the next step trains on: a function of the stored shards and the cursor alone.

Shards are found by their batch number, in its order; one that is not there yet is waited for, so
that a training whose shards came late reads the same rows in the same steps. Three phases follow
each other:

* `stream`: the first pass, while answers still arrive. Rows are shuffled inside their shard;
* `pass`: further passes over the sealed rows, the same way with another shuffle, if asked for;
* `decay`: ceil(decay x steps so far) further steps over the sealed rows in the order of a hash,
  from the start again should they run out.

A step takes whole rows until it has `tokens_per_step` supervised tokens, across the borders of
shards; only the end of a pass takes fewer. Steps end between rows, so a cursor needs no more than
the number of the next row.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import count
from typing import Literal

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from services.trainer.plan import decay_steps
from stillhouse.chassis.errors import DigestMismatch, PermanentError
from stillhouse.chassis.storage import ObjectStore
from stillhouse.contracts import artifacts, signals
from stillhouse.contracts.artifacts import ObjectRef
from stillhouse.contracts.canonical import digest_of, sha256_hex
from stillhouse.contracts.shards import METADATA_KEY, SHARD_SCHEMA, Dataset, ShardHeader
from stillhouse.contracts.spec import ResolvedSpec
from stillhouse.contracts.trainings import Cursor

Phase = Literal["stream", "pass", "decay"]

INVALID_SHARD = "invalid_shard"
CACHED_ROWS = 20_000  # rows kept parsed; about 40 MB at 200 positions of top-20

_COLUMNS = (
    "row_id",
    "input_ids",
    "prompt_tokens",
    "supervised_tokens",
    "signal",
    "signal_slots",
    "signal_ids",
    "signal_first",
    "signal_rest",
    "signal_tail",
)


@dataclass(frozen=True)
class Row:
    """One row: ids[prompt_tokens:] are supervised, each with a position of `signal` (None where
    the teacher's row is text only)."""

    row_id: str
    batch: int
    ids: npt.NDArray[np.int64]
    prompt_tokens: int
    signal: signals.StoredTopK | None

    @property
    def supervised(self) -> int:
        return len(self.ids) - self.prompt_tokens

    @property
    def fed(self) -> int:
        """Tokens that go through the student: nothing is predicted from the last id."""
        return len(self.ids) - 1


@dataclass(frozen=True)
class StepRows:
    """What one step trains on, and where the cursor stands after it (without its ledger entry)."""

    kind: Phase
    rows: list[Row]
    cursor: Cursor
    vocabulary: int  # every id of the rows is below it

    @property
    def tokens(self) -> int:
        return sum(row.supervised for row in self.rows)

    @property
    def rows_sha256(self) -> str:
        return digest_of([row.row_id for row in self.rows])


@dataclass(frozen=True)
class Missing:
    """The next step needs an object that is not in the store yet."""

    key: str


@dataclass(frozen=True)
class End:
    """No step is left."""

    cursor: Cursor


@dataclass(frozen=True)
class _Shard:
    ref: ObjectRef
    rows: list[Row]


class _Absent(Exception):
    def __init__(self, key: str) -> None:
        super().__init__(key)
        self.key = key


class TrainData:
    """The train rows of one training, read as they are needed."""

    def __init__(self, store: ObjectStore, resolved: ResolvedSpec) -> None:
        self._store = store
        self._resolved = resolved
        self._training = resolved.spec.training
        self._vocabulary = 0
        self._cache: OrderedDict[int, _Shard] = OrderedDict()
        self._dataset: Dataset | None = None

    def next_step(self, cursor: Cursor) -> StepRows | Missing | End:
        """The rows of the step after this cursor, what is missing for it, or the end.

        Raises DigestMismatch or PermanentError where a shard is not what it should be.
        """
        try:
            return self._next(cursor)
        except _Absent as absent:
            return Missing(absent.key)

    def order(self, pass_index: int, batch: int, cursor: Cursor) -> list[Row]:
        """The rows of a train shard (counted from the first) in the order of a pass."""
        rows = self._shard(batch, cursor).rows
        if pass_index > 0:
            deleted = self._deleted
            rows = [row for row in rows if row.row_id not in deleted]
        return sorted(rows, key=lambda row: self._hash(f"{pass_index}:{batch}:{row.row_id}"))

    def _next(self, cursor: Cursor) -> StepRows | End:
        if cursor.phase == "done":
            return End(cursor)
        if cursor.phase != "decay":
            step = self._pass_step(cursor, cursor.phase)
            if step is not None:
                return step
            self._check_recorded(cursor)  # what comes after the first pass needs the sealed rows
            following = cursor.pass_index + 1
            if following < self._training.passes:
                again = {"phase": "pass", "pass_index": following, "batch": 0, "row": 0}
                return self._next(cursor.model_copy(update=again))
            cursor = cursor.model_copy(update={"phase": "decay", "decay_from": cursor.step})
        return self._decay_step(cursor)

    def _pass_step(self, cursor: Cursor, kind: Phase) -> StepRows | None:
        """The next step of a pass; None when all its rows are trained on."""
        rows: list[Row] = []
        tokens, batch, at = 0, cursor.batch, cursor.row
        shards = list(cursor.shards)
        while tokens < self._training.tokens_per_step and self._has(batch):
            ordered = self.order(cursor.pass_index, batch, cursor)
            if batch == len(shards):
                shards.append(self._shard(batch, cursor).ref)
            while at < len(ordered) and tokens < self._training.tokens_per_step:
                rows.append(ordered[at])
                tokens += ordered[at].supervised
                at += 1
            if at == len(ordered):
                batch, at = batch + 1, 0
        if not rows:
            return None
        after = {"batch": batch, "row": at, "shards": shards}
        return self._step(kind, rows, cursor, after)

    def _decay_step(self, cursor: Cursor) -> StepRows | End:
        assert cursor.decay_from is not None
        done = cursor.model_copy(update={"phase": "done"})
        if cursor.step - cursor.decay_from >= decay_steps(self._training, cursor.decay_from):
            return End(done)
        self._check_recorded(cursor)
        order = self._decay_order(cursor)
        if not order:
            return End(done)
        rows: list[Row] = []
        tokens = 0
        for position in count(cursor.decay_position):
            if tokens >= self._training.tokens_per_step:
                break
            batch, index = order[position % len(order)]
            rows.append(self._shard(batch, cursor).rows[index])
            tokens += rows[-1].supervised
        return self._step("decay", rows, cursor, {"decay_position": position})

    def _step(
        self, kind: Phase, rows: list[Row], cursor: Cursor, after: dict[str, object]
    ) -> StepRows:
        counted: dict[str, object] = {
            "step": cursor.step + 1,
            "tokens": cursor.tokens + sum(row.supervised for row in rows),
            "rows": cursor.rows + len(rows),
        }
        return StepRows(kind, rows, cursor.model_copy(update=counted | after), self._vocabulary)

    def _decay_order(self, cursor: Cursor) -> list[tuple[int, int]]:
        """(train shard, row in it) of all sealed rows, by the hash of their ids."""
        if self._order is None:
            deleted = self._deleted
            keyed = [
                (self._hash(f"decay:{row.row_id}"), batch, index)
                for batch in range(len(self._sealed_refs()))
                for index, row in enumerate(self._shard(batch, cursor).rows)
                if row.row_id not in deleted
            ]
            self._order = [(batch, index) for _, batch, index in sorted(keyed)]
        return self._order

    _order: list[tuple[int, int]] | None = None

    def _hash(self, text: str) -> str:
        return sha256_hex(f"{self._training.seed}:{text}".encode())

    # What is in the store

    def _sealed(self) -> Dataset:
        if self._dataset is None:
            key = artifacts.dataset_key(self._resolved.tenant_id, self._resolved.dataset_id)
            found = self._store.find_model(key, Dataset)
            if found is None:
                raise _Absent(key)
            self._dataset = found[0]
        return self._dataset

    @cached_property
    def _deleted(self) -> frozenset[str]:
        return frozenset(self._sealed().deleted_rows)

    def _has(self, batch: int) -> bool:
        """Whether a pass goes on with this train shard: the sealed dataset may have fewer than
        were planned, when answers stopped being bought."""
        if batch in self._cache:
            return True
        try:
            return batch < len(self._sealed_refs())
        except _Absent:
            return batch < self._resolved.batches.train

    def _sealed_refs(self) -> list[ObjectRef]:
        return [entry.shard for entry in self._sealed().shards if entry.split == "train"]

    def _check_recorded(self, cursor: Cursor) -> None:
        """What was trained on before the sealing must be what was sealed."""
        for read, named in zip(cursor.shards, self._sealed_refs(), strict=False):
            if read != named:
                raise DigestMismatch(
                    f"{read.key}: trained on SHA-256 {read.sha256}, and dataset.json names "
                    f"{named.key} with {named.sha256}"
                )

    def _shard(self, batch: int, cursor: Cursor) -> _Shard:
        """A train shard by its number, counted from the first one; read once."""
        if batch in self._cache:
            self._cache.move_to_end(batch)
            return self._cache[batch]
        number = self._resolved.batches.heldout + batch
        key = artifacts.shard_key(self._resolved.tenant_id, self._resolved.dataset_id, number)
        if batch < len(cursor.shards):
            ref = cursor.shards[batch]
            data = self._store.get(ref)
        elif self._dataset is not None:
            ref = self._sealed_refs()[batch]
            data = self._store.get(ref)
        else:
            stored = self._store.read(key)
            if stored is None:
                raise _Absent(key)
            data = stored.data
            ref = ObjectRef(key=key, size=len(data), sha256=sha256_hex(data))
        shard = _Shard(ref, self._parse(data, key, batch, number))
        self._cache[batch] = shard
        while len(self._cache) > 1 and sum(len(s.rows) for s in self._cache.values()) > CACHED_ROWS:
            self._cache.popitem(last=False)
        return shard

    def _parse(self, data: bytes, key: str, batch: int, number: int) -> list[Row]:
        try:
            table = pq.read_table(pa.BufferReader(data), columns=list(_COLUMNS))
            header = ShardHeader.model_validate_json(table.schema.metadata[METADATA_KEY])
            for name in _COLUMNS:
                expected, found = SHARD_SCHEMA.field(name).type, table.schema.field(name).type
                if expected != found:
                    raise ValueError(f"column {name}: expected {expected}, found {found}")
        except (pa.ArrowException, KeyError, TypeError, ValueError) as error:
            raise _invalid(key, f"expected a shard with a header, found none: {error}") from error
        self._check_header(key, header, number)
        rows = [_row(values, batch) for values in table.to_pylist()]
        for row, said in zip(rows, table.column("supervised_tokens").to_pylist(), strict=True):
            self._check_row(key, row, said, header.vocabulary)
        if len(rows) != header.rows or len({row.row_id for row in rows}) != header.rows:
            raise _invalid(key, f"expected {header.rows} different rows, found {len(rows)}")
        self._vocabulary = max(self._vocabulary, header.vocabulary)
        return rows

    def _check_header(self, key: str, header: ShardHeader, number: int) -> None:
        resolved = self._resolved
        expected = {
            "dataset_id": resolved.dataset_id,
            "batch": number,
            "split": "train",
            "spec_sha256": resolved.spec_sha256,
            "tokenizer_sha256": resolved.tokenizer_sha256,
            "template_sha256": resolved.template_sha256,
        }
        for name, value in expected.items():
            if getattr(header, name) != value:
                raise _invalid(key, f"expected {name} {value}, found {getattr(header, name)}")

    def _check_row(self, key: str, row: Row, supervised: int, vocabulary: int) -> None:
        where = f"row {row.row_id}"
        if row.supervised != supervised or supervised < 1 or row.prompt_tokens < 1:
            raise _invalid(
                key,
                f"{where}: {len(row.ids)} ids, {row.prompt_tokens} of the prompt and {supervised} "
                "supervised do not fit each other (at least one of each)",
            )
        if row.ids.min() < 0 or row.ids.max() >= vocabulary:
            raise _invalid(key, f"{where}: an id is outside the vocabulary of {vocabulary}")
        if row.signal is not None:
            try:
                found = signals.decode(row.signal)
            except ValueError as error:
                raise _invalid(key, f"{where}: {error}") from error
            if found.positions != supervised or not 0 <= found.ids.max() < vocabulary:
                raise _invalid(
                    key,
                    f"{where}: a signal of {found.positions} positions for {supervised} supervised "
                    "tokens, or with ids outside the vocabulary",
                )


def _invalid(key: str, detail: str) -> PermanentError:
    return PermanentError(f"{key}: {detail}", reason=INVALID_SHARD)


def _row(values: dict[str, object], batch: int) -> Row:
    stored = None
    if values["signal"] in ("topk", "counts"):
        stored = signals.StoredTopK(
            slots=values["signal_slots"],  # type: ignore[arg-type]
            ids=values["signal_ids"],  # type: ignore[arg-type]
            first=values["signal_first"],  # type: ignore[arg-type]
            rest=values["signal_rest"],  # type: ignore[arg-type]
            tail=values["signal_tail"],  # type: ignore[arg-type]
        )
    return Row(
        row_id=str(values["row_id"]),
        batch=batch,
        ids=np.array(values["input_ids"], np.int64),
        prompt_tokens=int(values["prompt_tokens"]),  # type: ignore[call-overload]
        signal=stored,
    )


def micro_batches(rows: Sequence[Row], limit: int) -> list[list[Row]]:
    """Share the rows of a step out among passes of at most `limit` tokens (a longer row goes
    alone): the longest first, each into the first pass that has room.

    The order depends on the rows alone, so sums of floats are the same in every run.
    """
    groups: list[list[Row]] = []
    room: list[int] = []
    for row in sorted(rows, key=lambda row: -row.fed):
        at = next((n for n, left in enumerate(room) if left >= row.fed), len(groups))
        if at == len(groups):
            groups.append([])
            room.append(limit)
        groups[at].append(row)
        room[at] -= row.fed
    return groups
