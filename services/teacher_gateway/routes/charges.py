"""The lines of a ledger, page by page: a pipeline's and an account's are read alike."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any

from fastapi import Query
from sqlalchemy import func, select, tuple_
from sqlalchemy.orm import Session

from services.teacher_gateway.ledger import AccountId, Purse, charge_of
from services.teacher_gateway.models import AccountCharge, Charge
from services.teacher_gateway.problems import ProblemError
from services.teacher_gateway.routes.parts import moment

AfterCharge = Annotated[
    str | None, Query(pattern=r"^[a-z0-9:._-]{1,80}$", description="`next` of the page before")
]


@dataclass(frozen=True)
class ChargePage:
    """Some lines, oldest first, the last one's name where there are more, and all by kind."""

    charges: list[Any]
    next: str | None
    totals: dict[str, int]


def page_of(session: Session, purse: Purse, after: str | None, limit: int) -> ChargePage:
    """Read what comes after a line. Raises ProblemError where there is no such line."""
    table: Any = Charge
    own: tuple[Any, ...] = (Charge.pipeline_id == purse,)
    if isinstance(purse, AccountId):
        table = AccountCharge
        own = (table.tenant_id == purse.tenant_id, table.account == purse.name)
    query = select(table).where(*own)
    order = (table.booked_at, table.charge_id)
    if after is not None:
        last = charge_of(session, purse, after)
        if last is None:
            raise ProblemError(
                422, "cursor", "`after` names no charge: give `next` of the page before"
            )
        query = query.where(tuple_(*order) > (last.booked_at, last.charge_id))
    found = list(session.scalars(query.order_by(*order).limit(limit + 1)))
    totals = session.execute(
        select(table.kind, func.sum(table.microusd)).where(*own).group_by(table.kind)
    ).all()
    page = found[:limit]
    return ChargePage(
        page,
        page[-1].charge_id if len(found) > limit else None,
        {kind: int(total) for kind, total in totals},
    )


def shown(charge: Any) -> dict[str, Any]:
    """What every line tells."""
    return {
        "charge_id": charge.charge_id,
        "kind": charge.kind,
        "answers": charge.answers,
        "microusd": charge.microusd,
        "detail": charge.detail,
        "booked_at": moment(charge.booked_at),
    }
