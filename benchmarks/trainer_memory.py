"""How much more memory a process takes than when it began to train."""

import threading
from pathlib import Path
from types import TracebackType


def resident() -> int:
    """Bytes of this process in memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


class MemoryPeak:
    """Looks every 10 ms; `over_start` is the most that was seen above the start."""

    def __init__(self) -> None:
        self._start = resident()
        self.over_start = 0
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._look, daemon=True)

    def __enter__(self) -> "MemoryPeak":
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._ended.set()
        self._thread.join()

    def _look(self) -> None:
        while not self._ended.wait(0.01):
            self.over_start = max(self.over_start, resident() - self._start)
