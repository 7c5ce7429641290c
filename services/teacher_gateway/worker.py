"""The gateway's worker: events in the main process, jobs in the pool's children."""

from __future__ import annotations

from services.teacher_gateway.context import build_context
from services.teacher_gateway.database import open_engine
from services.teacher_gateway.handlers import HANDLERS
from services.teacher_gateway.jobs import JOBS
from services.teacher_gateway.migrate import check_migrated
from services.teacher_gateway.settings import TeacherGatewaySettings
from services.teacher_gateway.timeouts import table
from stillhouse.chassis.jobs import ServiceShell, run_worker
from stillhouse.chassis.storage import open_store
from stillhouse.contracts.flow import GATEWAY


def make_shell(settings: TeacherGatewaySettings) -> ServiceShell:
    """Put the service together. Opens no connection."""
    return ServiceShell(
        service=GATEWAY,
        stage="collect",
        settings=settings,
        handlers=HANDLERS,
        jobs=JOBS,
        timeouts=table(settings.profile).for_jobs,
        context=lambda: build_context(settings),
        processes=settings.worker_processes,
    )


def run(settings: TeacherGatewaySettings) -> None:
    """Check store and tables once, then work until a signal."""
    open_store(settings).self_test()
    engine = open_engine(settings.database_url)
    try:
        check_migrated(engine)
    finally:
        engine.dispose()  # before the pool forks
    run_worker(make_shell(settings))
