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
    AfterValidator,
    AwareDatetime,
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

MAX_TOP_K = 512
# Answer tokens in a batch at most, and outcomes beside them: what a builder's job can turn into a
# shard within its limit.
MAX_BATCH_TOKENS = 200_000
MAX_BATCH_OUTCOMES = 12_800_000


class SpecPart(BaseModel):
    """Base of all parts of a spec: unknown fields are errors."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


# Where weights, prompts and tokenizers lie: `file:/abs/path`, `s3://bucket/prefix`,
# `hf://repo@commit`, `upload:<sha256>`.
Reference = Annotated[str, StringConstraints(min_length=1, max_length=2000)]

_DATA_SCHEMES = ("file:", "upload:", "s3:")
_WEIGHTS_SCHEMES = ("file:", "s3:", "hf:")
_S3 = re.compile(r"s3://[a-z0-9][a-z0-9.-]{1,61}[a-z0-9](/[^\s/?#]+)+/?")
# A branch or tag may move; a commit is what it is.
_HUB = re.compile(r"hf://[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?@[0-9a-f]{40}")


def file_path(reference: str) -> str:
    """Return the absolute path of a `file:` reference (`file:///a/b` and `file:/a/b`)."""
    path = reference.removeprefix("file:")
    return path.removeprefix("//") if path.startswith("//") else path


def _check_reference(value: str, schemes: tuple[str, ...]) -> str:
    if not value.startswith(schemes):
        raise ValueError(
            f"expected a reference that starts with {' or '.join(schemes)}, found {value!r}"
        )
    if value.startswith("s3:") and not _S3.fullmatch(value):
        raise ValueError(f"expected s3://bucket/key, found {value!r}")
    if value.startswith("hf:") and not _HUB.fullmatch(value):
        raise ValueError(
            f"expected hf://owner/name@<commit of 40 hex digits>, found {value!r}: branches and "
            "tags may move, and the papers must say which weights were used"
        )
    return value


def check_tags(tags: dict[str, str]) -> dict[str, str]:
    """Refuse what OpenAI's `metadata` could not hold: 16 pairs, keys of 64, values of 512."""
    if len(tags) > 16 or any(not k or len(k) > 64 or len(v) > 512 for k, v in tags.items()):
        raise ValueError("expected at most 16 tags, names of 1 to 64 characters, values of 512")
    return tags


Tags = Annotated[dict[str, str], AfterValidator(check_tags)]


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
    """What the teacher's endpoint bears, over all pipelines and replicas that call it."""

    concurrency: int = Field(
        8, ge=1, le=1024, description="calls at once at most; fewer while the endpoint is strained"
    )
    requests_per_minute: int | None = Field(None, ge=1, le=1_000_000_000)
    tokens_per_minute: int | None = Field(
        None, ge=1, le=1_000_000_000_000, description="prompt and answer tokens together"
    )
    timeout_seconds: float = Field(120, gt=0, le=600, description="deadline of one call")


