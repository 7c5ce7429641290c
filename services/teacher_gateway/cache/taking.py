"""What the cache has for a claimed batch, stored as the first parts of its attempt.

So the manifest, and all that follows from it, is the same as if the answers had been asked for.
"""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial

from services.teacher_gateway.asking import Result
from services.teacher_gateway.books import Books
from services.teacher_gateway.cache import index
from services.teacher_gateway.cache.index import Kept
from services.teacher_gateway.claims import MOST_CRASHES, Claim
from services.teacher_gateway.context import Context
from services.teacher_gateway.counters import CACHED
from services.teacher_gateway.database import transaction
from services.teacher_gateway.holding import Fenced
from services.teacher_gateway.parts import PART_ANSWERS, Part, encode_part
from stillhouse.chassis.crash import crash_point
from stillhouse.chassis.storage import AlreadyExists
from stillhouse.contracts.artifacts import ObjectRef
from stillhouse.contracts.responses import Answer

_READ_AT_ONCE = 8


def take_cached(context: Context, claim: Claim, books: Books) -> bool:
    """Read the parts that hold answers to this batch's questions, each once, and store them anew.

    What is missing there stays open: its row goes, and the next attempt, which begins at once,
    asks for it. Ends early when time is up; False when the pipeline stops.
    """
    if claim.stopping or claim.crashes >= MOST_CRASHES:
        return not claim.stopping
    wanted: dict[ObjectRef, list[tuple[str, Kept]]] = {}
    for item_id, kept in claim.cached.items():
        if item_id in claim.pending:
            wanted.setdefault(kept.part, []).append((item_id, kept))
    if not wanted:
        return True
    going = True
    found: list[Answer] = []
    gone: list[Kept] = []
    stored: list[Part] = []
    books.cached = None  # until all is stored it is not known what is
    read, renewed = partial(index.read_part, context.store), books.started
    with ThreadPoolExecutor(_READ_AT_ONCE) as pool:
        for start in range(0, len(wanted), _READ_AT_ONCE):
            refs = list(wanted)[start : start + _READ_AT_ONCE]
            if time.monotonic() - renewed > context.times.beat:
                renewed = time.monotonic()
                going = books.renew()
                if not going:
                    books.result = Result(stopping=True)
                    break
            if time.monotonic() > books.started + context.times.attempt:
                break
            for ref, answers in zip(refs, pool.map(read, refs), strict=True):
                for item_id, kept in wanted[ref]:
                    answer = answers.get(kept.item_id)
                    if answer is None:
                        gone.append(kept)
                    else:
                        free = {"item_id": item_id, "cost_microusd": 0, "cached": True}
                        found.append(answer.model_copy(update=free))
            while len(found) >= PART_ANSWERS:
                stored.append(_store(books, len(stored) + 1, found[:PART_ANSWERS]))
                del found[:PART_ANSWERS]
    if found:
        stored.append(_store(books, len(stored) + 1, found))
    books.cached = stored
    CACHED.inc(sum(len(part.answers) for part in stored))
    crash_point("cached_stored")
    if gone:
        with transaction(context.engine) as session:
            index.forget(session, claim.tenant_id, gone)
    return going


def _store(books: Books, number: int, answers: list[Answer]) -> Part:
    crash_point("cached_part_ready")
    try:
        ref = books.store_at(number, encode_part(answers))
    except AlreadyExists as error:
        raise Fenced("the series of parts was ended by a later attempt") from error
    crash_point("cached_part_stored")
    return Part(ref, tuple(answers))
