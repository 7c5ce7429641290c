"""Recorded exchanges on the disk of the process that served them, until the store has them.

    <folder>/<spool id>/lock            held (flock) as long as the process lives
    <folder>/<spool id>/000001.spool    records, appended; closed ones wait to be shipped

A thread writes what has come since its last write and makes it durable with one fsync, a few dozen
times a second: an answer never waits for it. A process that died loses at most what came since;
its spool is found by its free lock.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import secrets
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path

from services.teacher_gateway.capture.failures import SPOOL_DISK, SPOOL_ERROR
from services.teacher_gateway.capture.record import Record, frame
from services.teacher_gateway.counters import CAPTURE_SPOOLED
from stillhouse.chassis.errors import PermanentError
from stillhouse.chassis.logs import logger

log = logger(__name__)

_LOCK = "lock"
_SUFFIX = ".spool"
_SET_ASIDE = ".damaged"
# A new spool is made under this name until its lock is held, so that nobody takes it for a dead
# one.
_MAKING = ".making-"
_MADE_LONG_AGO_SECONDS = 3600
_FLUSH_SECONDS = 0.02
_SEGMENT_BYTES = 4 << 20
# What may wait in memory while the disk hangs.
_MOST_QUEUED_BYTES = 64 << 20
_RECORD_OVERHEAD = 400


def open_folder(folder: Path) -> None:
    """Make the folder of all spools, for its owner alone. Raises PermanentError."""
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        found = folder.lstat()
    except OSError as error:
        raise PermanentError(
            f"the folder for recorded traffic {folder} cannot be used ({error.strerror}): set "
            "TEACHER_GATEWAY_CAPTURE_DIR to one on a disk that outlives this process",
            reason="settings",
        ) from error
    if found.st_uid != os.geteuid() or found.st_mode & 0o022:
        raise PermanentError(
            f"{folder} belongs to another user, or others may write to it: set "
            "TEACHER_GATEWAY_CAPTURE_DIR to a folder of your own",
            reason="settings",
        )


class Spool:
    """This process's own spool. `add` and `shipped` are called by the event loop alone."""

    def __init__(
        self,
        folder: Path,
        *,
        most_bytes: int,
        closed: Callable[[Path], None],
        lost: Callable[[list[Record], str], None],
        segment_seconds: float,
    ) -> None:
        """`closed` gets each segment that is complete, `lost` what could not be written; both are
        called by the writing thread."""
        open_folder(folder)
        self.path, self._lock = _make(folder)
        self.spool_id = self.path.name
        self._most_bytes = most_bytes
        self._closed = closed
        self._lost = lost
        self._segment_seconds = segment_seconds
        self._waiting: deque[Record] = deque()
        self._wake = threading.Event()
        self._ending = threading.Event()
        # Added and shipped are the event loop's, written is the thread's: none is shared.
        self._added = 0
        self._shipped = 0
        self._written = 0
        self._number = 0
        self._file: int | None = None
        self._size = 0
        self._opened_at = 0.0
        self._thread = threading.Thread(target=self._run, name="capture-spool", daemon=True)
        self._thread.start()

    @property
    def size(self) -> int:
        """What is not in the store yet, in memory and on disk; about."""
        return self._added - self._shipped

    def add(self, record: Record) -> bool:
        """Have a record written; False when there is no room for it."""
        size = len(record.request) + len(record.answer) + _RECORD_OVERHEAD
        if (
            self.size + size > self._most_bytes
            or self._added - self._written > _MOST_QUEUED_BYTES
            or self._ending.is_set()
        ):
            return False
        self._added += size
        self._waiting.append(record)
        if not self._wake.is_set():
            self._wake.set()
        return True

    def shipped(self, records: list[Record]) -> None:
        """These are in the store, or lost: they take no room any more."""
        self._shipped += _room(records)

    def close(self) -> None:
        """Write what waits, and close the last segment. Blocks for one fsync."""
        self._ending.set()
        self._wake.set()
        self._thread.join()

    def remove(self) -> None:
        """Give up the lock, and the folder if nothing is left in it."""
        _remove(self.path)
        os.close(self._lock)

    # The thread

    def _run(self) -> None:
        while not self._ending.is_set():
            if self._wake.wait(self._patience()):
                # Let a few more come: one fsync makes all of them durable.
                self._ending.wait(_FLUSH_SECONDS)
                self._wake.clear()
            self._write_waiting()
        self._write_waiting()
        self._close_segment()

    def _patience(self) -> float:
        """Until the open segment is old enough to be closed."""
        if self._file is None:
            return self._segment_seconds
        return max(self._opened_at + self._segment_seconds - time.monotonic(), 0.01)

    def _write_waiting(self) -> None:
        records: list[Record] = []
        while self._waiting:
            records.append(self._waiting.popleft())
        framed: list[Record] = []
        data: list[bytes] = []
        for record in records:
            try:
                data.append(frame(record))
                framed.append(record)
            except Exception:
                # One that cannot be written, such as for a text that UTF-8 cannot hold, costs none
                # of the others.
                log.exception("a record was not written", path=str(self.path))
                self._lost([record], SPOOL_ERROR)
        if framed:
            try:
                self._append(b"".join(data))
            except OSError as error:
                log.error("recorded traffic was not written", why=str(error), path=str(self.path))
                self._lost(framed, SPOOL_DISK)
            except Exception:
                # The thread must go on: without it nothing more would be recorded.
                log.exception("recorded traffic was not written", path=str(self.path))
                self._lost(framed, SPOOL_ERROR)
            else:
                CAPTURE_SPOOLED.inc(len(framed))
        self._written += _room(records)
        old = time.monotonic() - self._opened_at >= self._segment_seconds
        if self._file is not None and (old or self._size >= _SEGMENT_BYTES):
            self._close_segment()

    def _append(self, data: bytes) -> None:
        if self._file is None:
            self._open_segment()
        assert self._file is not None
        try:
            done = 0
            while done < len(data):
                done += os.write(self._file, data[done:] if done else data)
            os.fdatasync(self._file)
        except OSError:
            # What a full disk cut off must not hide what comes behind it.
            with contextlib.suppress(OSError):
                os.ftruncate(self._file, self._size)
            self._close_segment()
            raise
        self._size += len(data)

    def _open_segment(self) -> None:
        self._number += 1
        path = self.path / f"{self._number:06d}{_SUFFIX}"
        self._file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        self._size = 0
        self._opened_at = time.monotonic()
        _sync_folder(self.path)

    def _close_segment(self) -> None:
        if self._file is None:
            return
        os.close(self._file)
        self._file = None
        path = self.path / f"{self._number:06d}{_SUFFIX}"
        if self._size:
            self._closed(path)
        else:
            path.unlink()