class Teacher(SpecPart):
    """A model that answers, by one route: an endpoint, local weights, or answers given along."""

    name: Id
    url: (
        Annotated[str, StringConstraints(pattern=r"^https?://[^\s@]+$", max_length=2000)] | None
    ) = Field(None, description="base URL of the endpoint, with /v1")
    api: Literal["openai", "anthropic"] = Field("openai", description="what the endpoint speaks")
    batch_api: bool = Field(
        False, description="ask by the provider's files and batches; prices are then those of it"
    )
    weights: Reference | None = Field(
        None, description="weights that answer in the gateway's worker"
    )
    answers: Literal["given"] | None = Field(
        None, description="the prompts carry their answers; beside `weights` these score them"
    )
    model: Annotated[str, StringConstraints(min_length=1, max_length=200)]
    api_key: SecretRef | None = None
    terms: Annotated[str, StringConstraints(min_length=1, max_length=200)]
    usd_per_million: Price
    limits: Limits = Limits()
    reference: Reference | None = Field(
        None, description="weights beside the url, for pruning, tokenizer and kl_full only"
    )
    weight: float | None = Field(None, gt=0, description="share of the prompts, by their hash")
    tags: Tags | None = Field(None, description="answers the prompts that have all of these tags")

    @field_validator("api_key", mode="before")
    @classmethod
    def _no_literal(cls, value: Any) -> Any:
        if isinstance(value, str):
            raise ValueError(
                "expected a reference such as {env: MY_KEY}, found a literal: "
                "put the key into a variable of the gateway's environment"
            )
        return value

    @field_validator("reference", "weights")
    @classmethod
    def _reference(cls, value: str | None) -> str | None:
        return value if value is None else _check_reference(value, _WEIGHTS_SCHEMES)

    @model_validator(mode="after")
    def _one_route(self) -> Teacher:
        routes = [name for name in ("url", "weights", "answers") if getattr(self, name)]
        if routes not in (["url"], ["weights"], ["answers"], ["weights", "answers"]):
            raise ValueError(
                "expected one route: `url` (an endpoint), `weights` (in the gateway's worker), "
                f"`answers: given`, or `weights` with `answers: given`; found {routes or 'none'}"
            )
        for name, used in (("api", self.api != "openai"), ("batch_api", self.batch_api)):
            if used and self.url is None:
                raise ValueError(f"`{name}` goes with `url`")
        if self.batch_api and self.api != "openai":
            raise ValueError("`batch_api` is built for `api: openai`")
        if routes == ["answers"] and (self.usd_per_million.input or self.usd_per_million.output):
            raise ValueError("`usd_per_million` must be 0 with `answers: given`: nothing is bought")
        if self.weights and self.reference:
            raise ValueError("`reference` goes with `url`; `weights` are their own reference")
        if self.weight is not None and self.tags is not None:
            raise ValueError("expected either `weight` or `tags`")
        return self

    @property
    def known_weights(self) -> str | None:
        """The reference of this teacher's weights, where they can be read."""
        return self.weights or self.reference

    @property
    def gives_logprobs(self) -> bool:
        """Whether its route can give log-probabilities at all."""
        return self.api == "openai"


class Captured(SpecPart):
    """Prompts that the capture endpoint recorded, chosen by tags."""

    tags: Tags = Field({}, alias="tag", description="all of them; from the requests' `metadata`")
    teacher: Id | None = Field(None, description="the registered teacher that was asked")
    since: AwareDatetime | None = None
    until: AwareDatetime | None = None
    answers: bool = Field(
        False, description="take the recorded answers too; needs a teacher with `answers: given`"
    )

    model_config = ConfigDict(frozen=True, extra="forbid", populate_by_name=True)


class Prompts(SpecPart):
    """What the teachers are asked."""

    source: Reference | None = Field(
        None, alias="from", description="JSONL or Parquet: `file:`, `s3:` or `upload:<sha256>`"
    )
    captured: Captured | None = Field(None, description="recorded traffic instead of `from`")
    terms: Annotated[str, StringConstraints(min_length=1, max_length=200)] = "own-data"
    heldout: float = Field(
        0.05, gt=0, le=0.5, description="share kept out, half each for validation and test"
    )
    samples: int = Field(1, ge=1, le=64, description="answers for each prompt")
    batch: int = Field(64, ge=1, le=200, description="items in a batch, and in a shard")
    cache: bool = Field(
        True, description="take answers that the tenant paid for already to the same questions"
    )

    model_config = ConfigDict(frozen=True, extra="forbid", populate_by_name=True)

    @field_validator("source")
    @classmethod
    def _source(cls, value: str | None) -> str | None:
        return value if value is None else _check_reference(value, _DATA_SCHEMES)

    @model_validator(mode="after")
    def _one_source(self) -> Prompts:
        if (self.source is None) == (self.captured is None):
            raise ValueError("expected either `from` or `captured`")
        return self


