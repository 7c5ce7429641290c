"""The pipeline spec: what a user posts, and what acceptance makes of it.

All fields of version 1 are parsed and checked here. A field that is described but not built yet
is refused by its name (`NOT_BUILT`), so that nothing a user asks for is dropped in silence.
`docs/spec.md` documents every field and is tested against these classes.
"""

from __future__ import annotations

import re
import unicodedata
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    StringConstraints,
    field_validator,
    model_validator,
)

from stillhouse.contracts.artifacts import Id, ObjectRef, Sha256
from stillhouse.contracts.canonical import digest_of, sha256_hex
from stillhouse.contracts.events import Split

MAX_TOP_K = 64
# Answer tokens in a batch at most: what a builder's job can turn into a shard within its limit.
MAX_BATCH_TOKENS = 200_000


class SpecPart(BaseModel):
    """Base of all parts of a spec: unknown fields are errors."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


# Where weights, prompts and tokenizers lie: `file:/abs/path`, `upload:<sha256>`. The schemes
# `s3:` and `hf:` are part of version 1 and not built yet.
Reference = Annotated[str, StringConstraints(min_length=1, max_length=2000)]

_SCHEMES = ("file:", "upload:")


def file_path(reference: str) -> str:
    """Return the absolute path of a `file:` reference (`file:///a/b` and `file:/a/b`)."""
    path = reference.removeprefix("file:")
    return path.removeprefix("//") if path.startswith("//") else path


def _check_reference(value: str, schemes: tuple[str, ...]) -> str:
    if value.startswith(("s3:", "hf:")):
        scheme = value.split(":", 1)[0]
        raise ValueError(
            f"`{scheme}:` references are not built yet: copy the files to a folder "
            "that the operator named and use `file:`"
        )
    if not value.startswith(schemes):
        raise ValueError(
            f"expected a reference that starts with {' or '.join(schemes)}, found {value!r}"
        )
    return value


class Purpose(SpecPart):
    """What the student is for: the terms are judged against it."""

    use: Literal["internal", "commercial", "research"] = "internal"
    kind: Literal["generative", "classifier"] = "generative"
    distributed: bool = Field(False, description="whether the student is given to third parties")


class SecretRef(SpecPart):
    """A secret by reference: the name of a variable of the gateway's environment."""

    env: Annotated[str, StringConstraints(pattern=r"^[A-Z][A-Z0-9_]{0,99}$")]


class Price(SpecPart):
    """US dollars for a million tokens."""

    input: float = Field(ge=0, le=100_000)
    output: float = Field(ge=0, le=100_000)


class Limits(SpecPart):
    """What the teacher's endpoint bears."""

    concurrency: int = Field(8, ge=1, le=1024, description="calls at once in one batch")
    requests_per_minute: int | None = Field(None, ge=1)
    tokens_per_minute: int | None = Field(None, ge=1)
    timeout_seconds: float = Field(120, gt=0, le=600, description="deadline of one call")


class Teacher(SpecPart):
    """A model that answers, by one route: its endpoint, price and terms."""

    name: Id
    url: (
        Annotated[str, StringConstraints(pattern=r"^https?://[^\s@]+$", max_length=2000)] | None
    ) = Field(None, description="base URL of an OpenAI-compatible endpoint, with /v1")
    weights: Reference | None = Field(None, description="local weights that answer")
    model: Annotated[str, StringConstraints(min_length=1, max_length=200)]
    api_key: SecretRef | None = None
    terms: Annotated[str, StringConstraints(min_length=1, max_length=200)]
    usd_per_million: Price
    limits: Limits = Limits()
    reference: Reference | None = Field(
        None, description="weights beside the url, for pruning, tokenizer and kl_full only"
    )
    weight: float | None = Field(None, gt=0, description="share of the prompts")

    @field_validator("api_key", mode="before")
    @classmethod
    def _no_literal(cls, value: Any) -> Any:
        if isinstance(value, str):
            raise ValueError(
                "expected a reference such as {env: MY_KEY}, found a literal: "
                "put the key into a variable of the gateway's environment"
            )
        return value

    @model_validator(mode="after")
    def _one_route(self) -> Teacher:
        if self.url is None and self.weights is None:
            raise ValueError("expected `url`: the base URL of an OpenAI-compatible endpoint")
        return self

    @field_validator("reference")
    @classmethod
    def _reference(cls, value: str | None) -> str | None:
        return value if value is None else _check_reference(value, ("file:",))


