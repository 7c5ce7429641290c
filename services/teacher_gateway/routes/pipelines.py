"""Create, list, read and cancel pipelines."""

from __future__ import annotations

import json
import re
import secrets
from typing import Annotated, Any

from fastapi import APIRouter, Header, Query, Request, Response
from fastapi.concurrency import run_in_threadpool
from sqlalchemy import func, or_, select, tuple_
from sqlalchemy.exc import IntegrityError

from services.teacher_gateway.admission import (
    admit,
    budget_microusd,
    check_deadlines,
    survey,
)
from services.teacher_gateway.database import Session, now, reading, transaction
from services.teacher_gateway.keys import Caller
from services.teacher_gateway.models import (
    Account,
    Audit,
    Batch,
    Charge,
    Item,
    Pipeline,
    TeacherEndpoint,
)
from services.teacher_gateway.posted import JSON_TYPES, YAML_TYPES, read_spec
from services.teacher_gateway.preflight.check import preflight, refuse_unfit
from services.teacher_gateway.preflight.interview import SAMPLED_PROMPTS
from services.teacher_gateway.preflight.running import RunningChecks
from services.teacher_gateway.preflight.unasked import refuse_unasked
from services.teacher_gateway.preflight.views import Preflight
from services.teacher_gateway.problems import ProblemError, responses, unavailable
from services.teacher_gateway.routes.parts import (
    Gateway,
    Limit,
    Parts,
    PipelineId,
    Who,
    maybe_moment,
    moment,
    owned,
)
from services.teacher_gateway.schemas import (
    Checked,
    Cost,
    Created,
    Pipelines,
    PipelineSummary,
    PipelineView,
    PromptsFound,
    StageView,
    TokenizerFound,
    Tokens,
)
from services.teacher_gateway.stop import cancel_pipeline
from stillhouse.chassis.crash import crash_point
from stillhouse.contracts.artifacts import ID_PATTERN
from stillhouse.contracts.canonical import canonical_json
from stillhouse.contracts.events import STAGES
from stillhouse.contracts.spec import Spec, spec_digest

router = APIRouter(prefix="/v1/pipelines", tags=["pipelines"])

# Pipelines that wait for acceptance: with the broker away none gets on, and each holds its spec.
MOST_WAITING = 10_000
_IDEMPOTENCY_KEY = re.compile(r"^[\x21-\x7e]{1,200}$")
_TRACEPARENT = re.compile(r"^00-[0-9a-f]{32}-[0-9a-f]{16}-[0-9a-f]{2}$")
_SPEC_BODY = {
    "requestBody": {
        "required": True,
        "content": {
            media: {"schema": {"$ref": "#/components/schemas/Spec"}}
            for media in JSON_TYPES + YAML_TYPES
        },
    }
}


@router.post(
    "",
    status_code=202,
    response_model=Created | Checked,
    responses={
        200: {"description": "Checked; nothing was created", "model": Checked},
        202: {
            "description": "Taken; acceptance goes on by itself",
            "model": Created,
            "headers": {"Location": {"schema": {"type": "string"}}},
        },
        **responses(400, 401, 402, 408, 413, 415, 422, 429, 503),
    },
    openapi_extra=_SPEC_BODY,
)
async def create_pipeline(
    request: Request,
    response: Response,
    who: Who,
    parts: Parts,
    check: Annotated[bool, Query(description="only check the spec, create nothing")] = False,
    probe: Annotated[
        bool,
        Query(
            description="beside `check`: ask each teacher a handful of questions, which it bills"
        ),
    ] = False,
    idempotency_key: Annotated[
        str | None,
        Header(description="repeats with the same key and spec get the same pipeline"),
    ] = None,
    traceparent: Annotated[str | None, Header(description="W3C trace context")] = None,
) -> Any:
    """Create a pipeline from a spec (JSON or YAML), or check the spec."""
    if probe and not check:
        raise ProblemError(
            422,
            "probe-without-check",
            "`probe` goes with `check=true`; a pipeline asks its teacher one thing by itself",
        )
    body = await request.body()
    spec = await run_in_threadpool(read_spec, body, request.headers.get("content-type"))
    if check:
        response.status_code = 200
        running: RunningChecks = request.app.state.running_checks
        if not probe:
            return await running.read(lambda: _check(parts, who, spec, probe))
        return await running.ask(who.tenant_id, lambda: _check(parts, who, spec, probe))
    created = await run_in_threadpool(
        _create, parts, who, spec, _key(idempotency_key), _trace(traceparent)
    )
    response.headers["Location"] = f"/v1/pipelines/{created.pipeline_id}"
    return created


