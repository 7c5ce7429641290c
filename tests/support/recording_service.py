"""A service that writes down what reaches it: the chassis run for real, without a domain.

It stands in for the dataset builder on its queues. What a `response_batch.stored` does is said by
its batch number (see `Batch`), and every handler call and job leaves a line in the records.

    with recording_worker(broker_url, tmp_path) as worker:
        worker.publish(7)
        wait_for(lambda: worker.done(7), 20, "the job ran")
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import httpx
from prometheus_client import Counter

from stillhouse.chassis import bus, logs
from stillhouse.chassis.errors import PermanentError, RetryableError
from stillhouse.chassis.jobs import Job, ServiceShell, Timeouts, run_worker
from stillhouse.chassis.settings import ServiceSettings
from stillhouse.contracts import events as e
from stillhouse.contracts.artifacts import ObjectRef
from stillhouse.contracts.envelope import Envelope, seal
from stillhouse.contracts.flow import BUILDER, GATEWAY
from stillhouse.embedded.ports import free_ports
from stillhouse.embedded.process import base_environment, kill_group, spawn
from tests.support.waiting import wait_for

SERVICE = BUILDER


class Batch:
    """What a batch number asks for; others run a job that ends at once."""

    HANDLER_KEY_ERROR = 901  # kombu takes a KeyError for a lost connection to Valkey
    HANDLER_VALUE_ERROR = 902
    HANDLER_OS_ERROR = 903
    RETRYABLE = 911
    PERMANENT = 912
    ERROR = 913
    KILLS_ITS_PROCESS = 914
    SLEEPS = 1000  # 1000 + n sleeps for n tenths of a second


JOBS_DONE = Counter("stillhouse_recording_jobs_total", "Jobs that ended", ["service"])
HANDLED = Counter("stillhouse_recording_events_total", "Events handled", ["service"])


class Settings(ServiceSettings):
    """What the recording worker is told."""

    PREFIX: ClassVar[str] = "RECORDING_"

    delivery_limit: int = bus.DELIVERY_LIMIT


def ref(key: str) -> ObjectRef:
    return ObjectRef(key=key, size=1, sha256="0" * 64)


def stored(batch: int, pipeline: str = "pl-1", tenant: str = "t-1") -> Envelope:
    """A `response_batch.stored`: the event that asks for a job."""
    event = e.ResponseBatchStored(batch=batch, manifest=ref("manifest"), answers=1, rejected=0)
    return seal(event, tenant_id=tenant, pipeline_id=pipeline)


def write(path: Path, **line: Any) -> None:
    data = json.dumps({"at": time.time(), "pid": os.getpid(), **line}).encode() + b"\n"
    handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    try:
        os.write(handle, data)
    finally:
        os.close(handle)


def make_shell(settings: Settings, records: Path, timeouts: Timeouts) -> ServiceShell:
    def on_event(envelope: Envelope, event: e.Event) -> list[Job]:
        batch = getattr(event, "batch", -1)
        write(records, what="event", pipeline=envelope.pipeline_id, batch=batch)
        HANDLED.labels(SERVICE).inc()
        if batch == Batch.HANDLER_KEY_ERROR:
            raise KeyError("a mistake in a handler")
        if batch == Batch.HANDLER_VALUE_ERROR:
            raise ValueError("a mistake in a handler")
        if batch == Batch.HANDLER_OS_ERROR:
            raise OSError("a mistake in a handler")
        return [Job.of("record", envelope, batch=batch)]

    def record(job: Job, context: str) -> None:
        batch = int(job.args["batch"])
        write(records, what="start", pipeline=job.pipeline_id, batch=batch, context=context)
        if batch == Batch.RETRYABLE:
            raise RetryableError("the store was away")
        if batch == Batch.PERMANENT:
            raise PermanentError("the manifest was wrong", reason="bad_manifest")
        if batch == Batch.ERROR:
            raise ZeroDivisionError("a mistake in a job")
        if batch == Batch.KILLS_ITS_PROCESS:
            os.kill(os.getpid(), signal.SIGKILL)
        if batch >= Batch.SLEEPS:
            time.sleep((batch - Batch.SLEEPS) / 10)
        JOBS_DONE.labels(SERVICE).inc()
        write(records, what="end", pipeline=job.pipeline_id, batch=batch)

    consumed = (e.PipelineAccepted, e.ResponseBatchStored, e.ResponsesCompleted, e.PipelineStopped)
    return ServiceShell(
        service=SERVICE,
        stage="build",
        settings=settings,
        handlers=dict.fromkeys(consumed, on_event),
        jobs={"record": record},
        timeouts=timeouts,
        context=lambda: f"made in {os.getpid()}",
    )


@dataclass(frozen=True)
class Worker:
    """A running worker, its main process and its records of one pipeline."""

    broker_url: str
    process: subprocess.Popen[bytes]
    records: Path
    metrics_url: str
    pipeline: str = "pl-1"

    def publish(self, *batches: int) -> None:
        """Publish a `response_batch.stored` for each batch, as the gateway does."""
        bus.Publisher(GATEWAY, self.broker_url).publish(
            *(stored(batch, self.pipeline) for batch in batches)
        )

    def lines(self, what: str, batch: int | None = None) -> list[dict[str, Any]]:
        if not self.records.exists():
            return []
        found = [json.loads(line) for line in self.records.read_text().splitlines()]
        return [
            line
            for line in found
            if line["what"] == what
            and line["pipeline"] == self.pipeline
            and (batch is None or line["batch"] == batch)
        ]

    def done(self, batch: int) -> int:
        """How often the job of a batch ran to its end."""
        return len(self.lines("end", batch))

    def metrics(self) -> str:
        return httpx.get(f"{self.metrics_url}/metrics", trust_env=False).text

    def healthy(self) -> bool:
        return httpx.get(f"{self.metrics_url}/healthz", trust_env=False).status_code == 200

    def alive(self) -> bool:
        return self.process.poll() is None

    def kill(self) -> None:
        """kill -9 the main process and its pool, as one."""
        kill_group(self.process)


@contextlib.contextmanager
def recording_worker(
    broker_url: str, folder: Path, *, name: str = "worker", job: float = 60, visibility: float = 200
) -> Iterator[Worker]:
    """Run a worker until the end of the block; two of them in one folder share their records."""
    metrics = folder / f"{name}-metrics"
    metrics.mkdir(parents=True, exist_ok=True)
    port = next(free_ports())
    log = folder / f"{name}.log"
    env = base_environment(
        {
            "RECORDING_BROKER_URL": broker_url,
            "RECORDING_DELIVERY_LIMIT": str(bus.DELIVERY_LIMIT),
            "RECORDING_METRICS_PORT": str(port),
            "PROMETHEUS_MULTIPROC_DIR": str(metrics),
            "OMP_NUM_THREADS": "1",
        }
    )
    words = ("--records", str(folder / "records.jsonl"), "--job", job, "--visibility", visibility)
    process = spawn(
        [sys.executable, "-m", "tests.support.recording_service", *map(str, words)],
        env=env,
        log=log,
        cwd=Path(__file__).parents[2],
    )
    worker = Worker(broker_url, process, folder / "records.jsonl", f"http://127.0.0.1:{port}")
    try:
        wait_for(worker.healthy, 30, f"the worker serves /healthz; its log is {log}")
        yield worker
    finally:
        kill_group(process)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--records", type=Path, required=True)
    parser.add_argument("--job", type=float, required=True)
    parser.add_argument("--visibility", type=float, required=True)
    chosen = parser.parse_args(argv)
    from stillhouse.chassis.settings import load

    settings = load(Settings)
    logs.setup("recording", "worker", settings.log_level)
    bus.DELIVERY_LIMIT = settings.delivery_limit
    timeouts = Timeouts(job=chosen.job, visibility=chosen.visibility)
    run_worker(make_shell(settings, chosen.records, timeouts))
    return 0


if __name__ == "__main__":
    sys.exit(main())