class Prompts(SpecPart):
    """What the teachers are asked."""

    source: Reference = Field(alias="from", description="JSONL: `file:` or `upload:<sha256>`")
    terms: Annotated[str, StringConstraints(min_length=1, max_length=200)] = "own-data"
    heldout: float = Field(
        0.05, gt=0, le=0.5, description="share kept out, half each for validation and test"
    )
    samples: int = Field(1, ge=1, le=64, description="answers for each prompt")
    batch: int = Field(64, ge=1, le=200, description="items in a batch, and in a shard")

    model_config = ConfigDict(frozen=True, extra="forbid", populate_by_name=True)

    @field_validator("source")
    @classmethod
    def _source(cls, value: str) -> str:
        return _check_reference(value, _SCHEMES)


class Signal(SpecPart):
    """What comes beside the text of an answer."""

    kind: Literal["text", "topk", "counts", "auto"] = "topk"
    k: int = Field(20, ge=1, le=MAX_TOP_K, description="log-probabilities for each token")
    max_tokens: int = Field(512, ge=1, le=32_768)
    temperature: float = Field(1.0, ge=0, le=2)


class DatasetOptions(SpecPart):
    """Steps between answers and rows."""

    min_characters: int = Field(1, ge=1, description="shorter answers are rejected")
    max_tokens: int = Field(4096, ge=16, le=131_072, description="longer rows are rejected")
    drop_cut: bool = Field(False, description="reject answers that ended by length")
    redact: list[Literal["email", "secrets", "phone"]] | None = None
    near_duplicates: Literal["keep", "drop"] | None = None


class Student(SpecPart):
    """The model that learns: a folder, or a teacher's own layers, thinned."""

    source: Reference | None = Field(None, alias="from", description="a folder of weights")
    layers: int | None = Field(None, ge=1, le=1000, description="layers kept of `of`")
    of: Reference | None = Field(None, description="open weights to prune")
    terms: Annotated[str, StringConstraints(min_length=1, max_length=200)] = "own-weights"
    config: dict[str, Any] | None = None

    model_config = ConfigDict(frozen=True, extra="forbid", populate_by_name=True)

    @field_validator("source", "of")
    @classmethod
    def _sources(cls, value: str | None) -> str | None:
        return value if value is None else _check_reference(value, ("file:",))

    @model_validator(mode="after")
    def _one_way(self) -> Student:
        if self.config is not None:
            return self  # refused by name below
        if (self.source is None) == (self.of is None):
            raise ValueError("expected either `from: file:...` or `layers: N, of: file:...`")
        if (self.of is None) != (self.layers is None):
            raise ValueError(
                "`layers` and `of` go together: how many layers to keep, of which weights"
            )
        return self

    @property
    def weights(self) -> str:
        """The reference of the weights that the student starts from."""
        reference = self.source or self.of
        assert reference is not None
        return reference


class Training(SpecPart):
    """How the student learns. Stored in the spec, so a training can be repeated from it."""

    loss: Literal["sft", "forward_kl", "reverse_kl", "jsd", "skew_kl", "skew_reverse_kl"] = (
        "forward_kl"
    )
    passes: int = Field(1, ge=1, le=100, description="passes before the decay")
    learning_rate: float = Field(2e-5, gt=0, le=1)
    warmup_steps: int = Field(5, ge=0)
    decay: float = Field(0.1, ge=0, le=1, description="decay steps, as a share of the steps so far")
    tokens_per_step: int = Field(32_768, ge=1, description="supervised tokens in a step")
    weight_decay: float = Field(0.0, ge=0, le=1)
    clip_norm: float = Field(1.0, gt=0)
    seed: int = Field(7, ge=0, le=2**31 - 1)
    lora: dict[str, Any] | None = None


