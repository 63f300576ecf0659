"""Has queries screened without letting one tenant's take the others' time."""

from __future__ import annotations

import asyncio
from typing import Final
from uuid import UUID
from weakref import WeakValueDictionary

from anyio import to_thread

from app.policies.admission import admit
from app.policies.overrides import Terms
from app.policies.screening import Verdict

# Characters that are screened in some milliseconds where the tenant has no patterns of its own.
_QUICK: Final = 4_000


class Admission:
    """What may take up to a second is done in a thread, for each tenant one query at a time: who asks a thousand at
    once waits for itself, and leaves the threads to the others.
    """

    def __init__(self) -> None:
        self._turns: WeakValueDictionary[UUID, asyncio.Lock] = WeakValueDictionary()

    async def verdict(self, tenant_id: UUID, query: str, terms: Terms) -> Verdict:
        """Whether a query of this tenant is let in."""
        if len(query) <= _QUICK and not any(rules.block or rules.flag for rules in terms.screenings.values()):
            return admit(query, terms)
        async with self._turns.setdefault(tenant_id, asyncio.Lock()):
            return await to_thread.run_sync(admit, query, terms)
