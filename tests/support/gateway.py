"""A pipeline of the gateway as acceptance leaves it, and one job in a process of its own.

python -m tests.support.gateway '<json of Where>' collect PIPELINE BATCH
"""

from __future__ import annotations

import dataclasses
import json
import multiprocessing
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from sqlalchemy import Engine, func, select, update

from services.teacher_gateway.asking import Asked
from services.teacher_gateway.batch_input import (
    counts_as_we_do,
    prompt_tokens_bound,
    read_batch,
    read_tokenizer,
)
from services.teacher_gateway.collect import collect_batch
from services.teacher_gateway.context import Context
from services.teacher_gateway.database import now, open_engine, reading, transaction
from services.teacher_gateway.limits.endpoints import endpoint_of
from services.teacher_gateway.models import (
    Base,
    Batch,
    Charge,
    History,
    Item,
    Outbox,
    Pipeline,
    Tenant,
)
from services.teacher_gateway.outbox import emit
from services.teacher_gateway.settings import TeacherGatewaySettings
from services.teacher_gateway.timeouts import EMBEDDED, GatewayTimeouts
from stillhouse.chassis.bus import Publisher
from stillhouse.chassis.storage import ObjectStore
from stillhouse.contracts import artifacts, responses
from stillhouse.contracts.canonical import canonical_json
from stillhouse.contracts.events import PipelineAccepted
from stillhouse.contracts.flow import GATEWAY
from stillhouse.contracts.responses import Answer, ResponsesManifest
from stillhouse.contracts.spec import ResolvedSpec
from stillhouse.embedded.parts import Store
from tests.support.answers import make_items, prompts_bytes
from tests.support.shards import make_resolved_spec, store_of, store_spec

FAST: GatewayTimeouts = dataclasses.replace(
    EMBEDDED,
    call=2,
    attempt=6,
    lease=7,
    job=8,
    visibility=30,
    lease_ttl=2,
    beat=0.5,
    tries=2,
    attempts=2,
    try_backoff=0.05,
    batch_backoff=0.1,
    budget_wait=0.1,
    probe_attempts=2,
    probe_backoff=0.05,
    redrive=60,
    provider_absent=0,
)


def make_settings(database_url: str, **more: Any) -> TeacherGatewaySettings:
    values = {
        "broker_url": "memory://",
        "database_url": database_url,
        "key_pepper": "0123456789abcdef",
        "profile": "embedded",
        "secret_hosts": "LLM_KEY@*,PROVIDER_KEY@*",
        **more,
    }
    return TeacherGatewaySettings.model_validate(values)


def make_context(
    store: ObjectStore, database_url: str, times: GatewayTimeouts = FAST, **settings: Any
) -> Context:
    told = make_settings(database_url, **settings)
    return Context(
        engine=open_engine(database_url),
        store=store,
        publisher=Publisher(GATEWAY, told.broker_url),
        settings=told,
        times=times,
    )


