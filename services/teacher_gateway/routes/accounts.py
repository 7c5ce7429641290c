"""The tenant's accounts: money that no pipeline pays, such as that of checks."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Path, Query
from sqlalchemy import select, tuple_

from services.teacher_gateway.database import reading
from services.teacher_gateway.ledger import AccountId
from services.teacher_gateway.models import Account
from services.teacher_gateway.problems import ProblemError, not_found, responses
from services.teacher_gateway.routes.charges import AfterCharge, page_of, shown
from services.teacher_gateway.routes.parts import Limit, Parts, Who, moment
from services.teacher_gateway.routes.pipelines import cost_of
from services.teacher_gateway.schemas import (
    AccountCharges,
    AccountChargeView,
    Accounts,
    AccountView,
)
from stillhouse.contracts.artifacts import ID_PATTERN

router = APIRouter(prefix="/v1/accounts", tags=["accounts"])


@router.get("", response_model=Accounts, responses=responses(400, 401, 422, 503))
def list_accounts(
    who: Who,
    parts: Parts,
    after: Annotated[
        str | None, Query(pattern=ID_PATTERN, description="`next` of the page before")
    ] = None,
    limit: Limit = 100,
) -> Accounts:
    """List the tenant's accounts with their sums, newest first."""
    order = (Account.created_at, Account.name)
    query = select(Account).where(Account.tenant_id == who.tenant_id)
    with reading(parts.engine) as session:
        if after is not None:
            last = session.get(Account, (who.tenant_id, after))
            if last is None:
                raise ProblemError(
                    422, "cursor", "`after` names no account: give `next` of the page before"
                )
            query = query.where(tuple_(*order) < (last.created_at, last.name))
        query = query.order_by(*(column.desc() for column in order)).limit(limit + 1)
        found = list(session.scalars(query))
    page = found[:limit]
    return Accounts(
        items=[
            AccountView(
                name=account.name, cost=cost_of(account), created_at=moment(account.created_at)
            )
            for account in page
        ],
        next=page[-1].name if len(found) > limit else None,
    )


@router.get(
    "/{name}/charges", response_model=AccountCharges, responses=responses(400, 401, 404, 422, 503)
)
def list_account_charges(
    name: Annotated[str, Path(max_length=63, description="an account's name")],
    who: Who,
    parts: Parts,
    after: AfterCharge = None,
    limit: Limit = 500,
) -> AccountCharges:
    """List an account's lines: what was paid for, and what may have been billed besides."""
    with reading(parts.engine) as session:
        account = session.get(Account, (who.tenant_id, name))
        if account is None:
            raise not_found("account")
        page = page_of(session, AccountId(who.tenant_id, name), after, limit)
    return AccountCharges(
        items=[AccountChargeView(**shown(charge)) for charge in page.charges],
        next=page.next,
        cost=cost_of(account),
        totals_microusd=page.totals,
    )
