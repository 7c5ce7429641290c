"""The thread that computes: it puts what is waiting side by side, and lets it go when it is done.

Calls come one by one from an event loop, which stays free. Between two steps new calls join those
under way and abandoned ones are dropped, so a token costs less the more calls there are at once.
"""

from __future__ import annotations

import threading
from collections import deque
from concurrent.futures import Future
from dataclasses import dataclass
from typing import TYPE_CHECKING

from services.teacher_gateway import reasons
from services.teacher_gateway.teachers.local.weights import Weights
from services.teacher_gateway.teachers.local.work import Work
from services.teacher_gateway.teachers.outcomes import Reject
from stillhouse.chassis.logs import logger
from stillhouse.contracts.spec import Signal

if TYPE_CHECKING:
    from services.teacher_gateway.teachers.local.rows import Rows

log = logger(__name__)

# Tokens of prompts, or of texts to score, in one forward, with their padding: on a CPU others wait
# for it, and on a GPU it must be enough to keep it busy.
_FORWARD_TOKENS = {"cpu": 1024, "cuda": 16_384}


@dataclass(frozen=True)
class _Bounds:
    """Tokens at most: read in one forward, and held in the cache; a single work always goes."""

    forward: int
    cache: int

    def halved(self, works: list[Work]) -> _Bounds:
        """Half of what these works took, for they were too many at once."""
        took = max(work.size for work in works) * len(works)
        return _Bounds(self.forward // 2, min(self.cache, took) // 2)


class Engine:
    """Answers works with one model, from when it is loaded until `close`."""

    def __init__(
        self, held: Future[Weights], signal: Signal, *, threads: int, cache_mib: int
    ) -> None:
        self._held = held
        self._signal = signal
        self._threads = threads
        self._cache_mib = cache_mib
        self._changed = threading.Condition()
        self._waiting: deque[Work] = deque()
        self._closing = False
        self._thread = threading.Thread(target=self._run, name="local-teacher", daemon=True)
        self._thread.start()
        held.add_done_callback(self._wake)

    def submit(self, work: Work) -> None:
        """Take a work on. Its future tells the outcome."""
        with self._changed:
            self._waiting.append(work)
            self._changed.notify()

    def close(self) -> None:
        """End after the step under way; what is left is nobody's any more."""
        with self._changed:
            self._closing = True
            self._changed.notify()
        self._thread.join()

    def _wake(self, _: object) -> None:
        with self._changed:
            self._changed.notify()

    def _run(self) -> None:
        with self._changed:
            self._changed.wait_for(lambda: self._closing or self._held.done())
            if self._closing or self._held.exception() is not None:
                return  # whoever calls waits for the weights itself
        weights = self._held.result()
        import torch

        from services.teacher_gateway.teachers.local.rows import Rows

        torch.set_num_threads(self._threads)  # a thread has its own number
        rows = Rows(weights, self._signal)
        bounds = _Bounds(
            forward=_FORWARD_TOKENS["cuda" if weights.model.device.type == "cuda" else "cpu"],
            cache=(self._cache_mib << 20) // weights.token_bytes,
        )
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._closing or self._waiting or len(rows))
                if self._closing:
                    return
                taken = self._take(weights, rows, bounds)
            try:
                _advance(weights, self._signal, rows, taken)
            except Exception as error:
                works = dict.fromkeys([*rows.clear(), *taken])
                left = [work for work in works if not work.future.done()]
                if isinstance(error, torch.OutOfMemoryError):
                    error.__traceback__ = None  # its frames hold what did not fit
                    _free_memory()
                    if len(left) > 1:
                        bounds = bounds.halved(left)
                        log.warning("local weights: out of memory, fewer at once", bounds=bounds)
                        with self._changed:
                            # From their beginnings: random numbers are an item's own.
                            self._waiting.extendleft(reversed(left))
                        continue
                log.exception("local weights failed")
                for work in left:
                    work.end(error)

    def _take(self, weights: Weights, rows: Rows, bounds: _Bounds) -> list[Work]:
        """What joins now: works of one kind, as many as one forward and the cache hold."""
        taken: list[Work] = []
        largest = max((work.size for work in rows.works), default=0)
        longest = 0
        while self._waiting:
            work = self._waiting[0]
            if work.abandoned or _end_at_once(weights, work):
                self._waiting.popleft()
                continue
            if taken and (work.answer is None) != (taken[0].answer is None):
                break
            longest = max(longest, len(work.prompt) + len(work.answer or ()))
            if taken and longest * (len(taken) + 1) > bounds.forward:
                break
            if work.answer is None:
                largest = max(largest, work.size)
                beside = len(taken) + len(rows)
                if beside and largest * (beside + 1) > bounds.cache:
                    break
            taken.append(self._waiting.popleft())
        return taken


def _end_at_once(weights: Weights, work: Work) -> bool:
    """Reject what is longer than the model can see."""
    tokens = len(work.prompt) + len(work.answer or ())
    # The last token of an answer is not read.
    if tokens - (work.answer is not None) <= weights.positions:
        return False
    detail = f"it has {tokens} tokens, and the weights see {weights.positions}"
    work.end(Reject(reasons.REFUSED_BY_TEACHER, detail))
    return True


def _advance(weights: Weights, signal: Signal, rows: Rows, taken: list[Work]) -> None:
    from services.teacher_gateway.teachers.local.rows import score

    if taken and taken[0].answer is not None:
        score(weights, signal, taken)
    elif taken:
        rows.join(taken)
    rows.drop_abandoned()
    if len(rows):
        rows.step()


def _free_memory() -> None:
    import gc

    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
