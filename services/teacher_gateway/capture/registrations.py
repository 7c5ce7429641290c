"""Registered teachers: where live traffic goes, what it costs, under which terms.

A registration is a spec's teacher with an endpoint, plus a purpose, a budget and what becomes of a
call whose client left. It is judged by the terms gate when it is posted and again whenever a
process reads it, so that a changed catalogue holds without another post.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from concurrent.futures import Executor
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Annotated, Literal

import msgspec
from multidict import CIMultiDict
from pydantic import AfterValidator, Field, field_validator, model_validator
from sqlalchemy import Engine, select
from yarl import URL

from services.teacher_gateway.accounts import open_account
from services.teacher_gateway.capture.asked import Asked, Kind
from services.teacher_gateway.capture.memory import Memory
from services.teacher_gateway.capture.refusal import Refusal
from services.teacher_gateway.database import Session, now, reading
from services.teacher_gateway.egress import check_url
from services.teacher_gateway.ledger import AccountId, Rates
from services.teacher_gateway.models import CapturedTotal, RegisteredTeacher
from services.teacher_gateway.settings import TeacherGatewaySettings
from services.teacher_gateway.teachers.api_keys import read_api_key
from services.teacher_gateway.terms.gate import Catalogue
from services.teacher_gateway.timeouts import table
from stillhouse.chassis.errors import PermanentError
from stillhouse.contracts.artifacts import ID_PATTERN, Id
from stillhouse.contracts.canonical import canonical_json
from stillhouse.contracts.spec import Limits, Purpose, Teacher, Verdict

# An account's name is the teacher's behind a prefix, and an id has 63 characters.
MAX_NAME = 50


def _short(name: str) -> str:
    if len(name) > MAX_NAME:
        raise ValueError(f"expected a name of at most {MAX_NAME} characters")
    return name


class CaptureLimits(Limits):
    """What the endpoint bears of live traffic, in each process of the API."""

    concurrency: int = Field(256, ge=1, le=4096, description="calls at once in one process")

    @field_validator("requests_per_minute", "tokens_per_minute")
    @classmethod
    def _not_here(cls, value: int | None) -> int | None:
        if value is not None:
            raise ValueError(
                "not for a registered teacher: its own 429 answers reach the caller with their "
                "Retry-After"
            )
        return value


class Registration(Teacher):
    """A teacher for live traffic, as it is posted."""

    name: Annotated[Id, AfterValidator(_short)]
    limits: CaptureLimits = CaptureLimits()
    purpose: Purpose = Purpose()
    budget_usd: float = Field(ge=0, le=10_000_000, description="never exceeded, over all processes")
    on_disconnect: Literal["finish", "abort"] = Field(
        "finish", description="what becomes of a call whose client left"
    )

    @model_validator(mode="after")
    def _an_endpoint(self) -> Registration:
        if self.url is None or self.api != "openai":
            raise ValueError("expected a `url` with `api: openai`: callers speak that API")
        for name in ("batch_api", "reference", "weight", "tags"):
            if getattr(self, name):
                raise ValueError(f"`{name}` is for a pipeline's teacher: leave it out")
        return self

    @property
    def budget_microusd(self) -> int:
        return int(Fraction(str(self.budget_usd)) * 1_000_000)


def account_of(tenant_id: str, teacher: str) -> AccountId:
    """The account that pays for live traffic to a teacher."""
    return AccountId(tenant_id, f"teacher-{teacher}")


def judge(
    registration: Registration, catalogue: Catalogue, settings: TeacherGatewaySettings
) -> Verdict:
    """Judge a registration's address, by raising PermanentError, and its terms."""
    check_url(registration.url or "", private=settings.private_teachers)
    return catalogue.judge_teacher(registration, registration.purpose)


# In SQL


def register(session: Session, tenant_id: str, registration: Registration) -> bool:
    """Make a registered teacher, or replace it whole; return whether it is new."""
    at = now(session)
    text = canonical_json(registration.model_dump(mode="json", by_alias=True)).decode()
    found = session.get(RegisteredTeacher, (tenant_id, registration.name), with_for_update=True)
    if found is None:
        session.add(
            RegisteredTeacher(
                tenant_id=tenant_id,
                name=registration.name,
                registration=text,
                created_at=at,
                updated_at=at,
            )
        )
        session.flush()
    else:
        found.registration, found.updated_at = text, at
    open_account(session, account_of(tenant_id, registration.name), registration.budget_microusd)
    if session.get(CapturedTotal, (tenant_id, registration.name)) is None:
        session.add(
            CapturedTotal(
                tenant_id=tenant_id,
                teacher=registration.name,
                records=0,
                failures=0,
                microusd=0,
                first_at=at,
                last_at=0.0,
            )
        )
    return found is None


