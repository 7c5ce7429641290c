"""Money that no pipeline pays: a tenant's accounts, each with a budget, sums and charges.

`ledger.reserve`, `settle` and `correct` take an account as they take a pipeline. A paid call is
booked at its worst case first and corrected by what the teacher says, so that a crash leaves it
listed.
"""

from __future__ import annotations

from datetime import UTC, datetime

from sqlalchemy import case, update
from sqlalchemy.orm import Session

from services.teacher_gateway.database import insert_new, now
from services.teacher_gateway.ledger import AccountId, changed
from services.teacher_gateway.models import Account


def open_account(session: Session, account: AccountId, budget_microusd: int) -> None:
    """Make an account, or set the budget of the one that is there.

    A budget below what is spent and reserved becomes just that: nothing more can be spent.
    """
    row = {
        "tenant_id": account.tenant_id,
        "name": account.name,
        "budget_microusd": budget_microusd,
        "spent_microusd": 0,
        "reserved_microusd": 0,
        "created_at": now(session),
    }
    insert_new(session, Account, [row])
    held = Account.spent_microusd + Account.reserved_microusd
    budget = case((held > budget_microusd, held), else_=budget_microusd)
    changed(
        session,
        update(Account)
        .where(
            Account.tenant_id == account.tenant_id,
            Account.name == account.name,
            Account.budget_microusd != budget,
        )
        .values(budget_microusd=budget),
    )


def checks_account(session: Session, tenant_id: str, usd_per_day: float) -> AccountId:
    """Open the account that pays for the checks of this UTC day, by the database's clock."""
    today = datetime.fromtimestamp(now(session), UTC).date()
    account = AccountId(tenant_id, f"checks-{today.isoformat()}")
    open_account(session, account, round(usd_per_day * 1_000_000))
    return account
