"""What a spec can be refused for before anything is created or paid.

`admit` is quick and runs for every post; `survey` also reads tokenizer and prompts, for
`?check=true`. Acceptance does the same again with the same functions, since files change.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from decimal import ROUND_DOWN, Decimal
from typing import BinaryIO

from sqlalchemy import Engine

from services.teacher_gateway.egress import check_url
from services.teacher_gateway.ledger import cost_microusd
from services.teacher_gateway.problems import FieldError, ProblemError
from services.teacher_gateway.prompts.file import (
    Prompt,
    RefusedLine,
    judge_all,
    max_line_bytes,
    read_again,
    read_prompts,
)
from services.teacher_gateway.prompts.lines import PromptLine
from services.teacher_gateway.prompts.sources import check_source, snapshot
from services.teacher_gateway.prompts.split import Plan, plan, teacher_of
from services.teacher_gateway.settings import TeacherGatewaySettings
from services.teacher_gateway.teachers.api_keys import check_api_key
from services.teacher_gateway.terms.gate import Catalogue
from services.teacher_gateway.timeouts import table
from services.teacher_gateway.tokenizers import FoundTokenizer, find_tokenizer, prompt_tokens
from stillhouse.chassis.errors import PermanentError, RetryableError
from stillhouse.chassis.references import sources_of
from stillhouse.chassis.storage import ObjectStore
from stillhouse.contracts.canonical import sha256_hex
from stillhouse.contracts.chat import TemplateRefused
from stillhouse.contracts.spec import Spec, Teacher, Verdict

# A check counts the tokens of so many prompts; acceptance counts all.
MEASURED_PROMPTS = 2000
_surveys = threading.BoundedSemaphore(2)


class SurveysBusy(RetryableError):
    """Too many specs are being checked at once."""


@dataclass(frozen=True)
class Sample:
    """A prompt of the spec that a preflight may ask; `tokens` of its rendering."""

    line: PromptLine
    tokens: int


@dataclass(frozen=True)
class Survey:
    """What a check found out about a spec that would be accepted."""

    verdicts: list[Verdict]
    tokenizer: FoundTokenizer
    plan: Plan
    prompts: int
    rejections: dict[str, int]
    prompt_tokens: int
    worst_case_microusd: int
    samples: dict[str, list[Sample]]  # by the teacher that would be asked


def budget_microusd(spec: Spec) -> int:
    """The budget in micro-dollars; a fraction of one is left out."""
    exact = Decimal(str(spec.budget.teacher_usd)) * 1_000_000
    return int(exact.to_integral_value(rounding=ROUND_DOWN))


def admit(
    spec: Spec,
    tenant_id: str,
    settings: TeacherGatewaySettings,
    catalogue: Catalogue,
    store: ObjectStore,
    engine: Engine,
) -> list[Verdict]:
    """Refuse what can be refused quickly: terms, addresses, secrets, missing prompts.

    Raises ProblemError (422).
    """
    verdicts = catalogue.judge(spec)
    denied = [v for v in verdicts if v.outcome == "deny"]
    if denied:
        errors = [FieldError(field=_terms_field(spec, v), message=v.reason) for v in denied]
        raise ProblemError(422, "terms-denied", "; ".join(v.reason for v in denied), errors=errors)
    for number, teacher in enumerate(spec.teachers):
        if teacher.url is not None:
            with _at(f"teachers[{number}].url"):
                check_url(teacher.url, private=settings.private_teachers)
        with _at(f"teachers[{number}].api_key"):
            check_api_key(teacher, settings)
    with _at("prompts.from" if spec.prompts.captured is None else "prompts.captured"):
        check_source(spec, tenant_id, settings=settings, engine=engine, store=store)
    return verdicts


def survey(
    spec: Spec,
    tenant_id: str,
    settings: TeacherGatewaySettings,
    catalogue: Catalogue,
    store: ObjectStore,
    engine: Engine,
    *,
    samples: int = 0,
) -> Survey:
    """Do all of acceptance that writes nothing, and read `samples` prompts of each teacher.

    Raises ProblemError (422) or SurveysBusy.
    """
    check_deadlines(spec, settings)
    verdicts = admit(spec, tenant_id, settings, catalogue, store, engine)
    if not _surveys.acquire(timeout=20):
        raise SurveysBusy("two specs are being checked already")
    try:
        with _at("student"):
            tokenizer = find_tokenizer(spec, sources_of(settings))
        with (
            _at("prompts"),
            snapshot(spec, tenant_id, settings=settings, engine=engine, store=store) as file,
        ):
            prompts, refused = _read(spec, settings, file, tokenizer)
            planned = plan(prompts, spec)
            sampled = _sample(spec, file, prompts, tokenizer, samples)
    finally:
        _surveys.release()
    tokens, worst = 0, 0
    for teacher in spec.teachers:
        asked, paid = _worst_case(spec, teacher, prompts)
        tokens, worst = tokens + asked, worst + paid
    return Survey(
        verdicts=verdicts,
        tokenizer=tokenizer,
        plan=planned,
        prompts=len(prompts),
        rejections=dict(Counter(line.reason for line in refused)),
        prompt_tokens=tokens,
        worst_case_microusd=worst,
        samples=sampled,
    )


def _worst_case(spec: Spec, teacher: Teacher, prompts: list[Prompt]) -> tuple[int, int]:
    """Prompt tokens that a teacher is asked, and the micro-dollars that its answers cost at most;
    prompts that were not counted are taken for those that were."""
    own = [prompt for prompt in prompts if prompt.teacher == teacher.name]
    counted = [prompt.tokens for prompt in own if prompt.tokens >= 0] or [
        prompt.tokens for prompt in prompts if prompt.tokens >= 0
    ]
    items = len(own) * spec.prompts.samples
    tokens = round(sum(counted) / len(counted) * items)
    return tokens, cost_microusd(teacher.usd_per_million, tokens, items * spec.signal.max_tokens)


def _read(
    spec: Spec, settings: TeacherGatewaySettings, file: BinaryIO, tokenizer: FoundTokenizer
) -> tuple[list[Prompt], list[RefusedLine]]:
    return judge_all(
        read_prompts(
            file,
            max_lines=settings.max_prompts,
            max_line_bytes=max_line_bytes(spec),
            max_tokens=spec.dataset.max_tokens,
            teacher_of=teacher_of(spec),
            tokens_of=lambda line: prompt_tokens(tokenizer.chat, line),
            measured=MEASURED_PROMPTS,
        )
    )


def _sample(
    spec: Spec, file: BinaryIO, prompts: Sequence[Prompt], tokenizer: FoundTokenizer, count: int
) -> dict[str, list[Sample]]:
    """Some prompts of each teacher, by the spec's seed."""
    seed = spec.training.seed
    ordered = sorted(prompts, key=lambda p: sha256_hex(f"{seed}:sample:{p.sha256}".encode()))
    found: dict[str, list[Sample]] = {teacher.name: [] for teacher in spec.teachers}
    for prompt in ordered if count else ():
        if len(found[prompt.teacher]) == count:
            continue
        line = read_again(file, prompt)
        try:
            found[prompt.teacher].append(Sample(line, prompt_tokens(tokenizer.chat, line)))
        except TemplateRefused:
            continue  # one of those that a check does not count, and acceptance refuses
    return found


