"""Findings of a preflight: one a thing, each with its verdict and what to change."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from services.teacher_gateway.fitness import Unfit
from services.teacher_gateway.preflight.views import Estimate, Finding, Topic
from services.teacher_gateway.problems import FieldError, ProblemError

Verdict = Literal["ok", "warning", "unfit", "unknown"]


class Findings:
    """Findings in the order in which they are added."""

    def __init__(self, teacher: str | None) -> None:
        self._teacher = teacher
        self._found: list[Finding] = []

    def add(
        self,
        topic: Topic,
        value: str,
        verdict: Verdict = "ok",
        *,
        field: str | None = None,
        message: str = "",
        reason: str = "",
    ) -> None:
        self._found.append(
            Finding(
                teacher=self._teacher,
                topic=topic,
                value=value,
                verdict=verdict,
                field=field,
                message=message,
                reason=reason,
            )
        )

    def refuse(self, topic: Topic, value: str, why: Unfit) -> None:
        self.add(topic, value, "unfit", field=why.field, message=why.detail, reason=why.reason)


def refuse(unfit: Sequence[Unfit]) -> None:
    """Raise ProblemError (422) with what to change, where there is anything."""
    if unfit:
        errors = [FieldError(field=why.field, message=why.detail) for why in unfit]
        detail = "; ".join(why.detail for why in unfit)
        raise ProblemError(422, unfit[0].reason.replace("_", "-"), detail, errors=errors)


def plain(estimate: Estimate, form: str, of: str) -> str:
    """A figure of something with its interval, for people."""
    said = format(estimate.value, form)
    if estimate.low is None or estimate.high is None:
        return f"about {said} {of} (one answer)"
    return f"{said} {of} ({estimate.low:{form}} to {estimate.high:{form}}, n {estimate.n})"


def percent(estimate: Estimate, of: str) -> str:
    found = f"{100 * estimate.value:.0f} % {of}"
    if estimate.low is None or estimate.high is None:
        return found
    return f"{found} ({100 * estimate.low:.0f} to {100 * estimate.high:.0f} %, n {estimate.n})"
