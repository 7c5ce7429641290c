"""The shell: handlers against the flow, no torch in the main process, progress now and then."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest

from services.evaluator.evaluation import Next
from services.evaluator.jobs import JOBS, EvaluatorContext
from services.evaluator.settings import TIMEOUTS, EvaluatorSettings
from services.evaluator.worker import make_shell
from stillhouse.chassis.jobs import Job
from stillhouse.chassis.settings import SettingsError, load
from stillhouse.contracts.artifacts import ObjectRef
from stillhouse.contracts.envelope import Envelope
from stillhouse.contracts.events import CheckpointSaved, StageProgressed
from stillhouse.contracts.trainings import Published
from tests.support.reports import checkpoint_saved
from tests.support.shards import make_resolved_spec

SETTINGS = {"EVALUATOR_BROKER_URL": "redis://nowhere"}


def test_handlers_and_time_outs_pass_the_start_up_check() -> None:
    for profile in TIMEOUTS:
        make_shell(load(EvaluatorSettings, SETTINGS, profile=profile)).check()


def test_the_main_process_never_imports_torch() -> None:
    code = (
        "import sys, services.evaluator.__main__, services.evaluator.worker\n"
        "found = {'torch', 'transformers'} & set(sys.modules)\n"
        "assert not found, found"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_a_setting_that_is_not_known_is_refused() -> None:
    with pytest.raises(SettingsError, match="EVALUATOR_THREAD"):
        load(EvaluatorSettings, SETTINGS | {"EVALUATOR_THREAD": "2"})


class _Said:
    """An evaluation that says what follows."""

    def __init__(self, following: Next) -> None:
        self.following = following

    def evaluate_checkpoint(self, *_: Any) -> Next:
        return self.following


def _run(following: Next, times: int = 1) -> tuple[list[Envelope], list[Job], Envelope]:
    ref = ObjectRef(key="k", size=1, sha256="a" * 64)
    cause = checkpoint_saved(make_resolved_spec(), Published(step=4, epoch=1, manifest=ref))
    published: list[Envelope] = []
    enqueued: list[Job] = []
    context = EvaluatorContext(
        evaluation=_Said(following),  # type: ignore[arg-type]
        publish=lambda *envelopes: published.extend(envelopes),
        enqueue=enqueued.append,
    )
    event = cause.event()
    assert isinstance(event, CheckpointSaved)
    job = Job.of("evaluate_checkpoint", cause, step=event.step)
    for _ in range(times):
        JOBS[job.name](job, context)
    return published, enqueued, cause


def test_jobs_that_follow_keep_the_pipeline_and_the_cause() -> None:
    _, enqueued, cause = _run(Next(jobs=[("evaluate_part", {"step": 4, "part": 2})]))
    (job,) = enqueued
    assert (job.name, job.args) == ("evaluate_part", {"step": 4, "part": 2})
    assert job.pipeline_id == cause.pipeline_id
    assert job.caused_by == cause


def test_progress_is_told_at_most_every_five_seconds() -> None:
    progress = StageProgressed(stage="evaluate", figures={"step": 4})
    published, _, cause = _run(Next(events=[progress]), times=3)
    assert len(published) == 1
    assert published[0].caused_by == cause.event_id
