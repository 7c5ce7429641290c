"""What was heard of one teacher, judged."""

from __future__ import annotations

from services.teacher_gateway.admission import Survey
from services.teacher_gateway.fitness import TEXT_INSTEAD, Unfit, other_tokenizer
from services.teacher_gateway.preflight.findings import Findings, percent, plain
from services.teacher_gateway.preflight.forecast import UNCHANGED_NATS
from services.teacher_gateway.preflight.heard import Heard
from services.teacher_gateway.preflight.interview import AGAIN, NO_BATCH_API
from services.teacher_gateway.preflight.views import Finding, TeacherPreflight
from services.teacher_gateway.teachers.outcomes import Answered, Reject
from stillhouse.contracts.spec import Signal, Spec

# Divergence between two answers to the same question, in nats a token. SmolLM2-135M in bf16 is up
# to 0.002 from itself in a batch of another shape, and up to 0.004 from float32; where replicas
# differ by more, a student would learn their noise.
AGREED_NATS = 0.01
FEWEST_ENDED = 0.8


def _named(signal: Signal) -> str:
    if signal.kind == "topk":
        return f"topk, {signal.k} log-probabilities a token"
    return f"counts, {signal.draws} draws a token" if signal.kind == "counts" else "text"


def _tokens_missing(name: str, place: str) -> Unfit:
    return Unfit(
        "tokens_missing",
        f"teacher {name!r} lists a character of several tokens once, with the id of the last one, "
        "so that no row of such answers keeps its log-probabilities: use a server that lists every "
        f"token (vLLM), or local `weights`; or {TEXT_INSTEAD}",
        place,
    )


