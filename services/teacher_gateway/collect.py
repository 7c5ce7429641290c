"""A paid batch: claim it, adopt what earlier attempts stored, ask for the rest, close it once.

    1. one transaction: lease, fencing epoch, attempt, and the worst case reserved
    2. the parts of earlier attempts are read and their series ended; what was found is settled,
       what a dead attempt may have lost is listed
    3. the rest is asked for, and stored in parts while it comes (`asking`)
    4. the manifest, then one transaction `WHERE epoch = mine`: items, money, batch, event
    5. the job's message is acknowledged by returning

A job that meets a live lease asks nothing. What cannot be answered now leaves the batch waiting
with `next_attempt_at`; what can never be becomes a rejection, so every batch closes.
"""

from __future__ import annotations

import asyncio
import os
import random
import time
from collections.abc import Sequence
from contextlib import suppress
from datetime import UTC, datetime

from sqlalchemy import func, select, update
from sqlalchemy.orm import Session

from services.teacher_gateway import reasons
from services.teacher_gateway.asking import (
    Attempt,
    Fenced,
    GivenUp,
    Result,
)
from services.teacher_gateway.batch_input import BatchInput, read_batch
from services.teacher_gateway.books import Books, answers_line, record_answers, reject
from services.teacher_gateway.circuit import TeacherQuestion
from services.teacher_gateway.claims import (
    MOST_CRASHES,
    Claim,
    claim_batch,
    claimable,
    stand_still,
)
from services.teacher_gateway.context import Context
from services.teacher_gateway.database import now, reading, transaction
from services.teacher_gateway.ledger import (
    changed,
    lock,
    settle,
)
from services.teacher_gateway.models import Batch, Item, Pipeline
from services.teacher_gateway.outbox import emit
from services.teacher_gateway.parts import Series, close_series
from services.teacher_gateway.stop import TERMINAL, finish_stopping
from services.teacher_gateway.teachers.openai import open_teacher
from services.teacher_gateway.teachers.outcomes import Reject, Retry
from stillhouse.chassis.crash import crash_point
from stillhouse.chassis.errors import PermanentError, RetryableError, StoreUnavailable
from stillhouse.chassis.logs import logger
from stillhouse.contracts.artifacts import (
    ObjectRef,
    responses_key,
    responses_manifest_key,
)
from stillhouse.contracts.events import ResponseBatchStored, ResponsesCompleted
from stillhouse.contracts.responses import (
    Rejection,
    ResponsesClosed,
    ResponsesManifest,
)

log = logger(__name__)

# The pause of a batch whose teacher is away grows to 2 ** this times the first one, or the cap.
_MOST_DOUBLINGS = 20


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
    try:
        given = read_batch(
            context.store,
            row.tenant_id,
            pipeline_id,
            ObjectRef.model_validate_json(row.prompts),
        )
    except PermanentError:
        if not pipeline.stopping:
            raise
        given = None  # what was reserved must be settled all the same
    except StoreUnavailable:
        _wait_for_store(context, row, began)
        raise
    started = time.monotonic()
    claim = claim_batch(context, pipeline_id, batch, given)
    if claim is None:
        return
    crash_point("batch_claimed")
    books = Books(context, claim, given, started)
    try:
        _attempt(context, claim, given, books)
    except Fenced as error:
        log.warning("batch left to another worker", batch=batch, why=str(error))
    except RetryableError as error:
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
    result = Result()
    if claim.asks and given is not None and not claim.stopping:
        books.asked = True
        books.result = result = asyncio.run(_ask(context, claim, given, books))
    crash_point("answers_stored")
    _finish(context, claim, given, books, series, result)


async def _ask(context: Context, claim: Claim, given: BatchInput, books: Books) -> Result:
    """Step 3: one event loop and one HTTP session for the whole attempt."""
    teacher = given.resolved.teacher
    async with open_teacher(
        teacher,
        given.resolved.spec.signal,
        environ=os.environ,
        private=context.settings.private_teachers,
    ) as client:
        attempt = Attempt(
            client.ask,
            books,
            price=teacher.usd_per_million,
            times=context.times,
            concurrency=teacher.limits.concurrency,
            call_seconds=teacher.limits.timeout_seconds,
            started=books.started,
            question=TeacherQuestion(context, claim, given, client),
            suspect=claim.away > 0,
        )
        return await attempt.run(claim.asks)


