"""A batch that a provider answers by its batch API: asked once, and looked at now and then.

    reserve the worst case -> upload -> create -> wait, without a lease, and look
    -> read the files -> the one closing transaction (`closing`)

A look (`provider.looks`) takes no lease and counts no attempt. Whatever follows from it is an
attempt under a lease, as a live one is. The reservation
stands from before the upload until the answers are settled, so what a provider bills is in the
ledger all the time. Before the provider is asked to begin, the row says so; a worker that dies then
leaves a batch to be found by its metadata, and one that cannot be found is a listed charge. What a
provider did not answer is asked again in another batch, up to the same bounds as live calls.
"""

from __future__ import annotations

import asyncio
import json
from dataclasses import dataclass

from sqlalchemy import func, select
from sqlalchemy.orm import Session

from services.teacher_gateway import reasons
from services.teacher_gateway.asking import GivenUp, Result
from services.teacher_gateway.batch_input import BatchInput
from services.teacher_gateway.books import Books, answers_line, record_answers, rejection_of
from services.teacher_gateway.cache.taking import take_cached
from services.teacher_gateway.claims import MOST_CRASHES, Claim, plan, stand_still
from services.teacher_gateway.closing import Ended, finish
from services.teacher_gateway.context import Context
from services.teacher_gateway.counters import PROVIDER_FILES
from services.teacher_gateway.database import now, reading, transaction
from services.teacher_gateway.holding import Fenced, OutOfTime, while_held
from services.teacher_gateway.ledger import Line, settle
from services.teacher_gateway.models import Batch, ProviderBatch
from services.teacher_gateway.parts import Series, answers_in, close_series
from services.teacher_gateway.provider.answers import Reading, call_of
from services.teacher_gateway.provider.looks import (
    STATUS_CHARACTERS,
    Look,
    metadata_of,
    open_provider,
    provider_of,
)
from services.teacher_gateway.teachers.batch_api import NoAnswer, Progress, Refused
from services.teacher_gateway.teachers.outcomes import Retry
from stillhouse.chassis.crash import crash_point
from stillhouse.chassis.errors import PermanentError
from stillhouse.chassis.logs import logger
from stillhouse.contracts.spec import Teacher

log = logger(__name__)

# After all that counts, and within what a job may take.
_DELETING_SECONDS = 5.0
# Of what an away provider says: that it surely did not take the request.
_NOT_BEGUN = (reasons.TEACHER_UNREACHABLE, reasons.TEACHER_RATE_LIMITED)


def attempt(
    context: Context, claim: Claim, given: BatchInput | None, books: Books, seen: Look | None
) -> None:
    """Do what a look led to, or begin: send, note an id, or read the answers and close."""
    if seen is not None and claim.epoch != seen.epoch + 1:
        _put_back(context, books, 0.0)  # another job was faster: what was seen is old
        return
    series = [
        close_series(context.store, claim.tenant_id, claim.pipeline_id, claim.batch, number)
        for number in range(1, claim.attempt)
    ]
    crash_point("series_closed")
    provider, reserved = _begin(context, claim, given, books, series, seen)
    crash_point("provider_planned")
    if provider is not None:
        claim.cached = {
            i: kept for i, kept in claim.cached.items() if i not in json.loads(provider.items)
        }
    going = take_cached(context, claim, books) and not claim.overdue
    if provider is None:
        finish(context, claim, given, books, series)
        return
    held = _Held(context, claim, books, provider, reserved)
    ended = _follow(held, given, seen, going=going)
    crash_point("answers_stored")
    if ended is not None:
        finish(context, claim, given, books, series, ended)
        if given is not None:
            asyncio.run(_delete_files(held, given, seen))


@dataclass(frozen=True)
class _Held:
    """A provider's batch whose batch this attempt holds, and what is reserved for it."""

    context: Context
    claim: Claim
    books: Books
    provider: ProviderBatch
    reserved: int

    @property
    def number(self) -> int:
        return self.provider.number


