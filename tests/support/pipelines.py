"""A whole embedded stack with a billing teacher and a tiny student, for end-to-end tests."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stillhouse.chassis.storage import ObjectStore
from stillhouse.cli import specs
from stillhouse.cli.client import Client, new_key
from stillhouse.contracts import artifacts
from stillhouse.contracts.envelope import seal
from stillhouse.contracts.events import PipelineAccepted
from stillhouse.contracts.spec import ResolvedSpec
from stillhouse.contracts.trainings import CheckpointManifest
from stillhouse.embedded.stack import StackInfo, StackOptions, read_stack, running_stack
from tests.support.shards import store_of, tiny_student
from tests.support.teacher import MODEL, Invoice, Teacher, running_teacher
from tests.support.trainers import Bench, head_of, replay

TENANT = "default"


@dataclass
class Plant:
    """A running stack, its teacher, a client and a store."""

    root: Path
    stack: StackInfo
    teacher: Teacher
    client: Client
    store: ObjectStore
    student: Path

    def spec(self, name: str = "plant", items: int = 64, **changed: Any) -> dict[str, Any]:
        """A small pipeline of numbered prompts."""
        prompts = self.root / f"{name}.jsonl"
        lines = [json.dumps({"prompt": f"[{name} {n}] Say something."}) for n in range(items)]
        prompts.write_text("\n".join(lines) + "\n")
        spec = {
            "version": 1,
            "name": name,
            "teachers": [
                {
                    "name": "billing",
                    "url": self.teacher.url,
                    "model": MODEL,
                    "terms": "smollm2@self-hosted",
                    "usd_per_million": {"input": 1, "output": 2},
                    "limits": {"concurrency": 2, "timeout_seconds": 10},
                    "reference": f"file:{self.student}",
                }
            ],
            "prompts": {"from": f"file:{prompts}", "heldout": 0.2, "batch": 8},
            "signal": {"kind": "topk", "k": 8, "max_tokens": 24},
            "student": {"from": f"file:{self.student}"},
            "training": {"tokens_per_step": 64, "learning_rate": 1e-3, "seed": 3},
            "evaluation": {"every_steps": 4, "samples": 2},
            "budget": {"teacher_usd": 1},
        }
        return specs.upload_inputs(self.client, {**spec, **changed})

    def submit(self, **changed: Any) -> str:
        pipeline = self.client.submit(self.spec(**changed), idempotency_key=new_key())
        return str(pipeline["pipeline_id"])

    def wait(
        self, pipeline: str, what: str, done: Callable[[dict[str, Any]], bool], seconds: float
    ) -> dict[str, Any]:
        """Poll the status until `done`. Prints what it last saw where it never is."""
        end = time.monotonic() + seconds
        while True:
            status = self.client.status(pipeline)
            if done(status):
                return status
            if time.monotonic() > end or status["state"] in ("failed", "cancelled", "withheld"):
                raise AssertionError(f"waited for {what}; last saw {json.dumps(status, indent=1)}")
            time.sleep(0.1)

    def events(self, pipeline: str) -> list[dict[str, Any]]:
        return list(self.client.events(pipeline))

    def charges(self, pipeline: str) -> dict[str, Any]:
        """The ledger's first page, with the totals of all its lines."""
        return self.client._json("GET", f"/v1/pipelines/{pipeline}/charges")

    def invoices(self, name: str) -> list[Invoice]:
        """What the teacher billed for the prompts of this spec."""
        return [i for i in self.teacher.invoices() if i.marker.startswith(f"{name} ")]

    def kill(self, name: str) -> None:
        """kill -9 of one process with all its children, and wait until the supervisor has put
        another one in its place."""
        before = read_stack(self.root).pid(name)
        os.killpg(before, signal.SIGKILL)
        end = time.monotonic() + 60
        while read_stack(self.root).processes.get(name, {}).get("pid") in (before, None):
            assert time.monotonic() < end, f"{name} was not started again within 60 s"
            time.sleep(0.1)


@contextlib.contextmanager
def running_plant(
    root: Path, *, latency: float = 0.0, service_env: dict[str, str] | None = None
) -> Iterator[Plant]:
    """Start everything; stop everything."""
    student = tiny_student(root / "models" / "tiny")
    options = StackOptions(
        quick_stop=True, file_roots=(student.parent,), service_env=service_env or {}
    )
    with (
        running_teacher(root / "invoices.jsonl", latency=latency) as teacher,
        running_stack(root / "stack", options, say=lambda line: None) as stack,
    ):
        assert stack.api_url is not None
        assert stack.api_key is not None
        with Client(stack.api_url, stack.api_key, patience_seconds=60) as client:
            store = store_of(stack.store)
            yield Plant(root / "stack", stack, teacher, client, store, student)


def train_undisturbed(
    plant: Plant, resolved: ResolvedSpec, disturbed: CheckpointManifest, folder: Path
) -> CheckpointManifest:
    """Train another student over the same sealed dataset by the same plan, in this process, in one
    go."""
    again = resolved.model_copy(
        update={
            "pipeline_id": f"{resolved.pipeline_id}-again",
            "training_id": artifacts.training_id(
                resolved.dataset_id, resolved.spec_sha256, "again"
            ),
        }
    )
    ref = plant.store.put_new_model(artifacts.spec_key(TENANT, again.pipeline_id), again)
    event = PipelineAccepted(spec=ref, dataset_id=again.dataset_id, training_id=again.training_id)
    replay(plant.store, again, disturbed)
    folder.mkdir()
    bench = Bench(plant.store, plant.stack.store, folder, plant.student.parent)
    bench.run(seal(event, tenant_id=TENANT, pipeline_id=again.pipeline_id))
    return head_of(plant.store, again)