class Budget(SpecPart):
    """What may be spent. A pipeline never reserves more."""

    teacher_usd: float = Field(ge=0, le=10_000_000)
    gpu_hours: float | None = Field(None, gt=0)
    min_gain_per_usd: float | None = Field(None, gt=0)


Control = Literal["untrained", "sft"]


class Evaluation(SpecPart):
    """What is measured, and when."""

    every_steps: int = Field(200, ge=1, description="checkpoints to evaluate")
    controls: list[Control] = Field(["untrained"], min_length=1)
    samples: int = Field(5, ge=0, le=50, description="answers shown side by side")
    tasks: list[str] | None = None

    @field_validator("controls", mode="before")
    @classmethod
    def _always_measured(cls, value: Any) -> Any:
        if value == []:
            raise ValueError(
                "expected at least one control: the untrained student is always measured; leave "
                "`controls` out, or write `[untrained]`"
            )
        return value


class Spec(SpecPart):
    """One pipeline, as a user posts it."""

    version: Literal[1]
    name: Id
    purpose: Purpose = Purpose()
    teachers: list[Teacher] = Field(min_length=1)
    prompts: Prompts
    signal: Signal = Signal()
    dataset: DatasetOptions = DatasetOptions()
    student: Student
    training: Training = Training()
    budget: Budget
    evaluation: Evaluation = Evaluation()
    gates: list[dict[str, Any]] | None = None
    start: Literal["at_once", "after_student"] = Field(
        "at_once", description="whether train batches wait for the prepared student"
    )
    close_deadline_hours: float = Field(24, gt=0, le=24 * 30)

    @model_validator(mode="after")
    def _refuse_unbuilt(self) -> Spec:
        unbuilt = [f"`{path}`: {instead}" for path, used, instead in _not_built(self) if used]
        if unbuilt:
            raise ValueError("not built yet: " + "; ".join(unbuilt))
        if self.signal.kind == "text" and self.training.loss != "sft":
            raise ValueError(
                f"`training.loss: {self.training.loss}` needs log-probabilities and "
                "`signal.kind: text` has none: use `signal.kind: topk`, or "
                "`training.loss: sft`"
            )
        tokens = self.prompts.batch * self.signal.max_tokens
        if tokens > MAX_BATCH_TOKENS:
            raise ValueError(
                f"`prompts.batch` x `signal.max_tokens` is {tokens}, expected at most "
                f"{MAX_BATCH_TOKENS}, so that a batch can be built in one job: lower "
                "`prompts.batch`"
            )
        if self.signal.kind == "topk" and self.signal.temperature != 1:
            raise ValueError(
                "`signal.temperature` must be 1 for `topk`: whether an endpoint's "
                "log-probabilities are raw at another temperature is not known"
            )
        return self


