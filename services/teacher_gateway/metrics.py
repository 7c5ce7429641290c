"""Metrics of the gateway: requests as they come, and gauges rendered from stored state.

What a restart must not forget (pipelines by state, money, pending items, unfinished trainings) is
asked of the database at each scrape. The labels `pipeline` and `teacher` (some digits of an
endpoint's digest) are capped, and no label carries what a user wrote.
"""

from __future__ import annotations

import threading
import time
from collections import Counter as Counts
from collections.abc import Iterator
from typing import Any

from prometheus_client import Counter, Histogram
from prometheus_client.core import GaugeMetricFamily, Metric
from sqlalchemy import Engine, func, select
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from services.teacher_gateway.database import Session, now, reading
from services.teacher_gateway.limits.endpoints import SHOWN_DIGITS, Named
from services.teacher_gateway.limits.strain import calls_at_once
from services.teacher_gateway.models import (
    Batch,
    Item,
    Outbox,
    Pipeline,
    ProviderBatch,
    Redrive,
    TeacherEndpoint,
    TeacherShare,
)
from services.teacher_gateway.settings import TeacherGatewaySettings
from stillhouse.chassis import bus
from stillhouse.chassis.errors import RetryableError
from stillhouse.chassis.logs import logger
from stillhouse.contracts.events import STAGES
from stillhouse.contracts.flow import SERVICES

log = logger(__name__)

REQUESTS = Counter(
    "stillhouse_teacher_gateway_requests_total",
    "Requests of the API by route, method and class of status",
    ["route", "method", "status"],
)
REQUEST_SECONDS = Histogram(
    "stillhouse_teacher_gateway_request_seconds",
    "Duration of requests of the API until the last byte",
    ["route", "method"],
    buckets=(0.005, 0.02, 0.05, 0.1, 0.5, 1, 5, 30),
)

_METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "DELETE", "PATCH", "OPTIONS"})
# Active pipelines that get series of their own, the oldest first.
PIPELINES_SHOWN = 50
# Endpoints that running pipelines have still to ask and that get series of their own.
TEACHERS_SHOWN = 50
_DEPTH_SECONDS = 10.0


