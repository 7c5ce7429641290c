"""Kill what a killed supervisor left behind.

The kernel kills the supervisor's children with it, but not their children: a worker's pool would
live on. So the supervisor tells this small process, line by line, which groups it started and which
folders are only for this run; when the pipe closes, what is still on the list goes. It imports only
the standard library and is run by its path, to stay small and to start at once.
"""

import contextlib
import os
import shutil
import signal
import sys
from collections.abc import Iterable


def reap(lines: Iterable[str]) -> None:
    """Follow `group N`, `ended N` and `folder PATH` until the end, then remove what is left."""
    groups: set[int] = set()
    folders: set[str] = set()
    for line in lines:
        word, _, rest = line.rstrip("\n").partition(" ")
        if word == "group":
            groups.add(int(rest))
        elif word == "ended":
            groups.discard(int(rest))
        elif word == "folder":
            folders.add(rest)
    for group in groups:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(group, signal.SIGKILL)
    for folder in folders:
        shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)  # only the end of the supervisor ends this
    reap(sys.stdin)
