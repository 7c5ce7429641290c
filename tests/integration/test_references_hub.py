"""`hf:` references against a hub over real HTTP: what is fetched, what is checked, what is said."""

from __future__ import annotations

import json
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from stillhouse.chassis import download, references
from stillhouse.chassis.errors import PermanentError, RetryableError
from tests.support.hub import COMMIT, NAME, REFERENCE, FakeHub, serving_hub
from tests.support.references import WHOLE, contents, make_sources, model_files, start_reader
from tests.support.waiting import wait_for

SHARD = "model-00002-of-00002.safetensors"


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    monkeypatch.setattr(download, "_PAUSE", 0.001)
    with serving_hub(model_files()) as found:
        yield found


def sources(hub: FakeHub, folder: Path, token: str = "", **told: Any) -> references.Sources:
    environ = {"HF_ENDPOINT": hub.url, "HF_TOKEN": token}
    return make_sources(environ, **{"cache_dir": folder / "cache", "allow_hub": True, **told})


def fetched(where: references.Sources, reference: str = REFERENCE, **how: Any) -> dict[str, bytes]:
    with references.opened(reference, where, **how) as folder:
        return contents(folder)


def refused(where: references.Sources, reference: str = REFERENCE) -> PermanentError:
    with pytest.raises(PermanentError) as caught, references.opened(reference, where):
        pass
    return caught.value


def test_a_repository_is_fetched_once_and_only_what_a_model_folder_may_hold(
    hub: FakeHub, tmp_path: Path
) -> None:
    where = sources(hub, tmp_path)
    seen: list[tuple[int, int]] = []
    found = fetched(where, watching=lambda done, total: seen.append((done, total)))
    assert found == {name: hub.files[name] for name in WHOLE}
    total = sum(len(data) for data in found.values())
    assert seen[-1] == (total, total)
    asked = list(hub.asked)
    assert sorted(name for name, _ in asked) == sorted(WHOLE)
    hub.status = 503  # from now on nobody answers, and nobody is asked
    assert fetched(where) == found
    assert hub.asked == asked


def test_acceptance_fetches_a_tokenizer_and_no_weights(hub: FakeHub, tmp_path: Path) -> None:
    found = fetched(sources(hub, tmp_path), part="tokenizer")
    assert set(found) == {"config.json", "tokenizer.json", "tokenizer_config.json"}
    assert not any(name.endswith(".safetensors") for name, _ in hub.asked)


def test_one_file_of_weights_is_taken_before_an_index(hub: FakeHub, tmp_path: Path) -> None:
    hub.files["model.safetensors"] = b"all in one"
    names = set(fetched(sources(hub, tmp_path)))
    assert names == {"config.json", "tokenizer.json", "tokenizer_config.json", "model.safetensors"}


def test_a_token_opens_a_gated_repository_and_reaches_nobody_else(
    hub: FakeHub, tmp_path: Path
) -> None:
    hub.token = "hf_secret"
    error = refused(sources(hub, tmp_path))
    assert "accept its licence on the hub" in str(error)
    assert "HF_TOKEN" in str(error)
    opening = {"token": "hf_secret", "hub_token_owners": "ACME, other"}
    assert set(fetched(sources(hub, tmp_path, **opening))) == WHOLE
    assert hub.leaked == []
    assert "hf_secret" not in repr(sources(hub, tmp_path, token="hf_secret"))


@pytest.mark.parametrize(
    ("told", "opens"),
    [
        ({"profile": "embedded"}, True),
        ({"profile": "deployed"}, False),
        ({"profile": "deployed", "hub_token_owners": "other,acme2"}, False),
        ({"profile": "deployed", "hub_token_owners": "acme"}, True),
        ({"profile": "deployed", "hub_token_owners": "*"}, True),
        ({"profile": "embedded", "hub_token_owners": "other"}, False),
    ],
)
def test_the_operators_token_opens_only_what_the_operator_named(
    hub: FakeHub, tmp_path: Path, told: dict[str, str], opens: bool
) -> None:
    hub.token = "hf_secret"
    where = sources(hub, tmp_path, token="hf_secret", **told)
    if opens:
        assert set(fetched(where)) == WHOLE
    else:
        assert "HUB_TOKEN_OWNERS" in str(refused(where))
        assert hub.asked == []
    hub.token = None  # whoever is not named fetches what is open to all, without the token
    assert set(fetched(where)) == WHOLE
    assert hub.authorizations == ({"Bearer hf_secret"} if opens else {None})


