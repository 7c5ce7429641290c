"""What the gateway's jobs work with: database, store, broker, settings, times."""

from __future__ import annotations

from dataclasses import dataclass

from sqlalchemy import Engine

from services.teacher_gateway.database import open_engine
from services.teacher_gateway.settings import TeacherGatewaySettings
from services.teacher_gateway.timeouts import GatewayTimeouts, table
from stillhouse.chassis.bus import Publisher
from stillhouse.chassis.storage import ObjectStore, open_store
from stillhouse.contracts.flow import GATEWAY


@dataclass(frozen=True)
class Context:
    """Built in each process that runs jobs, after its fork."""

    engine: Engine
    store: ObjectStore
    publisher: Publisher
    settings: TeacherGatewaySettings
    times: GatewayTimeouts


def build_context(settings: TeacherGatewaySettings) -> Context:
    return Context(
        engine=open_engine(settings.database_url),
        # Short: a hanging store must not eat the lease of a batch.
        store=open_store(settings, connect_timeout=2, read_timeout=10, attempts=3),
        publisher=Publisher(GATEWAY, settings.broker_url),
        settings=settings,
        times=table(settings.profile),
    )
