"""Every key of the object store, built from typed ids, and every id that is derived.

No other module concatenates a key. Ids are checked on the way in, so that no caller's text can
reach a key. The layout stands in `docs/architecture.md`.
"""

from __future__ import annotations

import re
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, StringConstraints

from stillhouse.contracts.canonical import derived_id

ID_PATTERN = r"^[a-z0-9][a-z0-9-]{0,62}$"
SHA256_PATTERN = r"^[0-9a-f]{64}$"
# Used with fullmatch: `$` alone lets a trailing newline pass.
_ID = re.compile(ID_PATTERN)
_SHA256 = re.compile(SHA256_PATTERN)

Id = Annotated[str, StringConstraints(pattern=ID_PATTERN)]
Sha256 = Annotated[str, StringConstraints(pattern=SHA256_PATTERN)]


class ObjectRef(BaseModel):
    """An object of the store as a manifest or an event names it: trusted by size and digest."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    key: Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9/._-]*$", max_length=512)]
    size: int = Field(ge=0)
    sha256: Sha256


def _id(value: str) -> str:
    if not _ID.fullmatch(value):
        raise ValueError(f"not an id (expected {ID_PATTERN}): {value!r}")
    return value


def _number(value: int, width: int) -> str:
    if value < 0 or len(str(value)) > width:
        raise ValueError(f"not a number of at most {width} digits: {value!r}")
    return f"{value:0{width}d}"


# Derived ids: every service computes them from what it already knows.


def dataset_id(pipeline_id: str, spec_sha256: str) -> str:
    """The dataset that the steps of this spec make of this pipeline's answers."""
    return derived_id("ds", pipeline_id, spec_sha256)


def training_id(dataset_id_: str, spec_sha256: str, arm: str = "main") -> str:
    return derived_id("tr", dataset_id_, spec_sha256, arm)


def student_id(training_id_: str) -> str:
    return derived_id("st", training_id_)


# Pipelines


def pipeline_prefix(tenant: str, pipeline: str) -> str:
    return f"tenants/{_id(tenant)}/pipelines/{_id(pipeline)}"


def upload_key(tenant: str, sha256: str) -> str:
    if not _SHA256.fullmatch(sha256):
        raise ValueError(f"not a SHA-256 in hex: {sha256!r}")
    return f"tenants/{_id(tenant)}/uploads/{sha256}"


def spec_key(tenant: str, pipeline: str) -> str:
    return f"{pipeline_prefix(tenant, pipeline)}/spec.json"


def tokenizer_key(tenant: str, pipeline: str) -> str:
    """The teacher's `tokenizer.json` and chat template, as one JSON object (`ChatTokenizer`)."""
    return f"{pipeline_prefix(tenant, pipeline)}/tokenizer.json"


def stopped_key(tenant: str, pipeline: str) -> str:
    return f"{pipeline_prefix(tenant, pipeline)}/stopped.json"


def responses_key(tenant: str, pipeline: str) -> str:
    return f"{pipeline_prefix(tenant, pipeline)}/responses.json"


def prompts_key(tenant: str, pipeline: str, batch: int) -> str:
    return f"{pipeline_prefix(tenant, pipeline)}/prompts/batch-{_number(batch, 6)}.parquet"


def _responses_prefix(tenant: str, pipeline: str, batch: int) -> str:
    return f"{pipeline_prefix(tenant, pipeline)}/responses/batch-{_number(batch, 6)}"


def part_key(tenant: str, pipeline: str, batch: int, attempt: int, part: int) -> str:
    prefix = _responses_prefix(tenant, pipeline, batch)
    return f"{prefix}/attempt-{_number(attempt, 4)}/part-{_number(part, 4)}.jsonl.gz"


def responses_manifest_key(tenant: str, pipeline: str, batch: int, attempt: int) -> str:
    """The list of parts that won a batch; its attempt is in the key, so writers never meet."""
    prefix = _responses_prefix(tenant, pipeline, batch)
    return f"{prefix}/attempt-{_number(attempt, 4)}/manifest.json"


# Captured traffic


