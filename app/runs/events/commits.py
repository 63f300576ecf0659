"""What is to happen once a transaction has ended, whichever way."""

from __future__ import annotations

from typing import Protocol

from sqlalchemy import event as hooks
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import Session, SessionTransaction


class Then(Protocol):
    """Told whether the transaction is known to be committed."""

    def __call__(self, *, is_committed: bool) -> None: ...


def at_end(session: AsyncSession, then: Then) -> None:
    """Call once the transaction has ended, with whether it is known to be committed. A session of ours has but one."""
    is_committed = False

    def committed(of: Session) -> None:
        nonlocal is_committed
        is_committed = is_committed or not of.in_nested_transaction()

    def over(_of: Session, transaction: SessionTransaction) -> None:
        if transaction.parent is None:
            then(is_committed=is_committed)

    hooks.listen(session.sync_session, "after_commit", committed)
    hooks.listen(session.sync_session, "after_transaction_end", over)