@router.get("", response_model=Pipelines, responses=responses(400, 401, 422, 503))
def list_pipelines(
    who: Who,
    parts: Parts,
    limit: Limit = 50,
    after: Annotated[
        str | None, Query(pattern=ID_PATTERN, description="`next` of the page before")
    ] = None,
) -> Pipelines:
    """List the tenant's pipelines, newest first."""
    order = (Pipeline.created_at, Pipeline.pipeline_id)
    query = select(Pipeline).where(Pipeline.tenant_id == who.tenant_id)
    with reading(parts.engine) as session:
        if after is not None:
            last = session.get(Pipeline, after)
            if last is None or last.tenant_id != who.tenant_id:
                raise ProblemError(
                    422, "cursor", "`after` names no pipeline: give `next` of the page before"
                )
            query = query.where(tuple_(*order) < (last.created_at, last.pipeline_id))
        query = query.order_by(*(column.desc() for column in order)).limit(limit + 1)
        found = list(session.scalars(query))
    page = found[:limit]
    return Pipelines(
        items=[PipelineSummary(**_summary(pipeline)) for pipeline in page],
        next=page[-1].pipeline_id if len(found) > limit else None,
    )


@router.get(
    "/{pipeline_id}", response_model=PipelineView, responses=responses(400, 401, 404, 422, 503)
)
def get_pipeline(pipeline_id: PipelineId, who: Who, parts: Parts) -> PipelineView:
    """Read a pipeline: state, stages, counts, money, tokens, times."""
    with reading(parts.engine) as session:
        return _view(session, owned(session, who, pipeline_id))


@router.post(
    "/{pipeline_id}/cancel",
    response_model=PipelineView,
    responses=responses(400, 401, 404, 422, 503),
)
def cancel(pipeline_id: PipelineId, who: Who, parts: Parts) -> PipelineView:
    """Stop a pipeline. Repeating it changes nothing; one that has ended stays as it is."""
    with reading(parts.engine) as session:
        ends = owned(session, who, pipeline_id).state in ("accepting", "running")
    if ends:
        reason = f"cancelled with the key {who.prefix}"
        cancel_pipeline(parts.engine, parts.store, pipeline_id, reason)
        with transaction(parts.engine) as session:
            _audit(session, who, "pipeline.cancelled", pipeline_id)
    with reading(parts.engine) as session:
        return _view(session, owned(session, who, pipeline_id))


def cost_of(purse: Pipeline | Account) -> Cost:
    names = ("budget", "spent", "reserved")
    micro = {f"{n}_microusd": getattr(purse, f"{n}_microusd") for n in names}
    return Cost(**micro, **{f"{n}_usd": micro[f"{n}_microusd"] / 1e6 for n in names})