def remove(session: Session, tenant_id: str, name: str) -> bool:
    """Take no more calls for a teacher. What was recorded and paid stays."""
    found = session.get(RegisteredTeacher, (tenant_id, name))
    if found is None:
        return False
    session.delete(found)
    return True


def registered(session: Session, tenant_id: str) -> list[RegisteredTeacher]:
    """A tenant's teachers by name."""
    return list(
        session.scalars(
            select(RegisteredTeacher)
            .where(RegisteredTeacher.tenant_id == tenant_id)
            .order_by(RegisteredTeacher.name)
        )
    )


def registration_of(row: RegisteredTeacher) -> Registration:
    return Registration.model_validate_json(row.registration)


# For the hot path


@dataclass(frozen=True)
class Served:
    """A registered teacher in the form that a call needs."""

    tenant_id: str
    name: str
    model: msgspec.Raw
    urls: Mapping[Kind, URL]
    headers: CIMultiDict[str] = field(repr=False)
    key: str | None = field(repr=False)
    rates: Rates
    verdict_id: str
    terms: str
    concurrency: int
    timeout_seconds: float
    aborts: bool
    budget_microusd: int

    def most(self, asked: Asked) -> int:
        """The most that a call can cost, in micro-USD."""
        return self.rates.cost(asked.most_prompt_tokens, asked.most_answer_tokens)


def serve(
    tenant_id: str,
    registration: Registration,
    catalogue: Catalogue,
    settings: TeacherGatewaySettings,
    environ: Mapping[str, str],
) -> Served:
    """Make a registration ready for calls. Raises Refusal (403 or 503) that says what to do."""
    try:
        verdict = judge(registration, catalogue, settings)
        key = read_api_key(registration, settings, environ)
    except PermanentError as error:
        raise Refusal(503, "teacher_not_usable", f"{registration.name}: {error}") from error
    if verdict.outcome == "deny":
        raise Refusal(403, "terms_denied", verdict.reason)
    base = (registration.url or "").rstrip("/")
    headers = CIMultiDict({"Content-Type": "application/json", "Accept-Encoding": "identity"})
    if key:
        headers["Authorization"] = f"Bearer {key}"
    return Served(
        tenant_id=tenant_id,
        name=registration.name,
        model=msgspec.Raw(msgspec.json.encode(registration.model)),
        urls={"chat": URL(f"{base}/chat/completions"), "text": URL(f"{base}/completions")},
        headers=headers,
        key=key,
        rates=Rates.of(registration.usd_per_million),
        verdict_id=verdict.id,
        terms=registration.terms,
        concurrency=registration.limits.concurrency,
        timeout_seconds=min(registration.limits.timeout_seconds, table(settings.profile).call),
        aborts=registration.on_disconnect == "abort",
        budget_microusd=registration.budget_microusd,
    )


class ServedTeachers:
    """The registered teachers that this process serves, from memory."""

    def __init__(
        self,
        engine: Engine,
        catalogue: Catalogue,
        settings: TeacherGatewaySettings,
        environ: Mapping[str, str],
        threads: Executor,
    ) -> None:
        self._engine = engine
        self._catalogue = catalogue
        self._settings = settings
        self._environ = environ
        self._memory: Memory[tuple[str, str], Served] = Memory(
            lambda key, _: self._read(*key), threads
        )

    def known(self, tenant_id: str, name: str) -> Served | None:
        return self._memory.known((tenant_id, name))

    async def find(self, tenant_id: str, name: str) -> Served:
        """Read a teacher. Raises Refusal or DatabaseUnavailable."""
        return await self._memory.find((tenant_id, name), lambda: self._read(tenant_id, name))

    def forget(self, tenant_id: str, name: str) -> None:
        """Use the teacher as it is stored now. Other processes follow within seconds."""
        self._memory.forget((tenant_id, name))

    def _read(self, tenant_id: str, name: str) -> Served:
        row = None
        if re.fullmatch(ID_PATTERN, name):
            with reading(self._engine) as session:
                row = session.get(RegisteredTeacher, (tenant_id, name))
        if row is None:
            raise Refusal(
                404,
                "model_not_found",
                f"there is no registered teacher {name[:63]!r}: `model` is the name of one; "
                "GET /v1/models lists them, `stillhouse teachers add FILE` registers one",
            )
        return serve(
            tenant_id, registration_of(row), self._catalogue, self._settings, self._environ
        )