def _follow(
    held: _Held, given: BatchInput | None, seen: Look | None, *, going: bool
) -> Ended | None:
    """Do what follows from a look; None while the provider's batch goes on."""
    unusable = given is None or held.claim.crashes >= MOST_CRASHES
    if seen is None or seen.verdict == "unsent":
        if unusable or not going or given is None:
            return Ended(held.number, "unsent")
        return _send(held, given)
    if seen.verdict == "absent":
        return Ended(held.number, "absent")
    if seen.verdict == "found":
        assert seen.progress is not None, "it was found"
        _note_created(held, seen.progress)
        return None
    if seen.verdict == "lost" or unusable or given is None:
        return _lose(held, seen.why or "nobody could read it")
    return _read(held, given, seen)


def _begin(
    context: Context,
    claim: Claim,
    given: BatchInput | None,
    books: Books,
    series: list[Series],
    seen: Look | None,
) -> tuple[ProviderBatch | None, int]:
    """Adopt what dead attempts stored. Go on with the provider's batch, or plan and reserve one.

    Returns it, and what is reserved for it; None where nothing is to be asked.
    """
    with transaction(context.engine) as session:
        row = books.fenced(session)
        lines = books.adopt_stored(session, series)
        spent = sum(line.microusd for line in lines)
        # What an attempt reserved that died before it made a row was for nothing.
        stale = row.reserved_microusd if seen is None and claim.dead else spent
        if not settle(session, claim.pipeline_id, lines, release=stale):
            raise AssertionError("what is released pays for what is booked")
        row.reserved_microusd -= stale
        if seen is None:
            if claim.dead:
                plan(session, claim, given)
                row.reserved_microusd = sum(asked.worst_microusd for asked in claim.asks)
            if not claim.asks:
                return None, 0
            made = _make(session, claim)
            row.provider_batch = made.number
            return made, row.reserved_microusd
        wanted = set(json.loads(seen.provider.items)) & claim.pending.keys()
        asked = given.asked if given is not None else ()
        claim.asks = [one for one in asked if one.item.item_id in wanted]
        return provider_of(session, row), row.reserved_microusd


def _make(session: Session, claim: Claim) -> ProviderBatch:
    last = session.execute(
        select(func.max(ProviderBatch.number)).where(
            ProviderBatch.pipeline_id == claim.pipeline_id, ProviderBatch.batch == claim.batch
        )
    ).scalar_one()
    made = ProviderBatch(
        pipeline_id=claim.pipeline_id,
        batch=claim.batch,
        number=(last or 0) + 1,
        tenant_id=claim.tenant_id,
        state="uploading",
        items=json.dumps([asked.item.item_id for asked in claim.asks]),
        file_id="",
        created_at=now(session),
    )
    session.add(made)
    session.flush()
    return made


def _lose(held: _Held, why: str) -> Ended:
    """Give a provider's batch up, and list all that it may bill."""
    claim, detail = held.claim, f"a provider's batch was given up: {why}"
    log.warning("a provider's batch is lost", batch=claim.batch, why=why)
    _give_up(held, reasons.TEACHER_ERROR, detail)
    charge_id = f"lost:{claim.batch}:p{held.number}"
    line = Line(charge_id, "unknown", held.reserved, claim.batch, claim.attempt, 0, detail)
    return Ended(held.number, "lost", [line])


def _give_up(held: _Held, reason: str, detail: str) -> None:
    """Nothing of what was asked for has an answer."""
    gone = [GivenUp(asked.item.item_id, reason, detail[:300]) for asked in held.claim.asks]
    held.books.result = Result(given_up=gone)


# Sending


def _send(held: _Held, given: BatchInput) -> Ended | None:
    """Upload and create; None when the provider has it, or is to be asked later."""
    claim = held.claim
    reused = bool(held.provider.file_id)
    try:
        work = _upload_and_create(held, given)
        progress = asyncio.run(while_held(held.context.times, held.books.renew, work))
    except (NoAnswer, OutOfTime) as error:
        return _not_sent(held, error.outcome)
    except Refused as error:
        if reused:
            # Perhaps for the file, which it may have dropped meanwhile: another try has another.
            return _not_sent(held, Retry(error.outcome.reason, error.outcome.detail))
        rejections = [rejection_of(asked.item.item_id, error.outcome) for asked in claim.asks]
        return Ended(held.number, "refused", rejections=rejections)
    try:
        _note_created(held, progress)
    except Fenced:
        _withdraw(held, given, progress)
        raise
    return None