def _not_built(spec: Spec) -> list[tuple[str, bool, str]]:
    teachers = spec.teachers
    return [
        ("gates", spec.gates is not None, "leave it out; the report shows every figure"),
        ("evaluation.tasks", spec.evaluation.tasks is not None, "leave it out"),
        (
            "evaluation.controls: sft",
            "sft" in spec.evaluation.controls,
            "use `controls: [untrained]`",
        ),
        ("teachers (more than one)", len(teachers) > 1, "give one teacher"),
        (
            "teachers.weights",
            any(t.weights for t in teachers),
            "serve the weights over HTTP and give `url`",
        ),
        ("teachers.weight", any(t.weight for t in teachers), "give one teacher"),
        (
            "teachers.limits.requests_per_minute",
            any(t.limits.requests_per_minute for t in teachers),
            "use `limits.concurrency`",
        ),
        (
            "teachers.limits.tokens_per_minute",
            any(t.limits.tokens_per_minute for t in teachers),
            "use `limits.concurrency`",
        ),
        ("signal.kind: counts", spec.signal.kind == "counts", "use `topk` or `text`"),
        ("signal.kind: auto", spec.signal.kind == "auto", "use `topk` or `text`"),
        ("dataset.redact", spec.dataset.redact is not None, "redact the prompts beforehand"),
        (
            "dataset.near_duplicates",
            spec.dataset.near_duplicates is not None,
            "leave it out; exact duplicates are always dropped",
        ),
        ("student.config", spec.student.config is not None, "use `from` or `layers` and `of`"),
        ("training.lora", spec.training.lora is not None, "leave it out"),
        (
            "training.loss: " + spec.training.loss,
            spec.training.loss not in ("sft", "forward_kl"),
            "use `forward_kl` or `sft`",
        ),
        ("budget.gpu_hours", spec.budget.gpu_hours is not None, "use `budget.teacher_usd`"),
        (
            "budget.min_gain_per_usd",
            spec.budget.min_gain_per_usd is not None,
            "use `budget.teacher_usd`",
        ),
    ]


# What acceptance makes of a spec


class Verdict(SpecPart):
    """The terms gate's judgement of one teacher, the prompts or the student's weights."""

    id: Id
    subject: str = Field(description="e.g. `teacher:smollm2`, `prompts`, `student`")
    terms: str
    outcome: Literal["allow", "allow_with_duties", "deny"]
    duties: list[str] = Field(default_factory=list)
    reason: str
    source: str = Field(description="where the terms stand, and as of which date")
    catalogue_sha256: Sha256


class Batches(SpecPart):
    """How the items were grouped: validation batches first, then test, then train."""

    validation: int = Field(ge=1)
    test: int = Field(ge=1)
    train: int = Field(ge=1)

    @property
    def total(self) -> int:
        return self.validation + self.test + self.train

    @property
    def heldout(self) -> int:
        return self.validation + self.test

    def split_of(self, batch: int) -> Split:
        if not 0 <= batch < self.total:
            raise ValueError(f"expected a batch below {self.total}, found {batch}")
        if batch < self.validation:
            return "validation"
        return "test" if batch < self.heldout else "train"


class ResolvedSpec(SpecPart):
    """`spec.json`: the spec with everything settled that the services need. Write-once."""

    tenant_id: Id
    pipeline_id: Id
    spec: Spec
    spec_sha256: Sha256 = Field(
        description="digest of `spec`; datasets and trainings derive their ids from it"
    )
    dataset_id: Id
    training_id: Id
    student_id: Id
    tokenizer: ObjectRef = Field(description="the teacher's tokenizer and chat template")
    tokenizer_sha256: Sha256
    template_sha256: Sha256
    verdicts: list[Verdict]
    batches: Batches
    items: int = Field(ge=1, description="items in the batches: prompts x samples")
    rejected: int = Field(ge=0, description="prompts rejected at acceptance")

    @property
    def teacher(self) -> Teacher:
        return self.spec.teachers[0]

    @property
    def duties(self) -> list[str]:
        return sorted({duty for verdict in self.verdicts for duty in verdict.duties})


def spec_digest(spec: Spec) -> str:
    return digest_of(spec.model_dump(mode="json", by_alias=True))


def heldout_split(prompt_sha256: str, share: float, seed: int) -> Split:
    """Decide by the hash of the normalised prompt: the same prompt lands on the same side."""
    point = int(sha256_hex(f"{seed}:{prompt_sha256}".encode())[:12], 16) / 16**12
    if point < share / 2:
        return "validation"
    return "test" if point < share else "train"


_SPACE = re.compile(r"\s+")


def normalised_text(text: str) -> str:
    """The form in which prompts and answers are compared: NFKC, one space, lower case."""
    return _SPACE.sub(" ", unicodedata.normalize("NFKC", text)).strip().casefold()
