"""What was recorded of live traffic, without any of its text."""

from __future__ import annotations

import json
from collections import Counter
from typing import Annotated

from fastapi import APIRouter, Query
from sqlalchemy import func, select

from services.teacher_gateway.database import reading
from services.teacher_gateway.models import CapturedBatch
from services.teacher_gateway.problems import responses
from services.teacher_gateway.routes.parts import Parts, Who, moment
from services.teacher_gateway.schemas import CapturedFailure, CapturedTeacher, CapturedView
from stillhouse.contracts.artifacts import ID_PATTERN

router = APIRouter(prefix="/v1/captured", tags=["captured"])

# Tags and reasons are summed over so many batches, so that a view stays quick.
_NEWEST = 1000
_FAILURES_SHOWN = 20


@router.get("", response_model=CapturedView, responses=responses(400, 401, 422, 503))
def get_captured(
    who: Who,
    parts: Parts,
    teacher: Annotated[
        str | None, Query(pattern=ID_PATTERN, description="only of this registered teacher")
    ] = None,
) -> CapturedView:
    """Sum up what was recorded: how much, with which tags, and what failed last."""
    chosen = [CapturedBatch.tenant_id == who.tenant_id]
    if teacher is not None:
        chosen.append(CapturedBatch.teacher == teacher)
    with reading(parts.engine) as session:
        teachers = [
            CapturedTeacher(
                teacher=name,
                records=records,
                failures=failed,
                cost_microusd=cost,
                first_at=moment(first),
                last_at=moment(last),
            )
            for name, records, failed, cost, first, last in session.execute(
                select(
                    CapturedBatch.teacher,
                    func.sum(CapturedBatch.records),
                    func.sum(CapturedBatch.failures),
                    func.sum(CapturedBatch.microusd),
                    func.min(CapturedBatch.first_at),
                    func.max(CapturedBatch.last_at),
                )
                .where(*chosen)
                .group_by(CapturedBatch.teacher)
                .order_by(CapturedBatch.teacher)
            )
        ]
        newest = list(
            session.scalars(
                select(CapturedBatch)
                .where(*chosen)
                .order_by(CapturedBatch.stored_at.desc(), CapturedBatch.batch_id)
                .limit(_NEWEST)
            )
        )
    return CapturedView(
        records=sum(found.records for found in teachers),
        failures=sum(found.failures for found in teachers),
        cost_microusd=sum(found.cost_microusd for found in teachers),
        teachers=teachers,
        tags=_tags(newest),
        reasons=_reasons(newest),
        last_failures=_last_failures(newest),
    )


def _tags(batches: list[CapturedBatch]) -> dict[str, dict[str, int]]:
    found: dict[str, Counter[str]] = {}
    for batch in batches:
        for name, values in json.loads(batch.tags or "{}").items():
            found.setdefault(name, Counter()).update(values)
    return {name: dict(values) for name, values in sorted(found.items())}


def _reasons(batches: list[CapturedBatch]) -> dict[str, int]:
    found: Counter[str] = Counter()
    for batch in batches:
        found.update(json.loads(batch.reasons))
    return dict(sorted(found.items()))


def _last_failures(batches: list[CapturedBatch]) -> list[CapturedFailure]:
    found = [
        CapturedFailure(
            at=moment(entry["at"]),
            teacher=batch.teacher,
            reason=entry["reason"],
            status=entry["status"],
            detail=entry["detail"],
        )
        for batch in batches
        for entry in json.loads(batch.last_failures)
    ]
    return sorted(found, key=lambda entry: entry.at, reverse=True)[:_FAILURES_SHOWN]
