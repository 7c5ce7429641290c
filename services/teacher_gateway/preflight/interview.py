"""The questions of a preflight to one teacher.

First the probe's question, to find the signal; then the same again, at once and with other
settings, to find out whether replicas agree and whether log-probabilities are the model's own;
then some of the spec's own prompts, as a pipeline would ask them. All within the limits that
pipelines keep to, which ask the same endpoint meanwhile.

Answers that are given along are read instead, and local weights, which answer in a worker, are not
asked at all.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Collection, Iterator
from contextlib import AsyncExitStack
from dataclasses import replace

from sqlalchemy import Engine

from services.teacher_gateway import reasons
from services.teacher_gateway.admission import Sample, Survey
from services.teacher_gateway.auto_signal import QUESTION_SECONDS, without_asking
from services.teacher_gateway.depths import COMMON_DEPTHS, Found, depths, find_depth
from services.teacher_gateway.fitness import Unfit, did_not_answer, judge
from services.teacher_gateway.limits.shared import Holder, SharedLimits
from services.teacher_gateway.limits.turns import Turns
from services.teacher_gateway.paid_calls import (
    PROBE_MESSAGES,
    PaidCalls,
    Question,
    asked_directly,
    make_question,
    probe_question,
)
from services.teacher_gateway.preflight.answers import (
    disagreement,
    ended_by_itself,
    first_list,
    ids_match,
    largest_change,
    length_of,
    lists_characters,
)
from services.teacher_gateway.preflight.heard import Heard, HeardAnswer
from services.teacher_gateway.prompts.lines import answer_of
from services.teacher_gateway.settings import TeacherGatewaySettings
from services.teacher_gateway.teachers.api_keys import read_api_key
from services.teacher_gateway.teachers.batch_api import NoAnswer, Refused, open_batch_api
from services.teacher_gateway.teachers.outcomes import (
    Answered,
    Call,
    Outcome,
    Reject,
    Retry,
    TeacherClient,
)
from services.teacher_gateway.teachers.routes import open_teacher
from services.teacher_gateway.timeouts import table
from stillhouse.chassis.errors import PermanentError
from stillhouse.contracts.spec import Signal, Spec, Teacher

# Of each teacher's prompts.
SAMPLED_PROMPTS = 8
# No question is begun later than this, so that a check ends.
ASKING_SECONDS = 120.0
NO_BATCH_API = "no_batch_api"
AGAIN = ("again-1", "again-2", "again-3")
_CHANGED = ("temperature", "top_p")


class Interview:
    """The questions by name, booked by whoever pays, and what the teacher says to them."""

    def __init__(
        self,
        check: str,
        number: int,
        spec: Spec,
        survey: Survey,
        settings: TeacherGatewaySettings,
        engine: Engine,
        tenant_id: str,
    ) -> None:
        teacher = spec.teachers[number]
        self._teacher = asked_directly(teacher)
        self._spec = spec
        self._settings = settings
        self._times = table(settings.profile)
        self._chat = survey.tokenizer.chat
        self._samples = survey.samples[teacher.name]
        # Scores of another tokenizer's tokens mean nothing to this student.
        self._scores = teacher.gives_logprobs and teacher.name not in survey.tokenizer.text_only
        self._expected = len(self._chat.encode_prompt(PROBE_MESSAGES))
        self._prefix = f"check:{check}:{number}"
        self._clients: dict[tuple[str, int], TeacherClient] = {}
        self._heard = Heard(teacher, number)
        # What a teacher that is asked for text would give besides is worth knowing.
        k = COMMON_DEPTHS[0] if spec.signal.kind == "text" else spec.signal.k
        self._wanted = spec.signal.model_copy(update={"k": k})
        self._text = spec.signal.model_copy(update={"kind": "text"})
        self.questions: dict[str, Question] = {}
        if teacher.url is not None:
            self._prepare(teacher)
            holder = Holder(tenant_id, f"check-{check}", number, 0)
            self._shared = SharedLimits(engine, self._times, self._teacher, holder)
        elif teacher.weights is not None:
            self._heard.skipped = (
                "weights answer in a worker, not in a check: how their answers end and how long "
                "they take is seen once the pipeline runs"
            )
            self._heard.known = self._known(survey.tokenizer.text_only)

    def _prepare(self, teacher: Teacher) -> None:
        probe = Call(PROBE_MESSAGES, self._prefix)
        calls = {"text": probe}
        if self._scores:
            calls |= {f"topk-{depth}": probe for depth in depths(self._wanted.k)}
            if self._spec.signal.kind != "text":
                calls |= dict.fromkeys(AGAIN, probe)
                calls["temperature"] = replace(probe, temperature=0.5)
                calls["top_p"] = replace(probe, top_p=0.5)
        for name, call in calls.items():
            charge_id = f"{self._prefix}:{name}"
            self.questions[name] = probe_question(charge_id, teacher, call, self._chat)
        for number, sample in enumerate(self._samples, 1):
            name, most = f"prompt-{number}", self._spec.signal.max_tokens
            charge_id = f"{self._prefix}:{name}"
            call = Call(sample.line.messages, charge_id, sample.line.tools)
            self.questions[name] = make_question(charge_id, teacher, call, self._chat, most)

    def _known(self, text_only: Collection[str]) -> Signal:
        """What weights give."""
        if self._teacher.name in text_only:
            return self._text
        automatic = without_asking(self._spec, self._teacher, text_only)
        return automatic if self._spec.signal.kind == "auto" and automatic else self._spec.signal

    async def hold(self, calls: PaidCalls, stack: AsyncExitStack) -> Heard:
        """Ask what can be asked; stop where an answer shows that the teacher is unfit."""
        self._calls, self._stack = calls, stack
        if self._heard.skipped:
            return self._heard
        if self._teacher.answers is not None:
            await self._read_given()
            return self._heard
        self._latest = time.monotonic() + ASKING_SECONDS
        most = min(self._teacher.limits.concurrency, SAMPLED_PROMPTS)
        turns = Turns(
            self._teacher.limits.concurrency,
            wanted=most,
            shared=self._shared,
            ttl=self._times.lease_ttl,
        )
        self._turns = await stack.enter_async_context(turns)
        heard, wants_scores = self._heard, self._spec.signal.kind != "text"
        try:
            if heard.teacher.batch_api:
                heard.unfit = await self._miss_batches()
                if heard.unfit is not None:
                    return heard
            heard.found = found = await self._find()
            heard.unfit = self._unfit(found)
            scored = wants_scores and found.signal.kind == "topk"
            if heard.unfit is None and scored:
                await self._repeat(found)
            if heard.unfit is None:
                await self._ask_samples(found.signal if scored else self._text)
        except PermanentError as error:
            heard.unfit = Unfit(error.reason, str(error), heard.place)
        return heard

    async def _miss_batches(self) -> Unfit | None:
        """Look whether the server has the batch API by which a pipeline would ask it."""
        name, place = self._teacher.name, self._heard.place
        try:
            async with open_batch_api(
                self._teacher,
                self._text,
                key=read_api_key(self._teacher, self._settings, os.environ),
                private=self._settings.private_teachers,
                deadline=min(QUESTION_SECONDS, self._teacher.limits.timeout_seconds),
            ) as api:
                if await api.exists():
                    return None
        except (NoAnswer, Refused) as error:
            self._heard.batches_unknown = str(error)
            return None
        return Unfit(
            NO_BATCH_API,
            f"the server of teacher {name!r} has no batch API (below its `url` it knows neither "
            "`/batches` nor `/files`): remove `batch_api`, and give the price of live calls",
            f"{place}.batch_api",
        )

    async def _find(self) -> Found:
        place, found = self._heard.place, None
        if self._scores:

            async def ask(signal: Signal) -> Outcome:
                return await self._ask(f"topk-{signal.k}", signal)

            found = await find_depth(
                ask, self._teacher, self._wanted, self._chat, self._expected, field=place
            )
            if isinstance(found.outcome, Answered | Retry):
                return found
        outcome = await self._ask("text", self._text)
        unfit = judge(outcome, self._teacher, self._text, self._chat, self._expected, field=place)
        # Where it answers this one, what it refused is log-probabilities.
        return Found(self._text, outcome, unfit or (found.unfit if found else None))

    def _unfit(self, found: Found) -> Unfit | None:
        """Why the teacher does not do for this spec."""
        if isinstance(found.outcome, Retry):
            return did_not_answer(self._teacher.name, self._heard.place, found.outcome)
        if isinstance(found.outcome, Reject) or self._spec.signal.kind == "topk":
            return found.unfit
        return None

    async def _repeat(self, found: Found) -> None:
        """Ask the same again, at once and with other settings of the sampling."""
        assert isinstance(found.outcome, Answered), "its log-probabilities were judged"
        k, again = found.signal.k, []
        base = first_list(found.outcome.body, k)
        names = (*AGAIN, *_CHANGED)
        outcomes = await asyncio.gather(*(self._ask(name, found.signal) for name in names))
        for name, outcome in zip(names, outcomes, strict=True):
            if not isinstance(outcome, Answered):
                self._heard.unanswered[name] = outcome.detail
                continue
            try:
                listed = first_list(outcome.body, k)
            except ValueError as error:
                self._heard.unanswered[name] = str(error)
                continue
            if name in AGAIN:
                again.append(listed)
            else:
                self._heard.changes[name] = largest_change(base, listed)
        if again:
            self._heard.disagreement = disagreement([base, *again])

    async def _read_given(self) -> None:
        """Judge the answers that some prompts carry; nobody is asked, and nothing is paid."""
        heard, scored = self._heard, self._spec.signal.kind == "topk"
        signal = self._wanted if scored else self._text
        if not self._samples:
            heard.skipped = "none of its prompts can be rendered"
            return
        client = await self._client(signal)
        outcomes = [await client.ask(call, deadline=self._times.call) for call in self._given()]
        judged = [self._unfit_given(outcome, signal) for outcome in outcomes]
        unfit = [one for one in judged if one is not None]
        heard.found = Found(signal, outcomes[0], unfit[0] if unfit else None)
        if len(unfit) == len(judged):
            heard.unfit = unfit[0]
            return
        heard.unusable = len(unfit)
        for sample, outcome, why in zip(self._samples, outcomes, judged, strict=True):
            self._note(sample, outcome, scored=scored and why is None)

    def _given(self) -> Iterator[Call]:
        for number, sample in enumerate(self._samples, 1):
            name, line = f"{self._prefix}:prompt-{number}", sample.line
            yield Call(line.messages, name, line.tools, given=answer_of(line))

    def _unfit_given(self, outcome: Outcome, signal: Signal) -> Unfit | None:
        if isinstance(outcome, Reject) and outcome.reason != reasons.MISSING_LOGPROBS:
            said = f"an answer given along cannot be used: {outcome.detail}"
            return Unfit(outcome.reason, said, "prompts")
        # Whether the prompt was another one is a finding of its own.
        counted = outcome.usage.prompt_tokens if isinstance(outcome, Answered) else 0
        place = self._heard.place
        return judge(outcome, self._teacher, signal, self._chat, counted, field=place)

    async def _ask_samples(self, signal: Signal) -> None:
        client, scored = await self._client(signal), signal.kind == "topk"
        await asyncio.gather(
            *(
                self._ask_sample(f"prompt-{number}", sample, client, scored)
                for number, sample in enumerate(self._samples, 1)
            )
        )

    async def _ask_sample(
        self, name: str, sample: Sample, client: TeacherClient, scored: bool
    ) -> None:
        asked = await self._put(client, name, self._times.call)
        if asked is None:
            self._heard.unasked += 1
            return
        outcome, seconds = asked
        self._note(sample, outcome, scored=scored, seconds=seconds)

    def _note(
        self, sample: Sample, outcome: Outcome, *, scored: bool, seconds: float | None = None
    ) -> None:
        if not isinstance(outcome, Answered):
            self._heard.failures.append(f"{outcome.reason}: {outcome.detail}")
            return
        usage = outcome.usage  # answers given along may have none
        match = ids_match(outcome.body, self._chat) if scored else None
        self._heard.answers.append(
            HeardAnswer(
                prompt_tokens=usage.prompt_tokens or None,
                rendered_tokens=sample.tokens,
                completion_tokens=usage.completion_tokens or length_of(outcome.body, self._chat),
                ended=ended_by_itself(outcome.body),
                ids_match=match,
                ids_missing=match is False and lists_characters(outcome.body),
                seconds=seconds,
            )
        )

    async def _ask(self, name: str, signal: Signal) -> Outcome:
        client = await self._client(signal)
        asked = await self._put(client, name, QUESTION_SECONDS)
        if asked is None:
            waited = f"its limits gave no turn within {ASKING_SECONDS:g} s"
            return Retry(reasons.TEACHER_RATE_LIMITED, waited)
        return asked[0]

    async def _put(
        self, client: TeacherClient, name: str, seconds: float
    ) -> tuple[Outcome, float] | None:
        """Ask once it is this question's turn; None when it is not in time. With the seconds that
        the answer took."""
        question = self.questions[name]
        turn = await self._turns.enter(question.tokens, self._latest)
        if turn is None:
            return None
        self._heard.calls += 1
        deadline = min(seconds, self._teacher.limits.timeout_seconds)
        outcome = None
        try:
            outcome = await self._calls.ask(client, question, deadline=deadline)
        finally:
            self._turns.leave(turn, outcome)
        return outcome, time.monotonic() - turn.began

    async def _client(self, signal: Signal) -> TeacherClient:
        """A client that asks for a signal. Raises PermanentError that says what to change."""
        key = (signal.kind, signal.k)
        if key not in self._clients:
            self._clients[key] = await self._stack.enter_async_context(
                open_teacher(self._teacher, signal, self._settings, environ=os.environ)
            )
        return self._clients[key]
