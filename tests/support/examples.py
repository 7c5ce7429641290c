"""One valid event of each type: plain ones, and ones as large as their fields allow."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from stillhouse.contracts import artifacts
from stillhouse.contracts import events as e
from stillhouse.contracts.artifacts import ObjectRef

TENANT, PIPELINE = "acme", "pl-support"
DATASET = artifacts.dataset_id(PIPELINE, "5" * 64)
TRAINING = artifacts.training_id(DATASET, "5" * 64)
STUDENT = artifacts.student_id(TRAINING)


def _ref(key: str) -> ObjectRef:
    return ObjectRef(key=key, size=1234, sha256="a1" * 32)


def plain_events() -> list[e.Event]:
    """One of each type, as the services publish them."""
    a = artifacts
    checkpoint = _ref(a.checkpoint_manifest_key(TENANT, TRAINING, 200, 1))
    report = _ref(a.report_key(TENANT, TRAINING, 200))
    release = _ref(a.release_key(TENANT, STUDENT))
    return [
        e.PipelineAccepted(
            spec=_ref(a.spec_key(TENANT, PIPELINE)), dataset_id=DATASET, training_id=TRAINING
        ),
        e.ResponseBatchStored(
            batch=42,
            manifest=_ref(a.responses_manifest_key(TENANT, PIPELINE, 42, 1)),
            answers=63,
            rejected=1,
        ),
        e.ResponsesCompleted(responses=_ref(a.responses_key(TENANT, PIPELINE)), batches=60),
        e.PipelineStopped(stopped=_ref(a.stopped_key(TENANT, PIPELINE)), outcome="cancelled"),
        e.ShardWritten(
            dataset_id=DATASET,
            batch=42,
            split="train",
            shard=_ref(a.shard_key(TENANT, DATASET, 42)),
            rows=60,
            rejected=4,
            supervised_tokens=7001,
        ),
        e.HeldoutSealed(dataset_id=DATASET, heldout=_ref(a.heldout_key(TENANT, DATASET))),
        e.DatasetSealed(
            dataset_id=DATASET, dataset=_ref(a.dataset_key(TENANT, DATASET)), shards=60, rows=3600
        ),
        e.CheckpointSaved(
            training_id=TRAINING,
            step=200,
            epoch=1,
            manifest=checkpoint,
            tokens=6_553_600,
            gpu_seconds=812.5,
        ),
        e.TrainingCompleted(
            training_id=TRAINING,
            step=200,
            epoch=1,
            manifest=checkpoint,
            tokens=6_553_600,
            gpu_seconds=812.5,
        ),
        e.CheckpointEvaluated(training_id=TRAINING, step=200, report=report),
        e.StudentEvaluated(
            student_id=STUDENT,
            training_id=TRAINING,
            step=200,
            manifest=_ref(a.student_manifest_key(TENANT, STUDENT)),
            report=report,
        ),
        e.StudentReleased(student_id=STUDENT, release=release),
        e.StudentWithheld(student_id=STUDENT, release=release),
        e.StageProgressed(stage="train", figures={"step": 120.0, "loss": 1.25}),
        e.StageFailed(
            stage="build", reason="digest_mismatch", detail="expected 3 bytes", fatal=True
        ),
    ]


def largest_event(event: type[e.Event]) -> e.Event:
    """An event whose every field is as long as its schema allows."""
    schema = event.model_json_schema()
    definitions = schema.get("$defs", {})
    fields = schema["properties"]
    return event.model_validate({name: _largest(f, definitions) for name, f in fields.items()})


def _largest(field: dict[str, Any], definitions: dict[str, Any]) -> Any:
    makers: dict[str, Callable[[], Any]] = {
        "integer": lambda: 2**63 - 1,
        "number": lambda: 1.2345678901234567e300,
        "boolean": lambda: False,
        "string": lambda: _longest_text(field),
        "object": lambda: {f"{n:02d}{'f' * 62}": 1.2345678901234567e300 for n in range(16)},
    }
    if "$ref" in field:
        found = definitions[field["$ref"].rsplit("/", 1)[-1]]
        return {name: _largest(f, definitions) for name, f in found["properties"].items()}
    if "enum" in field:
        return max(field["enum"], key=len)
    return makers[field["type"]]()


def _longest_text(field: dict[str, Any]) -> str:
    pattern, most = field.get("pattern"), field.get("maxLength")
    if pattern == artifacts.SHA256_PATTERN:
        return "f" * 64
    if pattern == artifacts.ID_PATTERN:
        return "z" * 63
    assert most is not None, f"a string without a limit: {field}"
    return ("z" if pattern else "\x01") * int(most)