async def _upload_and_create(held: _Held, given: BatchInput) -> Progress:
    context = held.context
    async with open_provider(context, given.teacher, given.signal) as api:
        api.form = await asyncio.to_thread(_known_form, held, given.teacher)
        file_id = held.provider.file_id
        if not file_id:
            calls = {asked.item.item_id: call_of(asked.item) for asked in held.claim.asks}
            file_id = await api.upload(api.encode(calls), deadline=context.times.call)
            crash_point("provider_uploaded")
        # Also the last look at the lease: from here on the provider may begin.
        await asyncio.to_thread(_note_uploaded, held, file_id)
        crash_point("provider_creating")
        progress = await api.create(file_id, metadata_of(held.provider))
        crash_point("provider_created")
        return progress


def _note_uploaded(held: _Held, file_id: str) -> None:
    held.books.renew()
    with transaction(held.context.engine) as session:
        provider = provider_of(session, held.books.fenced(session))
        provider.state, provider.file_id, provider.absent_since = "creating", file_id, None
    held.provider.file_id = file_id


def _note_created(held: _Held, progress: Progress) -> None:
    """Keep the provider's id, book what the cache gave, and wait without a lease."""
    claim, books = held.claim, held.books
    with transaction(held.context.engine) as session:
        row = books.fenced(session)
        provider = provider_of(session, row)
        provider.state, provider.provider_id = "waiting", progress.id
        provider.status = progress.status[:STATUS_CHARACTERS]
        line = answers_line(claim.batch, claim.attempt, answers_in(books.parts))
        if not settle(session, claim.pipeline_id, [line], release=0):
            raise AssertionError("what the cache gives is free")
        record_answers(session, claim, books.parts)
        row.away = 0
        _release(row, now(session) + held.context.times.provider_poll)
    crash_point("provider_noted")


def _not_sent(held: _Held, outcome: Retry) -> Ended | None:
    """Tell a provider that surely did not begin from one that perhaps did, which is looked for."""
    log.warning("a provider did not take a batch", batch=held.claim.batch, why=outcome.detail)
    began = outcome.lost or (outcome.away and outcome.reason not in _NOT_BEGUN)
    if not began and not outcome.away:
        # About the account: it counts as a failure of the items, as it does live.
        _give_up(held, outcome.reason, outcome.detail)
        return Ended(held.number, "refused")
    with transaction(held.context.engine) as session:
        row = held.books.fenced(session)
        provider = provider_of(session, row)
        if not began:
            provider.state = "uploading"  # its file stays, for the next time
        _wait(held, session, row, outcome)
    return None


def _withdraw(held: _Held, given: BatchInput, progress: Progress) -> None:
    """Cancel what was created when the lease was lost, unless whoever took over has found it."""
    claim = held.claim
    with reading(held.context.engine) as session:
        row = session.get(ProviderBatch, (claim.pipeline_id, claim.batch, held.number))
        if row is not None and row.provider_id == progress.id:
            return
    detail = "a provider's batch was created by a worker that had lost its lease, and cancelled"
    log.warning(detail, batch=claim.batch)
    charge_id = f"lost:{claim.batch}:p{held.number}:late"
    worst = sum(asked.worst_microusd for asked in claim.asks)
    line = Line(charge_id, "unknown", worst, claim.batch, claim.attempt, 0, detail)
    with transaction(held.context.engine) as session:
        if not settle(session, claim.pipeline_id, [line], release=0):
            log.error("its worst case does not fit the budget any more", microusd=worst)

    async def cancel() -> None:
        async with open_provider(held.context, given.teacher, given.signal) as api:
            await api.cancel(progress.id)

    try:
        asyncio.run(cancel())
    except (NoAnswer, Refused) as error:
        log.warning("it was not cancelled", why=str(error))


