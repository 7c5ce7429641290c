"""Fetches files of an origin into a folder, several at once, each whole or not at all.

A file has its own name only after its size and digest were found right. One that broke off goes
on where it ended, also after a kill; after a restart of the machine only where the place told its
digest, since nothing else would tell what a power cut left in it.
"""

from __future__ import annotations

import errno
import hashlib
import os
import secrets
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from pathlib import Path

from stillhouse.chassis.errors import PermanentError, RetryableError
from stillhouse.chassis.origins import Origin, OriginUnavailable, RemoteFile

FILE_DAMAGED = "reference_damaged"
_AT_ONCE = 4
_FAILURES = 4  # in a row, without a byte in between
_PAUSE = 0.5
_LOOK_SECONDS = 1.0
_CHUNK = 1 << 20

# Told bytes so far and in all about once a second, also of what another process fetches (0, 0: not
# known yet). What it raises ends the fetch.
Watching = Callable[[int, int], None]


def nobody(_done: int, _total: int) -> None:
    """Nobody watches."""


def seldom(watching: Watching) -> Watching:
    """Tell about once a second, however often this is called."""
    told_at = time.monotonic()

    def told(done: int, total: int) -> None:
        nonlocal told_at
        if time.monotonic() - told_at >= _LOOK_SECONDS:
            told_at = time.monotonic()
            watching(done, total)

    return told


class _Stopped(Exception):
    """Another file failed, or the watcher had enough."""


class Download:
    """Files of one origin on their way into one folder."""

    def __init__(self, origin: Origin, folder: Path, watching: Watching) -> None:
        self._origin = origin
        self._folder = folder
        self._watching = watching
        self._stop = threading.Event()
        self._lock = threading.Lock()
        self._done = 0

    def fetch(self, files: Sequence[RemoteFile]) -> dict[str, str]:
        """Fetch what is not there yet; return the SHA-256 of each file by its name. Raises the
        first error, once all others have stopped."""
        total = sum(file.size for file in files)
        self._done = 0
        digests: dict[str, str] = {}
        with ThreadPoolExecutor(_AT_ONCE, thread_name_prefix="fetch") as pool:
            names = {pool.submit(self._fetch, file): file.name for file in files}
            running = set(names)
            try:
                while running:
                    done, running = wait(running, _LOOK_SECONDS, FIRST_COMPLETED)
                    digests |= {names[future]: future.result() for future in done}
                    self._watching(self._done, total)
            except BaseException:
                self._stop.set()
                pool.shutdown(wait=False, cancel_futures=True)
                raise
        return digests

    def _fetch(self, file: RemoteFile) -> str:
        target = self._folder / file.name
        part = target.with_name(f"{file.name}{'' if file.has_digest else f'.{_boot()}'}.part")
        if target.exists() and (digest := _checked(target, file)):
            self._count(file.size)
            return digest
        resumed = part.exists() and part.stat().st_size <= file.size
        if not resumed:
            part.unlink(missing_ok=True)
        self._stream(file, part)
        digest = _checked(part, file)
        if digest is None and resumed:
            # The earlier try's bytes may be to blame: once more from the start.
            self._count(-file.size)
            part.unlink()
            self._stream(file, part)
            digest = _checked(part, file)
        if digest is None:
            part.unlink()
            raise PermanentError(
                f"{file.name} of {self._origin.reference} came with another digest than its "
                "place lists: try again; if it stays so, the file there is damaged",
                reason=FILE_DAMAGED,
            )
        part.rename(target)
        return digest

    def _stream(self, file: RemoteFile, part: Path) -> None:
        """Append to a file until it has its size, going on where a connection broke."""
        try:
            self._append(file, part)
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            raise RetryableError(
                f"the disk of {self._folder} is full: make room, or name another folder for "
                "fetched weights (CACHE_DIR)"
            ) from error

    def _append(self, file: RemoteFile, part: Path) -> None:
        failures = 0
        with part.open("ab") as sink:
            have = sink.tell()
            self._count(have)
            while have < file.size:
                try:
                    for chunk in self._origin.read(file, have):
                        if self._stop.is_set():
                            raise _Stopped
                        if have + len(chunk) > file.size:
                            raise PermanentError(
                                f"{file.name} of {self._origin.reference} is longer than the "
                                f"{file.size} bytes that its place lists",
                                reason=FILE_DAMAGED,
                            )
                        sink.write(chunk)
                        have += len(chunk)
                        self._count(len(chunk))
                        failures = 0
                    if have < file.size:
                        raise OriginUnavailable(
                            f"{file.name} of {self._origin.reference} ended after {have} of "
                            f"{file.size} bytes"
                        )
                except RetryableError:
                    failures += 1
                    if failures == _FAILURES or self._stop.wait(_PAUSE * 2**failures):
                        raise
            sink.flush()
            os.fsync(sink.fileno())

    def _count(self, size: int) -> None:
        with self._lock:
            self._done += size


def _boot() -> str:
    """Name the time since the machine was started; a name that nobody has where none is known."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return secrets.token_hex(8)


def _checked(path: Path, file: RemoteFile) -> str | None:
    """The SHA-256 of a file, or None where size or digest are not what its place told."""
    if path.stat().st_size != file.size:
        return None
    sha256 = hashlib.sha256()
    git_sha1 = hashlib.sha1(b"blob %d\0" % file.size, usedforsecurity=False)
    with path.open("rb") as source:
        while chunk := source.read(_CHUNK):
            sha256.update(chunk)
            if file.git_sha1 is not None:
                git_sha1.update(chunk)
    right = file.sha256 in (None, sha256.hexdigest())
    right = right and file.git_sha1 in (None, git_sha1.hexdigest())
    return sha256.hexdigest() if right else None
