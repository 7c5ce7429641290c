"""The cache of fetched weights: bounded, checked each time, never emptied under a reader."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from stillhouse.chassis import download
from stillhouse.chassis.download import nobody
from stillhouse.chassis.errors import PermanentError, RetryableError
from stillhouse.chassis.model_cache import ModelCache
from stillhouse.chassis.origins import RemoteFile
from tests.support.references import contents


@dataclass
class Place:
    """An origin in memory."""

    reference: str
    data: dict[str, bytes]
    read_files: list[str] = field(default_factory=list)

    def pin(self) -> str:
        return str(sorted((name, hash(data)) for name, data in self.data.items()))

    def files(self) -> Mapping[str, RemoteFile]:
        return {n: RemoteFile(n, len(d), str(hash(d))) for n, d in self.data.items()}

    def read(self, file: RemoteFile, start: int) -> Iterator[bytes]:
        self.read_files.append(file.name)
        yield self.data[file.name][start:]


def everything(listed: Mapping[str, RemoteFile], _small: Callable[[str], Path]) -> list[RemoteFile]:
    return list(listed.values())


def place(name: str, size: int = 100) -> Place:
    return Place(f"s3://models/{name}", {"config.json": b"{}", "a.safetensors": bytes(size - 2)})


@pytest.fixture
def cache(tmp_path: Path) -> ModelCache:
    return ModelCache(tmp_path / "cache", 250, prefix="READER_")


def opening(cache: ModelCache, origin: Place) -> AbstractContextManager[Path]:
    return cache.opened(origin, "weights", origin.pin(), everything, nobody)


def test_what_was_opened_longest_ago_makes_room(cache: ModelCache) -> None:
    origins = [place(name) for name in "abc"]
    for number, origin in enumerate(origins):
        with opening(cache, origin) as folder:
            assert contents(folder) == origin.data
        lock = folder.with_name(f"{folder.name}.lock")
        os.utime(lock, (number, number))
    kept = [path for path in folder.parent.iterdir() if path.is_dir()]
    assert len(kept) == 2
    for origin in origins[1:]:
        with opening(cache, origin):
            assert len(origin.read_files) == 2, "it was still there"
    with opening(cache, origins[0]):
        assert len(origins[0].read_files) == 4, "it was fetched again"
    left = {path.suffix for path in folder.parent.iterdir() if not path.is_dir()}
    assert left == {".lock"}
    assert len(list(folder.parent.glob("*.lock"))) == 3, "two folders', and that of the room"


def test_what_is_being_read_is_not_removed(cache: ModelCache) -> None:
    with (
        opening(cache, place("a")) as one,
        opening(cache, place("b")) as other,
        pytest.raises(RetryableError, match="in use: raise READER_CACHE_GIB"),
        opening(cache, place("c")),
    ):
        pass
    assert contents(one)
    assert contents(other)
    with opening(cache, place("c")) as third:
        assert contents(third)


def test_a_folder_that_never_fits_is_refused_unfetched(cache: ModelCache) -> None:
    large = place("large", 251)
    with pytest.raises(PermanentError, match="use a smaller model") as caught:
        opening(cache, large).__enter__()
    assert caught.value.reason == "weights_too_large"
    assert large.read_files == []


@pytest.mark.parametrize("damage", ["changed", "cut", "removed", "manifest"])
def test_what_changed_on_the_disk_is_fetched_again(cache: ModelCache, damage: str) -> None:
    origin = place("a")
    with opening(cache, origin) as folder:
        path = folder / "a.safetensors"
    before = path.stat()
    if damage == "changed":
        path.write_bytes(b"\1" * before.st_size)
        os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    elif damage == "cut":
        os.truncate(path, 5)
    elif damage == "removed":
        path.unlink()
    else:
        (folder / "manifest.json").write_text("{")
    with opening(cache, origin) as again:
        assert again == folder
        assert contents(again) == origin.data


class Enough(Exception):
    """What a watcher raises."""


@pytest.fixture
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tell of everything, not about once a second."""
    monkeypatch.setattr(download, "_LOOK_SECONDS", 0)


@pytest.mark.usefixtures("at_once")
def test_the_checking_of_what_is_there_is_watched(cache: ModelCache) -> None:
    """Weights of many gigabytes take minutes to read."""
    origin, told = place("a"), list[tuple[int, int]]()
    with opening(cache, origin):
        pass

    def watching(done: int, total: int) -> None:
        told.append((done, total))

    with cache.opened(origin, "weights", origin.pin(), everything, watching):
        assert set(told) == {(0, 0)}

    def enough(_done: int, _total: int) -> None:
        raise Enough

    with pytest.raises(Enough):
        cache.opened(origin, "weights", origin.pin(), everything, enough).__enter__()
    assert len(origin.read_files) == 2, "nothing was fetched again"


@pytest.mark.usefixtures("at_once")
def test_the_size_in_all_is_told_when_it_is_known_and_not_that_of_a_first_file(
    cache: ModelCache,
) -> None:
    origin, told = place("a"), list[tuple[int, int]]()

    def choose(listed: Mapping[str, RemoteFile], small: Callable[[str], Path]) -> list[RemoteFile]:
        small("config.json")
        return everything(listed, small)

    def watching(done: int, total: int) -> None:
        told.append((done, total))

    with cache.opened(origin, "weights", origin.pin(), choose, watching):
        pass
    assert {total for _, total in told} == {0, 100}
    assert told[-1] == (100, 100)


@pytest.mark.usefixtures("at_once")
@pytest.mark.parametrize("name", ["room", "folder"])
def test_who_waits_for_another_process_may_have_enough(cache: ModelCache, name: str) -> None:
    origin = place("a")
    with opening(cache, origin) as folder:
        pass
    if name == "room":  # of another folder, which has to be fetched
        origin = place("b")
    lock = folder.parent / "room.lock" if name == "room" else Path(f"{folder}.lock")

    def watching(_done: int, total: int) -> None:
        if total == 0:
            waited.append(1)
        if len(waited) > 3:
            raise Enough

    waited: list[int] = []
    with lock.open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(Enough):
            cache.opened(origin, "weights", origin.pin(), everything, watching).__enter__()


def test_other_content_is_another_folder(cache: ModelCache) -> None:
    origin = place("a")
    with opening(cache, origin) as folder:
        before = contents(folder)
    origin.data["config.json"] = b"[]"
    with opening(cache, origin) as other:
        assert other != folder
        assert contents(other) == origin.data
    assert contents(folder) == before


def test_a_folder_in_which_others_may_write_is_refused(tmp_path: Path) -> None:
    shared = tmp_path / "shared"
    shared.mkdir()
    shared.chmod(0o777)
    linked = tmp_path / "linked"
    linked.symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere").mkdir()
    for folder in (shared, linked):
        cache = ModelCache(folder, 250, prefix="READER_")
        with pytest.raises(PermanentError, match="READER_CACHE_DIR"):
            opening(cache, place("a")).__enter__()
        assert not list(folder.iterdir())


def test_a_new_folder_is_the_users_alone(cache: ModelCache) -> None:
    with opening(cache, place("a")) as folder:
        assert folder.parent.stat().st_mode & 0o777 == 0o700
