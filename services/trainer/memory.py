"""How much memory is left, and keeping what a step has used for the next one.

A step makes and drops the same large arrays again and again. The C library gives those above 32 MB
back to the system at once and clears the next ones page by page, a tenth of a step; it is told to
keep them while a training lasts.
"""

from __future__ import annotations

import ctypes
import re
from pathlib import Path

import torch

# Of malloc.h: the least size of memory that is mapped by itself, and what may lie unused.
_M_MMAP_THRESHOLD, _M_TRIM_THRESHOLD = -3, -1
_KEPT_EACH, _KEPT_IN_ALL = 1 << 28, (1 << 31) - 1
_CGROUP = Path("/sys/fs/cgroup")


def available(device: torch.device) -> int:
    """Bytes that one more pass may take."""
    if device.type == "cuda":
        free = int(torch.cuda.mem_get_info(device)[0])
        kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return free + int(kept)
    return _of_the_machine()


def keep() -> None:
    """Keep what is dropped from now on; of another C library than glibc nothing is asked."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_MMAP_THRESHOLD, _KEPT_EACH)
        mallopt(_M_TRIM_THRESHOLD, _KEPT_IN_ALL)


def give_back() -> None:
    """Return to the system what is kept and not used."""
    malloc_trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if malloc_trim is not None:
        malloc_trim(0)


def _of_the_machine() -> int:
    """MemAvailable, or what the container may still take where that is less."""
    said = re.search(r"^MemAvailable:\s+(\d+) kB", Path("/proc/meminfo").read_text(), re.MULTILINE)
    found = int(said[1]) * 1024 if said else 1 << 62
    try:
        most = (_CGROUP / "memory.max").read_text().strip()
        used = int((_CGROUP / "memory.current").read_text())
        cached = re.search(
            r"^inactive_file (\d+)", (_CGROUP / "memory.stat").read_text(), re.MULTILINE
        )
    except (OSError, ValueError):
        return found
    if most == "max":
        return found
    return min(found, max(0, int(most) - used + (int(cached[1]) if cached else 0)))
