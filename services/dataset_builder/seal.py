"""Freezing: `heldout.json` when all held-out shards exist, `dataset.json` when all shards do.

Whoever sees all shards seals. There is no lease: what is written follows from immutable shards
alone, so two jobs that seal at once write the same bytes and publish the same event, and the
worst that a race costs is reading the shards twice.

Cost. After each shard: for a held-out batch one HEAD of `heldout.json` and HEADs of the held-out
shards from the newest down to the first that is missing; for every batch one HEAD of
`responses.json`. The gateway sends batches in order within a window, so a missing shard is found
within that window. Sealing itself asks for every shard once (THREADS at a time) and reads every
byte of the dataset once for the digests: 10,000 shards of 2 MB at 300 MB/s are 67 s. Beyond some
100,000 shards that outgrows a job, and shards would need their entries beside them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from services.dataset_builder import metrics, shards
from services.dataset_builder.inputs import read_items
from services.dataset_builder.steps.clean import answer_sha256
from stillhouse.chassis.errors import MissingObject, PermanentError, RetryableError
from stillhouse.chassis.storage import AlreadyExists, ObjectStore
from stillhouse.contracts import artifacts
from stillhouse.contracts.artifacts import ObjectRef
from stillhouse.contracts.canonical import sha256_hex
from stillhouse.contracts.events import DatasetSealed, HeldoutSealed, Split
from stillhouse.contracts.responses import ResponsesClosed
from stillhouse.contracts.shards import Dataset, Heldout, ShardEntry, ShardHeader
from stillhouse.contracts.spec import ResolvedSpec

THREADS = 8

A = TypeVar("A")
B = TypeVar("B")


def heldout_event(store: ObjectStore, spec: ResolvedSpec) -> HeldoutSealed | None:
    """Seal the held-out rows when all their shards exist; the event again when they are sealed.

    None while a held-out shard is missing.
    """
    found = store.find_model(artifacts.heldout_key(spec.tenant_id, spec.dataset_id), Heldout)
    if found is not None:
        return HeldoutSealed(dataset_id=spec.dataset_id, heldout=found[1])
    if not all_shards_exist(store, spec, spec.batches.heldout):
        return None
    return HeldoutSealed(dataset_id=spec.dataset_id, heldout=_seal_heldout(store, spec))


def dataset_event(store: ObjectStore, spec: ResolvedSpec) -> DatasetSealed | None:
    """Seal the dataset when the last batch closed and all shards exist; the event again when it
    is sealed. None while answers or shards are to come."""
    found = store.find_model(artifacts.dataset_key(spec.tenant_id, spec.dataset_id), Dataset)
    if found is not None:
        return _dataset_event(*found)
    key = artifacts.responses_key(spec.tenant_id, spec.pipeline_id)
    closed = store.find_model(key, ResponsesClosed)
    if closed is None:
        return None
    batches = closed[0].batches
    if not spec.batches.heldout <= batches <= spec.batches.total:
        raise PermanentError(
            f"{key}: expected {spec.batches.heldout} to {spec.batches.total} batches, "
            f"found {batches}",
            reason="wrong_batches",
        )
    if not all_shards_exist(store, spec, batches):
        return None
    heldout = heldout_event(store, spec)
    if heldout is None:  # all shards exist, so the held-out ones do
        raise RetryableError("a held-out shard was there and is gone")
    return _dataset_event(*_seal_dataset(store, spec, batches, heldout.heldout))


def all_shards_exist(store: ObjectStore, spec: ResolvedSpec, batches: int) -> bool:
    """Whether shards 0 to batches - 1 exist, asked from the newest side in growing groups."""
    newest, group = batches, 1
    while newest > 0:
        numbers = range(max(newest - group, 0), newest)
        keys = [artifacts.shard_key(spec.tenant_id, spec.dataset_id, n) for n in numbers]
        if not all(_each(store.exists, keys)):
            return False
        newest, group = numbers.start, min(group * 2, 64)
    return True


def _seal_heldout(store: ObjectStore, spec: ResolvedSpec) -> ObjectRef:
    entries: list[ShardEntry] = []
    prompts: set[str] = set()
    answers: set[str] = set()

    def read(batch: int) -> tuple[ShardEntry, list[str], list[str]]:
        ref, header, data = _read_shard(store, spec, batch)
        texts = [answer_sha256(text) for text in shards.read_column(data, "answer")]
        return shards.shard_entry(header, ref), _prompts(store, spec, batch), texts

    for entry, asked, answered in _each(read, range(spec.batches.heldout)):
        entries.append(entry)
        prompts.update(asked)
        answers.update(answered)
    heldout = Heldout(
        tenant_id=spec.tenant_id,
        pipeline_id=spec.pipeline_id,
        dataset_id=spec.dataset_id,
        shards=entries,
        prompt_sha256=sorted(prompts),
        answer_sha256=sorted(answers),
    )
    key = artifacts.heldout_key(spec.tenant_id, spec.dataset_id)
    try:
        ref = store.put_new_model(key, heldout)
        metrics.SEALED.labels("heldout").inc()
        return ref
    except AlreadyExists:
        return _stored(store, key)


def _seal_dataset(
    store: ObjectStore, spec: ResolvedSpec, batches: int, heldout: ObjectRef
) -> tuple[Dataset, ObjectRef]:
    entries: list[ShardEntry] = []
    rows: dict[Split, int] = {"train": 0, "validation": 0, "test": 0}
    rejections: Counter[str] = Counter()

    def read(batch: int) -> tuple[ShardEntry, dict[str, int]]:
        ref, header, _ = _read_shard(store, spec, batch)
        return shards.shard_entry(header, ref), header.counts

    for entry, counts in _each(read, range(batches)):
        entries.append(entry)
        rows[entry.split] += entry.rows
        rejections.update(counts)
    dataset = Dataset(
        tenant_id=spec.tenant_id,
        pipeline_id=spec.pipeline_id,
        dataset_id=spec.dataset_id,
        spec_sha256=spec.spec_sha256,
        heldout=heldout,
        shards=entries,
        rows=rows,
        rejections=dict(sorted(rejections.items())),
    )
    key = artifacts.dataset_key(spec.tenant_id, spec.dataset_id)
    try:
        ref = store.put_new_model(key, dataset)
        metrics.SEALED.labels("dataset").inc()
        return dataset, ref
    except AlreadyExists:
        found = store.find_model(key, Dataset)
        if found is None:
            raise RetryableError(f"{key} was there and is gone") from None
        return found


def _dataset_event(dataset: Dataset, ref: ObjectRef) -> DatasetSealed:
    return DatasetSealed(
        dataset_id=dataset.dataset_id,
        dataset=ref,
        shards=len(dataset.shards),
        rows=sum(dataset.rows.values()),
    )


def _read_shard(
    store: ObjectStore, spec: ResolvedSpec, batch: int
) -> tuple[ObjectRef, ShardHeader, bytes]:
    key = artifacts.shard_key(spec.tenant_id, spec.dataset_id, batch)
    stored = store.read(key)
    if stored is None:
        raise MissingObject(f"{key} was in the store and is gone")
    ref = ObjectRef(key=key, size=len(stored.data), sha256=sha256_hex(stored.data))
    return ref, shards.read_header(stored.data), stored.data


def _prompts(store: ObjectStore, spec: ResolvedSpec, batch: int) -> list[str]:
    """Digests of all prompts of a batch, also of those that got no row."""
    key = artifacts.prompts_key(spec.tenant_id, spec.pipeline_id, batch)
    stored = store.read(key)
    if stored is None:
        raise MissingObject(f"{key} is not in the store: acceptance writes it")
    return [item.prompt_sha256 for item in read_items(stored.data, key)]


def _stored(store: ObjectStore, key: str) -> ObjectRef:
    found = store.find(key)
    if found is None:
        raise RetryableError(f"{key} was there and is gone")
    return found


def _each(function: Callable[[A], B], values: Iterable[A]) -> Iterator[B]:
    """Map over threads, a group at a time, so that few results wait in memory."""
    waiting = list(values)
    if len(waiting) == 1:
        yield function(waiting[0])
        return
    with ThreadPoolExecutor(THREADS) as pool:
        for start in range(0, len(waiting), THREADS):
            yield from pool.map(function, waiting[start : start + THREADS])