def test_a_broken_connection_is_gone_on_with(hub: FakeHub, tmp_path: Path) -> None:
    hub.cut_after[SHARD] = [100_000, 1, 150_000]
    assert fetched(sources(hub, tmp_path))[SHARD] == hub.files[SHARD]
    ranges = [asked for name, asked in hub.asked if name == SHARD]
    assert ranges == [None, "bytes=100000-", "bytes=100001-", "bytes=250001-"]


def test_a_hub_that_knows_no_ranges_sends_the_beginning_again(hub: FakeHub, tmp_path: Path) -> None:
    hub.ranges = False
    hub.cut_after[SHARD] = [100_000]
    assert fetched(sources(hub, tmp_path))[SHARD] == hub.files[SHARD]


@pytest.mark.parametrize("name", ["tokenizer.json", SHARD])
def test_bytes_that_are_not_those_of_the_commit_are_refused(
    hub: FakeHub, tmp_path: Path, name: str
) -> None:
    right = hub.files[name]
    hub.sent[name] = bytes(len(right))
    error = refused(sources(hub, tmp_path))
    assert error.reason == "reference_damaged"
    hub.sent[name] = right + b"more"
    assert "longer than" in str(refused(sources(hub, tmp_path)))
    hub.sent.clear()
    assert set(fetched(sources(hub, tmp_path))) == WHOLE


def test_a_hub_that_is_away_is_a_matter_of_time(hub: FakeHub, tmp_path: Path) -> None:
    hub.status = 503
    with pytest.raises(RetryableError, match="answered 503"):
        fetched(sources(hub, tmp_path))
    gone = make_sources(
        {"HF_ENDPOINT": "http://127.0.0.1:9"}, cache_dir=tmp_path / "cache", allow_hub=True
    )
    with pytest.raises(RetryableError, match="check the network and HF_ENDPOINT"):
        fetched(gone)


def test_what_is_not_there_and_what_is_no_hub_is_said(hub: FakeHub, tmp_path: Path) -> None:
    where = sources(hub, tmp_path)
    assert "no such commit" in str(refused(where, f"hf://{NAME}@{'f' * 40}"))
    assert "check the name" in str(refused(where, f"hf://acme/other@{COMMIT}"))
    hub.status = 200
    assert "check HF_ENDPOINT" in str(refused(where))
    hub.status = 401
    assert "HF_TOKEN" in str(refused(where))


def test_the_hub_is_asked_only_where_the_operator_allows_it(hub: FakeHub, tmp_path: Path) -> None:
    for told in ({"allow_hub": False}, {"allow_hub": "", "profile": "deployed"}):
        assert "READER_ALLOW_HUB=true" in str(refused(sources(hub, tmp_path, **told)))
    assert not hub.asked
    assert fetched(sources(hub, tmp_path, allow_hub="", profile="embedded"))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"config.json": b'{"auto_map": {}}'}, "code of its own"),
        ({"config.json": b"[1]"}, "expected a JSON object"),
        ({"model.safetensors.index.json": b'{"weight_map": {"a": "../x"}}'}, "files beside it"),
        ({"model.safetensors.index.json": b'{"weight_map": {"a": "b.bin"}}'}, "b.bin"),
        ({"tokenizer.json": bytes((64 << 20) + 1)}, "that is no tokenizer.json"),
    ],
)
def test_weights_are_not_fetched_for_a_folder_that_is_refused(
    hub: FakeHub, tmp_path: Path, change: dict[str, bytes], said: str
) -> None:
    hub.files |= change
    assert said in str(refused(sources(hub, tmp_path)))
    assert hub.times(SHARD) == 0


