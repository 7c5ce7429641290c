"""The object store on SeaweedFS: conditional writes decide, digests are checked."""

from __future__ import annotations

import secrets
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import TypeVar
from urllib.parse import urlsplit

import pytest
from pydantic import BaseModel

from stillhouse.chassis.errors import (
    DigestMismatch,
    MissingObject,
    PermanentError,
    RetryableError,
    StoreRefused,
    StoreUnavailable,
)
from stillhouse.chassis.storage import AlreadyExists, Conflict, ObjectStore
from stillhouse.contracts.artifacts import ObjectRef
from stillhouse.contracts.canonical import sha256_hex
from stillhouse.embedded.parts import Store
from tests.support.fake_store import fake_store
from tests.support.proxy import Proxy, proxy
from tests.support.shards import store_of

THREADS, ROUNDS, LANES = 8, 30, 10

T = TypeVar("T")


@pytest.fixture
def key(tenant: str) -> str:
    return f"tenants/{tenant}/object"


@pytest.fixture
def edge(store_part: Store) -> Iterator[Proxy]:
    parts = urlsplit(store_part.endpoint_url)
    with proxy(parts.hostname or "", parts.port or 0) as running:
        yield running


def through(edge: Proxy, part: Store, **options: object) -> ObjectStore:
    """A client whose way to the store leads through the proxy."""
    chosen = {"connect_timeout": 1, "read_timeout": 2, **options}
    return store_of(replace(part, endpoint_url=edge.url), **chosen)


def in_lanes(race: Callable[[int], None]) -> None:
    """Run all rounds, some side by side: SeaweedFS makes contenders for one key wait a second."""
    with ThreadPoolExecutor(LANES) as pool:
        list(pool.map(race, range(ROUNDS)))


def contenders(call: Callable[[int], T]) -> list[T]:
    start = threading.Barrier(THREADS)

    def at_once(number: int) -> T:
        start.wait()
        return call(number)

    with ThreadPoolExecutor(THREADS) as pool:
        return list(pool.map(at_once, range(THREADS)))


def test_one_of_eight_racing_writers_makes_the_object(store: ObjectStore, key: str) -> None:
    def race(round_: int) -> None:
        def write(writer: int) -> bool:
            try:
                store.put_new(f"{key}-{round_}", f"{writer}".encode())
            except AlreadyExists:
                return False
            return True

        won = contenders(write)
        assert won.count(True) == 1, f"round {round_}: {won}"
        stored = store.read(f"{key}-{round_}")
        assert stored is not None
        assert stored.data == f"{won.index(True)}".encode()

    in_lanes(race)


def test_one_of_eight_racing_swaps_wins(store: ObjectStore, key: str) -> None:
    def race(round_: int) -> None:
        etag = store.swap(f"{key}-{round_}", b"start", None)

        def swap(writer: int) -> str | None:
            try:
                return store.swap(f"{key}-{round_}", f"{round_}:{writer}".encode(), etag)
            except Conflict:
                return None

        found = contenders(swap)
        assert found.count(None) == THREADS - 1, f"round {round_}: {found}"
        stored = store.read(f"{key}-{round_}")
        assert stored is not None
        assert stored.etag in found

    in_lanes(race)


def test_a_swap_over_nothing_or_over_a_deleted_object_conflicts(
    store: ObjectStore, key: str
) -> None:
    etag = store.swap(key, b"one", None)
    with pytest.raises(Conflict):
        store.swap(key, b"two", None)
    store.delete(key)
    with pytest.raises(Conflict):
        store.swap(key, b"two", etag)


def test_writing_the_same_bytes_again_counts_as_success(store: ObjectStore, key: str) -> None:
    first = store.put_new(key, b"same")
    assert store.put_new(key, b"same") == first
    with pytest.raises(AlreadyExists, match=key):
        store.put_new(key, b"other")
    assert store.get(first) == b"same"


def test_a_file_is_written_once_and_read_back_whole(
    store: ObjectStore, key: str, tmp_path: Path
) -> None:
    source, target = tmp_path / "source", tmp_path / "target"
    source.write_bytes(secrets.token_bytes(3 << 20))
    ref = store.put_new_file(key, source)
    assert store.put_new_file(key, source) == ref
    store.get_file(ref, target)
    assert target.read_bytes() == source.read_bytes()
    source.write_bytes(b"another")
    with pytest.raises(AlreadyExists):
        store.put_new_file(key, source)


def test_a_damaged_object_is_named_with_what_was_expected(
    store: ObjectStore, key: str, tmp_path: Path
) -> None:
    ref = store.put_new(key, b"as it is")
    wrong = ObjectRef(key=key, size=ref.size, sha256=sha256_hex(b"as it was"))
    for read in (
        lambda: store.get(wrong),
        lambda: store.get_file(wrong, tmp_path / "file"),
    ):
        with pytest.raises(DigestMismatch) as caught:
            read()
        for part in (key, wrong.sha256, ref.sha256):
            assert part in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_an_object_that_a_manifest_names_and_nobody_has_is_missing(
    store: ObjectStore, key: str, tmp_path: Path
) -> None:
    ref = ObjectRef(key=key, size=1, sha256=sha256_hex(b"x"))
    for read in (lambda: store.get(ref), lambda: store.get_file(ref, tmp_path / "file")):
        with pytest.raises(MissingObject, match=key):
            read()
    assert store.read(key) is None
    assert store.find(key) is None
    assert store.age(key) is None
    assert not store.exists(key)