def _finish(
    context: Context,
    claim: Claim,
    given: BatchInput | None,
    books: Books,
    series: Sequence[Series],
    result: Result,
) -> None:
    """Step 4: decide what becomes of each item, and close the batch or put it back."""
    times = context.times
    left = {i: n for i, n in claim.pending.items() if i not in result.rejected}
    for answer in result.answers:
        left.pop(answer.item_id, None)
    stopping = claim.stopping or result.stopping
    rejections: list[Rejection] = []
    failed = {gone.item_id: gone for gone in result.given_up if gone.item_id in left}
    # Where the teacher is away it is nobody's failure: the batch's deadline is the bound.
    for gone in () if result.away else tuple(failed.values()):
        if left[gone.item_id] + 1 >= times.attempts and not stopping:
            rejections.append(_rejection(gone.item_id, gone))
            del left[gone.item_id]
    final = _why_the_rest_ends(claim)
    if final is not None and not stopping:
        reason, detail = final
        rejections.extend(
            Rejection(item_id=item_id, stage="collect", reason=reason, detail=detail)
            for item_id in left
        )
        left = {}
    manifest = None
    if not left and not stopping:
        assert given is not None, "only a stopping pipeline goes on without its input"
        manifest = _write_manifest(context, claim, given, series, result, rejections)
        crash_point("manifest_written")
    with transaction(context.engine) as session:
        row = books.fenced(session)
        pipeline = lock(session, claim.pipeline_id)
        assert pipeline is not None, "pipelines are never deleted"
        clock = now(session)
        line = answers_line(claim.batch, claim.attempt, result.answers)
        if not settle(session, claim.pipeline_id, [line], release=row.reserved_microusd):
            raise AssertionError("what is released pays for what is booked")
        row.reserved_microusd = 0
        record_answers(session, claim, result.answers)
        reject(session, claim, rejections)
        if not result.away:
            _count_failures(session, claim, [i for i in failed if i in left])
        row.holder, row.lease_until = "", 0.0
        if manifest is not None or stopping:
            row.state, row.closed_at = "closed", clock
            row.answers = sum(len(found.answers) for found in series) + len(result.answers)
        else:
            unanswered = [failed[i] for i in failed if i in left]
            delay = _delay(context, claim, unanswered, result.away)
            row.state, row.next_attempt_at = "waiting", clock + delay
            if result.away:
                stand_still(row, time.monotonic() - books.started + delay)
        if result.away:
            row.away += 1
            log.warning(
                "the teacher is away: its batch waits",
                batch=claim.batch,
                attempts=row.away,
                reason=result.away.reason,
                why=result.away.detail,
            )
        elif claim.asks:
            row.away = 0
        if manifest is not None:
            row.rejected = row.items - row.answers
            event = ResponseBatchStored(
                batch=claim.batch,
                manifest=manifest,
                answers=row.answers,
                rejected=row.rejected,
            )
            emit(session, pipeline, event)
    crash_point("batch_closed")
    if stopping:
        finish_stopping(context.engine, context.store, claim.pipeline_id)
    elif manifest is not None:
        complete_responses(context, claim.pipeline_id)


def _why_the_rest_ends(claim: Claim) -> tuple[str, str] | None:
    """Why items that were not answered never will be; None when they are asked again."""
    if claim.overdue:
        away = f", and the teacher was away in the last {claim.away} attempts" if claim.away else ""
        return reasons.CLOSED_BY_DEADLINE, f"`close_deadline_hours` went by{away}"
    if claim.crashes >= MOST_CRASHES:
        return reasons.WORKER_LOST, f"{claim.crashes} workers died while they asked"
    if claim.exhausted:
        return (
            reasons.BUDGET_EXHAUSTED,
            "the worst case of one more answer does not fit `budget.teacher_usd`",
        )
    return None


def _delay(context: Context, claim: Claim, failed: Sequence[GivenUp], away: Retry | None) -> float:
    """Seconds until the next attempt: none when only time ran out, else a growing pause."""
    times = context.times
    if claim.must_wait:
        return times.budget_wait
    if not failed and away is None:
        return 0.0
    tried = max((claim.pending[gone.item_id] for gone in failed), default=0)
    if away:
        tried = min(claim.away, _MOST_DOUBLINGS)
    pause = min(times.batch_backoff * 2.0**tried, times.batch_backoff_cap)
    asked_for = max(gone.after or 0.0 for gone in (*failed, *([away] if away else ())))
    return max(pause * random.uniform(0.8, 1.2), asked_for)  # noqa: S311 jitter is no secret


