"""Looking at a provider's batch now and then: no lease is taken and no attempt counted.

A look only reads, or asks the provider to cancel what is not wanted any more.
"""

from __future__ import annotations

import asyncio
import os
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from typing import Literal

from sqlalchemy.orm import Session

from services.teacher_gateway.claims import stand_still
from services.teacher_gateway.context import Context
from services.teacher_gateway.database import now, reading, transaction
from services.teacher_gateway.ledger import lock
from services.teacher_gateway.models import Batch, Pipeline, ProviderBatch
from services.teacher_gateway.teachers.api_keys import read_api_key
from services.teacher_gateway.teachers.batch_api import (
    BatchApi,
    CannotList,
    NoAnswer,
    Progress,
    Refused,
    open_batch_api,
)
from services.teacher_gateway.teachers.outcomes import Retry
from stillhouse.chassis.crash import crash_point
from stillhouse.chassis.errors import PermanentError
from stillhouse.chassis.logs import logger
from stillhouse.contracts.spec import Signal, Spec, Teacher

log = logger(__name__)

# One call but an upload, at most.
_CALL_SECONDS = 30.0
# How long the provider's word for its state may be.
STATUS_CHARACTERS = 32


@dataclass(frozen=True)
class Look:
    """What became of a provider's batch, seen while nobody held ours.

    `unsent`: it was not asked to begin. `found`: it has one whose id we had lost. `absent`: it has
    none, and cannot begin one any more. `ended`: it is over. `lost`: nobody can tell what it did,
    and may bill.
    """

    provider: ProviderBatch
    epoch: int
    verdict: Literal["unsent", "found", "absent", "ended", "lost"]
    progress: Progress | None = None
    why: str = ""


def look_at_provider(context: Context, pipeline: Pipeline, seen: Batch) -> Look | None:
    """See what became of the provider's batch; None when it goes on, and when to look is noted."""
    with reading(context.engine) as session:
        provider = provider_of(session, seen)
        clock = now(session)
    if provider.state == "uploading":
        return Look(provider, seen.epoch, "unsent")
    unwanted = bool(pipeline.stopping) or (seen.close_by is not None and seen.close_by <= clock)
    since = provider.unwanted_since
    given_up = since is not None and clock - since > context.times.provider_cancel
    spec = Spec.model_validate_json(pipeline.spec)
    teacher = next(teacher for teacher in spec.teachers if teacher.name == seen.teacher)
    try:
        found = asyncio.run(
            _see(context, teacher, spec.signal, provider, seen.epoch, clock, unwanted)
        )
    except NoAnswer as error:
        if not given_up:
            _look_again(context, seen, unwanted, away=error.outcome)
            return None
        found = Look(provider, seen.epoch, "lost", why=str(error))
    except PermanentError as error:
        if not pipeline.stopping:
            raise
        found = Look(provider, seen.epoch, "lost", why=str(error))
    crash_point("provider_seen")
    if isinstance(found, Look):
        return found
    if found is None:
        _look_again(context, seen, unwanted, absent=True)
        return None
    if given_up:
        why = f"it was cancelled and did not end ({found.status})"
        return Look(provider, seen.epoch, "lost", found, why)
    _look_again(context, seen, unwanted, status=found.status, age=clock - provider.created_at)
    return None


async def _see(
    context: Context,
    teacher: Teacher,
    signal: Signal,
    provider: ProviderBatch,
    epoch: int,
    clock: float,
    unwanted: bool,
) -> Look | Progress | None:
    """Ask the provider; `Progress` while it works, None while one that it does not list may yet
    come."""
    async with open_provider(context, teacher, signal) as api:
        if provider.state == "creating":
            try:
                progress = await api.find(
                    metadata_of(provider), provider.file_id, provider.created_at
                )
            except CannotList as error:
                why = f"its id was lost, and the provider lists no batches ({error})"
                return Look(provider, epoch, "lost", why=why)
            if progress is not None:
                return Look(provider, epoch, "found", progress)
            since = provider.absent_since
            if since is None or clock - since < context.times.provider_absent:
                return None
            # Whatever comes after all has nothing to work on.
            try:
                await api.delete(provider.file_id)
            except Refused as error:
                why = f"it is not listed, and may begin yet: its file cannot be deleted ({error})"
                return Look(provider, epoch, "lost", why=why)
            return Look(provider, epoch, "absent")
        try:
            progress = await api.look(provider.provider_id)
            if unwanted and progress and not progress.ended and progress.status != "cancelling":
                progress = await api.cancel(provider.provider_id)
        except Refused as error:
            return Look(provider, epoch, "lost", why=str(error))
        if progress is None:
            return Look(provider, epoch, "lost", why="the provider does not know it any more")
        return Look(provider, epoch, "ended", progress) if progress.ended else progress


def _look_again(
    context: Context,
    seen: Batch,
    unwanted: bool,
    *,
    status: str = "",
    age: float = 0.0,
    absent: bool = False,
    away: Retry | None = None,
) -> None:
    """Put a batch back that its provider goes on with: no attempt, no lease, the money reserved."""
    times = context.times
    with transaction(context.engine) as session:
        pipeline = lock(session, seen.pipeline_id)
        row = session.get(Batch, (seen.pipeline_id, seen.batch), with_for_update=True)
        if pipeline is None or row is None or row.epoch != seen.epoch or row.state == "closed":
            return
        provider = provider_of(session, row)
        clock = now(session)
        provider.status = status[:STATUS_CHARACTERS] or provider.status
        if unwanted and provider.unwanted_since is None:
            provider.unwanted_since = clock
        if absent and provider.absent_since is None:
            provider.absent_since = clock
        if away is not None:
            pause = times.batch_pause(row.away, away.after or 0.0)
            log.warning("the provider did not tell", batch=row.batch, why=away.detail)
            stand_still(row, pause)
            row.away += 1
        else:
            pause = min(max(age / 10, times.provider_poll), times.provider_poll_cap)
            row.away = 0
        if unwanted:
            pause = min(pause, times.provider_poll)
        row.state, row.next_attempt_at = "waiting", clock + pause
        if not unwanted and pipeline.stopping:
            row.next_attempt_at = clock  # since a moment ago
        elif not unwanted and row.close_by is not None:
            row.next_attempt_at = min(row.next_attempt_at, row.close_by)


def open_provider(
    context: Context, teacher: Teacher, signal: Signal
) -> AbstractAsyncContextManager[BatchApi]:
    return open_batch_api(
        teacher,
        signal,
        key=read_api_key(teacher, context.settings, os.environ),
        private=context.settings.private_teachers,
        deadline=min(_CALL_SECONDS, context.times.call),
    )


def metadata_of(provider: ProviderBatch) -> dict[str, str]:
    """By what a batch at the provider is known as ours."""
    return {
        "stillhouse_pipeline": provider.pipeline_id,
        "stillhouse_batch": str(provider.batch),
        "stillhouse_number": str(provider.number),
    }


def provider_of(session: Session, row: Batch) -> ProviderBatch:
    found = session.get(ProviderBatch, (row.pipeline_id, row.batch, row.provider_batch))
    assert found is not None, "provider batches are never deleted"
    return found