class Signal(SpecPart):
    """What comes beside the text of an answer."""

    kind: Literal["text", "topk", "counts", "auto"] = "topk"
    k: int = Field(20, ge=1, le=MAX_TOP_K, description="log-probabilities for each token (`topk`)")
    draws: int = Field(50, ge=1, le=255, description="ids drawn for each token (`counts`)")
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
        return value if value is None else _check_reference(value, _WEIGHTS_SCHEMES)

    @model_validator(mode="after")
    def _one_way(self) -> Student:
        if self.config is not None:
            return self  # refused by name below
        if (self.source is None) == (self.of is None):
            raise ValueError("expected either `from: <weights>` or `layers: N, of: <weights>`")
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


# What a stored signal can teach.
STORED_LOSSES = ("sft", "forward_kl")


class Training(SpecPart):
    """How the student learns. Stored in the spec, so a training can be repeated from it."""

    loss: Literal["sft", "forward_kl", "reverse_kl", "jsd", "skew_kl", "skew_reverse_kl"] = (
        "forward_kl"
    )
    distribution: Literal["stored", "weights"] = Field(
        "stored", description="the stored signal, or the teacher's weights beside the student"
    )
    beta: float | None = Field(None, ge=0, le=1, description="of `jsd`: 0 forward, 1 reverse KL")
    alpha: float = Field(0.1, ge=0, lt=1, description="the skew of `skew_kl` and `skew_reverse_kl`")
    passes: int = Field(1, ge=1, le=100, description="passes before the decay")
    learning_rate: float = Field(2e-5, gt=0, le=1)
    warmup_steps: int = Field(5, ge=0)
    decay: float = Field(0.1, ge=0, le=1, description="decay steps, as a share of the steps so far")
    tokens_per_step: int = Field(32_768, ge=1, description="supervised tokens in a step")
    weight_decay: float = Field(0.0, ge=0, le=1)
    clip_norm: float = Field(1.0, gt=0)
    seed: int = Field(7, ge=0, le=2**31 - 1)
    lora: dict[str, Any] | None = None

    @model_validator(mode="after")
    def _one_loss(self) -> Training:
        if self.loss in STORED_LOSSES:
            if self.distribution == "weights" and self.loss == "sft":
                raise ValueError("`sft` learns from tokens: leave `distribution` out")
        elif self.distribution != "weights":
            raise ValueError(
                f"`{self.loss}` needs the teacher's whole distribution, which no stored signal "
                "carries: add `distribution: weights`, or use `forward_kl`"
            )
        if (self.loss == "jsd") != (self.beta is not None):
            raise ValueError(
                "`beta` goes with `loss: jsd` and has no default: 0 is forward KL, 1 reverse KL"
            )
        return self


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
        stored = self.training.distribution == "stored"
        if self.signal.kind == "text" and self.training.loss != "sft" and stored:
            raise ValueError(
                f"`training.loss: {self.training.loss}` needs log-probabilities and "
                "`signal.kind: text` has none: use `signal.kind: topk`, or "
                "`training.loss: sft`"
            )
        known = {teacher.known_weights for teacher in self.teachers}
        if not stored and (len(known) != 1 or None in known):
            raise ValueError(
                "`training.distribution: weights` needs the weights of the one teacher: give "
                "`teachers[0].reference`, or `weights`"
            )
        tokens = self.prompts.batch * self.signal.max_tokens
        if tokens > MAX_BATCH_TOKENS:
            raise ValueError(
                f"`prompts.batch` x `signal.max_tokens` is {tokens}, expected at most "
                f"{MAX_BATCH_TOKENS}, so that a batch can be built in one job: lower "
                "`prompts.batch`"
            )
        many = self.signal.kind in ("topk", "auto")
        if many and tokens * self.signal.k > MAX_BATCH_OUTCOMES:
            raise ValueError(
                "`prompts.batch` x `signal.max_tokens` x `signal.k` is "
                f"{tokens * self.signal.k}, expected at most {MAX_BATCH_OUTCOMES}: lower one of "
                "them"
            )
        self._check_teachers()
        return self

    def _check_teachers(self) -> None:
        kind, teachers = self.signal.kind, self.teachers
        names = [teacher.name for teacher in teachers]
        if len(set(names)) < len(names):
            raise ValueError(f"two teachers have the same name: {', '.join(sorted(names))}")
        for teacher in teachers:
            if kind == "topk" and not teacher.gives_logprobs:
                raise ValueError(
                    f"teacher {teacher.name!r} gives no log-probabilities (`api: anthropic`): use "
                    "`signal.kind: text` with `training.loss: sft`, or `signal.kind: auto`"
                )
            if kind == "counts" and teacher.weights is None:
                raise ValueError(
                    f"`signal.kind: counts` needs the whole distribution, which teacher "
                    f"{teacher.name!r} does not give: use local `weights`, or `signal.kind: topk`"
                )
            if kind != "text" and self.signal.temperature != 1 and teacher.weights is None:
                raise ValueError(
                    f"`signal.temperature` must be 1 for `{kind}`: whether an endpoint's "
                    "log-probabilities are raw at another temperature is not known"
                )
        given = [teacher.name for teacher in teachers if teacher.answers]
        if given and self.prompts.samples > 1:
            raise ValueError("`prompts.samples` must be 1 where answers are given along")
        if self.prompts.captured and self.prompts.captured.answers != bool(given):
            raise ValueError(
                "`prompts.captured.answers: true` and a teacher with `answers: given` go together"
            )
        if given and len(teachers) > 1:
            raise ValueError("a teacher with `answers: given` is the only teacher of a pipeline")
        if len(teachers) > 1:
            rest = [t.name for t in teachers if t.weight is None and t.tags is None]
            if len(rest) > 1 or (rest and any(t.weight for t in teachers)):
                raise ValueError(
                    "with several teachers each needs a `weight`, or `tags`; at most one beside "
                    f"those with `tags` has neither and takes the rest; found {', '.join(rest)}"
                )


