"""What starts and ends with a process that executes runs, whether it serves or only works."""

from __future__ import annotations

import asyncio
import gc
from collections.abc import AsyncIterator, Coroutine, Iterator
from contextlib import AsyncExitStack, asynccontextmanager
from functools import partial
from typing import Any, Final

import structlog
from anyio import to_thread
from sqlalchemy import text
from sqlalchemy.exc import ProgrammingError

from app import migration
from app.audit.heads import HeadFile
from app.audit.sealer import Sealer
from app.caller import PLATFORM_TENANT
from app.errors import ConfigurationError
from app.housekeeping import keep_house
from app.limits import service as limits
from app.platform_db import PlatformDatabase
from app.sandbox import cgroup_search
from app.settings import Settings
from app.telemetry import labels, logs, metrics
from app.tenants.workspaces import WorkspaceStore

_log = structlog.get_logger()
_CANCELLATIONS: Final = 10


@asynccontextmanager
async def alive(state: Any, *, keeps_record: bool) -> AsyncIterator[None]:
    """The parts of `state` at work inside the block; `keeps_record` where this process also seals what is recorded."""
    async with AsyncExitStack() as stack:
        await _open(state, stack, keeps_record=keeps_record)
        loops = (*_loops(state), *(_record_loops(state) if keeps_record else ()))
        state.background = tuple(start(stack, work, name) for name, work in loops)
        stack.push_async_callback(state.runs.close)
        _tell_what_is_missing(state)
        yield


async def _open(state: Any, stack: AsyncExitStack, *, keeps_record: bool) -> None:
    """In the order that lets each be closed before what it needs."""
    stack.enter_context(logs.redacting(state.secrets.redact))
    stack.push_async_callback(state.tracer.aclose)
    for client in state.outbound:
        stack.push_async_callback(client.aclose)
    stack.push_async_callback(state.platform.dispose)
    stack.push_async_callback(state.rate_limiter.close)
    await state.rate_limiter.open()
    stack.push_async_callback(state.watching.dispose)
    stack.push_async_callback(state.telling.dispose)
    stack.push_async_callback(state.database.dispose)
    stack.push_async_callback(state.sealer.close)
    await _check_schema(state.platform)
    if keeps_record:
        await to_thread.run_sync(state.head_file.check)
        stack.push_async_callback(_finish_record, state.sealer, state.head_file)
    stack.push_async_callback(state.outbox.close)
    stack.push_async_callback(state.raised.finish)
    stack.push_async_callback(state.authenticator.finish)
    await state.stored_models.refresh()
    stack.push_async_callback(state.workspaces.close)
    await _check_quota(state.settings, state.workspaces)
    # Before the relay: with version 2, other processes in the service's own group are in the way.
    state.cgroups = await to_thread.run_sync(cgroup_search.find)
    await stack.enter_async_context(state.relay)
    stack.push_async_callback(state.secrets.close)
    stack.push_async_callback(state.servers.close)
    await state.starter.open(state.cgroups or None)


def _loops(state: Any) -> Iterator[tuple[str, Coroutine[Any, Any, None]]]:
    yield "watch", state.watch.keep()
    yield "events", state.events.keep()
    yield "lag", metrics.watch_loop()
    yield "secrets", state.secrets.keep()
    yield "models", state.stored_models.keep()
    yield (
        "housekeeping",
        keep_house(
            state.pool,
            state.authenticator,
            state.platform,
            state.outbox,
            state.raised.flush,
            state.remembered.forget_erased,
            state.expire_approvals,
            partial(state.dispatch.measure, state.watching),
            partial(_measure_budgets, state.watching),
        ),
    )


async def _measure_budgets(watching: PlatformDatabase) -> None:
    if labels.shown():
        async with watching.transaction() as session:
            await limits.measure(session)


def _record_loops(state: Any) -> Iterator[tuple[str, Coroutine[Any, Any, None]]]:
    yield "sealer", state.sealer.keep()
    yield "heads", state.head_file.keep()
    yield "retention", state.retention.keep()
    yield "conversations", state.conversations.keep()
    yield "event_retention", state.event_retention.keep()
    yield "following", state.following.keep()


def start(stack: AsyncExitStack, work: Coroutine[Any, Any, None], name: str) -> asyncio.Task[None]:
    """A task that ends with the stack; that it dies before is told, and read in `/readyz`."""
    task = asyncio.create_task(work, name=name)
    task.add_done_callback(_tell_death)
    stack.push_async_callback(end, task)
    return task


def _tell_death(task: asyncio.Task[None]) -> None:
    """`/readyz` says no from now on: without it runs are not stopped, or servers not ended."""
    if not task.cancelled():
        _log.error("background.died", task=task.get_name(), exc_info=task.exception())


async def end(task: asyncio.Task[None], *, again_s: float = 3) -> None:
    """Cancel a loop and wait until it has ended; `again_s` is longer than what it does at its end.

    A library that gets what it waits for in the moment of the cancellation may lose that, as `asyncio.wait_for` of
    Python 3.11 does, and the loop goes on: it is cancelled again.
    """
    for _ in range(_CANCELLATIONS):
        task.cancel()
        if (await asyncio.wait({task}, timeout=again_s))[0]:
            return
    _log.error("background.does_not_end", task=task.get_name())


def _tell_what_is_missing(state: Any) -> None:
    if not state.sandbox.result:
        _log.error("sandbox.unavailable", reason=state.sandbox.result.reason, remedy=state.sandbox.result.remedy)
    if not state.cgroups:
        _log.warning("sandbox.no_cgroup", reason=state.cgroups.reason, remedy=state.cgroups.remedy)


async def _finish_record(sealer: Sealer, heads: HeadFile) -> None:
    """Once nobody records any more: what has been answered is sealed when the process ends."""
    await sealer.finish()
    await heads.export()


async def _check_quota(settings: Settings, workspaces: WorkspaceStore) -> None:
    """Who names `image` wants it or no service; `auto` is asked when a server shall write."""
    if settings.workspace_quota == "image" and (reason := await workspaces.writable_refusal()):
        raise ConfigurationError(f"BULKHEAD_WORKSPACE_QUOTA=image does not hold: {reason}. The log says what helps.")


async def _check_schema(platform: PlatformDatabase) -> None:
    """Refuse a schema that this code does not work on, and a platform without its reserved tenant."""
    async with platform.transaction() as session:
        try:
            # Whole, since only newer ones have `works_from`.
            told = await session.scalar(text("select to_jsonb(v) from alembic_version v")) or {}
        except ProgrammingError:  # there is no such table; what else is wrong is told as it is
            told = {}
    version = told.get("version_num")
    if reason := migration.refusal(version, told.get("works_from")):
        raise ConfigurationError(reason)
    if version != (own := migration.head()):
        _log.warning("schema.newer", schema=version, code=own)
    async with platform.transaction() as session:
        found = await session.scalar(text("select 1 from tenants where id = :id"), {"id": PLATFORM_TENANT})
    if found is None:
        raise ConfigurationError("The platform has no admin yet: run `bulkhead admin bootstrap` as the owner role.")


def settle_collector() -> None:
    """For a process that has begun: what is there stays, and no collection stops everybody to look through it.

    What outlives a look is looked at again after six, and all that has come since after eighteen. With Python's eleven
    and 121 a process had grown by 25 MB in 100,000 queries, of what tool servers left that came and went.
    """
    gc.freeze()
    gc.set_threshold(gc.get_threshold()[0], 5, 2)