class RequestMetrics:
    """Counts every request by the template of its route, so that ids make no series."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        started = time.monotonic()
        status = 500

        async def noting(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self._app(scope, receive, noting)
        finally:
            route = getattr(scope.get("route"), "path", "unmatched")
            method = scope["method"] if scope["method"] in _METHODS else "other"
            REQUESTS.labels(route, method, f"{status // 100}xx").inc()
            REQUEST_SECONDS.labels(route, method).observe(time.monotonic() - started)


class StateCollector:
    """Gauges from the database and the broker's queues; the clock's process serves them."""

    def __init__(self, engine: Engine, settings: TeacherGatewaySettings) -> None:
        self._engine = engine
        self._url = settings.broker_url
        self._lock = threading.Lock()
        self._depths: tuple[float, dict[str, int]] = (float("-inf"), {})

    def describe(self) -> list[Metric]:
        """Nothing: registering must not ask the database."""
        return []

    def collect(self) -> Iterator[Metric]:
        readable = 1
        try:
            with reading(self._engine) as session:
                found = [
                    *_pipelines(session),
                    *_money(session),
                    *_work(session),
                    *_teachers(session),
                ]
        except RetryableError as error:
            log.warning("state not readable for a scrape", why=str(error))
            readable, found = 0, []
        yield from found
        yield _gauge("state_readable_bool", "Whether the database could be read", readable)
        yield from self._queues()

    def _queues(self) -> Iterator[Metric]:
        family = _labelled("queue_messages", "Messages ready in a queue of a service", "queue")
        for queue, depth in self._depth().items():
            family.add_metric([queue], depth)
        yield family

    def _depth(self) -> dict[str, int]:
        """Ask the broker at most every ten seconds; a broker that is away shows no series."""
        with self._lock:
            asked_at, depths = self._depths
            if time.monotonic() - asked_at > _DEPTH_SECONDS:
                depths = {}
                try:
                    for service in SERVICES:
                        depths |= bus.depth(service, self._url)
                except RetryableError as error:
                    log.warning("queues not readable for a scrape", why=str(error))
                self._depths = (time.monotonic(), depths)
            return depths


def _name(rest: str) -> str:
    return f"stillhouse_teacher_gateway_{rest}"


def _gauge(name: str, text: str, value: float) -> GaugeMetricFamily:
    return GaugeMetricFamily(_name(name), text, value=value)


def _labelled(name: str, text: str, *labels: str) -> GaugeMetricFamily:
    return GaugeMetricFamily(_name(name), text, labels=list(labels))


def _pipelines(session: Session) -> Iterator[Metric]:
    family = _labelled("pipelines", "Pipelines by state", "state")
    counts = dict(_pairs(session, select(Pipeline.state, func.count()).group_by(Pipeline.state)))
    for state in ("accepting", "running", "released", "withheld", "failed", "cancelled"):
        family.add_metric([state], counts.get(state, 0))
    yield family
    stages = _labelled("stages", "Stages of running pipelines by state", "stage", "state")
    for stage in STAGES:
        column = getattr(Pipeline, stage)
        counts = dict(
            _pairs(
                session,
                select(column, func.count()).where(Pipeline.state == "running").group_by(column),
            )
        )
        for state in ("waiting", "running", "done", "failed", "cancelled"):
            stages.add_metric([stage, state], counts.get(state, 0))
    yield stages
    unfinished = session.execute(
        select(func.count())
        .select_from(Pipeline)
        .where(Pipeline.state == "running", Pipeline.train.in_(("waiting", "running")))
    ).scalar_one()
    yield _gauge(
        "unfinished_trainings", "Running pipelines whose training has not ended", unfinished
    )


def _money(session: Session) -> Iterator[Metric]:
    names = ("budget", "spent", "reserved")
    families = {
        name: _labelled(
            f"{name}_usd", f"Money {name} of an active pipeline, in US dollars", "pipeline"
        )
        for name in names
    }
    active = session.scalars(
        select(Pipeline)
        .where(Pipeline.state.in_(("accepting", "running")))
        .order_by(Pipeline.created_at, Pipeline.pipeline_id)
        .limit(PIPELINES_SHOWN)
    )
    for pipeline in active:
        for name in names:
            value = getattr(pipeline, f"{name}_microusd") / 1e6
            families[name].add_metric([pipeline.pipeline_id], value)
    yield from families.values()
    total = session.execute(
        select(func.coalesce(func.sum(Pipeline.spent_microusd), 0))
    ).scalar_one()
    yield _gauge(
        "spent_all_usd", "Money spent by all pipelines ever, in US dollars", int(total) / 1e6
    )


def _work(session: Session) -> Iterator[Metric]:
    running = select(Pipeline.pipeline_id).where(Pipeline.state == "running")
    clock = now(session)
    items = _labelled("items", "Items of running pipelines by outcome", "outcome")
    counts = dict(
        _pairs(
            session,
            select(Item.outcome, func.count())
            .where(Item.pipeline_id.in_(running))
            .group_by(Item.outcome),
        )
    )
    for outcome in ("pending", "answered", "row", "rejected"):
        items.add_metric([outcome], counts.get(outcome, 0))
    yield items
    rejections = _labelled("rejections", "Rejected items of running pipelines", "reason")
    rejected = _pairs(
        session,
        select(Item.reason, func.count())
        .where(Item.pipeline_id.in_(running), Item.outcome == "rejected")
        .group_by(Item.reason),
    )
    for reason, count in rejected:
        rejections.add_metric([reason], count)
    yield rejections
    batches = _labelled("batches", "Batches of running pipelines by state", "state")
    counts = dict(
        _pairs(
            session,
            select(Batch.state, func.count())
            .where(Batch.pipeline_id.in_(running))
            .group_by(Batch.state),
        )
    )
    for state in ("waiting", "due", "closed"):
        batches.add_metric([state], counts.get(state, 0))
    yield batches
    provider = _labelled(
        "provider_batches", "Batches at a provider's batch API by how far they are", "state"
    )
    counts = dict(
        _pairs(
            session,
            select(ProviderBatch.state, func.count())
            .where(ProviderBatch.state != "ended")
            .group_by(ProviderBatch.state),
        )
    )
    for state in ("uploading", "creating", "waiting"):
        provider.add_metric([state], counts.get(state, 0))
    yield provider
    oldest = session.execute(
        select(func.min(Pipeline.created_at)).where(
            Pipeline.state == "running",
            select(Item.item_id)
            .where(Item.pipeline_id == Pipeline.pipeline_id, Item.outcome == "pending")
            .exists(),
        )
    ).scalar_one()
    yield _gauge(
        "oldest_pending_item_age_seconds",
        "Age of the oldest pipeline with an item that has no answer yet",
        0.0 if oldest is None else max(0.0, clock - oldest),
    )
    waiting, since = session.execute(select(func.count(), func.min(Outbox.created_at))).one()
    yield _gauge("outbox_events", "Events that the broker has not taken yet", waiting)
    yield _gauge(
        "outbox_age_seconds",
        "Age of the oldest event that the broker has not taken yet",
        0.0 if since is None else max(0.0, clock - since),
    )
    sent = session.execute(
        select(func.coalesce(func.sum(Redrive.sent), 0)).where(Redrive.pipeline_id.in_(running))
    ).scalar_one()
    yield _gauge("redriven_events", "Inputs sent again for running pipelines", int(sent))


def _teachers(session: Session) -> Iterator[Metric]:
    running = select(Pipeline.pipeline_id).where(Pipeline.state == "running")
    wanted = select(Batch.endpoint).where(Batch.pipeline_id.in_(running), Batch.state != "closed")
    rows = list(
        session.scalars(
            select(TeacherEndpoint)
            .where(TeacherEndpoint.endpoint.in_(wanted))
            .order_by(TeacherEndpoint.endpoint)
            .limit(TEACHERS_SHOWN)
        )
    )
    clock = now(session)
    named = {row.endpoint: Named() for row in rows}
    calls = Counts[str]()
    for share in session.scalars(
        select(TeacherShare).where(
            TeacherShare.endpoint.in_([row.endpoint for row in rows]), TeacherShare.until > clock
        )
    ):
        named[share.endpoint].add(share.tenant_id, share)
        calls[share.endpoint] += share.running
    limits = _labelled("teacher_calls_limit", "Calls at once that a teacher gets now", "teacher")
    running_calls = _labelled("teacher_calls", "Calls of a teacher that run now", "teacher")
    pauses = _labelled(
        "teacher_pause_seconds", "How long a teacher that asked for a pause still has it", "teacher"
    )
    circuits = _labelled(
        "teacher_away_bool", "Whether a teacher was away when it was asked last", "teacher"
    )
    for row in rows:
        name = row.endpoint[:SHOWN_DIGITS]
        if most := named[row.endpoint].most_of_all():
            limits.add_metric([name], calls_at_once(row, most))
        running_calls.add_metric([name], calls[row.endpoint])
        pauses.add_metric([name], max(0.0, row.cool_until - clock))
        circuits.add_metric([name], row.away > 0)
    yield from (limits, running_calls, pauses, circuits)


def _pairs(session: Session, query: Any) -> list[tuple[str, int]]:
    return [(str(name), int(count)) for name, count in session.execute(query)]
