"""What was found out about a version: the tools that its servers have, and what a replay of recorded calls gave."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from functools import lru_cache
from typing import Any, Final
from uuid import UUID

from sqlalchemy import func, insert, select
from sqlalchemy.dialects.postgresql import insert as upsert
from sqlalchemy.ext.asyncio import AsyncSession

from app.audit import repository as audit
from app.audit.events import Event, EventType
from app.caller import Caller
from app.db import new_id
from app.errors import Conflict, NotFound
from app.policies import definitions, versions
from app.policies import document as documents
from app.policies.engine import PinnedTool, compile_policy
from app.policies.models import PolicyBacktest, PolicyCheck
from app.policies.publishing import FRESH_HOURS, BacktestRequired, PublishingRules, TooManyFlips
from app.policies.versions import ActivePolicy

PUBLISHED: Final = "published"
_FRESH: Final = timedelta(hours=FRESH_HOURS)
# Of all tenants: the largest take some 40 MB.
_MAX_COMPILED: Final = 8


class VersionUnchecked(Conflict):
    """The version has not been checked yet, so that its servers' tools are not known: POST .../check does that."""

    code = "version_unchecked"


@dataclass(frozen=True, slots=True)
class Checked:
    """A version with the tools that it is compiled against, as they were found at `checked_at`."""

    version: int
    document: str
    tools: tuple[PinnedTool, ...]
    checked_at: datetime
    is_published: bool = False

    def compiled(self) -> ActivePolicy:
        """Raise PolicyInvalid where it no longer fits. Unless it is one of the latest it takes seconds, a thread's."""
        return _compiled(self)


@lru_cache(maxsize=_MAX_COMPILED)
def _compiled(checked: Checked) -> ActivePolicy:
    document = documents.parse(checked.document)
    return ActivePolicy(checked.version, document, compile_policy(document, checked.tools), checked.tools)


async def get(session: AsyncSession, version: int | str) -> Checked:
    """A version, or the one that is PUBLISHED. Raise NotFound, or VersionUnchecked for a draft without known tools."""
    published = await versions.read_published(session)
    if published is not None and version in (PUBLISHED, published.version):
        tools = published.pinned()
        return Checked(published.version, published.document, tools, published.pinned_at, is_published=True)
    if isinstance(version, str):
        raise NotFound("No policy is published.")
    document = (await versions.get(session, version)).document
    found = await session.scalar(select(PolicyCheck).where(PolicyCheck.version == version))
    if found is None:
        raise VersionUnchecked
    return Checked(version, document, tuple(map(definitions.from_json, found.tools)), found.checked_at)


async def store(session: AsyncSession, caller: Caller, version: int, tools: Sequence[PinnedTool]) -> datetime:
    """Keep the tools that the version's servers have now, and give this moment."""
    values = {
        "tools": [definitions.to_json(tool) for tool in tools],
        "checked_by": caller.user_id,
        "checked_at": func.now(),
    }
    statement = upsert(PolicyCheck).values(tenant_id=caller.tenant_id, version=version, **values)
    statement = statement.on_conflict_do_update(index_elements=["tenant_id", "version"], set_=values)
    return (await session.execute(statement.returning(PolicyCheck.checked_at))).scalar_one()


async def record_check(session: AsyncSession, caller: Caller, version: int, tools: Sequence[PinnedTool]) -> datetime:
    """The same where it was asked for, and not part of publishing."""
    at = await store(session, caller, version, tools)
    data = {"version": version, "tools": len(tools)}
    await audit.append(session, caller.tenant_id, Event(EventType.POLICY_CHECKED, actor_id=caller.user_id, data=data))
    return at


@dataclass(frozen=True, slots=True)
class Backtest:
    """A replay that is to be kept. `flipped` counts calls; `result` is what its author was told."""

    version: int
    against: int
    tools_digest: str
    is_full: bool
    flipped: int
    result: Mapping[str, Any]


async def store_backtest(session: AsyncSession, caller: Caller, found: Backtest) -> UUID:
    """Keep it, on the record."""
    backtest_id = new_id()
    await session.execute(
        insert(PolicyBacktest).values(
            tenant_id=caller.tenant_id,
            id=backtest_id,
            version=found.version,
            against=found.against,
            tools_digest=found.tools_digest,
            is_full=found.is_full,
            flipped=found.flipped,
            result=dict(found.result),
            created_by=caller.user_id,
        )
    )
    data = {
        "backtest_id": backtest_id,
        "version": found.version,
        "against": found.against,
        "calls": found.result["calls"],
        "flipped": found.flipped,
        "is_full": found.is_full,
    }
    event = Event(EventType.POLICY_BACKTESTED, actor_id=caller.user_id, data=data)
    await audit.append(session, caller.tenant_id, event)
    return backtest_id


async def demand_backtest(
    session: AsyncSession, rules: PublishingRules, *, version: int, holds: int, tools: Sequence[PinnedTool]
) -> None:
    """What the version that `holds` asks before `version` replaces it. Raise BacktestRequired, TooManyFlips.

    The newest one counts: a replay of the same tools against that very version, of all that is recorded.
    """
    if not rules.require_backtest or version == holds:
        return
    query = (
        select(PolicyBacktest.flipped)
        .where(
            PolicyBacktest.version == version,
            PolicyBacktest.against == holds,
            PolicyBacktest.tools_digest == definitions.digest(tools),
            PolicyBacktest.is_full,
            PolicyBacktest.created_at > func.now() - _FRESH,
        )
        .order_by(PolicyBacktest.id.desc())
        .limit(1)
    )
    flipped = await session.scalar(query)
    if flipped is None:
        raise BacktestRequired(
            f"Version {holds} asks for a full backtest of its successor, at most {FRESH_HOURS} hours old:"
            f" POST /v1/policies/{version}/backtest, without `since` and with the highest `limit`."
        )
    if rules.max_flips is not None and flipped > rules.max_flips:
        raise TooManyFlips(
            f"Version {version} decides {flipped} recorded calls otherwise; version {holds} lets it be"
            f" {rules.max_flips}."
        )
