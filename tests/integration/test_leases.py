"""Leases on the real store: one holder at a time, whatever stops, and the others are fenced off."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from pydantic import BaseModel

from stillhouse.chassis.errors import StoreUnavailable
from stillhouse.chassis.leases import Lease, LeaseLost, LeaseTimes, acquire
from stillhouse.chassis.storage import ObjectStore
from stillhouse.embedded.parts import Store
from tests.support.proxy import Proxy, proxy
from tests.support.shards import store_of
from tests.support.waiting import wait_for

# The store tells whole seconds, so shorter ones would not be told apart.
SHORT = LeaseTimes(ttl=3, beat=0.4, stop_before=1, grace=1)


class State(BaseModel):
    """What the lease of these tests guards."""

    epoch: int = 1
    holder: str = ""
    beat: int = 0
    write_id: str = ""
    head: int = 0


def take(
    store: ObjectStore, key: str, holder: str, times: LeaseTimes = SHORT
) -> Lease[State] | None:
    return acquire(store, key, holder, model=State, initial=State, times=times)


def stored(store: ObjectStore, key: str) -> State:
    found = store.read(key)
    assert found is not None
    return State.model_validate_json(found.data)


@pytest.fixture
def key(tenant: str) -> str:
    return f"tenants/{tenant}/state.json"


@pytest.fixture
def edge(store_part: Store) -> Iterator[Proxy]:
    parts = urlsplit(store_part.endpoint_url)
    with proxy(parts.hostname or "", parts.port or 0) as running:
        yield running


def impatient(edge: Proxy, part: Store) -> ObjectStore:
    """As a lease should have it: a hanging call must not eat its time to live."""
    return store_of(
        replace(part, endpoint_url=edge.url), connect_timeout=0.5, read_timeout=0.7, attempts=1
    )


def test_one_of_eight_takes_a_lease_and_nobody_while_it_is_held(
    store: ObjectStore, key: str
) -> None:
    with ThreadPoolExecutor(8) as pool:
        taken = list(pool.map(lambda n: take(store, key, f"holder-{n}"), range(8)))
    [lease] = [found for found in taken if found is not None]
    with lease:
        assert stored(store, key).holder == lease.state.holder
        time.sleep(SHORT.ttl + SHORT.grace + 0.5)
        assert take(store, key, "another") is None
        assert lease.held()


def test_a_released_lease_is_free_at_once_and_its_epoch_grows(store: ObjectStore, key: str) -> None:
    first = take(store, key, "first")
    assert first is not None
    with first:
        first.update(head=5)
    second = take(store, key, "second")
    assert second is not None
    assert (second.state.epoch, second.state.head) == (2, 5)
    assert not first.held()
    with pytest.raises(LeaseLost):
        first.update(head=6)
    second.release()
    assert stored(store, key).head == 5


def test_one_of_eight_takes_an_expired_lease_and_the_old_holder_is_fenced(
    store: ObjectStore, key: str
) -> None:
    sleepy = replace(SHORT, beat=1000)
    first = take(store, key, "first", sleepy)
    assert first is not None
    wait_for(lambda: (store.age(key) or 0) >= SHORT.ttl + SHORT.grace, 10, "the lease is old")
    with ThreadPoolExecutor(8) as pool:
        taken = list(pool.map(lambda n: take(store, key, f"holder-{n}"), range(8)))
    [second] = [found for found in taken if found is not None]
    assert second.state.epoch == 2
    # Even a holder whose own clock stood still cannot write any more.
    first._renewed_at = time.monotonic()
    with pytest.raises(LeaseLost, match="taken over"):
        first.update(head=9)
    assert not first.held()
    assert stored(store, key).head == 0


def test_updates_and_heartbeats_do_not_fence_each_other(store: ObjectStore, key: str) -> None:
    lease = take(store, key, "holder", replace(SHORT, beat=0.01))
    assert lease is not None
    with lease:
        head = 0
        until = time.monotonic() + 30
        # Each update is a beat too: what is over the updates came from the heartbeat's thread.
        while lease.state.beat < head + 5 or head < 30:
            assert time.monotonic() < until, "the heartbeats do not come between the updates"
            head += 1
            lease.update(head=head)
        assert lease.held()
        assert stored(store, key).head == head


def test_a_renewal_without_change_still_moves_the_etag(store: ObjectStore, key: str) -> None:
    lease = take(store, key, "holder")
    assert lease is not None
    etags = set()
    for _ in range(3):
        lease.update()
        found = store.read(key)
        assert found is not None
        etags.add(found.etag)
    assert len(etags) == 3
    lease.release()


def test_a_holder_that_was_stopped_for_a_while_exits_when_it_wakes(
    store: ObjectStore, store_part: Store, key: str, tmp_path: Path
) -> None:
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.support.lease_holder", key],
        env={
            **os.environ,
            "HOLDER_ENDPOINT": store_part.endpoint_url,
            "HOLDER_KEYS": f"{store_part.access_key} {store_part.secret_key}",
            "HOLDER_BUCKET": store_part.bucket,
        },
        stdout=subprocess.PIPE,
        text=True,
        cwd=Path(__file__).parents[2],
    )
    assert process.stdout is not None
    try:
        assert process.stdout.readline() == "held\n"
        os.kill(process.pid, signal.SIGSTOP)
        second = wait_for(lambda: take(store, key, "second"), 15, "the lease was taken over")
        assert second is not None
        with second:
            os.kill(process.pid, signal.SIGCONT)
            said, _ = process.communicate(timeout=10)
            head = stored(store, key)
    finally:
        process.kill()
        process.wait()
        process.stdout.close()
    assert said == "lost\n"
    assert process.returncode == 3
    assert (head.holder, head.epoch) == ("second", 2)


def test_a_holder_stops_before_its_time_ends_when_the_store_is_away(
    edge: Proxy, store_part: Store, store: ObjectStore, key: str
) -> None:
    lease = take(impatient(edge, store_part), key, "holder")
    assert lease is not None
    with lease:
        wait_for(lambda: stored(store, key).beat >= 2, 5, "it beats")
        edge.mode = "hold"
        wait_for(lambda: not lease.held(), SHORT.ttl, "it stopped")
        # By the store's clock the lease has time left: nobody can have taken it yet.
        assert (store.age(key) or 0) < SHORT.ttl + SHORT.grace
        assert take(store, key, "early") is None
        with pytest.raises(LeaseLost):
            lease.check()
        edge.mode = "refuse"


def test_a_short_outage_costs_nothing(
    edge: Proxy, store_part: Store, store: ObjectStore, key: str
) -> None:
    lease = take(impatient(edge, store_part), key, "holder")
    assert lease is not None
    with lease:
        edge.mode = "refuse"
        with pytest.raises(StoreUnavailable):
            lease.update(head=1)
        edge.mode = "pass"
        lease.update(head=2)
        assert lease.held()
    assert stored(store, key).head == 2


@pytest.mark.parametrize("attempts", [1, 3])
def test_lost_replies_do_not_lose_the_lease(
    edge: Proxy, store_part: Store, store: ObjectStore, key: str, attempts: int
) -> None:
    client = store_of(
        replace(store_part, endpoint_url=edge.url), connect_timeout=1, attempts=attempts
    )
    edge.cut_replies(to=b"PUT", times=1)
    lease = take(client, key, "holder", replace(SHORT, beat=1000))
    assert lease is not None
    edge.cut_replies(to=b"PUT", times=1)
    lease.update(head=1)
    assert edge.cut == 2
    lease.update(head=2)
    assert stored(store, key).head == 2
    edge.cut_replies(to=b"PUT", times=1)
    lease.release()
    assert stored(store, key).holder == ""


def test_a_write_that_lands_late_does_not_lose_the_lease(
    edge: Proxy, store_part: Store, store: ObjectStore, key: str
) -> None:
    lease = take(impatient(edge, store_part), key, "holder", LeaseTimes(beat=1000))
    assert lease is not None
    edge.delay_requests(to=b"PUT", seconds=3)  # the client gives up before, botocore's wait for a
    # "100 Continue" included
    with pytest.raises(StoreUnavailable):
        lease.update(head=1)
    wait_for(lambda: stored(store, key).head == 1, 5, "the write landed all the same")
    with pytest.raises(StoreUnavailable):
        lease.update(head=2)  # meets its own late write, and adopts it
    assert lease.state.head == 1
    lease.update(head=2)
    assert stored(store, key).head == 2
    lease.release()


def test_may_take_leaves_a_finished_state_alone(store: ObjectStore, key: str) -> None:
    lease = take(store, key, "first")
    assert lease is not None
    lease.update(head=99)
    lease.release()
    before = store.read(key)
    found = acquire(
        store, key, "second", model=State, initial=State, may_take=lambda state: state.head != 99
    )
    assert found is None
    after = store.read(key)
    assert before is not None
    assert after is not None
    assert after.etag == before.etag
