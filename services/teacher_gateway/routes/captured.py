"""What was recorded of live traffic, without any of its text."""

from __future__ import annotations

import json
from collections import Counter
from typing import Annotated, NamedTuple

from fastapi import APIRouter, Query
from sqlalchemy import func, select

from services.teacher_gateway.database import reading
from services.teacher_gateway.models import CapturedBatch, CapturedTotal
from services.teacher_gateway.problems import responses
from services.teacher_gateway.routes.parts import Limit, Parts, Who, moment
from services.teacher_gateway.schemas import CapturedFailure, CapturedTeacher, CapturedView
from stillhouse.contracts.artifacts import ID_PATTERN

router = APIRouter(prefix="/v1/captured", tags=["captured"])

# Tags and reasons are summed over so many batches, so that a view stays quick, and so many tags are
# shown, so that it stays short.
_NEWEST = 1000
_NAMES_SHOWN = 50
_VALUES_SHOWN = 50
_FAILURES_SHOWN = 20


class _Newest(NamedTuple):
    """What is shown of one of the newest batches."""

    teacher: str
    tags: str
    reasons: str
    last_failures: str


@router.get("", response_model=CapturedView, responses=responses(400, 401, 422, 503))
def get_captured(
    who: Who,
    parts: Parts,
    teacher: Annotated[
        str | None, Query(pattern=ID_PATTERN, description="only of this registered teacher")
    ] = None,
    after: Annotated[
        str | None, Query(pattern=ID_PATTERN, description="`next` of the page before")
    ] = None,
    limit: Limit = 100,
) -> CapturedView:
    """Sum up what was recorded: how much, with which tags, and what failed last."""
    totals = [
        CapturedTotal.tenant_id == who.tenant_id,
        CapturedTotal.records + CapturedTotal.failures > 0,
    ]
    batches = [CapturedBatch.tenant_id == who.tenant_id]
    if teacher is not None:
        totals.append(CapturedTotal.teacher == teacher)
        batches.append(CapturedBatch.teacher == teacher)
    page = select(CapturedTotal).where(*totals)
    if after is not None:
        page = page.where(CapturedTotal.teacher > after)
    sums = (CapturedTotal.records, CapturedTotal.failures, CapturedTotal.microusd)
    with reading(parts.engine) as session:
        summed = session.execute(
            select(*(func.coalesce(func.sum(column), 0) for column in sums)).where(*totals)
        ).one()
        found = list(session.scalars(page.order_by(CapturedTotal.teacher).limit(limit + 1)))
        newest = [
            _Newest(*row)
            for row in session.execute(
                select(*(getattr(CapturedBatch, name) for name in _Newest._fields))
                .where(*batches)
                .order_by(CapturedBatch.stored_at.desc(), CapturedBatch.batch_id)
                .limit(_NEWEST)
            )
        ]
    tags, left_out = _tags(newest)
    return CapturedView(
        records=summed[0],
        failures=summed[1],
        cost_microusd=summed[2],
        teachers=[_teacher(total) for total in found[:limit]],
        next=found[limit - 1].teacher if len(found) > limit else None,
        tags=tags,
        tags_left_out=left_out,
        reasons=_reasons(newest),
        last_failures=_last_failures(newest),
    )


def _teacher(total: CapturedTotal) -> CapturedTeacher:
    return CapturedTeacher(
        teacher=total.teacher,
        records=total.records,
        failures=total.failures,
        cost_microusd=total.microusd,
        first_at=moment(total.first_at),
        last_at=moment(total.last_at),
    )


def _tags(batches: list[_Newest]) -> tuple[dict[str, dict[str, int]], int]:
    """The most frequent tags, and how many more there are."""
    found: dict[str, Counter[str]] = {}
    for batch in batches:
        for name, values in json.loads(batch.tags or "{}").items():
            found.setdefault(name, Counter()).update(values)
    names = sorted(found, key=lambda name: (-found[name].total(), name))[:_NAMES_SHOWN]
    shown = {name: dict(found[name].most_common(_VALUES_SHOWN)) for name in sorted(names)}
    return shown, sum(map(len, found.values())) - sum(map(len, shown.values()))


def _reasons(batches: list[_Newest]) -> dict[str, int]:
    found: Counter[str] = Counter()
    for batch in batches:
        found.update(json.loads(batch.reasons))
    return dict(sorted(found.items()))


def _last_failures(batches: list[_Newest]) -> list[CapturedFailure]:
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
