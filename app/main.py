"""The service: its routes over the parts, and what starts and stops with it."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Final
from uuid import UUID

from fastapi import FastAPI, Request
from prometheus_fastapi_instrumentator import Instrumentator

from app import VERSION, api_docs, operations, parameters, parts, problems, replays
from app.audit import endpoints as audit_endpoints
from app.audit.raised import Raised, RaisedErrors
from app.auth import endpoints as auth_endpoints
from app.caller import PLATFORM_TENANT
from app.checklist import endpoints as checklist_endpoints
from app.db import DatabaseUrls
from app.edge import Edge, trusted_hosts
from app.errors import AppError
from app.lifetime import alive
from app.limits import endpoints as limit_endpoints
from app.limits.refused import Refusals
from app.model_endpoints import endpoints as model_endpoints
from app.outbound.catalogue import ModelEndpoint
from app.policies import endpoints as policy_endpoints
from app.runs import endpoints as run_endpoints
from app.sandbox.choice import ProbedSandbox
from app.secrets import endpoints as secret_endpoints
from app.servers import endpoints as server_endpoints
from app.servers import templates
from app.settings import Settings
from app.telemetry import labels, metrics
from app.telemetry.requests import Observed
from app.tenants import endpoints as tenant_endpoints

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
    checklist_endpoints.router,
    operations.probes,
    operations.router,
)


def create_app(
    settings: Settings, *, urls: DatabaseUrls, sandbox: ProbedSandbox, rehearsal: ModelEndpoint | None = None
) -> FastAPI:
    """The service on this database and this sandbox. Raise ConfigurationError for what it cannot start with."""
    app = FastAPI(
        title="Bulkhead",
        version=VERSION,
        openapi_url=None,  # app/operations.py has a route for it, with a limit
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,  # the redirect would go wherever the Host header says
        # What any route may have to say. Not 500: that is a defect, which nobody is promised.
        responses=problems.responses(400, 408, 414, 422, 429, 431, 503),
        lifespan=_lifespan,
    )
    labels.show_tenants(settings.metrics_tenants)
    metrics.begin(app.version, templates.names())
    app.add_middleware(Observed)
    app.add_middleware(Refusals)
    app.add_middleware(
        Edge,
        max_body_bytes=settings.max_body_bytes,
        max_json_depth=settings.max_json_depth,
        trusted_proxies=settings.trusted_proxies,
        hosts=trusted_hosts(settings),
        has_tls=settings.tls_in_front,
    )
    problems.install(app, failed=_record_failure)
    replays.install(app)
    for router in _ROUTERS:
        app.include_router(router)
    if settings.api_docs:
        app.include_router(api_docs.router)
    app.state.parameters = parameters.declared(app.routes)
    meter = Instrumentator(excluded_handlers=["/metrics", "/healthz", "/readyz"])
    meter.add(metrics.count_http).add(metrics.count_query).instrument(app)
    for name, part in parts.build(settings, urls, sandbox, rehearsal).items():
        setattr(app.state, name, part)
    return app


@asynccontextmanager
async def _lifespan(app: FastAPI) -> AsyncIterator[None]:
    async with alive(app.state, keeps_record=True):
        yield


def _record_failure(request: Request, problem: AppError, error: Exception) -> None:
    """What a caller was told, by the name of what has failed: its text may say too much."""
    errors: RaisedErrors = request.app.state.raised
    user_id = getattr(request.state, "user_id", None)
    raised = Raised(
        getattr(request.state, "tenant_id", PLATFORM_TENANT),
        getattr(request.scope.get("route"), "path", "none"),
        problem.status,
        problem.code,
        type(error).__name__,
    )
    errors.note(raised, actor_id=UUID(user_id) if user_id else None, request_id=request.state.request_id)
