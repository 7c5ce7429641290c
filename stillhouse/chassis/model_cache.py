"""Fetched weights on the local disk: whole folders, bounded, shared by processes.

    <folder>/<key>/            manifest.json and the files that it names: a whole folder
    <folder>/<key>.partial/    what was fetched so far, and plan.json with the size in all
    <folder>/<key>.lock        held shared by who reads the folder, alone by who fetches or removes

Files are fetched under another name, renamed when their size and digest are right, and the folder
gets its own name last, so a kill leaves nothing half that passes for whole; the next try goes on
with the files that are there. Digests are checked each time a folder is opened.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
import stat
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError

from stillhouse.chassis.crash import crash_point
from stillhouse.chassis.download import Download, Watching, seldom
from stillhouse.chassis.errors import PermanentError, RetryableError
from stillhouse.chassis.logs import logger
from stillhouse.chassis.origins import ORIGIN_CHANGED, Origin, OriginRefused, RemoteFile
from stillhouse.contracts.canonical import digest_of

log = logger(__name__)

_MANIFEST, _PLAN = "manifest.json", "plan.json"
_PARTIAL, _LOCK = ".partial", ".lock"
_LOOK_SECONDS = 0.1
_TRIES = 3
_CHUNK = 1 << 20

TOO_LARGE = "weights_too_large"

# Chooses what is fetched of a place: `small` reads one of its JSON files, which is then there.
Choose = Callable[[Mapping[str, RemoteFile], Callable[[str], Path]], list[RemoteFile]]


class Kept(BaseModel):
    size: int
    sha256: str


class Manifest(BaseModel):
    """What a whole folder holds, and what it was fetched as."""

    reference: str
    pin: str
    files: dict[str, Kept]


class ModelCache:
    """One cache folder. `prefix` is that of the service's settings, for messages."""

    def __init__(self, folder: Path, most_bytes: int, *, prefix: str = "") -> None:
        self._folder = folder
        self._most = most_bytes
        self._prefix = prefix

    @contextmanager
    def opened(
        self, origin: Origin, part: str, pin: str, choose: Choose, watching: Watching
    ) -> Iterator[Path]:
        """Yield a whole folder, fetched where it is not there; nobody removes it meanwhile.

        Raises OriginRefused where the place no longer has the content that `pin` names, and
        RetryableError where there is no room now.
        """
        self._prepare()
        key = digest_of([origin.reference, pin, part])[:32]
        entry = self._folder / key
        waiting = seldom(lambda *_: watching(*self._fetched(key)))
        reading = seldom(watching)
        filled = False
        for _ in range(_TRIES):
            with self._locked(key, fcntl.LOCK_SH, waiting):
                # What was checked a moment ago is not read once more.
                if (entry / _MANIFEST).exists() if filled else _is_whole(entry, reading):
                    os.utime(self._folder / f"{key}{_LOCK}")
                    yield entry
                    return
            with self._locked(key, fcntl.LOCK_EX, waiting):
                if not _is_whole(entry, reading):
                    self._fill(key, origin, pin, choose, watching)
                    filled = True
        raise RetryableError(
            f"{origin.reference} was removed from {self._folder} right after it was fetched, "
            f"{_TRIES} times: raise {self._prefix}CACHE_GIB"
        )

    def _fetched(self, key: str) -> tuple[int, int]:
        """How far another process has come with a folder."""
        partial = self._folder / f"{key}{_PARTIAL}"
        try:
            total = int(json.loads((partial / _PLAN).read_text())["bytes"])
            return sum(f.stat().st_size for f in partial.iterdir() if f.name != _PLAN), total
        except (OSError, ValueError, LookupError, TypeError):
            return 0, 0  # not planned yet, or just finished

    def _prepare(self) -> None:
        """Make the folder ours alone: what others could write here would be taken for weights."""
        self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        found = self._folder.lstat()
        ours = stat.S_ISDIR(found.st_mode) and found.st_uid == os.geteuid()
        if not ours or found.st_mode & 0o022:
            raise PermanentError(
                f"{self._folder} is a link, or others may write there: name a folder of the "
                f"service's own user with {self._prefix}CACHE_DIR",
                reason="settings",
            )

    def _fill(self, key: str, origin: Origin, pin: str, choose: Choose, watching: Watching) -> None:
        """Fetch a folder, under its lock."""
        entry, partial = self._folder / key, self._folder / f"{key}{_PARTIAL}"
        if entry.exists():
            log.warning("fetched weights were damaged", reference=origin.reference)
            _remove(entry)
        listed = origin.files()
        if origin.pin() != pin:
            raise OriginRefused(
                f"{origin.reference} is not what it was when the pipeline was accepted: put the "
                "same objects back, or submit the pipeline again",
                reason=ORIGIN_CHANGED,
            )
        started = time.monotonic()
        partial.mkdir(exist_ok=True)
        # How much there is in all is known when these have been read.
        first = Download(origin, partial, lambda *_: watching(0, 0))

        def small(name: str) -> Path:
            first.fetch([listed[name]])
            return partial / name

        chosen = choose(listed, small)
        needed = sum(file.size for file in chosen)
        self._make_room(key, needed, watching)
        digests = Download(origin, partial, watching).fetch(chosen)
        for left in partial.iterdir():
            if left.name not in digests and left.name != _PLAN:
                left.unlink()
        files = {f.name: Kept(size=f.size, sha256=digests[f.name]) for f in chosen}
        manifest = Manifest(reference=origin.reference, pin=pin, files=files)
        crash_point("cache.fetched")
        _write(partial / _MANIFEST, manifest.model_dump())
        crash_point("cache.listed")
        partial.rename(entry)
        _sync(self._folder)
        seconds = round(time.monotonic() - started, 1)
        log.info("weights fetched", reference=origin.reference, bytes=needed, seconds=seconds)

    # Room

    def _make_room(self, key: str, needed: int, watching: Watching) -> None:
        """Remove what was not opened for longest until a folder fits, and reserve its size."""
        if needed > self._most:
            raise PermanentError(
                f"the folder has {needed} bytes and {self._prefix}CACHE_GIB allows "
                f"{self._most}: use a smaller model, or have the operator raise it",
                reason=TOO_LARGE,
            )
        with self._locked("room", fcntl.LOCK_EX, seldom(watching)):
            others = {name: size for name, size in self._sizes().items() if name != key}
            for other in sorted(others, key=self._opened_at):
                if sum(others.values()) + needed <= self._most:
                    break
                if self._evict(other):
                    del others[other]
            if sum(others.values()) + needed > self._most:
                raise RetryableError(
                    f"{self._folder} has no room for {needed} bytes while its other folders are "
                    f"in use: raise {self._prefix}CACHE_GIB"
                )
            _write(self._folder / f"{key}{_PARTIAL}" / _PLAN, {"bytes": needed})
        there = sum(f.stat().st_size for f in (self._folder / f"{key}{_PARTIAL}").iterdir())
        free = shutil.disk_usage(self._folder).free
        if free < needed - there:
            raise RetryableError(
                f"{self._folder} has {free} bytes free and {needed - there} are needed: make room "
                f"on the disk, or name another with {self._prefix}CACHE_DIR"
            )

    def _sizes(self) -> dict[str, int]:
        """What each folder takes or will take, by key."""
        found: dict[str, int] = {}
        for path in self._folder.iterdir():
            if not path.is_dir():
                continue
            key = path.name.removesuffix(_PARTIAL)
            try:
                size = int(json.loads((path / _PLAN).read_text())["bytes"])
            except (OSError, ValueError, LookupError, TypeError):
                # Removed meanwhile, or not planned yet.
                size = sum(f.stat().st_size for f in path.glob("*") if f.is_file())
            found[key] = found.get(key, 0) + size
        return found

    def _opened_at(self, key: str) -> float:
        try:
            return (self._folder / f"{key}{_LOCK}").stat().st_mtime
        except FileNotFoundError:
            return 0.0

    def _evict(self, key: str) -> bool:
        """Remove a folder unless someone reads or fetches it."""
        with self._locked(key, fcntl.LOCK_EX, None) as held:
            if not held:
                return False
            log.info("fetched weights removed for room", key=key)
            _remove(self._folder / key)
            _remove(self._folder / f"{key}{_PARTIAL}")
            (self._folder / f"{key}{_LOCK}").unlink()
        return True

    @contextmanager
    def _locked(self, name: str, mode: int, watching: Watching | None) -> Iterator[bool]:
        """Hold a lock, which goes with the process; without `watching` only if it is free."""
        path = self._folder / f"{name}{_LOCK}"
        while True:
            with path.open("a") as file:
                while True:
                    try:
                        fcntl.flock(file, mode | fcntl.LOCK_NB)
                        break
                    except BlockingIOError:
                        if watching is None:
                            yield False
                            return
                        watching(0, 0)
                        time.sleep(_LOOK_SECONDS)
                # The file of a folder that was removed meanwhile is nobody's lock any more.
                if _is_same(path, file.fileno()):
                    yield True
                    return


