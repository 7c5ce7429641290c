"""Work in an event loop that goes on only while its batch's lease is held."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any, TypeVar

from services.teacher_gateway import reasons
from services.teacher_gateway.asking import Fenced
from services.teacher_gateway.books import Books
from services.teacher_gateway.teachers.outcomes import Retry
from services.teacher_gateway.timeouts import GatewayTimeouts
from stillhouse.chassis.errors import RetryableError
from stillhouse.chassis.logs import logger

log = logger(__name__)

T = TypeVar("T")


class OutOfTime(Exception):
    """The work did not end within an attempt."""

    outcome = Retry(reasons.TEACHER_TIMEOUT, "no end within an attempt", lost=True, away=True)


async def while_held(times: GatewayTimeouts, books: Books, work: Coroutine[Any, Any, T]) -> T:
    """Do work while the lease is renewed; it is broken off once the lease is not surely held.

    Raises Fenced, OutOfTime, or what kept the lease from being renewed.
    """
    task = asyncio.create_task(work)
    beat = asyncio.create_task(_beat(times, books))
    try:
        await asyncio.wait((task, beat), return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            beat.result()
        return await task
    finally:
        for one in (task, beat):
            one.cancel()
        await asyncio.gather(task, beat, return_exceptions=True)


async def _beat(times: GatewayTimeouts, books: Books) -> None:
    """Renew until the lease is lost or an attempt is over, and raise then."""
    clock = asyncio.get_running_loop().time
    renewed, ends = clock(), clock() + times.attempt
    while clock() < ends:
        await asyncio.sleep(times.beat)
        sent = clock()
        try:
            await asyncio.to_thread(books.renew)
            renewed = sent
        except Fenced:
            raise
        except RetryableError as error:
            log.warning("the lease was not renewed", why=str(error))
            if clock() > renewed + times.lease_ttl - times.beat:
                raise
    raise OutOfTime
