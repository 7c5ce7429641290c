"""What a pipeline left behind in SQL: its events, rejections and charges."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Header, Query, Request, Response
from sqlalchemy import Engine, func, select

from services.teacher_gateway.database import Session, reading
from services.teacher_gateway.event_streams import PAGE, EventStream, Mark
from services.teacher_gateway.keys import authenticate
from services.teacher_gateway.models import History, Item
from services.teacher_gateway.problems import responses
from services.teacher_gateway.routes.charges import AfterCharge, page_of, shown
from services.teacher_gateway.routes.parts import Limit, Parts, PipelineId, Who, moment, owned
from services.teacher_gateway.routes.pipelines import cost_of
from services.teacher_gateway.schemas import (
    Charges,
    ChargeView,
    Events,
    EventView,
    Rejections,
    RejectionView,
)
from stillhouse.contracts.artifacts import ID_PATTERN
from stillhouse.contracts.envelope import Envelope

router = APIRouter(
    prefix="/v1/pipelines/{pipeline_id}",
    tags=["records"],
    responses=responses(400, 401, 404, 422, 503),
)


# As FastAPI describes streams of its own making.
_STREAM_ITEM = {
    "type": "object",
    "required": ["id", "event", "data"],
    "properties": {
        "id": {"type": "string"},
        "event": {"type": "string"},
        "data": {
            "type": "string",
            "contentMediaType": "application/json",
            "contentSchema": {"$ref": "#/components/schemas/EventView"},
        },
    },
}


@router.get("/events", response_model=Events)
def list_events(
    pipeline_id: PipelineId,
    who: Who,
    parts: Parts,
    after: Annotated[int, Query(ge=0, le=2**31 - 1, description="the last sequence seen")] = 0,
    limit: Limit = 100,
) -> Events:
    """List the stored events of a pipeline in the order in which they were recorded."""
    with reading(parts.engine) as session:
        owned(session, who, pipeline_id)
        found = _history(session, pipeline_id, after, limit + 1)
    page = [_event(entry) for entry in found[:limit]]
    return Events(items=page, next=page[-1].sequence if len(found) > limit else None)


@router.get(
    "/events/stream",
    response_class=EventStream,
    status_code=200,
    responses={
        200: {
            "description": "A stream of server-sent events: `id` is the sequence, `event` the "
            "type, `data` an EventView. A comment comes every 15 seconds without news. It ends "
            "when the pipeline has ended, and may end before: ask again with `Last-Event-ID`.",
            "content": {"text/event-stream": {"itemSchema": _STREAM_ITEM}},
        },
        204: {"description": "The pipeline has ended and no event comes after: ask no more."},
        **responses(429),
    },
)
def stream_events(
    pipeline_id: PipelineId,
    who: Who,
    parts: Parts,
    request: Request,
    after: Annotated[int, Query(ge=0, le=2**31 - 1, description="the last sequence seen")] = 0,
    last_event_id: Annotated[
        int | None,
        Header(
            alias="Last-Event-ID",
            ge=0,
            le=2**31 - 1,
            description="the same; it counts where both are given",
        ),
    ] = None,
) -> Response:
    """Follow the events of a pipeline as they are recorded, from any of them on."""
    with reading(parts.engine) as session:
        mark = Mark.of(owned(session, who, pipeline_id))
    seen = after if last_event_id is None else last_event_id
    if mark.ended and seen >= mark.last:
        return Response(status_code=204)
    key = request.headers.get("authorization")
    return EventStream(
        request.app.state.event_streams,
        tenant_id=who.tenant_id,
        pipeline_id=pipeline_id,
        mark=mark,
        after=seen,
        read=lambda sequence: _events_after(parts.engine, pipeline_id, sequence),
        check_key=lambda: authenticate(parts.engine, parts.settings.key_pepper, key),
    )


def _events_after(engine: Engine, pipeline_id: str, sequence: int) -> list[EventView]:
    with reading(engine) as session:
        return [_event(entry) for entry in _history(session, pipeline_id, sequence, PAGE)]


def _history(session: Session, pipeline_id: str, after: int, limit: int) -> list[History]:
    query = select(History).where(History.pipeline_id == pipeline_id, History.sequence > after)
    return list(session.scalars(query.order_by(History.sequence).limit(limit)))


def _event(entry: History) -> EventView:
    envelope = Envelope.decode(entry.envelope)
    return EventView(
        sequence=entry.sequence,
        event_id=envelope.event_id,
        type=envelope.type,
        version=envelope.version,
        occurred_at=envelope.occurred_at,
        recorded_at=moment(entry.recorded_at),
        caused_by=envelope.caused_by,
        payload=envelope.payload,
    )


@router.get("/rejections", response_model=Rejections)
def list_rejections(
    pipeline_id: PipelineId,
    who: Who,
    parts: Parts,
    reason: Annotated[
        str | None, Query(pattern=r"^[a-z0-9_]{1,64}$", description="only those with this reason")
    ] = None,
    after: Annotated[
        str | None, Query(pattern=ID_PATTERN, description="`next` of the page before")
    ] = None,
    limit: Limit = 100,
) -> Rejections:
    """List the items that became no row, with stage, reason and detail."""
    rejected = (Item.pipeline_id == pipeline_id, Item.outcome == "rejected")
    query = select(Item).where(*rejected)
    if reason is not None:
        query = query.where(Item.reason == reason)
    if after is not None:
        query = query.where(Item.item_id > after)
    with reading(parts.engine) as session:
        owned(session, who, pipeline_id)
        found = list(session.scalars(query.order_by(Item.item_id).limit(limit + 1)))
        counts = session.execute(
            select(Item.reason, func.count()).where(*rejected).group_by(Item.reason)
        ).all()
    page = found[:limit]
    return Rejections(
        items=[
            RejectionView(
                item_id=item.item_id,
                batch=item.batch,
                stage=item.stage,
                reason=item.reason,
                detail=item.detail,
            )
            for item in page
        ],
        next=page[-1].item_id if len(found) > limit else None,
        counts={name: count for name, count in counts},  # noqa: C416 (rows are not pairs)
    )


@router.get("/charges", response_model=Charges)
def list_charges(
    pipeline_id: PipelineId,
    who: Who,
    parts: Parts,
    after: AfterCharge = None,
    limit: Limit = 500,
) -> Charges:
    """List the ledger's lines: what was paid for, and what may have been billed besides."""
    with reading(parts.engine) as session:
        pipeline = owned(session, who, pipeline_id)
        page = page_of(session, pipeline_id, after, limit)
    return Charges(
        items=[
            ChargeView(
                **shown(charge), batch=charge.batch, attempt=charge.attempt, cached=charge.cached
            )
            for charge in page.charges
        ],
        next=page.next,
        cost=cost_of(pipeline),
        totals_microusd=page.totals,
    )
