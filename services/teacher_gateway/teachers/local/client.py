"""The client of local weights: renders as the builder does, and waits while they compute."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import asynccontextmanager
from datetime import date
from functools import partial

from services.teacher_gateway import reasons
from services.teacher_gateway.settings import TeacherGatewaySettings
from services.teacher_gateway.teachers.local.engine import Engine
from services.teacher_gateway.teachers.local.given import Given, answer_ids, read_given
from services.teacher_gateway.teachers.local.weights import Weights, shelf
from services.teacher_gateway.teachers.local.work import Spoken, Work, completion
from services.teacher_gateway.teachers.outcomes import (
    Answered,
    Call,
    Outcome,
    Reject,
    Retry,
    Usage,
)
from stillhouse.chassis.errors import PermanentError
from stillhouse.contracts.chat import TemplateRefused
from stillhouse.contracts.spec import Signal, Teacher


class LocalTeacher:
    """One teacher over the weights of this process; use `open_local`."""

    def __init__(
        self,
        held: Future[Weights],
        engine: Engine,
        teacher: Teacher,
        signal: Signal,
        today: date | None,
        clerk: ThreadPoolExecutor,
    ) -> None:
        self._held = held
        self._engine = engine
        self._model = teacher.model
        self._scores = teacher.answers == "given"
        self._signal = signal
        self._today = today
        self._clerk = clerk

    async def ask(self, call: Call, *, deadline: float) -> Outcome:
        """Answer one call, or score the answer given along, `deadline` seconds at most.

        Raises PermanentError where the weights cannot be used.
        """
        try:
            async with asyncio.timeout(deadline):
                return await self._ask(call)
        except PermanentError:
            raise
        except TimeoutError:
            loading = "" if self._held.done() else ": the weights are still loading"
            detail = f"no answer in {deadline:.0f} s{loading}"
            return Retry(reasons.TEACHER_TIMEOUT, detail, away=True)
        except Exception as error:  # torch's are not documented, and all are this machine's
            # As if nobody were there: a device that is out of order answers no item.
            detail = f"the weights failed: {type(error).__name__}: {error}"[:300]
            return Retry(reasons.TEACHER_ERROR, detail, away=True)

    async def _ask(self, call: Call) -> Outcome:
        weights = await asyncio.wrap_future(self._held)
        # A thread of its own: rendering and writing must not hold up what renews the lease.
        run = partial(asyncio.get_running_loop().run_in_executor, self._clerk)
        given = read_given(call.given) if self._scores and call.given is not None else None
        if isinstance(given, Reject):
            return given
        work = await run(self._work, weights, call, given)
        if isinstance(work, Reject):
            return work
        self._engine.submit(work)
        outcome = await asyncio.wrap_future(work.future)
        if isinstance(outcome, Reject):
            return outcome
        return await run(self._answered, weights, work, outcome, given)

    def _work(self, weights: Weights, call: Call, given: Given | None) -> Work | Reject:
        chat = weights.chat_on(self._today)
        try:
            prompt = chat.encode_prompt(call.messages, call.tools)
        except TemplateRefused as error:
            return Reject(reasons.REFUSED_BY_TEACHER, str(error)[:300])
        most = call.max_tokens or self._signal.max_tokens
        if given is None:
            return Work(prompt, call.seed_of, most)
        answer = answer_ids(given, chat, call, most)
        if isinstance(answer, Reject):
            return answer
        return Work(prompt, call.seed_of, most, answer, given.finish)

    def _answered(
        self, weights: Weights, work: Work, spoken: Spoken, given: Given | None
    ) -> Answered:
        body = completion(
            spoken,
            work,
            chat=weights.chat,
            model=self._model,
            ends=weights.ends,
            signal=self._signal.kind,
            given=given.as_choice() if given else None,
        )
        return Answered(body, Usage(len(work.prompt), len(spoken.positions)))


@asynccontextmanager
async def open_local(
    teacher: Teacher,
    signal: Signal,
    settings: TeacherGatewaySettings,
    *,
    today: date | None = None,
    pin: str | None = None,
) -> AsyncIterator[LocalTeacher]:
    """Open a client. It does not wait for the weights, which load meanwhile: the calls do.

    `today` is the date that templates see, the day of acceptance; `pin` names the content that
    the weights had then (`chassis.references`).
    """
    assert teacher.weights is not None, "the spec requires weights"
    held = shelf.weights(teacher.weights, settings, pin)
    engine = Engine(
        held, signal, threads=settings.local_threads, cache_mib=settings.local_cache_mib
    )
    clerk = ThreadPoolExecutor(1, "local-clerk")
    try:
        yield LocalTeacher(held, engine, teacher, signal, today, clerk)
    finally:
        await asyncio.to_thread(engine.close)
        clerk.shutdown(wait=False, cancel_futures=True)