def test_pickles_alone_are_refused(hub: FakeHub, tmp_path: Path) -> None:
    hub.files = {n: d for n, d in hub.files.items() if "safetensors" not in n}
    assert "save the weights again with save_pretrained" in str(refused(sources(hub, tmp_path)))
    assert hub.asked == []


def test_offline_mode_says_what_to_do(hub: FakeHub, tmp_path: Path) -> None:
    environ = {"HF_ENDPOINT": hub.url, "HF_HUB_OFFLINE": "1"}
    reader = start_reader(REFERENCE, environ, cache_dir=tmp_path / "cache", allow_hub=True)
    _, said = reader.communicate(timeout=60)
    assert reader.returncode == 1
    assert "HF_HUB_OFFLINE is set in the service's environment: unset it" in said


def test_a_kill_in_the_middle_leaves_nothing_that_passes_for_whole(
    hub: FakeHub, tmp_path: Path
) -> None:
    hub.held[SHARD] = threading.Event()
    reader = start_reader(
        REFERENCE, {"HF_ENDPOINT": hub.url}, cache_dir=tmp_path / "cache", allow_hub=True
    )
    other = "model-00001-of-00002.safetensors"
    cache = tmp_path / "cache"
    wait_for(lambda: list(cache.glob(f"*.partial/{other}")), 60, "one file is whole")
    wait_for(
        lambda: [p for p in cache.glob(f"*.partial/{SHARD}.part") if p.stat().st_size],
        60,
        "the other has begun",
    )
    reader.send_signal(signal.SIGKILL)
    reader.communicate(timeout=60)
    assert not [path for path in cache.iterdir() if path.is_dir() and path.suffix != ".partial"]
    (begun,) = cache.glob(f"*.partial/{SHARD}.part")
    have = begun.stat().st_size
    hub.held.pop(SHARD).set()
    assert fetched(sources(hub, tmp_path)) == {name: hub.files[name] for name in WHOLE}
    assert hub.times(other) == 1, "what was whole is not fetched again"
    assert (SHARD, f"bytes={have}-") in hub.asked


def test_a_kill_before_the_last_rename_costs_nothing(hub: FakeHub, tmp_path: Path) -> None:
    for point in ("cache.fetched", "cache.listed"):
        environ = {"HF_ENDPOINT": hub.url, "STILLHOUSE_CRASH_AT": point}
        cache = tmp_path / point
        reader = start_reader(REFERENCE, environ, cache_dir=cache, allow_hub=True)
        reader.communicate(timeout=60)
        assert reader.returncode == 137
        hub.asked.clear()
        assert set(fetched(sources(hub, tmp_path, cache_dir=cache))) == WHOLE
        assert hub.asked == []


def test_two_processes_at_once_fetch_one_copy(hub: FakeHub, tmp_path: Path) -> None:
    hub.held[SHARD] = threading.Event()
    told = {"cache_dir": tmp_path / "cache", "allow_hub": True}
    readers = [start_reader(REFERENCE, {"HF_ENDPOINT": hub.url}, **told) for _ in range(2)]
    wait_for(lambda: hub.times(SHARD), 60, "one of them fetches")
    seen: list[tuple[int, int]] = []

    def watching(done: int, total: int) -> None:
        seen.append((done, total))
        if 0 < done < total:  # who waits is told how far the other has come
            hub.held[SHARD].set()

    assert set(fetched(sources(hub, tmp_path), watching=watching)) == WHOLE
    assert seen
    for reader in readers:
        out, said = reader.communicate(timeout=60)
        assert reader.returncode == 0, said
        assert set(json.loads(out.splitlines()[-1])) == WHOLE
    assert all(hub.times(name) == 1 for name in WHOLE)


def test_what_the_watcher_raises_ends_the_fetch_and_keeps_what_came(
    hub: FakeHub, tmp_path: Path
) -> None:
    class LeaseLost(Exception):
        pass

    def watching(done: int, _total: int) -> None:
        if done > 300_000:
            raise LeaseLost

    with pytest.raises(LeaseLost):
        fetched(sources(hub, tmp_path), watching=watching)
    assert set(fetched(sources(hub, tmp_path))) == WHOLE
    assert hub.times("config.json") == 1