def _is_same(path: Path, descriptor: int) -> bool:
    try:
        return os.path.samestat(path.stat(), os.fstat(descriptor))
    except FileNotFoundError:
        return False


def _is_whole(entry: Path, watching: Watching) -> bool:
    """Whether a folder holds what its manifest names, by size and digest; large ones take minutes
    to read."""
    try:
        manifest = Manifest.model_validate_json((entry / _MANIFEST).read_bytes())
        files = manifest.files.items()
        return all(_kept(entry / name, watching) == kept for name, kept in files)
    except (OSError, ValidationError):
        return False


def _kept(path: Path, watching: Watching) -> Kept:
    size, sha256 = 0, hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            size += len(chunk)
            sha256.update(chunk)
            watching(0, 0)
    return Kept(size=size, sha256=sha256.hexdigest())


def _remove(folder: Path) -> None:
    """Remove a folder, its manifest first: a kill in between leaves what is known to be part."""
    (folder / _MANIFEST).unlink(missing_ok=True)
    shutil.rmtree(folder, ignore_errors=True)


def _write(path: Path, value: Mapping[str, Any]) -> None:
    partial = path.with_name(f"{path.name}.tmp")
    with partial.open("w") as file:
        json.dump(value, file, sort_keys=True)
        file.flush()
        os.fsync(file.fileno())
    partial.rename(path)


def _sync(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
