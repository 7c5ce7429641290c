"""The builder's jobs on a real store: one shard a batch, and each seal once, whatever happens."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import pytest

from services.dataset_builder import build, jobs, reasons, seal, shards
from services.dataset_builder.build import AttemptMarker, build_shard, claim
from services.dataset_builder.errors import AttemptFailed
from services.dataset_builder.handlers import HANDLERS
from services.dataset_builder.jobs import JOBS, BuilderContext
from services.dataset_builder.steps.clean import answer_sha256
from stillhouse.chassis.bus import BrokerUnavailable
from stillhouse.chassis.errors import PermanentError, RetryableError, StoreUnavailable
from stillhouse.chassis.storage import ObjectStore
from stillhouse.contracts import artifacts
from stillhouse.contracts.canonical import sha256_hex
from stillhouse.contracts.envelope import Envelope
from stillhouse.contracts.events import DatasetSealed, HeldoutSealed, ShardWritten
from stillhouse.contracts.responses import Item, Rejection
from stillhouse.contracts.shards import Dataset, Heldout, ShardHeader
from stillhouse.contracts.spec import ResolvedSpec
from tests.support.answers import close_batch, close_responses, make_body, make_item, make_items
from tests.support.shards import make_resolved_spec, stop_pipeline, store_spec

JOB_SECONDS = 20.0


@dataclass
class Told:
    """A publisher that collects. `broken` makes it fail as a broker does that is away."""

    envelopes: list[Envelope] = field(default_factory=list)
    broken: bool = False

    def publish(self, *envelopes: Envelope) -> None:
        if self.broken:
            raise BrokerUnavailable("the broker did not answer")
        self.envelopes.extend(envelopes)

    def take(self, kind: str) -> list[Envelope]:
        found = [envelope for envelope in self.envelopes if envelope.type == kind]
        self.envelopes = [envelope for envelope in self.envelopes if envelope.type != kind]
        return found


@dataclass
class Scene:
    """One accepted pipeline, and a builder process that takes its events."""

    store: ObjectStore
    spec: ResolvedSpec
    told: Told = field(default_factory=Told)

    def __post_init__(self) -> None:
        store_spec(self.store, self.spec)
        self.context = self.process()

    def process(self) -> BuilderContext:
        """Another process of the builder: nothing remembered."""
        return BuilderContext(self.store, self.told, JOB_SECONDS)

    def close(self, batch: int, *args: Any, **how: Any) -> Envelope:
        return close_batch(self.store, self.spec, batch, *args, **how)

    def take(self, envelope: Envelope, context: BuilderContext | None = None) -> None:
        for job in HANDLERS[type(envelope.event())](envelope, envelope.event()):
            JOBS[job.name](job, context or self.context)

    def header(self, batch: int) -> ShardHeader:
        return shards.read_header(self.data(batch))

    def data(self, batch: int) -> bytes:
        stored = self.store.read(self.shard_key(batch))
        assert stored is not None, f"no shard {batch}"
        return stored.data

    def shard_key(self, batch: int) -> str:
        return artifacts.shard_key(self.spec.tenant_id, self.spec.dataset_id, batch)

    def attempts(self, batch: int) -> set[str]:
        key = artifacts.build_attempt_key(self.spec.tenant_id, self.spec.dataset_id, batch, 1)
        prefix = key.rsplit("/", 1)[0]
        return {each.removeprefix(f"{prefix}/") for each in self.store.keys(prefix)}

    def heldout(self) -> Heldout:
        key = artifacts.heldout_key(self.spec.tenant_id, self.spec.dataset_id)
        found = self.store.find_model(key, Heldout)
        assert found is not None
        return found[0]

    def dataset(self) -> Dataset | None:
        key = artifacts.dataset_key(self.spec.tenant_id, self.spec.dataset_id)
        found = self.store.find_model(key, Dataset)
        return found and found[0]

    def freeze_heldout(self) -> None:
        for batch in range(self.spec.batches.heldout):
            self.take(self.close(batch))
        self.told.envelopes.clear()


@pytest.fixture
def scene(store: ObjectStore, tenant: str) -> Scene:
    return Scene(store, make_resolved_spec(tenant=tenant))


# One pipeline


def test_a_pipeline_becomes_shards_frozen_rows_and_a_sealed_dataset(scene: Scene) -> None:
    scene.take(scene.close(0))
    assert not scene.told.take(HeldoutSealed.TYPE)
    scene.take(scene.close(1))
    (sealed,) = scene.told.take(HeldoutSealed.TYPE)

    heldout = scene.store.get_model(HeldoutSealed(**sealed.payload).heldout, Heldout)
    assert [(e.batch, e.split, e.rows) for e in heldout.shards] == [
        (0, "validation", 4),
        (1, "test", 4),
    ]
    asked = [*make_items(scene.spec, 0), *make_items(scene.spec, 1)]
    assert heldout.prompt_sha256 == sorted(item.prompt_sha256 for item in asked)
    texts = shards.read_column(scene.data(0), "answer") + shards.read_column(
        scene.data(1), "answer"
    )
    assert heldout.answer_sha256 == sorted({answer_sha256(text) for text in texts})

    items = make_items(scene.spec, 3)
    lost = Rejection(item_id=items[0].item_id, stage="collect", reason="teacher_refused")
    scene.take(scene.close(3, items, rejections=[lost], bodies={items[1].item_id: "no json"}))
    scene.take(scene.close(2))
    assert scene.dataset() is None
    scene.take(close_responses(scene.store, scene.spec))
    assert scene.dataset() is None, "sealed before its last shard"
    assert not scene.told.take(DatasetSealed.TYPE)
    scene.take(scene.close(4))

    (sealed,) = scene.told.take(DatasetSealed.TYPE)
    event = DatasetSealed(**sealed.payload)
    dataset = scene.store.get_model(event.dataset, Dataset)
    assert (event.shards, event.rows) == (5, 18)
    assert [entry.batch for entry in dataset.shards] == [0, 1, 2, 3, 4]
    assert dataset.rows == {"train": 10, "validation": 4, "test": 4}
    assert dataset.rejections == {"malformed_json": 1, "teacher_refused": 1}
    assert [scene.store.get(entry.shard) for entry in dataset.shards]
    assert scene.store.get_model(dataset.heldout, Heldout) == heldout
    # Every item of every batch is one row or one rejection, and none is both.
    written = [ShardWritten(**e.payload) for e in scene.told.take(ShardWritten.TYPE)]
    assert sum(event.rows + event.rejected for event in written) == 20
    rows = [i for n in range(5) for i in shards.read_column(scene.data(n), "row_id")]
    rejected = [r.item_id for n in range(5) for r in scene.header(n).rejections]
    assert len({*rows, *rejected}) == len(rows) + len(rejected) == 20


def test_a_header_says_what_the_shard_was_made_from(scene: Scene) -> None:
    event = scene.close(0)
    scene.take(event)
    header, (told,) = scene.header(0), scene.told.take(ShardWritten.TYPE)
    assert header.responses_sha256 == event.payload["manifest"]["sha256"]
    assert header.tokenizer_sha256 == scene.spec.tokenizer_sha256
    assert (header.teacher, header.verdict_id) == ("billing", "ve-test")
    assert told.caused_by == event.event_id
    assert told.payload["shard"]["sha256"] == sha256_hex(scene.data(0))
    assert told.payload["supervised_tokens"] == header.supervised_tokens > 0


def test_train_rows_that_repeat_held_out_ones_are_dropped(scene: Scene) -> None:
    held, train = make_items(scene.spec, 1), make_items(scene.spec, 2)
    sentence = "A held-out answer of not fewer than eight words."
    scene.take(scene.close(0))
    scene.take(scene.close(1, held, bodies={held[0].item_id: plain(held[0], sentence)}))
    leaked = make_item(scene.spec, "[0/1]   SAY something short.")
    repeated = {train[0].item_id: plain(train[0], sentence.upper())}
    scene.take(scene.close(2, [leaked, *train], bodies=repeated))
    assert scene.header(2).counts == {reasons.HELDOUT_ANSWER: 1, reasons.HELDOUT_PROMPT: 1}
    assert scene.header(2).rows == 3


def test_a_batch_without_answers_is_a_shard_without_rows(scene: Scene) -> None:
    items = make_items(scene.spec, 0)
    lost = [
        Rejection(item_id=item.item_id, stage="collect", reason="budget_exhausted")
        for item in items
    ]
    scene.take(scene.close(0, items, rejections=lost))
    (told,) = scene.told.take(ShardWritten.TYPE)
    assert (told.payload["rows"], told.payload["rejected"]) == (0, 4)
    assert scene.header(0).counts == {"budget_exhausted": 4}


def test_train_batches_wait_for_the_frozen_rows(scene: Scene) -> None:
    event = scene.close(2)
    with pytest.raises(RetryableError, match=r"heldout\.json is not written yet"):
        scene.take(event)
    assert scene.attempts(2) == set(), "waiting is no attempt"
    scene.freeze_heldout()
    scene.take(event)
    assert scene.header(2).rows == 4


def plain(item: Item, text: str) -> str:
    """An answer to an item without log-probabilities."""

    def change(body: dict[str, Any]) -> None:
        body["choices"] = [{"message": {"content": text}, "finish_reason": "stop"}]

    return make_body(item.messages, change=change)


# Duplicates and deaths


def test_duplicate_events_give_one_shard_and_the_same_event(scene: Scene) -> None:
    event = scene.close(0)
    scene.take(event)
    before = scene.data(0)
    scene.take(event)
    scene.take(event, scene.process())
    told = scene.told.take(ShardWritten.TYPE)
    assert len(told) == 3
    assert len({envelope.event_id for envelope in told}) == 1
    assert scene.data(0) == before
    assert scene.attempts(0) == {"attempt-0001.json"}


def test_events_that_were_not_published_are_published_by_the_next_delivery(scene: Scene) -> None:
    first, second = scene.close(0), scene.close(1)
    scene.told.broken = True
    for event in (first, second):
        with pytest.raises(BrokerUnavailable):
            scene.take(event)
    scene.told.broken = False
    scene.take(first)
    scene.take(second)
    assert len(scene.told.take(ShardWritten.TYPE)) == 2
    assert scene.told.take(HeldoutSealed.TYPE)
    # And again, for whoever lost them on the way.
    scene.take(first)
    assert scene.told.take(HeldoutSealed.TYPE)


def test_a_sealed_dataset_is_told_again_when_asked_again(scene: Scene) -> None:
    scene.freeze_heldout()
    for batch in (2, 3, 4):
        scene.take(scene.close(batch))
    completed = close_responses(scene.store, scene.spec)
    scene.take(completed)
    scene.take(completed)
    told = scene.told.take(DatasetSealed.TYPE)
    assert len(told) == 2
    assert told[0].event_id == told[1].event_id


def test_a_crash_between_marker_and_shard_is_another_attempt(
    scene: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    event = scene.close(0)

    class Killed(BaseException):
        pass

    def killed(*_: object) -> bytes:
        raise Killed

    with monkeypatch.context() as patched:
        patched.setattr(shards, "encode_shard", killed)
        with pytest.raises(Killed):
            scene.take(event)
    assert scene.attempts(0) == {"attempt-0001.json"}

    scene.take(event)
    assert scene.attempts(0) == {"attempt-0001.json"}, "a younger marker was not respected"
    assert not scene.told.envelopes

    # By the store's clock the marker is now as old as a job may become.
    monkeypatch.setattr(build, "MARKER_MARGIN", -JOB_SECONDS)
    scene.take(event)
    assert scene.attempts(0) == {"attempt-0001.json", "attempt-0002.json"}
    assert scene.header(0).rows == 4
    assert len(scene.told.take(ShardWritten.TYPE)) == 1


def failing(error: Exception) -> Callable[..., Any]:
    def run(*_: object) -> Any:
        raise error

    return run


def test_three_failing_attempts_close_the_batch_without_rows(scene: Scene) -> None:
    event = scene.close(0)
    for attempt in (1, 2):
        with pytest.raises(AttemptFailed, match=f"attempt {attempt} of 3 .* KeyError$") as failed:
            attempt_at(scene, event, failing(KeyError("the text of an answer")))
        assert "the text of an answer" not in str(failed.value)
    built = attempt_at(scene, event, failing(KeyError("again")))
    assert built is not None
    assert (built.header.rows, built.header.counts) == (0, {reasons.BUILD_FAILED: 4})
    assert scene.attempts(0) == {
        f"attempt-000{n}{kind}.json" for n in (1, 2, 3) for kind in ("", ".error")
    }
    # Whoever comes later finds the shard and tells it.
    scene.take(event)
    (told,) = scene.told.take(ShardWritten.TYPE)
    assert (told.payload["rows"], told.payload["rejected"]) == (0, 4)


def test_three_dead_attempts_close_the_batch_without_rows(
    scene: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    event = scene.close(0)
    monkeypatch.setattr(build, "MARKER_MARGIN", -JOB_SECONDS)
    for attempt in (1, 2, 3):
        key = artifacts.build_attempt_key(scene.spec.tenant_id, scene.spec.dataset_id, 0, attempt)
        scene.store.put_new_model(key, AttemptMarker(attempt=attempt, holder="dead"))
    scene.take(event)
    assert scene.header(0).counts == {reasons.BUILD_FAILED: 4}


def attempt_at(
    scene: Scene, envelope: Envelope, run: Callable[..., Any]
) -> build.BuiltShard | None:
    event = envelope.event()
    return build_shard(
        scene.store,
        scene.context.inputs,
        scene.spec,
        event.batch,  # type: ignore[attr-defined]
        event.manifest,  # type: ignore[attr-defined]
        job_seconds=JOB_SECONDS,
        run=run,
    )


def test_a_store_that_was_away_counts_no_attempt(scene: Scene) -> None:
    event = scene.close(0)
    for _ in range(5):
        with pytest.raises(StoreUnavailable):
            attempt_at(scene, event, failing(StoreUnavailable("503")))
    assert scene.attempts(0) == set()
    scene.take(event)
    assert scene.header(0).rows == 4


def test_a_damaged_part_costs_its_batch_after_three_attempts(scene: Scene) -> None:
    event = scene.close(0)
    key = artifacts.part_key(scene.spec.tenant_id, scene.spec.pipeline_id, 0, 1, 2)
    scene.store.delete(key)
    for _ in range(2):
        with pytest.raises(AttemptFailed, match="part-0002"):
            scene.take(event)
    scene.take(event)
    assert scene.header(0).counts == {reasons.BUILD_FAILED: 4}


def test_a_missing_manifest_is_fatal(scene: Scene) -> None:
    event = scene.close(0)
    scene.store.delete(event.payload["manifest"]["key"])
    with pytest.raises(PermanentError, match=r"manifest\.json is named by a manifest and not in"):
        scene.take(event)


def test_the_manifest_of_another_batch_is_fatal(scene: Scene) -> None:
    other, event = scene.close(1), scene.close(0)
    payload = event.payload | {"manifest": other.payload["manifest"]}
    with pytest.raises(PermanentError, match="expected the answers of batch 0"):
        scene.take(event.model_copy(update={"payload": payload}))


def test_a_batch_that_closes_twice_with_other_answers_is_refused(scene: Scene) -> None:
    scene.take(scene.close(0))
    again = scene.close(0, attempt=2, bodies={make_items(scene.spec, 0)[0].item_id: "{}"})
    with pytest.raises(PermanentError, match="a batch closes once"):
        scene.take(again)


def test_a_tokenizer_that_is_not_the_specs_is_fatal(store: ObjectStore, tenant: str) -> None:
    spec = make_resolved_spec(tenant=tenant).model_copy(update={"template_sha256": "0" * 64})
    scene = Scene(store, spec)
    with pytest.raises(PermanentError, match="does not hold the tokenizer and template"):
        scene.take(scene.close(0))


def test_nothing_is_done_for_a_stopped_pipeline(scene: Scene) -> None:
    event, completed = scene.close(0), close_responses(scene.store, scene.spec)
    stop_pipeline(scene.store, scene.spec)
    scene.take(event)
    scene.take(completed)
    assert not scene.told.envelopes
    assert not scene.store.exists(scene.shard_key(0))


# Races


def at_once(*calls: Callable[[], object]) -> list[object]:
    """Run on threads that start together; raises what any of them raised."""
    gate = threading.Barrier(len(calls))

    def run(call: Callable[[], object]) -> object:
        gate.wait(10)
        return call()

    with ThreadPoolExecutor(len(calls)) as pool:
        return list(pool.map(run, calls))


def test_of_many_jobs_one_claims_an_attempt(scene: Scene) -> None:
    take = partial(claim, scene.store, scene.spec, 0, older_than=60)
    won = at_once(*[take] * 6)
    assert sorted(w for w in won if w) == [1]


def test_jobs_that_build_one_batch_at_once_leave_one_shard(scene: Scene) -> None:
    event = scene.close(0)
    at_once(*[partial(scene.take, event, scene.process()) for _ in range(4)])
    told = scene.told.take(ShardWritten.TYPE)
    assert len({envelope.event_id for envelope in told}) == 1
    assert scene.attempts(0) == {"attempt-0001.json"}


def test_two_jobs_that_end_together_seal_once(scene: Scene) -> None:
    scene.freeze_heldout()
    scene.take(scene.close(2))
    close_responses(scene.store, scene.spec)
    events = [scene.close(3), scene.close(4)]
    at_once(*[partial(scene.take, event, scene.process()) for event in events])
    told = scene.told.take(DatasetSealed.TYPE)
    assert {envelope.event_id for envelope in told} == {told[0].event_id}
    assert scene.dataset() is not None


def test_sealing_at_once_writes_the_same_bytes(scene: Scene) -> None:
    scene.freeze_heldout()
    for batch in (2, 3, 4):
        scene.take(scene.close(batch))
    close_responses(scene.store, scene.spec)
    assert scene.dataset() is None
    events = at_once(*[partial(seal.dataset_event, scene.store, scene.spec)] * 4)
    assert events[0] is not None
    assert events == [events[0]] * 4


def test_another_versions_shard_wins_when_it_is_there(
    scene: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    event, encode = scene.close(0), shards.encode_shard

    def beaten(header: ShardHeader, rows: list[Any]) -> bytes:
        theirs = header.model_copy(update={"support": "as an older version said it"})
        scene.store.put_new(scene.shard_key(0), encode(theirs, rows))
        return encode(header, rows)

    monkeypatch.setattr(shards, "encode_shard", beaten)
    scene.take(event)
    assert scene.header(0).support == "as an older version said it"
    (told,) = scene.told.take(ShardWritten.TYPE)
    assert told.payload["shard"]["sha256"] == sha256_hex(scene.data(0))


# What it costs


@pytest.fixture
def looks(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Keys that `exists` was asked for."""
    asked: list[str] = []
    exists = scene.store.exists

    def counted(key: str) -> bool:
        asked.append(key)
        return exists(key)

    monkeypatch.setattr(scene.store, "exists", counted)
    return asked


