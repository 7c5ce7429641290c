"""What a training leaves in the store: state, plan, cursor, checkpoint, report, student."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from stillhouse.contracts.artifacts import Id, ObjectRef, Sha256
from stillhouse.contracts.responses import Record


class Published(Record):
    """A checkpoint that other services may read."""

    step: int
    epoch: int
    manifest: ObjectRef
    final: bool = False
    tokens: int = 0
    gpu_seconds: float = Field(0.0, description="as its event says, so that it can be said again")


class Head(Record):
    """The newest checkpoint: where the next holder goes on."""

    step: int
    epoch: int
    manifest: ObjectRef


class TrainingState(Record):
    """`state.json`: lease and HEAD of a training in one object, moved by compare-and-swap.

    `write_id` is random in each write, because an ETag is the content's: without it an old
    reader could win with an old ETag.
    """

    training_id: Id
    epoch: int = Field(ge=1, description="fencing epoch: grows with each taking-over")
    holder: str = Field("", description="empty when released")
    beat: int = 0
    write_id: str
    head: Head | None = None
    published: list[Published] = Field(default_factory=list)
    gpu_seconds: float = 0.0
    tokens: int = 0
    crashes: int = Field(0, description="holders that died or hung since HEAD moved last")
    done: bool = False
    failed: str = Field("", description="why the training cannot go on; empty while it can")


class Environment(Record):
    """What the bits of a training depend on beside its inputs."""

    torch: str
    device: str
    dtype: str
    threads: int
    cpu_capability: str
    matrices: str = Field("native", description="library that multiplies float32 on a CPU")
    deterministic: bool
    code: str = Field(description="version of stillhouse")


class Plan(Record):
    """`plan.json`: settled before step 0, write-once; a replay uses it."""

    training_id: Id
    micro_batch_tokens: int = Field(description="that go through the student at once")
    activation_bytes: int = Field(0, description="kept for each of them until the backward pass")
    environment: Environment
    layers_kept: list[int] | None = Field(None, description="of the weights that were pruned")
    block_influence: list[float] | None = None
    started_at: str


class LedgerEntry(Record):
    """The rows that one step trained on: the entries partition the consumption exactly."""

    step: int
    kind: Literal["stream", "pass", "decay"]
    rows: int
    tokens: int
    rows_sha256: Sha256 = Field(description="digest of the row ids, in order")
    loss: float
    learning_rate: float


class Cursor(Record):
    """Where in the data a checkpoint stands: all that a resume needs beside the tensors."""

    step: int
    phase: Literal["stream", "pass", "decay", "done"]
    pass_index: int = 0
    batch: int = Field(0, description="next train shard of the pass, counted from the first one")
    row: int = Field(0, description="next row of that shard in its shuffled order")
    decay_from: int | None = Field(None, description="steps done when the decay began")
    decay_position: int = 0
    tokens: int = 0
    rows: int = 0
    ledger: list[LedgerEntry] = Field(default_factory=list)
    shards: list[ObjectRef] = Field(
        default_factory=list, description="train shards read so far, in order"
    )


class CheckpointManifest(Record):
    """`manifest.json` of a checkpoint; written last."""

    tenant_id: Id
    pipeline_id: Id
    training_id: Id
    step: int
    epoch: int
    files: dict[str, ObjectRef]
    parent: ObjectRef | None = Field(description="manifest that this training resumed from")
    tokenizer_sha256: Sha256
    template_sha256: Sha256
    tokens: int
    rows: int
    loss: float | None
    final: bool
    bitwise: bool = Field(description="whether the same inputs give the same bits here")
    environment: Environment
    saved_at: str


class Figures(Record):
    """Fidelity of one model over held-out rows; means over supervised positions.

    kl_top20: KL(teacher || model) in nats over the stored outcomes and their tail, a lower bound
    of kl_full, which needs the teacher's weights. ppl: exp of the mean loss on the teacher's own
    tokens. top1: share of positions where the model's likeliest token is the teacher's.
    stop_rate: share of sampled answers that end by themselves. None where it cannot be had.
    """

    kl_top20: float | None = None
    kl_full: float | None = None
    ppl: float | None = None
    top1: float | None = None
    stop_rate: float | None = None
    rows: int = 0
    tokens: int = 0
    intervals: dict[str, tuple[float, float]] = Field(
        default_factory=dict, description="95 % bounds by the figure's name, over prompts"
    )


class SamplePair(Record):
    """One prompt with the teacher's stored answer and the models' answers (greedy)."""

    prompt: str
    teacher: str
    untrained: str | None = None
    student: str | None = None


class Report(Record):
    """`report.json` of a checkpoint, or of the student over the test rows."""

    training_id: Id
    step: int
    split: Literal["validation", "test"]
    checkpoint: ObjectRef
    heldout_sha256: Sha256
    teacher: Figures = Field(description="the noise floor: the teacher's own weights")
    model: Figures
    untrained: Figures | None = None
    samples: list[SamplePair] = Field(default_factory=list)
    unmeasured: dict[str, str] = Field(
        default_factory=dict, description="figures that cannot be had, and why"
    )


class StudentManifest(Record):
    """`manifest.json` of a student folder; written last."""

    tenant_id: Id
    pipeline_id: Id
    student_id: Id
    training_id: Id
    step: int
    files: dict[str, ObjectRef]


class Release(Record):
    """`release.json`: the gateway's decision about a student."""

    tenant_id: Id
    pipeline_id: Id
    student_id: Id
    outcome: Literal["released", "withheld"]
    reasons: list[str]
    duties: list[str]
    decided_at: str
