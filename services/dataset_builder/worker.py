"""The builder's worker: events in the main process, jobs in the pool's children."""

from __future__ import annotations

from services.dataset_builder.handlers import HANDLERS
from services.dataset_builder.jobs import JOBS, PROGRESS_SECONDS, BuilderContext
from services.dataset_builder.settings import DatasetBuilderSettings
from stillhouse.chassis.bus import Publisher
from stillhouse.chassis.jobs import ServiceShell, run_worker
from stillhouse.chassis.storage import open_store
from stillhouse.contracts.flow import BUILDER


def make_shell(settings: DatasetBuilderSettings) -> ServiceShell:
    """Put the service together. Opens no connection."""

    def context() -> BuilderContext:
        return BuilderContext(
            store=open_store(settings),
            publisher=Publisher(BUILDER, settings.broker_url),
            job_seconds=settings.timeouts.job,
            progress_seconds=PROGRESS_SECONDS * settings.worker_processes,
        )

    return ServiceShell(
        service=BUILDER,
        stage="build",
        settings=settings,
        handlers=HANDLERS,
        jobs=JOBS,
        timeouts=settings.timeouts,
        context=context,
        processes=settings.worker_processes,
    )


def run(settings: DatasetBuilderSettings) -> None:
    """Check the store once, then work until a signal."""
    open_store(settings).self_test()
    run_worker(make_shell(settings))
