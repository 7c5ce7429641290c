"""Work in an event loop that goes on only while its batch's lease is held."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

from services.teacher_gateway import reasons
from services.teacher_gateway.teachers.outcomes import Retry
from services.teacher_gateway.timeouts import GatewayTimeouts
from stillhouse.chassis.errors import RetryableError
from stillhouse.chassis.logs import logger

log = logger(__name__)

T = TypeVar("T")


class Fenced(RetryableError):
    """Another worker took the batch over: this one has nothing more to say about it."""


class OutOfTime(Exception):
    """The work did not end within an attempt."""

    outcome = Retry(reasons.TEACHER_TIMEOUT, "no end within an attempt", lost=True, away=True)


class Lease:
    """A batch's lease, as this process knows it by time.monotonic()."""

    def __init__(self, times: GatewayTimeouts, renew: Callable[[], bool], taken: float) -> None:
        """`renew` is a blocking call that raises Fenced once the batch is another's, and is False
        when the pipeline stops; `taken` is no later than when the lease began."""
        self._times = times
        self._renew = renew
        self._renewed = taken

    @property
    def sure(self) -> bool:
        """Whether it is held for a beat at least."""
        return time.monotonic() < self._renewed + self._times.lease_ttl - self._times.beat

    async def renew(self) -> bool:
        sent = time.monotonic()
        going = await asyncio.to_thread(self._renew)
        self._renewed = sent
        return going

    async def keep(self, stop: Callable[[], None] = lambda: None) -> None:
        """Renew it for ever; call `stop` when the pipeline stops. Raises Fenced, or what kept it
        from being renewed until it was not surely held any more."""
        while True:
            await asyncio.sleep(self._times.beat)
            try:
                if not await self.renew():
                    stop()
            except Fenced:
                raise
            except RetryableError as error:
                log.warning("the lease was not renewed", why=str(error))
                if not self.sure:
                    raise


async def while_held(
    times: GatewayTimeouts, renew: Callable[[], bool], work: Coroutine[Any, Any, T]
) -> T:
    """Do work while the lease is renewed; it is broken off once the lease is not surely held.

    Raises Fenced, OutOfTime, or what kept the lease from being renewed.
    """
    task = asyncio.create_task(work)
    beat = asyncio.create_task(Lease(times, renew, time.monotonic()).keep())
    try:
        await asyncio.wait((task, beat), timeout=times.attempt, return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        if beat.done():
            beat.result()
        raise OutOfTime
    finally:
        for one in (task, beat):
            one.cancel()
        await asyncio.gather(task, beat, return_exceptions=True)