def _rejection(item_id: str, why: GivenUp | Reject) -> Rejection:
    return Rejection(item_id=item_id, stage="collect", reason=why.reason, detail=why.detail[:500])


def _count_failures(session: Session, claim: Claim, item_ids: Sequence[str]) -> None:
    if item_ids:
        changed(
            session,
            update(Item)
            .where(Item.pipeline_id == claim.pipeline_id, Item.item_id.in_(item_ids))
            .values(attempts=Item.attempts + 1),
        )


def _write_manifest(
    context: Context,
    claim: Claim,
    given: BatchInput,
    series: Sequence[Series],
    result: Result,
    rejections: Sequence[Rejection],
) -> ObjectRef:
    """Name the parts that won and the rejections: every item of the batch is in one of them."""
    resolved = given.resolved
    with reading(context.engine) as session:
        row = session.get(Batch, (claim.pipeline_id, claim.batch))
        assert row is not None, "batches are never deleted"
        earlier = session.execute(
            select(Item).where(
                Item.pipeline_id == claim.pipeline_id,
                Item.batch == claim.batch,
                Item.outcome == "rejected",
            )
        ).scalars()
        known = {
            item.item_id: Rejection(
                item_id=item.item_id, stage="collect", reason=item.reason, detail=item.detail
            )
            for item in earlier
        }
    known |= {rejection.item_id: rejection for rejection in rejections}
    answered = [a.item_id for found in series for a in found.answers]
    answered += [a.item_id for a in result.answers]
    expected = [asked.item.item_id for asked in given.asked]
    if sorted([*answered, *known]) != sorted(expected):
        raise PermanentError(
            f"batch {claim.batch}: expected each of {len(expected)} items once, found "
            f"{len(answered)} answers and {len(known)} rejections",
            reason="items_do_not_add_up",
        )
    manifest = ResponsesManifest(
        tenant_id=claim.tenant_id,
        pipeline_id=claim.pipeline_id,
        batch=claim.batch,
        split=resolved.batches.split_of(claim.batch),
        attempt=claim.attempt,
        teacher=resolved.teacher.name,
        verdict_id=next(
            v.id for v in resolved.verdicts if v.subject == f"teacher:{resolved.teacher.name}"
        ),
        prompts=ObjectRef.model_validate_json(row.prompts),
        parts=[ref for found in series for ref in found.parts] + result.parts,
        answers=len(answered),
        rejections=[known[item_id] for item_id in expected if item_id in known],
    )
    key = responses_manifest_key(claim.tenant_id, claim.pipeline_id, claim.batch, claim.attempt)
    return context.store.put_new_model(key, manifest)


def _let_go(context: Context, books: Books, error: RetryableError) -> None:
    """Free a batch whose attempt could not go on: the store or the database was in the way."""
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
    session: Session, context: Context, row: Batch, error: RetryableError, began: float
) -> None:
    pause = context.times.batch_backoff
    row.state, row.next_attempt_at = "waiting", now(session) + pause
    if isinstance(error, StoreUnavailable):
        stand_still(row, time.monotonic() - began + pause)


def complete_responses(context: Context, pipeline_id: str) -> bool:
    """Tell that the last batch closed, once; whoever sees it first does it."""
    with reading(context.engine) as session:
        pipeline = session.get(Pipeline, pipeline_id)
        if (
            pipeline is None
            or pipeline.stopping
            or pipeline.state != "running"
            or pipeline.responses_completed_at is not None
        ):
            return False
        counted = session.execute(
            select(
                func.count(),
                func.sum(Batch.answers),
                func.sum(Batch.rejected),
                func.max(Batch.closed_at),
            ).where(Batch.pipeline_id == pipeline_id, Batch.state == "closed")
        ).one()
        batches, answers, rejected, last = counted
        if last is None or batches < pipeline.batches:
            return False
    closed = ResponsesClosed(
        tenant_id=pipeline.tenant_id,
        pipeline_id=pipeline_id,
        batches=batches,
        answers=answers,
        rejected=rejected,
        completed_at=datetime.fromtimestamp(last, UTC).isoformat(),
    )
    ref = context.store.put_new_model(responses_key(pipeline.tenant_id, pipeline_id), closed)
    crash_point("responses_written")
    with transaction(context.engine) as session:
        held = lock(session, pipeline_id)
        assert held is not None, "pipelines are never deleted"
        if held.stopping or held.responses_completed_at is not None:
            return False
        held.responses_completed_at = now(session)
        held.collect = "done"
        emit(session, held, ResponsesCompleted(responses=ref, batches=batches))
    return True
