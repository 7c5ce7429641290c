"""The preflight of one check: what is paid, who is asked, what is refused.

All questions are booked at their worst case on the tenant's account of the day before the first
one leaves.
"""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Sequence
from contextlib import AsyncExitStack

from sqlalchemy import Engine

from services.teacher_gateway.accounts import checks_account
from services.teacher_gateway.admission import Survey, budget_microusd
from services.teacher_gateway.database import transaction
from services.teacher_gateway.fitness import Unfit
from services.teacher_gateway.ledger import AccountId, available
from services.teacher_gateway.paid_calls import PaidCalls, Question, book_worst, worst_of
from services.teacher_gateway.preflight.findings import refuse
from services.teacher_gateway.preflight.forecast import forecast
from services.teacher_gateway.preflight.heard import Heard
from services.teacher_gateway.preflight.interview import Interview
from services.teacher_gateway.preflight.pipeline_findings import PipelineFindings
from services.teacher_gateway.preflight.teacher_findings import TeacherFindings
from services.teacher_gateway.preflight.views import Finding, Preflight
from services.teacher_gateway.problems import FieldError, ProblemError
from services.teacher_gateway.settings import TeacherGatewaySettings
from stillhouse.chassis.crash import crash_point
from stillhouse.contracts.spec import Spec


def preflight(
    spec: Spec, survey: Survey, settings: TeacherGatewaySettings, engine: Engine, tenant_id: str
) -> tuple[Preflight, int]:
    """Ask the teachers of a surveyed spec; return what was found and its cost in micro-dollars.

    Raises ProblemError: 422 where a teacher cannot be asked as the spec asks, 402 where the
    spec's budget, or what is left of the day's for checks, may not pay for it.
    """
    check = secrets.token_hex(6)
    interviews = [
        Interview(check, number, spec, survey, settings, engine, tenant_id)
        for number in range(len(spec.teachers))
    ]
    questions = [q for interview in interviews for q in interview.questions.values()]
    account = _book(engine, tenant_id, settings, spec, questions)
    calls = PaidCalls(engine, account, questions)
    crash_point("check_booked")
    try:
        heard = asyncio.run(_hold_all(interviews, calls))
    finally:
        calls.close()
    return sum_up(spec, survey, heard, account.name), calls.spent_microusd


def sum_up(spec: Spec, survey: Survey, heard: list[Heard], account: str) -> Preflight:
    """Judge what was heard, and forecast money, time and steps."""
    figures = forecast(spec, survey, heard)
    findings: list[Finding] = []
    for one, teacher in zip(heard, figures.teachers, strict=True):
        findings += TeacherFindings(one, teacher, spec).all(survey)
    findings += PipelineFindings(spec, survey, heard, figures).all()
    return Preflight(
        teachers=figures.teachers,
        findings=findings,
        cost_usd=figures.cost_usd,
        seconds=figures.seconds,
        training_steps=figures.training_steps,
        account=account,
    )


def refuse_unfit(found: Preflight) -> None:
    """Raise ProblemError (422) with what to change where a teacher is unfit."""
    unfit = [finding for finding in found.findings if finding.verdict == "unfit"]
    refuse([Unfit(f.reason, f.message, f.field or "") for f in unfit])


def _book(
    engine: Engine,
    tenant_id: str,
    settings: TeacherGatewaySettings,
    spec: Spec,
    questions: Sequence[Question],
) -> AccountId:
    worst, budget = worst_of(questions), budget_microusd(spec)
    if worst > budget:
        # Whoever allows a pipeline so much does not expect a check of it to spend more.
        message = (
            f"asking the teachers may cost {worst / 1e6:.6f} USD, more than the spec's "
            f"`budget.teacher_usd` ({budget / 1e6:.6f} USD): check without `probe`, lower "
            "`signal.max_tokens`, or raise `budget.teacher_usd`"
        )
        errors = [FieldError(field="budget.teacher_usd", message=message)]
        raise ProblemError(402, "check-budget", message, errors=errors)
    with transaction(engine) as session:
        account = checks_account(session, tenant_id, settings.check_usd_per_day)
        if not book_worst(session, account, questions):
            left = available(session, account) / 1e6
            raise ProblemError(
                402,
                "check-budget",
                f"asking the teachers may cost {worst / 1e6:.6f} USD and {left:.6f} USD are left "
                "for this tenant's checks of today (UTC): check without `probe`, lower "
                "`signal.max_tokens`, wait for tomorrow, or have the operator raise "
                "TEACHER_GATEWAY_CHECK_USD_PER_DAY",
            )
    return account


async def _hold_all(interviews: list[Interview], calls: PaidCalls) -> list[Heard]:
    async with AsyncExitStack() as stack:
        return await asyncio.gather(*(interview.hold(calls, stack) for interview in interviews))