@dataclass
class World:
    """One running pipeline, and questions about it."""

    context: Context
    resolved: ResolvedSpec
    batches: int
    asked: dict[int, list[Asked]] = field(default_factory=dict)

    @property
    def pipeline_id(self) -> str:
        return self.resolved.pipeline_id

    @property
    def engine(self) -> Engine:
        return self.context.engine

    def collect(self, batch: int = 0) -> None:
        collect_batch(self.context, self.pipeline_id, batch)

    def collect_until_closed(self, batch: int = 0, attempts: int = 20) -> int:
        """Attempt a batch again and again, without waiting; return how often."""
        for number in range(attempts):
            if self.batch(batch).state == "closed":
                return number
            self.expire(batch)
            self.collect(batch)
        raise AssertionError(f"batch {batch} is not closed: {vars(self.batch(batch))}")

    def expire(self, batch: int = 0) -> None:
        """Let a batch's lease and pause be over."""
        self.set(Batch, lease_until=0.0, next_attempt_at=0.0, batch=batch)

    def set(self, table: type[Base], batch: int | None = None, **values: Any) -> None:
        statement = update(table).where(table.pipeline_id == self.pipeline_id)  # type: ignore
        if batch is not None:
            statement = statement.where(table.batch == batch)  # type: ignore[attr-defined]
        with transaction(self.engine) as session:
            session.execute(statement.values(**values))

    def pipeline(self) -> Pipeline:
        with reading(self.engine) as session:
            found = session.get(Pipeline, self.pipeline_id)
            assert found is not None
            return found

    def batch(self, number: int = 0) -> Batch:
        with reading(self.engine) as session:
            found = session.get(Batch, (self.pipeline_id, number))
            assert found is not None
            return found

    def items(self, batch: int = 0) -> list[Item]:
        return self.rows(select(Item).where(Item.batch == batch).order_by(Item.item_id))

    def outcomes(self, batch: int = 0) -> dict[str, int]:
        """Items by outcome, or by reason where they were rejected."""
        found: dict[str, int] = {}
        for item in self.items(batch):
            name = item.reason or item.outcome
            found[name] = found.get(name, 0) + 1
        return found

    def charges(self) -> list[Charge]:
        return self.rows(select(Charge).order_by(Charge.charge_id))

    def charged(self, *kinds: str) -> int:
        return sum(charge.microusd for charge in self.charges() if charge.kind in kinds)

    def rows(self, statement: Any) -> list[Any]:
        table = statement.column_descriptions[0]["entity"]
        with reading(self.engine) as session:
            scoped = statement.where(table.pipeline_id == self.pipeline_id)
            return list(session.execute(scoped).scalars())

    def events(self) -> list[str]:
        """Types of the events in the outbox, in order."""
        with reading(self.engine) as session:
            rows = session.execute(
                select(Outbox.envelope)
                .where(Outbox.pipeline_id == self.pipeline_id)
                .order_by(Outbox.number)
            ).scalars()
            return [json.loads(row)["type"] for row in rows]

    def history(self) -> list[str]:
        return [row.type for row in self.rows(select(History).order_by(History.sequence))]

    def manifest(self, batch: int = 0) -> ResponsesManifest:
        row = self.batch(batch)
        key = artifacts.responses_manifest_key(
            self.resolved.tenant_id, self.pipeline_id, batch, row.attempt
        )
        found = self.context.store.find_model(key, ResponsesManifest)
        assert found is not None, f"no manifest at {key}"
        return found[0]

    def answers(self, batch: int = 0) -> list[Answer]:
        from services.teacher_gateway.parts import decode_part

        manifest = self.manifest(batch)
        return [
            answer
            for part in manifest.parts
            for answer in decode_part(self.context.store.get(part), part.key)
        ]

    def check_books(self) -> None:
        """The pipeline's sums are those of its charges, and never above the budget."""
        pipeline = self.pipeline()
        with reading(self.engine) as session:
            booked = session.execute(
                select(func.coalesce(func.sum(Charge.microusd), 0)).where(
                    Charge.pipeline_id == self.pipeline_id
                )
            ).scalar_one()
            held = session.execute(
                select(func.coalesce(func.sum(Batch.reserved_microusd), 0)).where(
                    Batch.pipeline_id == self.pipeline_id
                )
            ).scalar_one()
        assert pipeline.spent_microusd == booked
        assert pipeline.reserved_microusd == held
        assert pipeline.spent_microusd + pipeline.reserved_microusd <= pipeline.budget_microusd


