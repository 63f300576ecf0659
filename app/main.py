"""The service: its routes over the parts, and what starts and stops with it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Final
from uuid import UUID

import structlog
from anyio import to_thread
from fastapi import FastAPI, Request
from prometheus_fastapi_instrumentator import Instrumentator
from sqlalchemy import text
from sqlalchemy.exc import SQLAlchemyError

from app import migration, operations, parts, problems, replays
from app.audit import endpoints as audit_endpoints
from app.audit.events import Event, EventType
from app.audit.heads import HeadFile
from app.audit.outbox import Outbox
from app.audit.sealer import Sealer
from app.auth import endpoints as auth_endpoints
from app.caller import PLATFORM_TENANT
from app.db import DatabaseUrls
from app.edge import Edge
from app.errors import AppError, ConfigurationError
from app.housekeeping import keep_house
from app.limits import endpoints as limit_endpoints
from app.limits.refused import Refusals
from app.model_endpoints import endpoints as model_endpoints
from app.outbound.catalogue import ModelEndpoint
from app.platform_db import PlatformDatabase
from app.policies import endpoints as policy_endpoints
from app.runs import endpoints as run_endpoints
from app.sandbox import cgroup_search
from app.sandbox.choice import ProbedSandbox
from app.secrets import endpoints as secret_endpoints
from app.servers import endpoints as server_endpoints
from app.servers import templates
from app.settings import Settings
from app.telemetry import labels, logs, metrics
from app.telemetry.requests import Observed
from app.tenants import endpoints as tenant_endpoints
from app.tenants.workspaces import WorkspaceStore

_log = structlog.get_logger()
_ROUTERS: Final = (
    *run_endpoints.routers,
    policy_endpoints.router,
    *tenant_endpoints.routers,
    auth_endpoints.router,
    audit_endpoints.router,
    secret_endpoints.router,
    model_endpoints.router,
    limit_endpoints.router,
    *server_endpoints.routers,
    operations.router,
)


def create_app(
    settings: Settings, *, urls: DatabaseUrls, sandbox: ProbedSandbox, rehearsal: ModelEndpoint | None = None
) -> FastAPI:
    """The service on this database and this sandbox. Raise ConfigurationError for what it cannot start with."""
    app = FastAPI(
        title="Bulkhead",
        version="0.1.0",
        openapi_url=None,  # app/operations.py has a route for it, with a limit
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,  # the redirect would go wherever the Host header says
        responses=problems.responses(429, 500, 503),  # what any route may have to say
        lifespan=_lifespan,
    )
    labels.show_tenants(settings.metrics_tenants)
    metrics.begin(app.version, templates.names())
    app.add_middleware(Observed)
    app.add_middleware(Refusals)
    app.add_middleware(Edge, max_body_bytes=settings.max_body_bytes, trusted_proxies=settings.trusted_proxies)
    problems.install(app, failed=_record_failure)
    replays.install(app)
    for router in _ROUTERS:
        app.include_router(router)
    meter = Instrumentator(excluded_handlers=["/metrics", "/healthz", "/readyz"])
    meter.add(metrics.count_http).add(metrics.count_query).instrument(app)
    for name, part in parts.build(settings, urls, sandbox, rehearsal).items():
        setattr(app.state, name, part)
    return app


@asynccontextmanager
async def _lifespan(app: FastAPI) -> AsyncIterator[None]:
    state = app.state
    async with AsyncExitStack() as stack:
        stack.enter_context(logs.redacting(state.secrets.redact))
        stack.push_async_callback(state.tracer.aclose)
        for client in state.outbound:
            stack.push_async_callback(client.aclose)
        stack.push_async_callback(state.platform.dispose)
        stack.push_async_callback(state.rate_limiter.close)
        await state.rate_limiter.open()
        stack.push_async_callback(state.watching.dispose)
        stack.push_async_callback(state.database.dispose)
        stack.push_async_callback(state.sealer.close)
        await _check_schema(state.platform)
        await to_thread.run_sync(state.head_file.check)
        stack.push_async_callback(_finish_record, state.sealer, state.head_file)
        stack.push_async_callback(state.outbox.close)
        await state.stored_models.refresh()
        stack.push_async_callback(state.workspaces.close)
        await _check_quota(state.settings, state.workspaces)
        # Before the relay: with version 2, other processes in the service's own group are in the way.
        state.cgroups = await to_thread.run_sync(cgroup_search.find)
        await stack.enter_async_context(state.relay)
        stack.push_async_callback(state.secrets.close)
        stack.push_async_callback(state.servers.close)
        await state.starter.open(state.cgroups or None)
        state.background = (
            asyncio.create_task(state.watch.keep(), name="watch"),
            asyncio.create_task(state.sealer.keep(), name="sealer"),
            asyncio.create_task(state.head_file.keep(), name="heads"),
            asyncio.create_task(state.retention.keep(), name="retention"),
            asyncio.create_task(metrics.watch_loop(), name="lag"),
            asyncio.create_task(state.secrets.keep(), name="secrets"),
            asyncio.create_task(state.stored_models.keep(), name="models"),
            asyncio.create_task(
                keep_house(
                    state.pool, state.authenticator, state.platform, state.outbox, state.remembered.forget_erased
                ),
                name="housekeeping",
            ),
        )
        for task in state.background:
            task.add_done_callback(_tell_death)
            stack.push_async_callback(_end, task)
        stack.push_async_callback(state.runs.close)
        if not state.sandbox.result:
            _log.error("sandbox.unavailable", reason=state.sandbox.result.reason, remedy=state.sandbox.result.remedy)
        if not state.cgroups:
            _log.warning("sandbox.no_cgroup", reason=state.cgroups.reason, remedy=state.cgroups.remedy)
        yield


def _record_failure(request: Request, problem: AppError, error: Exception) -> None:
    """What a caller was told, by the name of what has failed: its text may say too much."""
    outbox: Outbox = request.app.state.outbox
    user_id = getattr(request.state, "user_id", None)
    data = {
        "request_id": request.state.request_id,
        "route": getattr(request.scope.get("route"), "path", "none"),
        "status": problem.status,
        "code": problem.code,
        "error": type(error).__name__,
    }
    event = Event(EventType.ERROR_RAISED, actor_id=UUID(user_id) if user_id else None, data=data)
    outbox.put(getattr(request.state, "tenant_id", PLATFORM_TENANT), event)


def _tell_death(task: asyncio.Task[None]) -> None:
    """`/readyz` says no from now on: without it runs are not stopped, or servers not ended."""
    if not task.cancelled():
        _log.error("background.died", task=task.get_name(), exc_info=task.exception())


async def _end(task: asyncio.Task[None]) -> None:
    task.cancel()
    await asyncio.wait({task})


async def _finish_record(sealer: Sealer, heads: HeadFile) -> None:
    """Once nobody records any more: what has been answered is sealed when the process ends."""
    await sealer.finish()
    await heads.export()


async def _check_quota(settings: Settings, workspaces: WorkspaceStore) -> None:
    """Who names `image` wants it or no service; `auto` is asked when a server shall write."""
    if settings.workspace_quota == "image" and (reason := await workspaces.writable_refusal()):
        raise ConfigurationError(f"BULKHEAD_WORKSPACE_QUOTA=image does not hold: {reason}. The log says what helps.")


async def _check_schema(platform: PlatformDatabase) -> None:
    """Refuse a schema that this code was not written for, and a platform without its reserved tenant."""
    expected = migration.head()
    async with platform.transaction() as session:
        try:
            actual = await session.scalar(text("select version_num from alembic_version"))
        except SQLAlchemyError:
            actual = None
    if actual != expected:
        raise ConfigurationError(f"The database's schema is {actual}, this code needs {expected}: `bulkhead migrate`.")
    async with platform.transaction() as session:
        found = await session.scalar(text("select 1 from tenants where id = :id"), {"id": PLATFORM_TENANT})
    if found is None:
        raise ConfigurationError("The platform has no admin yet: run `bulkhead admin bootstrap` as the owner role.")
