"""The builder's real worker on real brokers: events in, shards and events out, kill -9 or not."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from stillhouse.chassis import bus
from stillhouse.chassis.storage import ObjectStore
from stillhouse.contracts import artifacts
from stillhouse.contracts.envelope import Envelope
from stillhouse.contracts.events import DatasetSealed, HeldoutSealed, ShardWritten
from stillhouse.contracts.flow import BUILDER, GATEWAY
from stillhouse.embedded.parts import Store
from stillhouse.embedded.process import kill_group, stop
from tests.support.answers import close_batch, close_responses, make_items
from tests.support.shards import make_resolved_spec, store_spec
from tests.support.workers import Worker


def test_a_worker_turns_events_into_shards_and_events(
    store: ObjectStore, store_part: Store, tenant: str, broker_url: str, tmp_path: Path
) -> None:
    spec = make_resolved_spec(tenant=tenant)
    gateway, seen = bus.Publisher(GATEWAY, broker_url), list[Envelope]()
    accepted = store_spec(store, spec)

    def told(kind: str, count: int) -> Callable[[], bool]:
        def look() -> bool:
            while (envelope := bus.pull(GATEWAY, broker_url)) is not None:
                seen.append(envelope)
            return len({e.event_id for e in seen if e.type == kind}) >= count

        return look

    worker = Worker(BUILDER, tmp_path, broker_url, store_part)
    try:
        heldout = [close_batch(store, spec, batch) for batch in (0, 1)]
        # Twice: every message may come twice.
        gateway.publish(accepted, *heldout, *heldout)
        worker.wait(told(HeldoutSealed.TYPE, 1), "heldout.sealed")
        assert worker.page("/healthz") == "ok\n"

        items = make_items(spec, 3)
        train = [
            close_batch(store, spec, 2),
            close_batch(store, spec, 3, bodies={items[0].item_id: "garbage"}),
        ]
        kill_group(worker.process)
        gateway.publish(*train)
        worker.start()
        worker.wait(told(ShardWritten.TYPE, 4), "the shards sent while it was dead")

        gateway.publish(close_responses(store, spec), close_batch(store, spec, 4))
        worker.wait(told(DatasetSealed.TYPE, 1), "dataset.sealed")
        page = worker.page("/metrics")
        assert stop(worker.process, grace_seconds=20), "the worker did not stop when asked"
    finally:
        kill_group(worker.process)

    assert store.exists(artifacts.dataset_key(tenant, spec.dataset_id))
    assert not [e for e in seen if e.type == "stage.failed"]
    assert bus.depth(BUILDER, broker_url)["dataset_builder.dead"] == 0
    # Counted over both lives of the worker, since its files of metrics are kept between them.
    assert 'stillhouse_dataset_builder_shards_total{split="train"} 3.0' in page
    assert 'stillhouse_dataset_builder_rows_total{split="train"} 11.0' in page
    assert 'stillhouse_dataset_builder_rejections_total{reason="malformed_json"} 1.0' in page
    assert 'stillhouse_dataset_builder_sealed_total{kind="dataset"} 1.0' in page
    assert "stillhouse_dataset_builder_shard_lag_seconds_count 5.0" in page


def test_an_error_that_cannot_heal_is_told_as_a_failed_stage(
    store: ObjectStore, store_part: Store, tenant: str, valkey_url: str, tmp_path: Path
) -> None:
    spec = make_resolved_spec(tenant=tenant)
    store_spec(store, spec)
    event = close_batch(store, spec, 0)
    store.delete(event.payload["manifest"]["key"])
    worker = Worker(BUILDER, tmp_path, valkey_url, store_part)
    try:
        bus.Publisher(GATEWAY, valkey_url).publish(event)

        def failed() -> bool:
            told = bus.pull(GATEWAY, valkey_url)
            return told is not None and told.payload.get("reason") == "missing_object"

        worker.wait(failed, "stage.failed")
    finally:
        kill_group(worker.process)
    assert not store.exists(artifacts.shard_key(tenant, spec.dataset_id, 0))
