"""Is the teacher away, or is it these items? One short question between two attempts tells.

An item that nobody answers looks like a teacher that is away, and the other way round: the first
must end as a rejection, the second must cost no item. So where an attempt met only silence, the
probe's question is asked; and while the teacher is away each attempt begins with it, so that an
outage is billed for no more than that. It is in the ledger like the probe.

Where nobody answers it, the teacher's circuit opens for all (`shared`): no batch of it is
dispatched for a while, then one, and all again once anything was answered (`dispatch`).
"""

from __future__ import annotations

import asyncio
import time

from services.teacher_gateway.asking import NoTurn
from services.teacher_gateway.batch_input import (
    BatchInput,
    counts_as_we_do,
    prompt_tokens_bound,
    read_tokenizer,
)
from services.teacher_gateway.claims import Claim
from services.teacher_gateway.context import Context
from services.teacher_gateway.counters import CALLS
from services.teacher_gateway.database import transaction
from services.teacher_gateway.ledger import Line, cost_microusd, settle
from services.teacher_gateway.limits.turns import Turns
from services.teacher_gateway.paid_calls import PROBE_MESSAGES, PROBE_TOKENS, book
from services.teacher_gateway.teachers.outcomes import Answered, Call, Outcome, Retry, TeacherClient

# A question that is booked is asked, however late its booking was.
_LEAST_SECONDS = 0.5


class TeacherQuestion:
    """`asking.Question` to one teacher, on the account of one attempt."""

    def __init__(
        self,
        context: Context,
        claim: Claim,
        given: BatchInput,
        client: TeacherClient,
        turns: Turns,
    ) -> None:
        self._context = context
        self._claim = claim
        self._given = given
        self._client = client
        self._turns = turns
        self._asked = 0

    async def __call__(self, *, deadline: float) -> Retry | None:
        ends = time.monotonic() + deadline
        tokens = await asyncio.to_thread(self._prompt_tokens)
        turn = await self._turns.enter(tokens + PROBE_TOKENS, ends)
        if turn is None:
            raise NoTurn
        outcome = None
        try:
            self._asked += 1
            charge_id = f"probe:{self._claim.batch}:{self._claim.attempt}:{self._asked}"
            worst = await asyncio.to_thread(self._book, charge_id, tokens)
            if worst is None:
                return None  # no money to ask: the items' own failures count
            call = Call(PROBE_MESSAGES, charge_id, max_tokens=PROBE_TOKENS)
            left = max(ends - time.monotonic(), _LEAST_SECONDS)
            outcome = await self._client.ask(call, deadline=left)
        finally:
            self._turns.leave(turn, outcome)
        CALLS.labels("answered" if isinstance(outcome, Answered) else outcome.reason).inc()
        await asyncio.to_thread(self._settle, charge_id, outcome, worst)
        return outcome if isinstance(outcome, Retry) and outcome.away else None

    def _prompt_tokens(self) -> int:
        chat = read_tokenizer(self._context.store, self._given.resolved.tokenizer)
        ours = counts_as_we_do(self._given.teacher, self._given.signal)
        return prompt_tokens_bound(chat, PROBE_MESSAGES, ours=ours)

    def _book(self, charge_id: str, tokens: int) -> int | None:
        worst = cost_microusd(self._given.teacher.usd_per_million, tokens, PROBE_TOKENS)
        claim = self._claim
        detail = "a question whether the teacher is there, whose answer is not known"
        line = Line(charge_id, "unknown", worst, claim.batch, claim.attempt, 0, detail)
        with transaction(self._context.engine) as session:
            return worst if settle(session, claim.pipeline_id, [line], release=0) else None

    def _settle(self, charge_id: str, outcome: Outcome, worst: int) -> None:
        with transaction(self._context.engine) as session:
            book(session, self._claim.pipeline_id, charge_id, outcome, self._given.teacher, worst)