def check_deadlines(spec: Spec, settings: TeacherGatewaySettings) -> None:
    """Refuse a deadline of a call that this gateway would cut, where the spec asks for it by name.

    Raises ProblemError (422). For specs as they were posted: a stored one names every field.
    """
    longest = table(settings.profile).call
    for number, teacher in enumerate(spec.teachers):
        asked = teacher.limits.timeout_seconds
        if "timeout_seconds" in teacher.limits.model_fields_set and asked > longest:
            with _at(f"teachers[{number}].limits.timeout_seconds"):
                raise PermanentError(
                    f"a call may take {longest:g} seconds at most on this gateway (profile "
                    f"{settings.profile}), found {asked:g}: ask for no more, or leave it out"
                )


def _terms_field(spec: Spec, verdict: Verdict) -> str:
    if verdict.subject in ("prompts", "student"):
        return f"{verdict.subject}.terms"
    names = [f"teacher:{teacher.name}" for teacher in spec.teachers]
    return f"teachers[{names.index(verdict.subject)}].terms"


@contextmanager
def _at(field: str) -> Iterator[None]:
    """Turn what is refused inside into a problem of one field."""
    try:
        yield
    except PermanentError as error:
        if error.reason == "store_refused":
            raise
        errors = [FieldError(field=field, message=str(error))]
        raise ProblemError(422, "refused", f"`{field}`: {error}", errors=errors) from error