def segments(path: Path) -> list[Path]:
    """The segments of a spool, oldest first."""
    return sorted(path.glob(f"*{_SUFFIX}"))


def set_aside(path: Path) -> Path:
    """Keep a segment for an operator, where nobody ships it again; return where it lies."""
    kept = path.with_suffix(_SET_ASIDE)
    path.rename(kept)
    return kept


def abandoned(folder: Path) -> Iterator[Path]:
    """Yield the spools whose process is gone, each held by us meanwhile; empty ones are removed
    when they were looked at."""
    if not folder.is_dir():
        return
    for path in sorted(folder.iterdir()):
        if path.name.startswith(_MAKING):
            try:
                _remove_half_made(path)
            except OSError as error:
                # Another sweep was faster, or it is none of ours; it holds up no spool.
                log.info("a half-made spool was not removed", path=str(path), why=str(error))
            continue
        if not path.is_dir() or path.is_symlink():
            continue
        try:
            lock = os.open(path / _LOCK, os.O_RDWR | os.O_NOFOLLOW)
        except OSError:
            continue
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            os.close(lock)
            continue
        try:
            yield path
            _remove(path)
        finally:
            os.close(lock)


def _make(folder: Path) -> tuple[Path, int]:
    name = f"sp-{secrets.token_hex(8)}"
    making = folder / f"{_MAKING}{name}"
    making.mkdir(mode=0o700)
    lock = os.open(making / _LOCK, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    path = folder / name
    making.rename(path)
    _sync_folder(folder)
    return path, lock


def _remove(path: Path) -> None:
    """Remove a spool in which nothing but its lock is left."""
    if [found.name for found in path.iterdir()] == [_LOCK]:
        (path / _LOCK).unlink()
        path.rmdir()


def _remove_half_made(path: Path) -> None:
    """A process that died while it made its spool left nothing in it."""
    if time.time() - path.lstat().st_mtime > _MADE_LONG_AGO_SECONDS:
        (path / _LOCK).unlink(missing_ok=True)
        path.rmdir()


def _sync_folder(path: Path) -> None:
    """Make a new name in a folder durable."""
    handle = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _room(records: list[Record]) -> int:
    return sum(len(r.request) + len(r.answer) + _RECORD_OVERHEAD for r in records)
