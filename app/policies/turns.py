"""Turns at work that takes a processor for seconds, in the process that all tenants share."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Final
from uuid import UUID
from weakref import WeakValueDictionary

from app.errors import Conflict

# Each thread that computes takes its share of the interpreter from the loop that serves everybody.
_AT_ONCE: Final = 2


class QuestionsUnderWay(Conflict):
    """The tenant asks more of its policies than is worked on at a time: wait for an answer."""

    code = "questions_under_way"


class Turns:
    """One piece of work at a time for a tenant and a few in all; `asked` is how many a tenant may have, with those
    that wait. What runs need does not wait here.
    """

    def __init__(self, *, asked: int = 16, refusal: type[Conflict] = QuestionsUnderWay) -> None:
        self._most = asked
        self._refusal = refusal
        self._asked: Counter[UUID] = Counter()
        self._locks: WeakValueDictionary[UUID, asyncio.Lock] = WeakValueDictionary()
        self._places = asyncio.Semaphore(_AT_ONCE)

    @asynccontextmanager
    async def turn(self, tenant_id: UUID) -> AsyncIterator[None]:
        """Wait for it; raise the refusal, QuestionsUnderWay, where the tenant asks too much."""
        if self._asked[tenant_id] >= self._most:
            raise self._refusal
        self._asked[tenant_id] += 1
        try:
            # The tenant's own turn first: who waits for that takes no place from the others.
            async with self._locks.setdefault(tenant_id, asyncio.Lock()), self._places:
                yield
        finally:
            self._asked[tenant_id] -= 1
            if not self._asked[tenant_id]:
                del self._asked[tenant_id]
