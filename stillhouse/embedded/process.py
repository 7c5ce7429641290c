"""Own child processes so that none can outlive us.

Each child leads a session of its own: Ctrl-C in a terminal then reaches only the supervisor, which
stops the others in order, and a whole part (a worker with its pool) can be killed as one group.
On Linux the kernel kills a child when the thread that started it is gone, so start children from a
thread that lives as long as they should.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

_PR_SET_PDEATHSIG = 1
_POLL_SECONDS = 0.05


class StackError(Exception):
    """The embedded stack cannot start or go on; the message says what to do."""


class NotReadyError(Exception):
    """A part runs but does not do its work yet; the message says what was seen."""


def _die_with(parent: int) -> Callable[[], None] | None:
    """Return what a child runs before exec so that it dies when its parent does."""
    if sys.platform != "linux":
        return None
    # Loaded before the fork: a lock that another thread holds would never be released in the child.
    prctl = ctypes.CDLL(None, use_errno=True).prctl

    def before_exec() -> None:
        prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        if os.getppid() != parent:  # it died between fork and prctl: no signal will come
            os._exit(1)

    return before_exec


def spawn(
    argv: Sequence[str | Path],
    *,
    env: Mapping[str, str],
    log: Path,
    cwd: Path | None = None,
    capture: bool = False,
) -> subprocess.Popen[bytes]:
    """Start a child that leads its own session and appends what it says to `log`.

    With `capture` its standard output is a pipe instead, for the caller to read.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("ab") as out:
        return subprocess.Popen(
            [str(word) for word in argv],
            env=dict(env),
            cwd=cwd,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE if capture else out,
            stderr=out,
            start_new_session=True,
            preexec_fn=_die_with(os.getpid()),
        )


def kill_group(process: subprocess.Popen[bytes]) -> None:
    """Kill what is left of a child's group, the child itself included."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def stop(process: subprocess.Popen[bytes], *, grace_seconds: float) -> bool:
    """Ask a child to end, then kill its group; return whether it ended by itself."""
    with contextlib.suppress(ProcessLookupError):
        process.terminate()
    clean = True
    try:
        process.wait(grace_seconds)
    except subprocess.TimeoutExpired:
        clean = False
    kill_group(process)
    return clean


def wait_until_ready(
    process: subprocess.Popen[bytes],
    probe: Callable[[], None],
    *,
    name: str,
    log: Path,
    deadline_seconds: float,
) -> None:
    """Return when `probe` stops raising NotReadyError; a dead child or the deadline is an error."""
    end = time.monotonic() + deadline_seconds
    while True:
        if process.poll() is not None:
            raise StackError(f"{name} ended with {process.returncode}. {last_lines(log)}")
        try:
            return probe()
        except NotReadyError as seen:
            if time.monotonic() > end:
                raise StackError(
                    f"{name} was not ready within {deadline_seconds:g} s: {seen}. {last_lines(log)}"
                ) from seen
        time.sleep(_POLL_SECONDS)


def last_lines(log: Path, count: int = 8) -> str:
    """Quote the end of a log for an error message."""
    try:
        with log.open("rb") as file:
            file.seek(max(0, log.stat().st_size - 4096))
            lines = file.read().decode(errors="replace").splitlines()[-count:]
    except OSError:
        lines = []
    if not lines:
        return f"Its log {log} is empty."
    return f"Its log {log} ends:\n  " + "\n  ".join(lines)


def base_environment(extra: Mapping[str, str] | None = None) -> dict[str, str]:
    """Return the few variables that any child needs, and nothing of the user's secrets."""
    kept = (
        *("HOME", "LANG", "LC_ALL", "PATH", "TMPDIR", "TZ", "VIRTUAL_ENV", "LD_LIBRARY_PATH"),
        *("CUDA_VISIBLE_DEVICES", "HF_HOME", "SSL_CERT_FILE", "XDG_CACHE_HOME"),
    )
    env = {k: v for k, v in os.environ.items() if k in kept or k.startswith("PYTHON")}
    return env | dict(extra or {})
