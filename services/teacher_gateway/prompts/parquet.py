"""Prompts in a Parquet file become lines, as if they had been written as JSONL.

A Parquet file of a few kilobytes may claim gigabytes, and a forged one may crash its reader, so a
process of its own (`parquet_rows`) reads it, within a fixed memory.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

from services.teacher_gateway.prompts import parquet_rows
from services.teacher_gateway.prompts.file import PromptsRefused

MAGIC = b"PAR1"
# Of addresses, of which the reader's libraries take 330 MB.
MEMORY_BYTES = 768 << 20
# How much longer the lines may be than their file, beside a first allowance.
MOST_EXPANSION = 100
ALLOWANCE_BYTES = 64 << 20
MOST_SECONDS = 120.0
LOOK_SECONDS = 1.0

_PASSED_ON = ("PATH", "PYTHONPATH", "LD_LIBRARY_PATH", "LANG", "LC_ALL")


def is_parquet(file: BinaryIO) -> bool:
    """Whether a file says by its first bytes that it is Parquet; leaves it at its start."""
    found = file.read(len(MAGIC))
    file.seek(0)
    return found == MAGIC


def lines_of_parquet(
    file: BinaryIO,
    folder: Path,
    *,
    max_bytes: int,
    max_rows: int,
    alive: Callable[[], None],
) -> BinaryIO:
    """Return an unnamed file with the rows as lines, `max_rows` and one more at most.

    Raises PromptsRefused.
    """
    size = file.seek(0, os.SEEK_END)
    file.seek(0)
    most = min(max_bytes, MOST_EXPANSION * size + ALLOWANCE_BYTES)
    lines = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115 (the caller closes it)
    said = ""
    try:
        with tempfile.TemporaryFile(dir=folder) as errors:
            code = _run((MEMORY_BYTES, most, max_rows), file, lines, errors, alive)
            errors.seek(0)
            said = errors.read(1000).decode(errors="replace").strip()
        if code == parquet_rows.REFUSED:
            raise PromptsRefused(said, reason="prompts_damaged")
        if code != 0:
            raise PromptsRefused(
                f"the Parquet file of prompts cannot be read (its reader ended with {code}): write "
                "it again, with smaller row groups",
                reason="prompts_damaged",
            )
    except BaseException:
        lines.close()
        raise
    lines.seek(0)
    return lines


def _run(
    limits: tuple[int, ...],
    file: BinaryIO,
    lines: BinaryIO,
    errors: BinaryIO,
    alive: Callable[[], None],
) -> int:
    """Let another process convert; it gets no secret of this one's environment."""
    environ = {name: os.environ[name] for name in _PASSED_ON if name in os.environ}
    # Its own pools reserve addresses by the gigabyte.
    environ["ARROW_DEFAULT_MEMORY_POOL"] = "system"
    process = subprocess.Popen(
        [sys.executable, "-m", parquet_rows.__name__, *map(str, limits)],
        stdin=file,
        stdout=lines,
        stderr=errors,
        env=environ,
    )
    ends = time.monotonic() + MOST_SECONDS
    try:
        while True:
            try:
                return process.wait(timeout=LOOK_SECONDS)
            except subprocess.TimeoutExpired:
                alive()
                if time.monotonic() > ends:
                    raise PromptsRefused(
                        f"reading the Parquet file of prompts took over {MOST_SECONDS:.0f} "
                        "seconds: split it over several pipelines, or give JSONL",
                        reason="prompts_too_large",
                    ) from None
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()