class TeacherFindings(Findings):
    def __init__(self, one: Heard, teacher: TeacherPreflight, spec: Spec) -> None:
        super().__init__(one.teacher.name)
        self._one = one
        self._figures = teacher
        self._spec = spec
        self._name = one.teacher.name

    def all(self, survey: Survey) -> list[Finding]:
        one = self._one
        if one.skipped:
            self.add("answers", "not asked", "unknown", message=one.skipped)
            self._known()
        elif one.found is None or not isinstance(one.found.outcome, Answered | Reject):
            assert one.unfit is not None, "whoever does not answer is unfit"
            missing = one.unfit.reason == NO_BATCH_API
            self.refuse("batch_api" if missing else "answers", "none", one.unfit)
        else:
            self._batches()
            self._signal(one.found.signal)
            self._agreement()
            self._raw()
            self._answers()
        self._terms(survey)
        return self._found

    def _batches(self) -> None:
        if not self._one.teacher.batch_api:
            return
        if why := self._one.batches_unknown:
            self.add(
                "batch_api",
                "not known",
                "warning",
                field=f"{self._one.place}.batch_api",
                message=f"the server of teacher {self._name!r} does not list its batches ({why}), "
                "so nobody knows whether it takes any",
            )
        else:
            self.add("batch_api", "the server has one")

    def _signal(self, signal: Signal) -> None:
        one, value = self._one, _named(signal)
        if one.unusable and one.found and one.found.unfit:
            self.add(
                "signal",
                value,
                "warning",
                message=f"{one.unusable} of {one.unusable + len(one.answers)} answers given along "
                f"do not carry it ({one.found.unfit.detail}): they are rejected, or become rows "
                "of text",
            )
        elif one.unfit is not None:
            self.refuse("signal", value, one.unfit)
        elif self._spec.signal.kind == "text" and signal.kind == "topk":
            self.add("signal", f"text; it would also give {value}")
        elif self._spec.signal.kind == "auto" and one.found and one.found.unfit:
            self.add("signal", value, message=one.found.unfit.detail)
        else:
            self.add("signal", value)

    def _known(self) -> None:
        """What is known of weights without asking them."""
        if (signal := self._one.known) is None:
            return
        self.add("signal", f"{_named(signal)}, computed from the weights")
        if signal.kind != "text":
            self.add("raw_logprobs", "yes: the model's own")

    def _agreement(self) -> None:
        nats = self._one.disagreement
        if nats is None:
            if why := self._one.unanswered.get(AGAIN[0]):
                message = f"teacher {self._name!r} did not answer the same again ({why})"
                self.add("agreement", "not known", "warning", message=message)
            return
        times = 1 + len(AGAIN) - sum(name in self._one.unanswered for name in AGAIN)
        value = f"the first token {nats:.4f} nats apart, asked the same {times} times at once"
        if nats <= AGREED_NATS:
            self.add("agreement", value)
            return
        self.add(
            "agreement",
            value,
            "unfit",
            field=self._one.place,
            message=f"teacher {self._name!r} gives other log-probabilities each time it is asked "
            f"the same ({nats:.4f} nats apart, at most {AGREED_NATS:g} can be trained on): its "
            "replicas serve different weights or quantisations; use one deployment of your own, "
            "or `signal.kind: text` with `training.loss: sft`",
            reason="replicas_disagree",
        )

    def _raw(self) -> None:
        one = self._one
        if one.teacher.answers and self._spec.signal.kind == "topk" and one.unfit is None:
            self.add(
                "raw_logprobs",
                "not known",
                "unknown",
                message=f"nobody is asked for the answers of {self._name!r}: their "
                "log-probabilities must be the model's own, before temperature and top_p",
            )
        if not one.changes and not one.unanswered:
            return
        moved = [name for name, change in one.changes.items() if change > UNCHANGED_NATS]
        refused = [name for name in ("temperature", "top_p") if name in one.unanswered]
        if moved:
            self.add(
                "raw_logprobs",
                f"no: they follow {' and '.join(moved)}",
                "warning",
                field=one.place,
                message=f"teacher {self._name!r} gives log-probabilities after its sampling "
                "settings. A pipeline asks at temperature 1 and top_p 1, where they are the "
                "model's own unless the server adds settings of its own (top_k, penalties): "
                "serve raw ones if you can (vLLM: --logprobs-mode raw_logprobs)",
            )
        elif refused:
            said = one.unanswered[refused[0]]
            self.add(
                "raw_logprobs",
                "not known",
                "warning",
                message=f"teacher {self._name!r} was not asked with another "
                f"{' and '.join(refused)} ({said}), so nobody knows whether its log-probabilities "
                "are the model's own",
            )
        else:
            self.add(
                "raw_logprobs",
                "yes: the first token's are the same at temperature 0.5 and at top_p 0.5",
            )

    def _answers(self) -> None:
        one = self._one
        asked = len(one.answers) + len(one.failures)
        if not asked:
            if one.unasked:
                message = "the limits of the spec, or others who ask it, left no turn in time"
                self.add("answers", "no prompt was asked", "warning", message=message)
            return
        done = "with a usable answer" if one.teacher.answers else "answered"
        value = f"{len(one.answers)} of {asked} prompts {done}"
        if not one.answers:
            self.add(
                "answers",
                value,
                "unfit",
                field=one.place,
                message=f"teacher {self._name!r} answers a short question and none of the spec's "
                f"prompts ({one.failures[0]})",
                reason="no_prompt_answered",
            )
            return
        if one.failures:
            then = "is rejected" if one.teacher.answers else "is tried again, and then rejected"
            self.add(
                "answers",
                value,
                "warning",
                message=f"some prompts had no answer ({one.failures[0]}); in a pipeline each "
                f"{then}",
            )
        else:
            self.add("answers", value)
        self._tokenizer()
        self._token_ids()
        self._ends()

    def _tokenizer(self) -> None:
        one, of = self._one, len(self._one.counted)
        if not of:
            return
        value = (
            f"{of - one.mismatched} of {of} prompts have as many tokens as our tokenizer and chat "
            "template make"
        )
        if not one.mismatched:
            self.add("tokenizer", value)
        elif one.found is None or one.found.signal.kind != "topk" or self._is_text:
            self.add("tokenizer", value, message="text may come from another tokenizer")
        elif 2 * one.mismatched > of:
            first = next(a for a in one.counted if a.prompt_tokens != a.rendered_tokens)
            why = other_tokenizer(
                self._name,
                one.place,
                f"counted {first.prompt_tokens} tokens in a prompt of the spec that our tokenizer "
                f"and chat template render to {first.rendered_tokens} ({one.mismatched} of {of} "
                "prompts differ)",
            )
            self.refuse("tokenizer", value, why)
        else:
            self.add(
                "tokenizer",
                value,
                "warning",
                field=f"{one.place}.reference",
                message=f"{one.mismatched} of {of} prompts would be rejected: teacher "
                f"{self._name!r} renders them otherwise than our chat template (system messages, "
                "tools and several turns are where templates differ)",
            )

    @property
    def _is_text(self) -> bool:
        return self._spec.signal.kind == "text"

    def _token_ids(self) -> None:
        judged = [answer for answer in self._one.answers if answer.ids_match is not None]
        if not judged:
            return
        right = sum(answer.ids_match is True for answer in judged)
        missing = sum(answer.ids_missing for answer in judged)
        value = f"{right} of {len(judged)} answers decode to their text"
        if right == len(judged):
            self.add("token_ids", value)
        elif missing == len(judged):
            self.refuse("token_ids", value, _tokens_missing(self._name, self._one.place))
        elif right + missing == 0:
            why = other_tokenizer(
                self._name, self._one.place, "gave token ids that do not decode to its text"
            )
            self.refuse("token_ids", value, why)
        elif right + missing == len(judged):
            self.add(
                "token_ids",
                value,
                "warning",
                message=f"{missing} of {len(judged)} answers would be rows of text without their "
                "log-probabilities: the server lists a character of several tokens once",
            )
        else:
            self.add(
                "token_ids",
                value,
                "warning",
                message="answers whose ids do not decode to their text become rows of text, or "
                "are rejected",
            )

    def _ends(self) -> None:
        ended, tokens = self._figures.ended, self._figures.completion_tokens
        assert ended is not None, "it answered"
        assert tokens is not None, "it answered"
        given, limit = self._one.teacher.answers, self._spec.signal.max_tokens
        within = "" if given else f" within {limit} tokens"
        value = percent(ended, f"of answers end by themselves{within}")
        if ended.value < FEWEST_ENDED and given:
            self.add(
                "ends",
                value,
                "warning",
                field="dataset.drop_cut",
                message="answers that were cut teach no ending: drop them with "
                "`dataset.drop_cut: true`",
            )
        elif ended.value < FEWEST_ENDED:
            self.add(
                "ends",
                value,
                "warning",
                field="signal.max_tokens",
                message="answers that are cut teach no ending: raise `signal.max_tokens`, ask "
                "for shorter answers in the prompts, or drop them with `dataset.drop_cut: true`",
            )
        else:
            self.add("ends", value)
        self.add("tokens", plain(tokens, ".0f", "an answer"))

    def _terms(self, survey: Survey) -> None:
        for verdict in survey.verdicts:
            if verdict.subject == f"teacher:{self._name}":
                duties = f", with duties: {', '.join(verdict.duties)}" if verdict.duties else ""
                self.add("terms", f"{verdict.terms}: {verdict.outcome}{duties}")
