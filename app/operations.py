"""What operators and their machines ask: does it live, is it ready, and its metrics."""

from __future__ import annotations

import asyncio
import hmac
import shutil
from typing import Any, Final

from fastapi import APIRouter, Depends, Request, Response
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from sqlalchemy.exc import SQLAlchemyError
from starlette.datastructures import State
from starlette.responses import PlainTextResponse

from app.auth.dependencies import counted_by_address
from app.db import Database
from app.errors import Unauthenticated
from app.problems import responses
from app.telemetry import metrics

router = APIRouter(tags=["operations"])
# What a process is asked that serves no callers, too.
probes = APIRouter(tags=["operations"])
_BY_ADDRESS: Final[Any] = Depends(counted_by_address)


@probes.head("/healthz", include_in_schema=False)
@probes.get("/healthz", summary="The process lives")
async def read_health() -> dict[str, str]:
    """Says nothing of what it needs."""
    return {"status": "ok"}


@probes.head("/readyz", include_in_schema=False, dependencies=[_BY_ADDRESS])
@probes.get(
    "/readyz",
    summary="The service can answer queries",
    responses={503: {"description": "Not ready"}},
    dependencies=[_BY_ADDRESS],
)
async def read_readiness(request: Request, response: Response) -> dict[str, Any]:
    """Database, sandbox and our own loops decide; models are named only, since theirs is not our readiness.

    Those of the settings: the names of stored ones are for who may see the catalogue.
    """
    state = request.app.state
    parts = await _parts(state)
    is_ready = all(parts.values()) and not state.is_ending
    response.status_code = 200 if is_ready else 503
    models = sorted(filter(state.catalogue.is_own, state.catalogue.endpoints))
    return {"ready": is_ready, **parts, "sandbox_detail": _sandbox(state), "models": models}


async def _parts(state: State) -> dict[str, bool]:
    return {
        "database": await _answers(state.database),
        "sandbox": bool(state.sandbox.result),
        "background": not any(task.done() for task in state.background),
    }


def _sandbox(state: State) -> dict[str, Any]:
    """What holds, what is missing, and how to get it."""
    result, groups = state.sandbox.result, state.cgroups
    return {
        "backend": state.sandbox.name,
        "reason": result.reason,
        "remedy": result.remedy,
        "note": result.note,
        "cgroup": {"available": bool(groups), "reason": getattr(groups, "reason", "")},
        "egress": state.relay.is_up,
    }


@router.get(
    "/.well-known/jwks.json",
    summary="The keys that sign identities for remote tool servers",
    dependencies=[_BY_ADDRESS],
)
async def read_identity_keys(request: Request, response: Response) -> dict[str, Any]:
    """A key set (RFC 7517), for everybody. All root keys have one here, so that a rotation can be prepared."""
    response.headers["Cache-Control"] = "public, max-age=300"
    keys: dict[str, Any] = request.app.state.identities.public_jwks()
    return keys


@router.get(
    "/.well-known/bulkhead-audit-keys.json",
    summary="The keys that verify the signed heads of the audit chain",
    dependencies=[_BY_ADDRESS],
)
async def read_audit_keys(request: Request, response: Response) -> dict[str, Any]:
    """Ed25519, each as base64 of its 32 raw bytes by its id, for everybody. Keep a copy: a verifier trusts its own."""
    response.headers["Cache-Control"] = "public, max-age=300"
    keys: dict[str, Any] = request.app.state.signers.public.document()
    return keys


@router.api_route("/openapi.json", methods=["GET", "HEAD"], include_in_schema=False, dependencies=[_BY_ADDRESS])
async def read_description(request: Request) -> dict[str, Any]:
    """OpenAPI; the framework's own route of it would be under no limit."""
    description: dict[str, Any] = request.app.openapi()
    return description


@probes.get("/metrics", summary="Prometheus metrics", responses=responses(401), response_class=PlainTextResponse)
async def read_metrics(request: Request) -> Response:
    """For the bearer of the metrics token; without one set, for nobody."""
    token = request.app.state.settings.metrics_token
    presented = request.headers.get("authorization", "").removeprefix("Bearer ")
    if token is None or not hmac.compare_digest(presented.encode(), token.get_secret_value().encode()):
        await counted_by_address(request)
        raise Unauthenticated("Metrics need the token of BULKHEAD_METRICS_TOKEN as a bearer token.")
    await _measure(request.app.state)
    return Response(generate_latest(), media_type=CONTENT_TYPE_LATEST)


async def _measure(state: State) -> None:
    """What is a figure of this moment, for the scrape that asks."""
    parts = await _parts(state)
    for part, is_up in (*parts.items(), ("egress", state.relay.is_up), ("cgroup", bool(state.cgroups))):
        metrics.IS_UP.labels(part).set(is_up)
    for role, database in (("app", state.database), ("platform", state.platform), ("watching", state.watching)):
        in_use, most = database.connections
        metrics.CONNECTIONS.labels(role).set(in_use)
        metrics.MAX_CONNECTIONS.labels(role).set(most)
    space = shutil.disk_usage(state.settings.data_dir)
    metrics.DATA_FREE.set(space.free)
    metrics.DATA_SIZE.set(space.total)


async def _answers(database: Database) -> bool:
    try:
        async with asyncio.timeout(2):
            await database.ping()
    except (SQLAlchemyError, OSError, TimeoutError):
        return False
    return True
