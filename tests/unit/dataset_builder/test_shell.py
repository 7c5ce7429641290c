"""Handlers, settings and time-outs: what the service's shell promises."""

from __future__ import annotations

import subprocess
import sys

import pytest

from services.dataset_builder.handlers import HANDLERS
from services.dataset_builder.jobs import JOBS
from services.dataset_builder.settings import TIMEOUTS, DatasetBuilderSettings
from services.dataset_builder.worker import make_shell
from stillhouse.chassis.jobs import Job, make_app
from stillhouse.chassis.settings import SettingsError, load
from stillhouse.contracts.artifacts import ObjectRef
from stillhouse.contracts.envelope import Envelope, seal
from stillhouse.contracts.events import (
    Event,
    PipelineAccepted,
    PipelineStopped,
    ResponseBatchStored,
    ResponsesCompleted,
)
from stillhouse.contracts.flow import BUILDER, consumed_by

REF = ObjectRef(key="some/key", size=1, sha256="0" * 64)


def jobs_of(event: Event) -> list[Job]:
    envelope: Envelope = seal(event, tenant_id="acme", pipeline_id="pl-1")
    return HANDLERS[type(event)](envelope, event)


def test_a_stored_batch_asks_for_its_shard() -> None:
    event = ResponseBatchStored(batch=3, manifest=REF, answers=1, rejected=0)
    (job,) = jobs_of(event)
    assert (job.name, job.tenant_id, job.pipeline_id) == ("build_shard", "acme", "pl-1")
    assert job.caused_by is not None
    assert job.caused_by.event() == event


def test_the_last_answer_asks_for_sealing() -> None:
    (job,) = jobs_of(ResponsesCompleted(responses=REF, batches=3))
    assert job.name == "seal_dataset"


def test_other_events_need_no_job() -> None:
    assert jobs_of(PipelineAccepted(spec=REF, dataset_id="ds-1", training_id="tr-1")) == []
    assert jobs_of(PipelineStopped(stopped=REF, outcome="cancelled")) == []


def test_every_consumed_event_has_a_handler_and_every_job_a_function() -> None:
    assert {event.TYPE for event in HANDLERS} == consumed_by(BUILDER)
    assert set(JOBS) == {"build_shard", "seal_dataset"}


@pytest.mark.parametrize("profile", ["embedded", "deployed"])
def test_time_outs_fit_each_other(profile: str) -> None:
    TIMEOUTS[profile].check()
    settings = load(
        DatasetBuilderSettings,
        {"DATASET_BUILDER_BROKER_URL": "redis://127.0.0.1:9", "DATASET_BUILDER_PROFILE": profile},
    )
    app = make_app(make_shell(settings))
    assert app.conf.task_time_limit == TIMEOUTS[profile].job


def test_a_misspelt_setting_is_refused() -> None:
    with pytest.raises(SettingsError, match="DATASET_BUILDER_WORKERS"):
        load(DatasetBuilderSettings, {"DATASET_BUILDER_WORKERS": "2"})


def test_the_service_needs_neither_torch_nor_transformers() -> None:
    code = (
        "import sys, services.dataset_builder.worker, services.dataset_builder.__main__;"
        "print([m for m in ('torch', 'transformers', 'sqlalchemy') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stdout.strip() == "[]", done.stderr


def test_a_missing_setting_is_one_clear_line() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "services.dataset_builder", "worker"],
        capture_output=True,
        text=True,
        timeout=60,
        env={},
    )
    assert done.returncode == 1
    assert "DATASET_BUILDER_BROKER_URL" in done.stderr
    assert "Traceback" not in done.stderr
