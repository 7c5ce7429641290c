"""The evaluator's worker: one job at a time, its models kept open in the pool's child."""

from __future__ import annotations

from celery import current_task

from services.evaluator.handlers import HANDLERS
from services.evaluator.jobs import JOBS, EvaluatorContext
from services.evaluator.metrics import StoredFigures
from services.evaluator.settings import TIMEOUTS, EvaluatorSettings
from stillhouse.chassis import bus, jobs
from stillhouse.chassis.references import sources_of
from stillhouse.chassis.storage import ObjectStore, open_store
from stillhouse.contracts.flow import EVALUATOR


def make_shell(settings: EvaluatorSettings) -> jobs.ServiceShell:
    """Say what the worker is made of. Opens nothing and imports no torch."""
    return jobs.ServiceShell(
        service=EVALUATOR,
        stage="evaluate",
        settings=settings,
        handlers=HANDLERS,
        jobs=JOBS,
        timeouts=TIMEOUTS[settings.profile],
        context=lambda: make_context(settings),
        processes=1,
    )


def make_context(settings: EvaluatorSettings) -> EvaluatorContext:
    """Build what jobs need, in the pool's child: torch is imported here."""
    from services.evaluator.evaluation import Evaluation
    from services.evaluator.models import Models, prepare_torch

    prepare_torch(settings.threads)
    store = open_store(settings)
    models = Models(
        store,
        work_dir=settings.work_dir,
        sources=sources_of(settings),
        device=settings.device,
    )
    return EvaluatorContext(
        evaluation=Evaluation(store, models, settings),
        publish=bus.Publisher(EVALUATOR, settings.broker_url).publish,
        enqueue=lambda job: jobs.enqueue(current_task.app, job),
    )


def figures_collector(settings: EvaluatorSettings) -> StoredFigures:
    def impatient_store() -> ObjectStore:
        # A scrape waits for it: better the last figures than a time-out.
        return open_store(settings, connect_timeout=1, read_timeout=3, attempts=1)

    return StoredFigures(
        impatient_store,
        most=settings.metrics_pipelines,
        refresh_seconds=settings.metrics_refresh_seconds,
    )


def run(settings: EvaluatorSettings) -> None:
    """Run until a signal."""
    open_store(settings).self_test()
    jobs.run_worker(make_shell(settings), collectors=[figures_collector(settings)])
