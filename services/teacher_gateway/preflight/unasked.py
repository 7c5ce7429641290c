"""What a check refuses without asking anybody: a pipeline that fails whatever its teachers say."""

from __future__ import annotations

from collections.abc import Iterator

from services.teacher_gateway.admission import Survey, budget_microusd
from services.teacher_gateway.auto_signal import (
    auto_questions,
    auto_unpaid,
    gives_nothing,
    without_asking,
)
from services.teacher_gateway.fitness import Unfit
from services.teacher_gateway.paid_calls import worst_of
from services.teacher_gateway.preflight.findings import refuse
from services.teacher_gateway.probe import probe_questions, probe_unpaid
from stillhouse.contracts.spec import Spec


def refuse_unasked(spec: Spec, survey: Survey) -> None:
    """Raise ProblemError (422) with what to change where acceptance or the probe would fail."""
    refuse([*_signals(spec, survey), *_money(spec, survey)])


def _signals(spec: Spec, survey: Survey) -> Iterator[Unfit]:
    if spec.signal.kind != "auto":
        return
    known = {t.name: without_asking(spec, t, survey.tokenizer.text_only) for t in spec.teachers}
    settled = {name: signal for name, signal in known.items() if signal is not None}
    if len(settled) == len(known) and (unfit := gives_nothing(spec, settled)):
        yield unfit


def _money(spec: Spec, survey: Survey) -> Iterator[Unfit]:
    """The first questions that the pipeline itself would pay for, each as it books them."""
    budget, chat = budget_microusd(spec), survey.tokenizer.chat
    if spec.signal.kind == "auto":
        text_only = survey.tokenizer.text_only
        asked = [t for t in spec.teachers if without_asking(spec, t, text_only) is None]
        auto = auto_questions(spec, asked, "", "", chat).values()
        if worst_of(auto) > budget:
            yield auto_unpaid(auto)
            return
    probe = probe_questions(spec, 1, "", chat).values()
    if worst_of(probe) > budget:
        yield probe_unpaid(probe)