def test_write_once_models_come_back_with_their_reference(store: ObjectStore, key: str) -> None:
    class Note(BaseModel):
        text: str

    ref = store.put_new_model(key, Note(text="Gr\u00fc\u00dfe"))
    assert store.find_model(key, Note) == (Note(text="Gr\u00fc\u00dfe"), ref)
    assert store.get_model(ref, Note).text == "Gr\u00fc\u00dfe"
    assert store.find(key) == ref
    assert store.age(key) is not None


def test_listing_pages_through_a_prefix(store: ObjectStore, tenant: str) -> None:
    names = [f"tenants/{tenant}/many/{n:04d}" for n in range(12)]
    for name in names:
        store.put_new(name, b"x")
    assert list(store.keys(f"tenants/{tenant}/many/")) == names


@pytest.mark.parametrize("wrong", ["access_key", "secret_key", "bucket"])
def test_wrong_credentials_stop_a_start_and_hold_up_what_runs(
    store_part: Store, key: str, wrong: str
) -> None:
    store = store_of(replace(store_part, **{wrong: "wrong-value"}))
    with pytest.raises(StoreRefused, match="check STORE_ENDPOINT_URL, STORE_BUCKET") as caught:
        store.put_new(key, b"x")
    assert key in str(caught.value)
    assert store_part.secret_key not in str(caught.value)
    # No pipeline fails for it, but a process that starts with it is told at once.
    assert isinstance(caught.value, RetryableError)
    with pytest.raises(PermanentError, match="check STORE_ENDPOINT_URL"):
        store.self_test()


def test_a_store_that_is_away_is_a_retryable_error(store_part: Store, key: str) -> None:
    away = store_of(
        replace(store_part, endpoint_url="http://127.0.0.1:1"), connect_timeout=1, attempts=1
    )
    for call in (lambda: away.read(key), lambda: away.put_new(key, b"x"), lambda: away.age(key)):
        with pytest.raises(StoreUnavailable, match=key):
            call()


def test_a_lost_reply_of_a_write_counts_as_won(
    edge: Proxy, store_part: Store, store: ObjectStore, key: str
) -> None:
    edge.cut_replies(to=b"PUT", times=1)
    ref = through(edge, store_part).put_new(key, b"body")
    assert edge.cut == 1
    assert store.get(ref) == b"body"


def test_a_lost_reply_of_a_file_counts_as_won(
    edge: Proxy, store_part: Store, store: ObjectStore, key: str, tmp_path: Path
) -> None:
    (tmp_path / "file").write_bytes(b"body")
    edge.cut_replies(to=b"PUT", times=1)
    ref = through(edge, store_part).put_new_file(key, tmp_path / "file")
    assert edge.cut == 1
    assert store.get(ref) == b"body"


def test_a_store_that_hangs_meets_its_time_out(edge: Proxy, store_part: Store, key: str) -> None:
    client = through(edge, store_part, read_timeout=1, attempts=1)
    edge.mode = "hold"
    with pytest.raises(StoreUnavailable, match=key):
        client.put_new(key, b"body")


def test_a_read_that_breaks_off_leaves_no_file_behind(
    edge: Proxy, store_part: Store, store: ObjectStore, key: str, tmp_path: Path
) -> None:
    ref = store.put_new(key, secrets.token_bytes(1 << 20))
    client = through(edge, store_part, attempts=1)
    edge.cut_replies(to=b"GET", times=1)
    with pytest.raises(StoreUnavailable, match=key):
        client.get_file(ref, tmp_path / "file")
    assert list(tmp_path.iterdir()) == []


def test_the_self_test_passes_here_and_leaves_nothing(store: ObjectStore) -> None:
    before = set(store.keys("self-test/"))
    store.self_test()
    assert set(store.keys("self-test/")) == before


def fake(url: str) -> ObjectStore:
    return store_of(Store(url, "bucket", "key", "secret"), attempts=1)


def test_the_self_test_passes_on_a_store_that_keeps_conditions() -> None:
    with fake_store(honours_conditions=True) as url:
        fake(url).self_test()


def test_the_self_test_refuses_a_store_that_ignores_conditions() -> None:
    with (
        fake_store(honours_conditions=False) as url,
        pytest.raises(PermanentError, match="found 4 with If-None-Match and 4 with If-Match"),
    ):
        fake(url).self_test()


def test_the_self_test_refuses_a_store_without_a_clock() -> None:
    with (
        fake_store(honours_conditions=True, tells_time=False) as url,
        pytest.raises(PermanentError, match="no Date header"),
    ):
        fake(url).self_test()