def test_a_missing_shard_is_found_from_the_newest_side(scene: Scene, looks: list[str]) -> None:
    assert not seal.all_shards_exist(scene.store, scene.spec, 10_000)
    assert len(looks) == 1


def test_a_missing_oldest_shard_is_not_overlooked(scene: Scene) -> None:
    for batch in range(1, 5):
        scene.store.put_new(scene.shard_key(batch), b"a shard")
    assert not seal.all_shards_exist(scene.store, scene.spec, 5)
    scene.store.put_new(scene.shard_key(0), b"a shard")
    assert seal.all_shards_exist(scene.store, scene.spec, 5)


def test_progress_is_told_at_most_every_five_seconds(scene: Scene) -> None:
    scene.take(scene.close(0))
    scene.take(scene.close(1))
    assert len(scene.told.take("stage.progressed")) == 1
    scene.context.progressed[scene.spec.pipeline_id] -= jobs.PROGRESS_SECONDS + 1
    scene.take(scene.close(2))
    assert len(scene.told.take("stage.progressed")) == 1


def test_samples_of_a_prompt_are_rows_of_their_own(scene: Scene) -> None:
    items: list[Item] = [make_item(scene.spec, "Say something.", sample) for sample in (0, 1)]
    scene.take(scene.close(0, items))
    assert shards.read_column(scene.data(0), "sample") == [0, 1]
    assert len(set(shards.read_column(scene.data(0), "row_id"))) == 2
    assert len(set(shards.read_column(scene.data(0), "prompt_id"))) == 1
