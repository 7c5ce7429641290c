"""Keep a table of processes running: start in order, restart with back-off, stop in order.

It knows nothing of what the processes do. All of it happens on one thread: on Linux a child dies
with the thread that started it, so the one that starts is also the one that stops.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

from stillhouse.embedded import reaper
from stillhouse.embedded.process import (
    NotReadyError,
    StackError,
    base_environment,
    kill_group,
    last_lines,
    spawn,
)

FIRST_DELAY_SECONDS = 0.5
LONGEST_DELAY_SECONDS = 15.0
STABLE_SECONDS = 30.0
TRIES_BEFORE_READY = 3
_ASK_SECONDS = 10.0
_POLL_SECONDS = 0.1
_LOG_LIMIT_BYTES = 20 << 20


class StopRequestedError(Exception):
    """Somebody asked to stop while the stack was still starting."""


@dataclass(frozen=True)
class ProcessSpec:
    """One row of the table.

    Rows with the same `start_order` start together and the next ones wait until they are ready;
    stopping goes through `stop_order` in the same way. `fresh_folders` are emptied before each
    start, `after_exit` tidies up after each end. A process with `deaf_seconds` is killed and
    started again when its probe has failed for so long: it may live and not work.
    """

    name: str
    argv: tuple[str, ...]
    env: Mapping[str, str] = field(repr=False)
    probe: Callable[[], None] = field(repr=False)
    address: str = ""
    cwd: Path | None = None
    start_order: int = 0
    stop_order: int = 0
    ready_seconds: float = 60.0
    stop_seconds: float = 10.0
    fresh_folders: tuple[Path, ...] = ()
    after_exit: Callable[[], None] | None = field(default=None, repr=False)
    deaf_seconds: float | None = None


@dataclass
class _Running:
    spec: ProcessSpec
    process: subprocess.Popen[bytes]
    since: float
    ready: bool = False
    restarts: int = 0
    deaths_in_a_row: int = 0
    restart_at: float | None = None
    heard_at: float = 0.0  # when its probe last went well, and is to be asked again
    ask_at: float = 0.0


@dataclass(frozen=True)
class ProcessState:
    """What an outsider may know of one process; `pid` is also its process group."""

    pid: int
    restarts: int
    address: str
    log: str


class Supervisor:
    """Run a table of processes on the calling thread."""

    def __init__(
        self,
        logs: Path,
        *,
        say: Callable[[str], None],
        changed: Callable[[], None] = lambda: None,
        stopping: threading.Event | None = None,
        hurry: threading.Event | None = None,
    ) -> None:
        self.logs = logs
        self.stopping = stopping or threading.Event()
        self.hurry = hurry or threading.Event()
        self._say = say
        self._write_down = changed
        self._unwritten = False
        self._running: dict[str, _Running] = {}
        self._reaper = subprocess.Popen(
            [sys.executable, "-I", "-S", reaper.__file__],
            stdin=subprocess.PIPE,
            start_new_session=True,
            env=base_environment(),
        )

    def states(self) -> dict[str, ProcessState]:
        """Return each process by name, in the order of their start."""
        return {
            name: ProcessState(r.process.pid, r.restarts, r.spec.address, str(self.log(name)))
            for name, r in self._running.items()
        }

    def log(self, name: str) -> Path:
        """Return the file that a process writes to."""
        return self.logs / f"{name}.log"

    def forget_folder_at_end(self, folder: Path) -> None:
        """Have a folder removed even if this process is killed."""
        self._tell_reaper(f"folder {folder}")

    def start(self, specs: Iterable[ProcessSpec]) -> None:
        """Start processes in their order, each order ready before the next."""
        table = sorted(specs, key=lambda spec: spec.start_order)
        for order in sorted({spec.start_order for spec in table}):
            batch = [spec for spec in table if spec.start_order == order]
            for spec in batch:
                try:
                    process = self._spawn(spec)
                except OSError as error:
                    raise StackError(f"{spec.name} cannot be started: {error}") from error
                self._running[spec.name] = _Running(spec, process, time.monotonic())
            self._changed()
            self._wait_until_ready(batch)

    def run_once(
        self,
        name: str,
        argv: tuple[str, ...],
        env: Mapping[str, str],
        *,
        cwd: Path | None = None,
        seconds: float = 60.0,
    ) -> str:
        """Run a command to its end and return what it printed; a failure is an error."""
        log = self.log(name)
        process = spawn(argv, env=env, log=log, cwd=cwd, capture=True)
        self._tell_reaper(f"group {process.pid}")
        deadline = time.monotonic() + seconds
        try:
            while True:
                try:
                    out, _ = process.communicate(timeout=_POLL_SECONDS)
                    break
                except subprocess.TimeoutExpired:
                    self._heed_stop()
                    if time.monotonic() > deadline:
                        raise StackError(
                            f"{name} did not end within {seconds:g} s. {last_lines(log)}"
                        ) from None
        finally:
            kill_group(process)
            self._tell_reaper(f"ended {process.pid}")
        if process.returncode != 0:
            raise StackError(f"{name} failed with {process.returncode}. {last_lines(log)}")
        return out.decode()

    def watch(self) -> None:
        """Restart what dies until somebody asks to stop."""
        while not self.stopping.wait(_POLL_SECONDS):
            self.tend()

    def tend(self) -> None:
        """Look at each process once: note deaths, restart what is due."""
        now = time.monotonic()
        for running in self._running.values():
            if running.restart_at is None:
                if running.process.poll() is not None:
                    self._note_death(running, now)
                elif running.ready and running.spec.deaf_seconds is not None:
                    self._listen(running, now, running.spec.deaf_seconds)
            elif now >= running.restart_at:
                self._restart(running)
        if self._unwritten:
            self._changed()

    def _listen(self, running: _Running, now: float, deaf_seconds: float) -> None:
        """Ask a process now and then whether it works; kill one that has not for too long."""
        if now < running.ask_at:
            return
        running.ask_at = now + _ASK_SECONDS
        try:
            running.spec.probe()
        except NotReadyError as error:
            if now - max(running.heard_at, running.since) > deaf_seconds:
                self._say(f"{running.spec.name} does not work: {error}; it is started again")
                kill_group(running.process)
        else:
            running.heard_at = time.monotonic()

    def _changed(self) -> None:
        """Have the table written down; on a full disk, again and again until there is room: the
        processes matter more than what is told of them."""
        try:
            self._write_down()
        except OSError as error:
            if not self._unwritten:
                self._say(f"cannot write down which processes run: {error}; trying again")
            self._unwritten = True
        else:
            self._unwritten = False

    def stop(self) -> None:
        """Stop in order; a group that does not end in its time is killed."""
        for order in sorted({r.spec.stop_order for r in self._running.values()}):
            batch = [r for r in self._running.values() if r.spec.stop_order == order]
            for running in batch:
                with contextlib.suppress(ProcessLookupError):
                    running.process.terminate()
            began = time.monotonic()
            while alive := [r for r in batch if r.process.poll() is None]:
                waited = time.monotonic() - began
                if self.hurry.is_set() or all(waited > r.spec.stop_seconds for r in alive):
                    break
                for running in alive:
                    if waited > running.spec.stop_seconds:
                        kill_group(running.process)
                time.sleep(0.05)
            for running in batch:
                if running.restart_at is None:  # else it is gone already, and its number reusable
                    self._end_of(running)
        self._running.clear()
        self._changed()

    def close(self) -> None:
        """Let the reaper go; whatever still runs goes with it."""
        if self._reaper.stdin is not None:
            with contextlib.suppress(OSError):
                self._reaper.stdin.close()
        self._reaper.wait()

    def _spawn(self, spec: ProcessSpec) -> subprocess.Popen[bytes]:
        for folder in spec.fresh_folders:
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True)
        log = self.log(spec.name)
        log.parent.mkdir(parents=True, exist_ok=True)
        with contextlib.suppress(FileNotFoundError):
            if log.stat().st_size > _LOG_LIMIT_BYTES:
                log.replace(log.with_suffix(".log.1"))
        with log.open("a") as file:
            file.write(f"--- {datetime.now(UTC):%Y-%m-%dT%H:%M:%SZ} {spec.name} starts\n")
        process = spawn(spec.argv, env=spec.env, log=log, cwd=spec.cwd)
        self._tell_reaper(f"group {process.pid}")
        return process

    def _wait_until_ready(self, batch: list[ProcessSpec]) -> None:
        began = time.monotonic()
        seen = dict.fromkeys((spec.name for spec in batch), "not asked yet")
        while seen:
            self._heed_stop()
            self.tend()
            for spec in [spec for spec in batch if spec.name in seen]:
                running = self._running[spec.name]
                if running.restart_at is not None:
                    continue
                try:
                    spec.probe()
                except NotReadyError as error:
                    seen[spec.name] = str(error)
                    if time.monotonic() - began > spec.ready_seconds:
                        raise StackError(
                            f"{spec.name} was not ready within {spec.ready_seconds:g} s: {error}. "
                            f"{last_lines(self.log(spec.name))}"
                        ) from error
                    continue
                del seen[spec.name]
                running.ready = True
                self._say(f"{spec.name:<24} {spec.address or 'ready'}")
            self.stopping.wait(_POLL_SECONDS)

    def _heed_stop(self) -> None:
        if self.stopping.is_set():
            raise StopRequestedError

    def _note_death(self, running: _Running, now: float) -> None:
        spec, code = running.spec, running.process.returncode
        if now - running.since > STABLE_SECONDS:
            running.deaths_in_a_row = 0
        running.deaths_in_a_row += 1
        self._end_of(running)
        if not running.ready and running.deaths_in_a_row >= TRIES_BEFORE_READY:
            raise StackError(
                f"{spec.name} ended {TRIES_BEFORE_READY} times before it was ready, "
                f"last with {code}. {last_lines(self.log(spec.name))}"
            )
        delay = min(FIRST_DELAY_SECONDS * 2 ** (running.deaths_in_a_row - 1), LONGEST_DELAY_SECONDS)
        running.restart_at = now + delay
        self._say(f"{spec.name} ended with {code}; it starts again in {delay:g} s")

    def _restart(self, running: _Running) -> None:
        now = time.monotonic()
        try:
            running.process = self._spawn(running.spec)
        except OSError as error:  # no memory, no descriptors: try again later
            running.restart_at = now + LONGEST_DELAY_SECONDS
            self._say(f"{running.spec.name} cannot be started again: {error}")
            return
        running.since, running.restart_at = now, None
        running.restarts += 1
        self._changed()

    def _end_of(self, running: _Running) -> None:
        kill_group(running.process)  # a dead worker's pool must not work beside its successor
        self._tell_reaper(f"ended {running.process.pid}")
        if running.spec.after_exit is not None:
            running.spec.after_exit()

    def _tell_reaper(self, line: str) -> None:
        if self._reaper.stdin is None:
            return
        with contextlib.suppress(OSError):  # killed: the kernel still kills our direct children
            os.write(self._reaper.stdin.fileno(), f"{line}\n".encode())
