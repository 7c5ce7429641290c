"""What a spec can be refused for before anything is created or paid.

`admit` is quick and runs for every post; `survey` also reads tokenizer and prompts, for
`?check=true`. Acceptance does the same again with the same functions, since files change.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from decimal import ROUND_DOWN, Decimal
from urllib.parse import urlsplit

from services.teacher_gateway.egress import check_url
from services.teacher_gateway.files import open_below
from services.teacher_gateway.ledger import cost_microusd
from services.teacher_gateway.problems import FieldError, ProblemError
from services.teacher_gateway.prompts import (
    Prompt,
    PromptsRefused,
    RefusedLine,
    judge_all,
    read_prompts,
    snapshot,
    upload_digest,
)
from services.teacher_gateway.settings import TeacherGatewaySettings
from services.teacher_gateway.split import Plan, plan
from services.teacher_gateway.terms.gate import Catalogue
from services.teacher_gateway.timeouts import table
from services.teacher_gateway.tokenizers import FoundTokenizer, find_tokenizer
from stillhouse.chassis.errors import PermanentError, RetryableError
from stillhouse.chassis.storage import ObjectStore
from stillhouse.contracts.artifacts import upload_key
from stillhouse.contracts.spec import Spec, Teacher, Verdict

# A check counts the tokens of so many prompts; acceptance counts all.
MEASURED_PROMPTS = 2000
_surveys = threading.BoundedSemaphore(2)


class SurveysBusy(RetryableError):
    """Too many specs are being checked at once."""


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
) -> list[Verdict]:
    """Refuse what can be refused quickly: terms, addresses, secrets, missing files.

    Raises ProblemError (422). The store is asked only about an upload.
    """
    verdicts = catalogue.judge(spec)
    denied = [v for v in verdicts if v.outcome == "deny"]
    if denied:
        errors = [FieldError(field=_terms_field(spec, v), message=v.reason) for v in denied]
        raise ProblemError(422, "terms-denied", "; ".join(v.reason for v in denied), errors=errors)
    for number, teacher in enumerate(spec.teachers):
        with _at(f"teachers[{number}].url"):
            check_url(teacher.url or "", private=settings.private_teachers)
        with _at(f"teachers[{number}].api_key"):
            check_secret(teacher, settings)
    with _at("prompts.from"):
        if spec.prompts.source.startswith("upload:"):
            digest = upload_digest(spec.prompts.source)
            if not store.exists(upload_key(tenant_id, digest)):
                raise PromptsRefused(
                    f"nothing was uploaded as {digest}: send the file with "
                    f"PUT /v1/uploads/{digest}",
                    reason="prompts_not_found",
                )
        else:
            open_below(settings.file_roots, spec.prompts.source).close()
    return verdicts


def survey(
    spec: Spec,
    tenant_id: str,
    settings: TeacherGatewaySettings,
    catalogue: Catalogue,
    store: ObjectStore,
) -> Survey:
    """Do all of acceptance that writes nothing. Raises ProblemError (422) or SurveysBusy."""
    check_deadlines(spec, settings)
    verdicts = admit(spec, tenant_id, settings, catalogue, store)
    if not _surveys.acquire(timeout=20):
        raise SurveysBusy("two specs are being checked already")
    try:
        with _at("student"):
            tokenizer = find_tokenizer(spec, settings.file_roots)
        with _at("prompts"):
            prompts, refused = _read(spec, tenant_id, settings, store, tokenizer)
            planned = plan(prompts, spec)
    finally:
        _surveys.release()
    measured = [prompt.tokens for prompt in prompts if prompt.tokens >= 0]
    tokens = round(sum(measured) / len(measured) * len(prompts) * spec.prompts.samples)
    price = spec.teachers[0].usd_per_million
    return Survey(
        verdicts=verdicts,
        tokenizer=tokenizer,
        plan=planned,
        prompts=len(prompts),
        rejections=dict(Counter(line.reason for line in refused)),
        prompt_tokens=tokens,
        worst_case_microusd=cost_microusd(price, tokens, planned.items * spec.signal.max_tokens),
    )


def _read(
    spec: Spec,
    tenant_id: str,
    settings: TeacherGatewaySettings,
    store: ObjectStore,
    tokenizer: FoundTokenizer,
) -> tuple[list[Prompt], list[RefusedLine]]:
    with snapshot(
        spec.prompts.source,
        tenant_id=tenant_id,
        roots=settings.file_roots,
        store=store,
        folder=settings.work_dir,
        max_bytes=settings.max_prompts_bytes,
    ) as file:
        return judge_all(
            read_prompts(
                file,
                max_lines=settings.max_prompts,
                max_tokens=spec.dataset.max_tokens,
                tokens_of=lambda messages: len(tokenizer.chat.encode_prompt(messages)),
                measured=MEASURED_PROMPTS,
            )
        )


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


def check_secret(teacher: Teacher, settings: TeacherGatewaySettings) -> None:
    """Refuse a variable that the operator has not bound to this teacher's host.

    Else one tenant could have another's key sent to a server of their own.
    """
    if teacher.api_key is None:
        return
    name, host = teacher.api_key.env, (urlsplit(teacher.url or "").hostname or "").lower()
    if name.startswith(TeacherGatewaySettings.PREFIX):
        raise PermanentError(f"{name} is the gateway's own: name a variable with a teacher's key")
    bound = settings.secret_hosts
    if bound is None and settings.profile == "embedded":
        return
    if not any(
        pair.partition("@")[0] == name and pair.partition("@")[2].lower() == host
        for pair in bound or ()
    ):
        raise PermanentError(
            f"the operator has not allowed {name} to be sent to {host}: have them add "
            f"{name}@{host} to TEACHER_GATEWAY_SECRET_HOSTS"
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
