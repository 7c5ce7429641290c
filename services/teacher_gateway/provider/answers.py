"""What a provider's batch left: its files, line by line, judged as live replies are, and stored.

Nothing is booked here. A worker that dies in the middle loses nothing: what it stored is adopted,
and the files are read again.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Mapping
from contextlib import aclosing
from dataclasses import dataclass, field
from datetime import UTC, datetime

from services.teacher_gateway import reasons
from services.teacher_gateway.asking import Asked, GivenUp, Result
from services.teacher_gateway.books import Books, rejection_of
from services.teacher_gateway.closing import Ended
from services.teacher_gateway.counters import CALLS, TOKENS
from services.teacher_gateway.holding import Fenced
from services.teacher_gateway.ledger import Kind, Line, cost_microusd
from services.teacher_gateway.parts import PART_ANSWERS, Part, encode_part
from services.teacher_gateway.teachers.batch_api import BatchApi, Progress, Refused, read_line
from services.teacher_gateway.teachers.outcomes import Answered, Call, Outcome, Reject, Retry
from stillhouse.chassis.crash import crash_point
from stillhouse.chassis.logs import logger
from stillhouse.chassis.storage import AlreadyExists
from stillhouse.contracts.responses import Answer, Item
from stillhouse.contracts.spec import Price

log = logger(__name__)

# Of a batch that failed as a whole: an account's limit, which is no fault of these items.
_FOR_NOW = re.compile(r"token_limit|rate_limit|quota|enqueued", re.IGNORECASE)


def call_of(item: Item) -> Call:
    """The question that an item is, as it is asked live too."""
    return Call(item.messages, item.item_id, tools=item.tools)


@dataclass
class Reading:
    """One reading of the files of a provider's batch."""

    api: BatchApi
    books: Books
    price: Price
    batch: int
    attempt: int
    number: int
    progress: Progress
    # All that it was asked for, and of these what has no outcome yet.
    items: frozenset[str]
    open: Mapping[str, Asked]
    result: Result = field(default_factory=Result)
    _unstored: list[Answer] = field(default_factory=list)
    _seen: set[str] = field(default_factory=set)

    async def run(self, *, deadline: float) -> Ended:
        """Read both files and store the answers; what is to be booked besides is returned."""
        progress = self.progress
        ended = Ended(self.number, progress.status)
        before = self.api.form
        sent = self.api.request(call_of(next(iter(self.open.values())).item)) if self.open else {}
        delivered = 0
        for file_id in (progress.output_file, progress.error_file):
            if not file_id:
                continue
            try:
                most = 2 * len(self.items)
                async with aclosing(self.api.lines(file_id, most=most, deadline=deadline)) as lines:
                    async for data in lines:
                        delivered += await self._take(data, sent, ended)
            except Refused as error:
                # What it held is missing, and listed with the rest of that.
                log.warning("a provider's file cannot be read", why=str(error))
        if self._unstored:
            await self._store()
        self._miss(ended, delivered)
        if self.api.form != before:
            ended.form = self.api.form
        return ended

    async def _take(self, data: bytes, sent: Mapping[str, object], ended: Ended) -> int:
        """Take one line; 1 where it is an answer that the provider counts."""
        line = read_line(data)
        if line is None or line.custom_id not in self.items or line.custom_id in self._seen:
            log.warning("a line of a provider's file that nobody asked for", batch=self.batch)
            return 0
        self._seen.add(line.custom_id)
        counted = int(line.response is not None and line.response.status_code == 200)
        asked = self.open.get(line.custom_id)
        if asked is None:
            return counted  # an earlier attempt stored it
        outcome = self.api.judge_line(line, sent)
        CALLS.labels("answered" if isinstance(outcome, Answered) else outcome.reason).inc()
        answer = self._judge(asked, outcome, ended)
        if answer is not None:
            crash_point("answer_received")
            self._unstored.append(answer)
            if len(self._unstored) == PART_ANSWERS:
                await self._store()
        return counted

    def _judge(self, asked: Asked, outcome: Outcome, ended: Ended) -> Answer | None:
        item_id, worst = asked.item.item_id, asked.worst_microusd
        if isinstance(outcome, Answered):
            usage = outcome.usage
            cost = cost_microusd(self.price, usage.prompt_tokens, usage.completion_tokens)
            if cost <= worst:
                TOKENS.labels("prompt").inc(usage.prompt_tokens)
                TOKENS.labels("completion").inc(usage.completion_tokens)
                return Answer(
                    item_id=item_id,
                    body=outcome.body,
                    prompt_tokens=usage.prompt_tokens,
                    completion_tokens=usage.completion_tokens,
                    cost_microusd=cost,
                    received_at=datetime.now(UTC).isoformat(),
                )
            detail = f"its usage ({usage}) is more than was asked for"
            outcome = Reject(reasons.TEACHER_INVALID, detail, lost=True)
        if outcome.lost:
            ended.lines.append(self._line("lost", item_id, "unknown", worst, outcome.detail))
        elif isinstance(outcome, Reject) and outcome.usage is not None:
            usage = outcome.usage
            cost = cost_microusd(self.price, usage.prompt_tokens, usage.completion_tokens)
            detail = f"{outcome.reason}: {outcome.detail}"
            ended.lines.append(self._line("unused", item_id, "unused", min(cost, worst), detail))
        if isinstance(outcome, Reject):
            ended.rejections.append(rejection_of(item_id, outcome))
        else:
            self.result.given_up.append(GivenUp(item_id, outcome.reason, outcome.detail))
        return None

    def _miss(self, ended: Ended, delivered: int) -> None:
        """What has no line: to be asked again, and listed where it may have been billed."""
        status, said = self.progress.status, self.progress.detail
        detail = f"the provider's batch ended as {status} without a line for it"
        detail = f"{detail} ({said})" if said else detail
        missing = [asked for name, asked in self.open.items() if name not in self._seen]
        if not missing:
            return
        late = status == "expired"
        reason = reasons.TEACHER_TIMEOUT if late else reasons.TEACHER_ERROR
        self.result.given_up += [GivenUp(asked.item.item_id, reason, detail) for asked in missing]
        completed = self.progress.completed
        if completed is None:
            completed = 0 if status == "failed" else delivered + len(missing)
        # It may have answered these and not delivered them; which ones, nobody knows.
        lost = min(max(completed - delivered, 0), len(missing))
        worst = sorted((asked.worst_microusd for asked in missing), reverse=True)[:lost]
        if worst:
            ended.lines.append(self._line("lost", "missing", "unknown", sum(worst), detail))
        if status == "failed" and _FOR_NOW.search(said) and len(missing) == len(self.open):
            self.result.away = Retry(reasons.TEACHER_RATE_LIMITED, detail, away=True)

    async def _store(self) -> None:
        crash_point("part_ready")
        answers, self._unstored = self._unstored, []
        number = len(self.result.parts) + 1
        try:
            ref = await asyncio.to_thread(self.books.store, number, encode_part(answers))
        except AlreadyExists as error:
            raise Fenced("the series of parts was ended by a later attempt") from error
        self.result.parts.append(Part(ref, tuple(answers)))
        crash_point("part_stored")

    def _line(self, what: str, of: str, kind: Kind, microusd: int, detail: str) -> Line:
        """A charge that is the same however often the files are read."""
        charge_id = f"{what}:{self.batch}:p{self.number}:{of}"
        return Line(charge_id, kind, microusd, self.batch, self.attempt, 0, detail)
