"""A paid batch: claim it, adopt what earlier attempts stored, ask for the rest, close it once.

    1. one transaction: lease, fencing epoch, attempt, and the worst case reserved (`claims`)
    2. the parts of earlier attempts are read and their series ended; what was found is settled,
       what a dead attempt may have lost is listed
    3. what the tenant paid for before is stored (`cache.index`), the rest is asked for, and stored
       in parts while it comes (`asking`); with `batch_api` a provider works on it instead
       (`provider.batches`)
    4. the manifest, then one transaction `WHERE epoch = mine`: items, money, batch, event
       (`closing`)
    5. the job's message is acknowledged by returning

A job that meets a live lease asks nothing. What cannot be answered now leaves the batch waiting
with `next_attempt_at`; what can never be becomes a rejection, so every batch closes.
"""

from __future__ import annotations

import asyncio
import os
import time
from contextlib import suppress

import uvloop
from sqlalchemy.orm import Session

from services.teacher_gateway.asking import Attempt, Result
from services.teacher_gateway.batch_input import BatchInput, read_batch, read_tokenizer
from services.teacher_gateway.books import Books
from services.teacher_gateway.cache import index
from services.teacher_gateway.cache.taking import take_cached
from services.teacher_gateway.claims import Claim, claim_batch, claimable, stand_still
from services.teacher_gateway.closing import complete_responses, finish
from services.teacher_gateway.context import Context
from services.teacher_gateway.database import now, reading, transaction
from services.teacher_gateway.holding import Fenced
from services.teacher_gateway.ledger import lock
from services.teacher_gateway.limits.question import TeacherQuestion
from services.teacher_gateway.limits.shared import Holder, SharedLimits
from services.teacher_gateway.limits.turns import Turns
from services.teacher_gateway.models import Batch, Pipeline
from services.teacher_gateway.parts import close_series
from services.teacher_gateway.provider import batches as provider_batches
from services.teacher_gateway.provider.looks import look_at_provider
from services.teacher_gateway.stop import TERMINAL
from services.teacher_gateway.teachers.outcomes import Call, Outcome
from services.teacher_gateway.teachers.routes import open_teacher
from stillhouse.chassis.crash import crash_point
from stillhouse.chassis.errors import (
    PermanentError,
    RetryableError,
    StillhouseError,
    StoreUnavailable,
)
from stillhouse.chassis.logs import logger
from stillhouse.contracts.artifacts import ObjectRef

log = logger(__name__)


def collect_batch(context: Context, pipeline_id: str, batch: int) -> None:
    """Do one attempt at a batch; see the module. Returns without effect when there is none."""
    with reading(context.engine) as session:
        row = session.get(Batch, (pipeline_id, batch))
        pipeline = session.get(Pipeline, pipeline_id)
        if row is None or pipeline is None or pipeline.state in TERMINAL:
            return
        if row.state == "closed":
            complete_responses(context, pipeline_id)
            return
        if not claimable(row, now(session)):
            return
    began = time.monotonic()
    look = None
    if row.provider_batch is not None:
        look = look_at_provider(context, pipeline, row)
        if look is None:
            return  # it goes on there; when to look again is noted
    keys: dict[str, str] = {}
    try:
        given = read_batch(
            context.store,
            row.tenant_id,
            pipeline_id,
            batch,
            ObjectRef.model_validate_json(row.prompts),
        )
        keys = index.keys_of(given, context.store)
    except PermanentError:
        if not pipeline.stopping:
            raise
        given = None  # what was reserved must be settled all the same
    except StoreUnavailable:
        _wait_for_store(context, row, began)
        raise
    started = time.monotonic()
    at_provider = look is not None or (given is not None and given.teacher.batch_api)
    claim = claim_batch(context, pipeline_id, batch, given, keys, plans=look is None)
    if claim is None:
        return
    crash_point("batch_claimed")
    books = Books(context, claim, given, started)
    try:
        if at_provider:
            provider_batches.attempt(context, claim, given, books, look)
        else:
            _attempt(context, claim, given, books)
    except Fenced as error:
        log.warning("batch left to another worker", batch=batch, why=str(error))
    except (RetryableError, PermanentError) as error:
        _let_go(context, books, error)
        raise


def _attempt(context: Context, claim: Claim, given: BatchInput | None, books: Books) -> None:
    """Steps 2 to 4."""
    series = [
        close_series(context.store, claim.tenant_id, claim.pipeline_id, claim.batch, number)
        for number in range(1, claim.attempt)
    ]
    crash_point("series_closed")
    books.adopt(series, given)
    crash_point("answers_adopted")
    if take_cached(context, claim, books) and claim.asks and given is not None:
        books.result = uvloop.run(_ask(context, claim, given, books))
    crash_point("answers_stored")
    finish(context, claim, given, books, series)


async def _ask(context: Context, claim: Claim, given: BatchInput, books: Books) -> Result:
    """Step 3: one event loop and one HTTP session for the whole attempt."""
    teacher, resolved = given.teacher, given.resolved
    most, shared = teacher.limits.concurrency, None
    if teacher.url is not None:
        holder = Holder(claim.tenant_id, claim.pipeline_id, claim.batch, claim.epoch)
        shared = SharedLimits(context.engine, context.times, teacher, holder)
    wanted, ttl = min(most, len(claim.asks)), context.times.lease_ttl
    async with (
        open_teacher(
            teacher,
            given.signal,
            context.settings,
            environ=os.environ,
            # Parsing a tokenizer takes a second or more, and only weights need it here.
            today=read_tokenizer(context.store, resolved.tokenizer).today
            if teacher.weights
            else None,
            pin=resolved.pinned.get(teacher.weights or ""),
        ) as client,
        Turns(most, wanted=wanted, shared=shared, ttl=ttl) as turns,
    ):

        async def ask(call: Call, *, deadline: float) -> Outcome:
            books.asked = True  # before this, nothing can have been billed
            return await client.ask(call, deadline=deadline)

        attempt = Attempt(
            ask,
            books,
            price=teacher.usd_per_million,
            times=context.times,
            concurrency=most,
            call_seconds=teacher.limits.timeout_seconds,
            started=books.started,
            question=TeacherQuestion(context, claim, given, client, turns),
            suspect=claim.away > 0 or turns.suspect,
            turns=turns,
        )
        result = await attempt.run(claim.asks)
        if result.away and result.away_to_all and shared is not None:
            with suppress(RetryableError):  # what was answered counts; the next one opens it
                await asyncio.to_thread(shared.away, result.away)
    return result


def _let_go(context: Context, books: Books, error: StillhouseError) -> None:
    """Free a batch whose attempt could not go on: the store or the database was in the way, or its
    teacher cannot be asked at all and the pipeline fails for it."""
    with suppress(RetryableError), transaction(context.engine) as session:
        _put_back(session, context, books.let_go(session), error, books.started)


def _wait_for_store(context: Context, seen: Batch, began: float) -> None:
    """Put a batch back that was not even claimed, since its input could not be read."""
    with suppress(RetryableError), transaction(context.engine) as session:
        lock(session, seen.pipeline_id)
        row = session.get(Batch, (seen.pipeline_id, seen.batch), with_for_update=True)
        if row is not None and row.epoch == seen.epoch and claimable(row, now(session)):
            _put_back(session, context, row, StoreUnavailable("its input"), began)


def _put_back(
    session: Session, context: Context, row: Batch, error: StillhouseError, began: float
) -> None:
    pause = context.times.batch_backoff
    row.state, row.next_attempt_at = "waiting", now(session) + pause
    if isinstance(error, StoreUnavailable):
        stand_still(row, time.monotonic() - began + pause)