def captured_key(tenant: str, teacher: str, captured: str) -> str:
    """A batch of recorded exchanges with a registered teacher: JSON lines, gzipped."""
    return f"tenants/{_id(tenant)}/captured/{_id(teacher)}/{_id(captured)}.jsonl.gz"


# Datasets


def dataset_prefix(tenant: str, dataset: str) -> str:
    return f"tenants/{_id(tenant)}/datasets/{_id(dataset)}"


def shard_key(tenant: str, dataset: str, batch: int) -> str:
    return f"{dataset_prefix(tenant, dataset)}/shards/shard-{_number(batch, 6)}.parquet"


def build_attempt_key(tenant: str, dataset: str, batch: int, attempt: int) -> str:
    prefix = dataset_prefix(tenant, dataset)
    return f"{prefix}/attempts/shard-{_number(batch, 6)}/attempt-{_number(attempt, 4)}.json"


def build_error_key(tenant: str, dataset: str, batch: int, attempt: int) -> str:
    prefix = dataset_prefix(tenant, dataset)
    return f"{prefix}/attempts/shard-{_number(batch, 6)}/attempt-{_number(attempt, 4)}.error.json"


def heldout_key(tenant: str, dataset: str) -> str:
    return f"{dataset_prefix(tenant, dataset)}/heldout.json"


def dataset_key(tenant: str, dataset: str) -> str:
    return f"{dataset_prefix(tenant, dataset)}/dataset.json"


# Trainings


def training_prefix(tenant: str, training: str) -> str:
    return f"tenants/{_id(tenant)}/trainings/{_id(training)}"


def training_state_key(tenant: str, training: str) -> str:
    """The one object that is overwritten, by compare-and-swap: lease and HEAD of a training."""
    return f"{training_prefix(tenant, training)}/state.json"


def plan_key(tenant: str, training: str) -> str:
    return f"{training_prefix(tenant, training)}/plan.json"


def checkpoint_prefix(tenant: str, training: str, step: int, epoch: int) -> str:
    prefix = training_prefix(tenant, training)
    return f"{prefix}/step-{_number(step, 8)}/epoch-{_number(epoch, 4)}"


def checkpoint_file_key(tenant: str, training: str, step: int, epoch: int, name: str) -> str:
    if name not in CHECKPOINT_FILES:
        raise ValueError(f"not a file of a checkpoint (expected {CHECKPOINT_FILES}): {name!r}")
    return f"{checkpoint_prefix(tenant, training, step, epoch)}/{name}"


CHECKPOINT_FILES = (
    "model.safetensors",
    "optimizer.safetensors",
    "config.json",
    "cursor.json",
    "manifest.json",
)


def checkpoint_manifest_key(tenant: str, training: str, step: int, epoch: int) -> str:
    return checkpoint_file_key(tenant, training, step, epoch, "manifest.json")


def report_part_key(tenant: str, training: str, step: int, part: int) -> str:
    prefix = training_prefix(tenant, training)
    return f"{prefix}/reports/step-{_number(step, 8)}/part-{_number(part, 4)}.json"


def report_key(tenant: str, training: str, step: int) -> str:
    return f"{training_prefix(tenant, training)}/reports/step-{_number(step, 8)}/report.json"


def reference_part_key(tenant: str, dataset: str, part: int) -> str:
    """What the teacher's own weights score on a range of held-out rows: the noise floor."""
    return f"{dataset_prefix(tenant, dataset)}/reference/part-{_number(part, 4)}.json"


# Students


def student_prefix(tenant: str, student: str) -> str:
    return f"tenants/{_id(tenant)}/students/{_id(student)}"


_STUDENT_FILE = re.compile(r"^[A-Za-z0-9][A-Za-z0-9._-]{0,100}$")


def student_file_key(tenant: str, student: str, name: str) -> str:
    if not _STUDENT_FILE.fullmatch(name):
        raise ValueError(f"not the name of a file of a student folder: {name!r}")
    return f"{student_prefix(tenant, student)}/{name}"


def student_manifest_key(tenant: str, student: str) -> str:
    return student_file_key(tenant, student, "manifest.json")


def release_key(tenant: str, student: str) -> str:
    return student_file_key(tenant, student, "release.json")