def make_world(
    store: ObjectStore,
    database_url: str,
    tenant: str,
    teacher_url: str,
    *,
    batches: int = 1,
    items: int = 8,
    budget_usd: float = 1.0,
    concurrency: int = 4,
    timeout_seconds: float = 2.0,
    times: GatewayTimeouts = FAST,
    collect: str = "running",
    teacher: Mapping[str, Any] | None = None,
    others: Sequence[Mapping[str, Any]] = (),
    change: Callable[[responses.Item], responses.Item] = lambda item: item,
    name: str = "",
    **spec: Any,
) -> World:
    """A pipeline whose batches wait to be asked; batches 0 and 1 are held-out ones. With a `name`
    it is one more of its tenant's, with the same prompts.

    `teacher` stands over the fields of its first teacher and `others` over those of further ones,
    which no batch asks; `change` may give the items tools, other
    messages or answers."""
    context = make_context(store, database_url, times)
    Base.metadata.create_all(context.engine)  # that migrations make the same is tested elsewhere
    total = max(batches, 3)
    asked = {
        "name": "billing",
        "url": teacher_url,
        "model": "billing-teacher",
        "terms": "own-weights",
        "usd_per_million": {"input": 1, "output": 2},
        "limits": {"concurrency": concurrency, "timeout_seconds": timeout_seconds},
        **(teacher or {}),
    }
    resolved = make_resolved_spec(
        tenant=tenant,
        pipeline=f"pl-{tenant}{name}",
        train=total - 2,
        teachers=[asked, *({**asked, **other} for other in others)],
        budget={"teacher_usd": budget_usd},
        **spec,
    )
    accepted = store_spec(store, resolved)
    world = World(context, resolved, batches)
    with transaction(context.engine) as session:
        if session.get(Tenant, tenant) is None:
            session.add(Tenant(tenant_id=tenant, created_at=now(session)))
            session.flush()
        pipeline = Pipeline(
            pipeline_id=resolved.pipeline_id,
            tenant_id=tenant,
            name="tiny",
            body_sha256="0" * 64,
            spec=canonical_json(
                resolved.spec.model_dump(mode="json", by_alias=True, exclude_none=True)
            ).decode(),
            traceparent="",
            state="running",
            collect=collect,
            dataset_id=resolved.dataset_id,
            training_id=resolved.training_id,
            student_id=resolved.student_id,
            batches=batches,
            heldout_batches=2,
            items=items * batches,
            budget_microusd=round(budget_usd * 1_000_000),
            created_at=now(session),
        )
        session.add(pipeline)
        session.flush()
        emit(session, pipeline, PipelineAccepted.model_validate(accepted.payload))
    for number in range(batches):
        _add_batch(world, number, [change(item) for item in make_items(resolved, number, items)])
    return world


def _add_batch(world: World, number: int, items: list[responses.Item]) -> None:
    resolved, store = world.resolved, world.context.store
    key = artifacts.prompts_key(resolved.tenant_id, resolved.pipeline_id, number)
    chat = read_tokenizer(store, resolved.tokenizer)
    ours = counts_as_we_do(resolved.teacher_of(number), resolved.signal_of(number))

    def tokens(item: responses.Item) -> int:
        return prompt_tokens_bound(chat, item.messages, item.tools, ours=ours)

    ref = store.put_new(key, prompts_bytes(items, tokens))
    with transaction(world.engine) as session:
        session.add(
            Batch(
                pipeline_id=resolved.pipeline_id,
                batch=number,
                tenant_id=resolved.tenant_id,
                split=resolved.batches.split_of(number),
                teacher=resolved.batch_teachers[number],
                endpoint=endpoint_of(resolved.teacher_of(number), resolved.tenant_id),
                items=len(items),
                prompts=ref.model_dump_json(),
            )
        )
        session.add_all(
            Item(
                pipeline_id=resolved.pipeline_id,
                item_id=item.item_id,
                tenant_id=resolved.tenant_id,
                batch=number,
            )
            for item in items
        )
    given = read_batch(store, resolved.tenant_id, resolved.pipeline_id, number, ref)
    world.asked[number] = list(given.asked)


_processes = multiprocessing.get_context("forkserver")
_processes.set_forkserver_preload(["tests.support.gateway"])


@dataclass(frozen=True)
class Where:
    """What a process of its own must know to work on a world."""

    database_url: str
    store: Store


def collect_in_process(
    where: Where, world: World, batch: int = 0, *, crash_at: str | None = None
) -> int:
    """Do one attempt in another process, which may be told where to die; return its status."""
    told = (where, world.context.times, world.pipeline_id, batch, crash_at)
    child = _processes.Process(target=_collect, args=told)
    child.start()
    child.join(60)
    if child.is_alive():
        child.kill()
        raise AssertionError("an attempt in a process of its own did not end within 60 s")
    return int(child.exitcode or 0)


def _collect(
    where: Where, times: GatewayTimeouts, pipeline_id: str, batch: int, crash_at: str | None
) -> None:
    os.environ["STILLHOUSE_CRASH_AT"] = crash_at or ""
    context = make_context(store_of(where.store), where.database_url, times)
    collect_batch(context, pipeline_id, batch)