def _check(parts: Gateway, who: Caller, spec: Spec, probe: bool) -> Checked:
    found = survey(
        spec,
        who.tenant_id,
        parts.settings,
        parts.catalogue,
        parts.store,
        parts.engine,
        samples=SAMPLED_PROMPTS if probe else 0,
    )
    refuse_unasked(spec, found)
    chat = found.tokenizer.chat
    asked: Preflight | None = None
    probed: int | None = None
    if probe:
        asked, probed = preflight(spec, found, parts.settings, parts.engine, who.tenant_id)
        names = ", ".join(teacher.url for teacher in spec.teachers if teacher.url)
        with transaction(parts.engine) as session:
            _audit(session, who, "teacher.probed", names, f"{probed} micro-USD")
        refuse_unfit(asked)
    return Checked(
        name=spec.name,
        spec_sha256=spec_digest(spec),
        verdicts=found.verdicts,
        duties=sorted({duty for verdict in found.verdicts for duty in verdict.duties}),
        tokenizer=TokenizerFound(
            source=found.tokenizer.source,
            sha256=chat.tokenizer_sha256,
            template_sha256=chat.template_sha256,
            vocabulary=chat.vocabulary,
        ),
        prompts=PromptsFound(
            prompts=found.prompts,
            rejections=found.rejections,
            items=found.plan.items,
            batches=found.plan.numbers,
        ),
        prompt_tokens=found.prompt_tokens,
        worst_case_usd=found.worst_case_microusd / 1e6,
        budget_usd=spec.budget.teacher_usd,
        probe_usd=None if probed is None else probed / 1e6,
        preflight=asked,
    )


def _create(parts: Gateway, who: Caller, spec: Spec, key: str | None, trace: str) -> Created:
    digest = spec_digest(spec)
    # Looked up before anything is judged again: a repetition gets the answer of the first time.
    if key is not None:
        with reading(parts.engine) as session:
            if earlier := _earlier(session, who, key, digest):
                return earlier
    check_deadlines(spec, parts.settings)
    admit(spec, who.tenant_id, parts.settings, parts.catalogue, parts.store, parts.engine)
    try:
        with transaction(parts.engine) as session:
            if key is not None and (earlier := _earlier(session, who, key, digest)):
                return earlier
            _check_room(session)
            at = now(session)
            pipeline = Pipeline(
                pipeline_id=f"pl-{secrets.token_hex(12)}",
                tenant_id=who.tenant_id,
                name=spec.name,
                idempotency_key=key,
                body_sha256=digest,
                spec=canonical_json(spec.model_dump(mode="json", by_alias=True)).decode(),
                traceparent=trace,
                state="accepting",
                budget_microusd=budget_microusd(spec),
                next_attempt_at=at,
                created_at=at,
            )
            session.add(pipeline)
            session.flush()
            _audit(session, who, "pipeline.created", pipeline.pipeline_id)
            crash_point("pipeline_inserted")
    except IntegrityError:
        # Another replica won the race for this key; what it stored is the answer.
        with reading(parts.engine) as session:
            earlier = _earlier(session, who, key or "", digest)
        if earlier is None:
            raise
        return earlier
    crash_point("pipeline_created")
    return _created(pipeline)


def _check_room(session: Session) -> None:
    """Refuse another pipeline while very many wait for acceptance, as when the broker is away."""
    waiting = session.execute(
        select(func.count()).select_from(Pipeline).where(Pipeline.state == "accepting")
    ).scalar_one()
    if waiting >= MOST_WAITING:
        raise unavailable(
            f"{waiting} pipelines wait for acceptance, which does not get on: the operator should "
            "look at broker and workers"
        )


def _earlier(session: Session, who: Caller, key: str, digest: str) -> Created | None:
    found = session.scalars(
        select(Pipeline).where(Pipeline.tenant_id == who.tenant_id, Pipeline.idempotency_key == key)
    ).one_or_none()
    if found is None:
        return None
    if found.body_sha256 != digest:
        raise ProblemError(
            422,
            "idempotency-key-reused",
            "this Idempotency-Key was used for another spec: take a new key for a new spec",
        )
    return _created(found)


def _created(pipeline: Pipeline) -> Created:
    return Created(
        pipeline_id=pipeline.pipeline_id,
        name=pipeline.name,
        created_at=moment(pipeline.created_at),
    )


def _key(value: str | None) -> str | None:
    if value is not None and not _IDEMPOTENCY_KEY.fullmatch(value):
        raise ProblemError(
            422,
            "idempotency-key",
            "expected an Idempotency-Key of 1 to 200 visible ASCII characters",
        )
    return value


