"""Step 4 of a paid batch: decide what becomes of each item, and close the batch or put it back.

The manifest is written first, then one transaction `WHERE epoch = mine` holds everything: items,
money, batch, event. Whoever sees the last batch closed tells that the responses are complete.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime

from sqlalchemy import func, select, update
from sqlalchemy.orm import Session

from services.teacher_gateway import reasons
from services.teacher_gateway.asking import GivenUp, Result
from services.teacher_gateway.batch_input import BatchInput
from services.teacher_gateway.books import Books, answers_line, record_answers, reject, rejection_of
from services.teacher_gateway.claims import MOST_CRASHES, Claim, budget_wait, stand_still
from services.teacher_gateway.context import Context
from services.teacher_gateway.database import now, reading, transaction
from services.teacher_gateway.ledger import Line, changed, lock, settle
from services.teacher_gateway.models import Batch, Item, Pipeline, ProviderBatch
from services.teacher_gateway.outbox import emit
from services.teacher_gateway.parts import Series, answers_in
from services.teacher_gateway.stop import finish_stopping
from services.teacher_gateway.teachers.outcomes import Retry
from stillhouse.chassis.crash import crash_point
from stillhouse.chassis.errors import PermanentError
from stillhouse.chassis.logs import logger
from stillhouse.contracts.artifacts import ObjectRef, responses_key, responses_manifest_key
from stillhouse.contracts.events import ResponseBatchStored, ResponsesCompleted
from stillhouse.contracts.responses import Rejection, ResponsesClosed, ResponsesManifest

log = logger(__name__)


@dataclass
class Ended:
    """A provider batch that is over, and what is to be booked for it beside its answers."""

    number: int
    status: str
    lines: list[Line] = field(default_factory=list)
    rejections: list[Rejection] = field(default_factory=list)
    # What was learnt of the parameters that the provider does not know.
    form: str = ""


def finish(
    context: Context,
    claim: Claim,
    given: BatchInput | None,
    books: Books,
    series: Sequence[Series],
    ended: Ended | None = None,
) -> None:
    """Book what an attempt came to (`books.result`), and the provider batch that ended with it."""
    times = context.times
    result = books.result or Result()
    answers = answers_in(books.parts)
    left = {i: n for i, n in claim.pending.items() if i not in result.rejected}
    for answer in answers:
        left.pop(answer.item_id, None)
    stopping = claim.stopping or result.stopping
    rejections: list[Rejection] = [*(ended.rejections if ended else ())]
    for rejection in rejections:
        left.pop(rejection.item_id, None)
    failed = {gone.item_id: gone for gone in result.given_up if gone.item_id in left}
    # Where the teacher is away it is nobody's failure: the batch's deadline is the bound.
    for gone in () if result.away else tuple(failed.values()):
        if left[gone.item_id] + 1 >= times.attempts and not stopping:
            rejections.append(rejection_of(gone.item_id, gone))
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
        manifest = write_manifest(context, claim, given, books, series, rejections)
        crash_point("manifest_written")
    with transaction(context.engine) as session:
        row = books.fenced(session)
        pipeline = lock(session, claim.pipeline_id)
        assert pipeline is not None, "pipelines are never deleted"
        clock = now(session)
        lines = [answers_line(claim.batch, claim.attempt, answers), *(ended.lines if ended else ())]
        if not settle(session, claim.pipeline_id, lines, release=row.reserved_microusd):
            raise AssertionError("what is released pays for what is booked")
        row.reserved_microusd = 0
        if ended is not None:
            _end(session, row, ended)
        record_answers(session, claim, books.parts)
        reject(session, claim, rejections)
        if not result.away:
            _count_failures(session, claim, [i for i in failed if i in left])
        row.holder, row.lease_until = "", 0.0
        if manifest is not None or stopping:
            row.state, row.closed_at = "closed", clock
            row.answers = sum(len(answers_in(s.parts)) for s in series) + len(answers)
        else:
            unanswered = [failed[i] for i in failed if i in left]
            delay = _delay(context, claim, given, unanswered, result.away)
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


def _end(session: Session, row: Batch, ended: Ended) -> None:
    """Note that a provider batch is over: its batch may be asked anew."""
    provider = session.get(ProviderBatch, (row.pipeline_id, row.batch, ended.number))
    assert provider is not None, "provider batches are never deleted"
    provider.state, provider.status = "ended", ended.status[:32]
    provider.form = ended.form or provider.form
    row.provider_batch = None


def _delay(
    context: Context,
    claim: Claim,
    given: BatchInput | None,
    failed: Sequence[GivenUp],
    away: Retry | None,
) -> float:
    """Seconds until the next attempt: none when only time ran out, else a growing pause."""
    times = context.times
    if claim.must_wait:
        return budget_wait(times, given)
    if not failed and away is None:
        return 0.0
    tried = max((claim.pending[gone.item_id] for gone in failed), default=0)
    asked_for = max(gone.after or 0.0 for gone in (*failed, *([away] if away else ())))
    return times.batch_pause(claim.away if away else tried, asked_for)


def _count_failures(session: Session, claim: Claim, item_ids: Sequence[str]) -> None:
    if item_ids:
        changed(
            session,
            update(Item)
            .where(Item.pipeline_id == claim.pipeline_id, Item.item_id.in_(item_ids))
            .values(attempts=Item.attempts + 1),
        )


def write_manifest(
    context: Context,
    claim: Claim,
    given: BatchInput,
    books: Books,
    series: Sequence[Series],
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
    parts = [*(part for found in series for part in found.parts), *books.parts]
    answered = [answer.item_id for answer in answers_in(parts)]
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
        teacher=given.teacher.name,
        verdict_id=next(
            v.id for v in resolved.verdicts if v.subject == f"teacher:{given.teacher.name}"
        ),
        prompts=ObjectRef.model_validate_json(row.prompts),
        parts=[part.ref for part in parts],
        answers=len(answered),
        rejections=[known[item_id] for item_id in expected if item_id in known],
    )
    key = responses_manifest_key(claim.tenant_id, claim.pipeline_id, claim.batch, claim.attempt)
    return context.store.put_new_model(key, manifest)


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
