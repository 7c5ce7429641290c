"""Which client speaks to a teacher: decided by the route that its spec names."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from datetime import date

from services.teacher_gateway.settings import TeacherGatewaySettings
from services.teacher_gateway.teachers.anthropic import open_anthropic
from services.teacher_gateway.teachers.api_keys import read_api_key
from services.teacher_gateway.teachers.given import GivenAnswers
from services.teacher_gateway.teachers.local.client import open_local
from services.teacher_gateway.teachers.openai import open_openai
from services.teacher_gateway.teachers.outcomes import TeacherClient
from stillhouse.contracts.spec import Signal, Teacher


@asynccontextmanager
async def open_teacher(
    teacher: Teacher,
    signal: Signal,
    settings: TeacherGatewaySettings,
    *,
    environ: Mapping[str, str],
    connections: int | None = None,
    today: date | None = None,
    pin: str | None = None,
) -> AsyncIterator[TeacherClient]:
    """Open a client. Raises EgressRefused or PermanentError that says what to change.

    For local weights: `today` is the date that their template sees, the day of acceptance, and
    `pin` names their content as it was then.
    """
    if teacher.weights is not None:
        async with open_local(teacher, signal, settings, today=today, pin=pin) as local:
            yield local
    elif teacher.answers == "given":
        yield GivenAnswers(signal)
    else:
        open_endpoint = open_anthropic if teacher.api == "anthropic" else open_openai
        async with open_endpoint(
            teacher,
            signal,
            key=read_api_key(teacher, settings, environ),
            private=settings.private_teachers,
            connections=connections,
        ) as client:
            yield client