def _trace(value: str | None) -> str:
    if value is not None and _TRACEPARENT.fullmatch(value):
        return value
    return f"00-{secrets.token_hex(16)}-{secrets.token_hex(8)}-01"


def _audit(session: Session, who: Caller, action: str, target: str, detail: str = "") -> None:
    session.add(
        Audit(
            at=now(session),
            tenant_id=who.tenant_id,
            actor=who.prefix,
            action=action,
            target=target[:200],
            detail=detail,
        )
    )


def _summary(pipeline: Pipeline) -> dict[str, Any]:
    return {
        "pipeline_id": pipeline.pipeline_id,
        "name": pipeline.name,
        "state": pipeline.state,
        "stopping": pipeline.stopping,
        "reason": pipeline.reason,
        "rows": pipeline.rows,
        "cost": cost_of(pipeline),
        "created_at": moment(pipeline.created_at),
        "ended_at": maybe_moment(pipeline.ended_at),
    }


def _view(session: Session, pipeline: Pipeline) -> PipelineView:
    counted = session.execute(
        select(Item.outcome, Item.reason, func.count())
        .where(Item.pipeline_id == pipeline.pipeline_id)
        .group_by(Item.outcome, Item.reason)
    ).all()
    by_outcome: dict[str, int] = {}
    for outcome, _, count in counted:
        by_outcome[outcome] = by_outcome.get(outcome, 0) + count
    closed = session.execute(
        select(func.count())
        .select_from(Batch)
        .where(Batch.pipeline_id == pipeline.pipeline_id, Batch.state == "closed")
    ).scalar_one()
    figures = json.loads(pipeline.figures)
    away = session.execute(
        select(func.count())
        .select_from(Batch)
        .where(
            Batch.pipeline_id == pipeline.pipeline_id,
            Batch.state != "closed",
            # Those that met nobody, and those that are not even sent meanwhile.
            or_(
                Batch.away > 0,
                Batch.endpoint.in_(
                    select(TeacherEndpoint.endpoint).where(TeacherEndpoint.away > 0)
                ),
            ),
        )
    ).scalar_one()
    if away:
        figures.setdefault("collect", {})["batches_teacher_away"] = away
    cached = session.execute(
        select(func.coalesce(func.sum(Charge.cached), 0)).where(
            Charge.pipeline_id == pipeline.pipeline_id
        )
    ).scalar_one()
    if cached:
        figures.setdefault("collect", {})["answers_cached"] = int(cached)
    at_provider = session.execute(
        select(func.count())
        .select_from(Batch)
        .where(Batch.pipeline_id == pipeline.pipeline_id, Batch.provider_batch.is_not(None))
    ).scalar_one()
    if at_provider:
        figures.setdefault("collect", {})["batches_at_provider"] = at_provider
    return PipelineView(
        **{**_summary(pipeline), "rows": by_outcome.get("row", 0)},
        stages={
            stage: StageView(state=getattr(pipeline, stage), figures=figures.get(stage, {}))
            for stage in STAGES
        },
        items=sum(by_outcome.values()),
        pending=by_outcome.get("pending", 0) + by_outcome.get("answered", 0),
        rejections={reason: count for outcome, reason, count in counted if outcome == "rejected"},
        batches=pipeline.batches,
        heldout_batches=pipeline.heldout_batches,
        batches_closed=closed,
        tokens=Tokens(
            prompt=pipeline.prompt_tokens,
            completion=pipeline.completion_tokens,
            trained=pipeline.trained_tokens,
        ),
        gpu_seconds=pipeline.gpu_seconds,
        last_event=pipeline.next_event - 1,
        dataset_id=pipeline.dataset_id,
        training_id=pipeline.training_id,
        student_id=pipeline.student_id,
        first_training_step_at=maybe_moment(pipeline.first_training_step_at),
        responses_completed_at=maybe_moment(pipeline.responses_completed_at),
    )
