"""What the preflight of all teachers says about the whole pipeline."""

from __future__ import annotations

from services.teacher_gateway.admission import Survey
from services.teacher_gateway.auto_signal import gives_nothing, without_asking
from services.teacher_gateway.preflight.findings import Findings, plain
from services.teacher_gateway.preflight.forecast import Forecast
from services.teacher_gateway.preflight.heard import Heard
from services.teacher_gateway.preflight.views import Finding
from stillhouse.contracts.spec import Spec


class PipelineFindings(Findings):
    def __init__(self, spec: Spec, survey: Survey, heard: list[Heard], figures: Forecast) -> None:
        super().__init__(None)
        self._spec = spec
        self._text_only = survey.tokenizer.text_only
        self._heard = heard
        self._figures = figures

    def all(self) -> list[Finding]:
        self._signals()
        self._cost()
        if (seconds := self._figures.seconds) is not None:
            self.add("time", plain(seconds, ".0f", "s of asking, at the speed seen"))
        self._steps()
        return self._found

    def _signals(self) -> None:
        """`auto` is settled for each teacher; the loss may need more than all of them give."""
        if self._spec.signal.kind != "auto":
            return
        found, why = {}, {}
        for one in self._heard:
            signal = (
                one.found.signal
                if one.found
                else without_asking(self._spec, one.teacher, self._text_only)
            )
            if signal is None:
                return  # it did not answer, which is refused already
            found[one.teacher.name] = signal
            why[one.teacher.name] = one.found.unfit if one.found else None
        if unfit := gives_nothing(self._spec, found, why):
            self.refuse("signal", "text from every teacher", unfit)

    def _cost(self) -> None:
        cost, budget = self._figures.cost_usd, self._spec.budget.teacher_usd
        if cost is None:
            if all(one.teacher.answers and not one.teacher.weights for one in self._heard):
                self.add("cost", "nothing: the answers are given along")
            return
        value = f"{plain(cost, '.3g', 'USD for all answers')}; the budget is {budget:g} USD"
        if cost.value > budget:
            self.add(
                "cost",
                value,
                "warning",
                field="budget.teacher_usd",
                message="the budget ends before the prompts do, and what is left is rejected: "
                f"raise `budget.teacher_usd` to {(cost.high or cost.value) * 1.05:.3g}, or give "
                "fewer prompts",
            )
        elif cost.high is not None and cost.high > budget:
            self.add(
                "cost",
                value,
                "warning",
                field="budget.teacher_usd",
                message="the budget may end before the prompts do: "
                f"`budget.teacher_usd: {cost.high * 1.05:.3g}` would be enough",
            )
        else:
            self.add("cost", value)

    def _steps(self) -> None:
        steps, training = self._figures.training_steps, self._spec.training
        if steps is None:
            return
        value = plain(steps, ".3g", f"steps of {training.tokens_per_step} tokens")
        if steps.value < max(training.warmup_steps, 1):
            self.add(
                "training",
                value,
                "warning",
                field="training.tokens_per_step",
                message=f"fewer steps than `training.warmup_steps: {training.warmup_steps}`, so "
                "the learning rate never gets to its full height: lower "
                "`training.tokens_per_step`, or give more prompts or `training.passes`",
            )
        else:
            self.add("training", value)