def _known_form(held: _Held, teacher: Teacher) -> str:
    """What this pipeline's earlier batches taught about the provider's parameters."""
    with reading(held.context.engine) as session:
        found = session.execute(
            select(ProviderBatch.form)
            .join(
                Batch,
                (Batch.pipeline_id == ProviderBatch.pipeline_id)
                & (Batch.batch == ProviderBatch.batch),
            )
            .where(
                ProviderBatch.pipeline_id == held.claim.pipeline_id,
                ProviderBatch.form != "",
                Batch.teacher == teacher.name,
            )
            .order_by(ProviderBatch.created_at.desc())
            .limit(1)
        ).scalar_one_or_none()
        return found or ""


# Reading


def _read(held: _Held, given: BatchInput, seen: Look) -> Ended | None:
    """Read the answers of a batch that is over; None when its files do not come now."""
    try:
        work = _read_files(held, given, seen)
        return asyncio.run(while_held(held.context.times, held.books.renew, work))
    except (NoAnswer, OutOfTime) as error:
        detail = error.outcome.detail
        log.warning("a provider's answers did not come", batch=held.claim.batch, why=detail)
        with transaction(held.context.engine) as session:
            row = held.books.fenced(session)
            provider, clock = provider_of(session, row), now(session)
            if held.claim.stopping or held.claim.overdue:
                provider.unwanted_since = provider.unwanted_since or clock
            since = provider.unwanted_since
            if since is None or clock - since <= held.context.times.provider_cancel:
                _wait(held, session, row, error.outcome)
                return None
        return _lose(held, detail)


async def _read_files(held: _Held, given: BatchInput, seen: Look) -> Ended:
    assert seen.progress is not None, "it ended"
    async with open_provider(held.context, given.teacher, given.signal) as api:
        api.form = await asyncio.to_thread(_known_form, held, given.teacher)
        reading = Reading(
            api,
            held.books,
            price=given.teacher.usd_per_million,
            batch=held.claim.batch,
            attempt=held.claim.attempt,
            number=held.number,
            progress=seen.progress,
            items=frozenset(json.loads(held.provider.items)),
            open={asked.item.item_id: asked for asked in held.claim.asks},
        )
        ended = await reading.run(deadline=held.context.times.attempt)
    held.books.result = reading.result
    return ended


# What the steps have in common


async def _delete_files(held: _Held, given: BatchInput, seen: Look | None) -> None:
    """Take the files of a provider's batch that is settled away, as far as that can be done now:
    what is left there costs room, and nobody's answers."""
    progress = seen.progress if seen is not None else None
    names = [held.provider.file_id]
    if progress is not None:
        names += [progress.output_file, progress.error_file]
    left = {name for name in names if name}
    try:
        async with (
            asyncio.timeout(_DELETING_SECONDS),
            open_provider(held.context, given.teacher, given.signal) as api,
        ):
            for name in sorted(left):
                await api.delete(name)
                left.remove(name)
                PROVIDER_FILES.labels("deleted").inc()
    except (NoAnswer, Refused, PermanentError, TimeoutError) as error:
        log.warning("files are left at a provider", files=sorted(left), why=str(error))
        PROVIDER_FILES.labels("left").inc(len(left))


def _release(row: Batch, at: float) -> None:
    row.holder, row.lease_until = "", 0.0
    row.state, row.next_attempt_at = "waiting", at


def _wait(held: _Held, session: Session, row: Batch, away: Retry) -> None:
    """Put a batch back whose provider is away, for a growing pause."""
    pause = held.context.times.batch_pause(row.away, away.after or 0.0)
    row.away += 1
    stand_still(row, pause)
    _release(row, now(session) + pause)


def _put_back(context: Context, books: Books, pause: float) -> None:
    with transaction(context.engine) as session:
        _release(books.fenced(session), now(session) + pause)