def _not_built(spec: Spec) -> list[tuple[str, bool, str]]:
    return [
        ("gates", spec.gates is not None, "leave it out; the report shows every figure"),
        ("evaluation.tasks", spec.evaluation.tasks is not None, "leave it out"),
        (
            "evaluation.controls: sft",
            "sft" in spec.evaluation.controls,
            "use `controls: [untrained]`",
        ),
        ("dataset.redact", spec.dataset.redact is not None, "redact the prompts beforehand"),
        (
            "dataset.near_duplicates",
            spec.dataset.near_duplicates is not None,
            "leave it out; exact duplicates are always dropped",
        ),
        ("student.config", spec.student.config is not None, "use `from` or `layers` and `of`"),
        ("training.lora", spec.training.lora is not None, "leave it out"),
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
    signals: dict[Id, Signal] = Field(
        description="by the teacher's name: what it is asked for, `auto` resolved"
    )
    batch_teachers: list[Id] = Field(description="which teacher answers each batch")
    pinned: dict[Reference, str] = Field(
        default_factory=dict,
        description="digests of the listings of `s3:` weights as they were accepted; other content "
        "is refused later",
    )
    reference: Reference | None = Field(
        None,
        description="the weights that the student is measured against in full: those of all "
        "teachers, where they have the student's tokenizer",
    )
    verdicts: list[Verdict]
    batches: Batches
    items: int = Field(ge=1, description="items in the batches: prompts x samples")
    rejected: int = Field(ge=0, description="prompts rejected at acceptance")

    def teacher_of(self, batch: int) -> Teacher:
        """The teacher that answers a batch."""
        return self.teacher_named(self.batch_teachers[batch])

    def teacher_named(self, name: str) -> Teacher:
        return next(teacher for teacher in self.spec.teachers if teacher.name == name)

    def signal_of(self, batch: int) -> Signal:
        return self.signals[self.batch_teachers[batch]]

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
