"""Backtests: a version is asked about the calls that the tenant's own runs have made, and every flip is told."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime
from functools import partial
from typing import Any, Final
from uuid import UUID

from anyio import to_thread

from app.caller import Caller
from app.db import Database
from app.errors import Conflict
from app.keyring import Keyring, SecretKey
from app.policies import checks, definitions
from app.policies.backtest import Replay
from app.policies.checks import PUBLISHED, Backtest, Checked
from app.policies.turns import Turns
from app.runs.backtests import recorded
from app.runs.backtests.recorded import UNREADABLE, Head
from app.servers import deciding
from app.tenants.service import open_tenant_key

MAX_CALLS: Final = 10_000
# Sealed arguments are read so many at once, up to so many bytes or one call's; they are opened one by one.
_BATCH: Final = 200
_BATCH_BYTES: Final = 10_000_000
_TIME_S: Final = 60.0
# Calls that might have flipped.
_MISSING: Final = frozenset({UNREADABLE, "no_time"})


class BacktestUnderWay(Conflict):
    """The tenant is backtesting a policy already."""

    code = "backtest_under_way"


@dataclass(frozen=True, slots=True)
class Question:
    """Which version is replayed over which calls: the newest `limit` of them, not older than `since`."""

    version: int
    since: datetime | None
    limit: int

    def is_for_all(self, found: int) -> bool:
        """True where these are all calls that there are, or as many as may be asked for."""
        return self.since is None and (found < self.limit or self.limit == MAX_CALLS)


class Backtests:
    """Runs a few at a time, and one for each tenant: a replay takes processor time for up to a minute."""

    def __init__(self, *, database: Database, keyring: Keyring) -> None:
        self._database = database
        self._keyring = keyring
        self._turns = Turns(asked=1, refusal=BacktestUnderWay)

    async def run(self, caller: Caller, question: Question) -> dict[str, Any]:
        """Replay the version instead of the one that holds, and keep what came of it.

        Raise NotFound, VersionUnchecked, BacktestUnderWay, and PolicyInvalid for a version that no longer compiles.
        """
        async with self._turns.turn(caller.tenant_id):
            async with self._database.transaction(caller.tenant_id) as session:
                after = await checks.get(session, question.version)
                before = await checks.get(session, PUBLISHED)
                heads = await recorded.heads(session, limit=question.limit, since=question.since)
                tenant_key = await open_tenant_key(session, self._keyring, caller.tenant_id)
            replay = await to_thread.run_sync(_prepared, before, after)
            skipped = await self._replay(caller.tenant_id, replay, heads, tenant_key)
        found = Backtest(
            version=after.version,
            against=before.version,
            tools_digest=definitions.digest(after.tools),
            is_full=question.is_for_all(len(heads)) and not skipped.keys() & _MISSING,
            flipped=replay.flipped,
            result=_result(replay, skipped),
        )
        async with self._database.transaction(caller.tenant_id) as session:
            backtest_id = await checks.store_backtest(session, caller, found)
        told = {"version": found.version, "against": found.against, "is_full": found.is_full, "flipped": found.flipped}
        return {"id": backtest_id, **told, **found.result}

    async def _replay(
        self, tenant_id: UUID, replay: Replay, heads: Sequence[Head], tenant_key: SecretKey
    ) -> Counter[str]:
        """Give how many calls could not be replayed, by reason."""
        skipped = Counter(head.unreadable for head in heads if head.unreadable is not None)
        readable = [head for head in heads if head.unreadable is None]
        opening = partial(_judge, replay, tenant_key=tenant_key, deadline=time.monotonic() + _TIME_S)
        left = len(readable)
        for batch in _batches(readable):
            async with self._database.transaction(tenant_id) as session:
                sealed = await recorded.sealed_arguments(session, batch)
            done, unreadable = await to_thread.run_sync(opening, batch, sealed)
            skipped[UNREADABLE] += unreadable
            left -= done
            if done < len(batch):
                break
        skipped["no_time"] = left
        return +skipped


def _prepared(before: Checked, after: Checked) -> Replay:
    return Replay(partial(deciding.decide, before.compiled()), partial(deciding.decide, after.compiled()))


def _batches(heads: Sequence[Head]) -> Iterator[list[Head]]:
    batch: list[Head] = []
    size = 0
    for head in heads:
        if batch and (len(batch) == _BATCH or size + head.size > _BATCH_BYTES):
            yield batch
            batch, size = [], 0
        batch.append(head)
        size += head.size
    if batch:
        yield batch


def _judge(
    replay: Replay,
    batch: Sequence[Head],
    sealed: dict[tuple[UUID, int], bytes],
    *,
    tenant_key: SecretKey,
    deadline: float,
) -> tuple[int, int]:
    """Give how many there was time for, and how many of them could not be read."""
    unreadable = 0
    for place, head in enumerate(batch):
        if time.monotonic() > deadline:
            return place, unreadable
        # One by one: as Python's objects, arguments may take fifty times their bytes.
        call = recorded.opened(head, sealed.pop((head.run_id, head.sequence), None), tenant_key)
        if call is None:
            unreadable += 1
        else:
            replay.judge(call)
    return len(batch), unreadable


def _result(replay: Replay, skipped: Counter[str]) -> dict[str, Any]:
    """As it is told and stored: ids and names of ours, nothing of the arguments."""
    flips = [
        {**asdict(flip), "count": count, "example": {"run_id": str(run_id), "sequence": sequence}}
        for flip, count, (run_id, sequence) in replay.listed()
    ]
    return {"calls": replay.calls, "skipped": dict(skipped), "flips": flips}
