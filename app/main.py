"""Builds the service: every part with explicit arguments, the routes, and what starts and stops with it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any, Final

import structlog
from anyio import to_thread
from fastapi import FastAPI
from prometheus_fastapi_instrumentator import Instrumentator
from prometheus_fastapi_instrumentator.metrics import default as http_metrics
from sqlalchemy import text
from sqlalchemy.exc import SQLAlchemyError

from app import migration, operations, problems, replays
from app.audit import endpoints as audit_endpoints
from app.audit.aggregate import MinuteCounts
from app.auth import endpoints as auth_endpoints
from app.auth import jwks
from app.auth.service import Authenticator
from app.caller import PLATFORM_TENANT
from app.cursors import Cursors
from app.db import Database, DatabaseUrls, create_engine
from app.edge import Edge
from app.errors import ConfigurationError
from app.housekeeping import keep_house
from app.keyring import Keyring
from app.limits.rates import RateLimiter
from app.model_endpoints import endpoints as model_endpoints
from app.model_endpoints.following import StoredModels
from app.outbound import catalogue
from app.outbound.catalogue import ModelCatalogue, ModelEndpoint
from app.outbound.client import fetch, outbound_client
from app.platform_db import PlatformDatabase
from app.policies import endpoints as policy_endpoints
from app.policies.caps import Caps
from app.policies.turns import Turns
from app.policies.versions import PolicyCache
from app.runs import endpoints as run_endpoints
from app.runs.backtests import Backtests
from app.runs.chats import Chats
from app.runs.executor import Executor
from app.runs.journal import Journal
from app.runs.redaction import Redactor
from app.runs.service import RunService
from app.runs.watch import Watch
from app.sandbox import cgroup_search
from app.sandbox.cgroup_search import NoCgroups
from app.sandbox.choice import ProbedSandbox
from app.secrets import endpoints as secret_endpoints
from app.secrets.locators import ENVIRONMENT_PREFIX
from app.secrets.providers.aws import SecretsManager
from app.secrets.providers.azure import KeyVaults
from app.secrets.providers.environment import Environment
from app.secrets.providers.file import Files
from app.secrets.providers.vault import Vault
from app.secrets.store import TenantSecrets
from app.servers import endpoints as server_endpoints
from app.servers import installs, templates
from app.servers.egress import Egress
from app.servers.identity import Identities
from app.servers.offers import ServerOffers
from app.servers.pool import ServerPool
from app.servers.relay import EgressRelay
from app.servers.starting import Premises, Starter
from app.servers.tenant_servers import TenantServers
from app.settings import Settings, tenants_variables
from app.telemetry import logs
from app.telemetry.metrics import count_query
from app.tenants import endpoints as tenant_endpoints
from app.tenants.images import Size
from app.tenants.volumes import Volumes
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
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,  # the redirect would go wherever the Host header says
        responses=problems.responses(500, 503),  # what any route may have to say
        lifespan=_lifespan,
    )
    app.add_middleware(Edge, max_body_bytes=settings.max_body_bytes)
    problems.install(app)
    replays.install(app)
    for router in _ROUTERS:
        app.include_router(router)
    meter = Instrumentator(excluded_handlers=["/metrics", "/healthz", "/readyz"])
    meter.add(http_metrics()).add(count_query).instrument(app)
    for name, part in _build(settings, urls, sandbox, rehearsal).items():
        setattr(app.state, name, part)
    return app


def _build(
    settings: Settings, urls: DatabaseUrls, sandbox: ProbedSandbox, rehearsal: ModelEndpoint | None
) -> Mapping[str, Any]:
    """Every part by the name that routes ask for it."""
    models = catalogue.from_settings(settings, rehearsal)
    _check_settings(settings, models)
    keyring = _keyring(settings)
    database = Database(create_engine(urls.app, pool_size=settings.database_pool))
    platform = PlatformDatabase(create_engine(urls.platform, pool_size=settings.database_pool))
    # Connections of its own: a flood of credentials to look up must not hold up what stops runs.
    watching = PlatformDatabase(create_engine(urls.platform, pool_size=2))
    caps = Caps(settings.policy_max_steps, settings.policy_max_timeout_s, settings.policy_max_tool_calls)
    allow_loopback = settings.model_loopback or rehearsal is not None
    outbound = outbound_client(allow_loopback=allow_loopback, read_timeout_s=settings.model_timeout_s)
    # The demo's model is on loopback; the key sets that tenants name never are, unless an operator says so.
    key_client = outbound_client(allow_loopback=settings.jwks_loopback)
    remote_keys = jwks.JwksCache(lambda url: fetch(key_client, url, max_bytes=jwks.MAX_DOCUMENT_BYTES))
    secrets = _build_secrets(settings, database, watching, keyring)
    redact = Redactor(_unspeakable(settings, models), of_tenant=secrets.redact)
    relay = EgressRelay(path=settings.egress_socket, ca_file=settings.server_ca_file)
    egress = _build_egress(settings, urls, relay, database, keyring)
    identities = Identities(keyring, settings.public_url)
    serving = _build_servers(settings, database, sandbox, egress, redact, identities, secrets)
    chats = Chats(models, outbound, timeout_s=settings.model_timeout_s, retries=settings.model_retries)
    return {
        **serving,
        **_build_runs(settings, database, watching, keyring, chats, serving, redact),
        "settings": settings,
        "secrets": secrets,
        "relay": relay,
        "cgroups": NoCgroups("nothing has been started yet"),
        "background": (),
        "sandbox": sandbox,
        "database": database,
        "platform": platform,
        "watching": watching,
        "keyring": keyring,
        "identities": identities,
        "cursors": Cursors(keyring),
        "outbound": (outbound, key_client),
        "catalogue": models,
        "stored_models": StoredModels(platform=watching, keyring=keyring, catalogue=models, conceal=redact.learn),
        "caps": caps,
        "policies": PolicyCache(database, caps),
        "turns": Turns(),
        "rate_limiter": RateLimiter(),
        "rate_refusals": MinuteCounts(),
        "authenticator": Authenticator(database=database, platform=platform, keyring=keyring, remote_keys=remote_keys),
    }


def _check_settings(settings: Settings, models: ModelCatalogue) -> None:
    if not models.endpoints:
        raise ConfigurationError("There is no model: set BULKHEAD_MODEL_API_KEY, or start the demo with `make up`.")
    if unknown := sorted(settings.egress_private_networks.keys() - templates.names()):
        raise ConfigurationError(f"BULKHEAD_EGRESS_PRIVATE_NETWORKS: there is no template {', '.join(unknown)}.")


def _build_egress(
    settings: Settings, urls: DatabaseUrls, relay: EgressRelay, database: Database, keyring: Keyring
) -> Egress:
    return Egress(
        relay=relay,
        database=database,
        keyring=keyring,
        private_networks={name: [*map(str, found)] for name, found in settings.egress_private_networks.items()},
        own=[(settings.host, settings.port), *urls.places()],
    )


def _build_secrets(
    settings: Settings, database: Database, platform: PlatformDatabase, keyring: Keyring
) -> TenantSecrets:
    token = settings.secrets_vault_token
    vault = Vault(
        settings.secrets_vault_url,
        token=token.get_secret_value() if token else None,
        token_file=settings.secrets_vault_token_file,
        namespace=settings.secrets_vault_namespace,
    )
    return TenantSecrets(
        database=database,
        platform=platform,
        keyring=keyring,
        providers={
            "environment": Environment(tenants_variables(ENVIRONMENT_PREFIX)),
            "file": Files(settings.secrets_dir),
            "aws": SecretsManager(settings.secrets_aws_endpoint),
            "azure": KeyVaults(settings.secrets_azure_vaults),
            "vault": vault,
        },
        ttl_s=settings.secrets_ttl_s,
    )


def _build_servers(
    settings: Settings,
    database: Database,
    sandbox: ProbedSandbox,
    egress: Egress,
    redact: Redactor,
    identities: Identities,
    secrets: TenantSecrets,
) -> dict[str, Any]:
    data_dir = settings.data_dir.resolve()
    volumes = Volumes(
        data_dir / "workspaces",
        data_dir / "volumes",
        quota=settings.workspace_quota,
        size=Size(settings.workspace_volume_bytes, settings.workspace_volume_files),
    )
    workspaces = WorkspaceStore(
        data_dir / "workspaces",
        max_workspaces=settings.workspaces_max,
        max_file_bytes=settings.workspace_max_file_bytes,
        max_total_bytes=settings.workspace_max_bytes,
        max_files=settings.workspace_max_files,
        volumes=volumes,
    )
    pool = ServerPool(
        maximum=settings.servers_max, per_tenant=settings.servers_per_tenant, idle_s=settings.servers_idle_s
    )
    starter = Starter(
        database=database,
        sandbox=sandbox,
        workspaces=workspaces,
        egress=egress,
        timeout_s=settings.server_start_timeout_s,
        premises=Premises(
            logs=data_dir / "servers",
            installs=installs.below(data_dir, settings.server_catalogue),
            ca_file=settings.server_ca_file,
        ),
        secrets=secrets,
        identities=identities,
    )
    wait_s = settings.server_start_timeout_s
    servers = TenantServers(database=database, starter=starter, pool=pool, wait_s=wait_s, redact=redact.for_tenant)
    offers = ServerOffers(data_dir, settings.server_catalogue)
    return {"workspaces": workspaces, "pool": pool, "starter": starter, "servers": servers, "offers": offers}


def _build_runs(
    settings: Settings,
    database: Database,
    watching: PlatformDatabase,
    keyring: Keyring,
    chats: Chats,
    serving: Mapping[str, Any],
    redact: Redactor,
) -> dict[str, Any]:
    journal = Journal(database)
    executor = Executor(
        journal=journal,
        chats=chats,
        servers=serving["servers"],
        redact=redact,
        tool_timeout_s=settings.tool_timeout_s,
    )
    lease_s = settings.run_lease_s
    runs = RunService(database=database, keyring=keyring, journal=journal, executor=executor, lease_s=lease_s)
    watch = Watch(
        platform=watching, executor=executor, pool=serving["pool"], every_s=settings.run_watch_s, lease_s=lease_s
    )
    backtests = Backtests(database=database, keyring=keyring)
    return {"runs": runs, "watch": watch, "backtests": backtests}


def _keyring(settings: Settings) -> Keyring:
    if settings.root_keys is None:
        raise ConfigurationError("Set BULKHEAD_ROOT_KEYS: without root keys nothing can be sealed or verified.")
    return Keyring.parse(settings.root_keys.get_secret_value())


def _unspeakable(settings: Settings, models: ModelCatalogue) -> list[str]:
    """What no tool result may carry to a model and no stderr to an admin: our secrets, and where things lie here."""
    own = (settings.metrics_token, settings.root_keys, settings.secrets_vault_token)
    secrets = [secret.get_secret_value() for secret in own if secret]
    return [*secrets, *(endpoint.api_key for endpoint in models.endpoints.values()), str(settings.data_dir.resolve())]


@asynccontextmanager
async def _lifespan(app: FastAPI) -> AsyncIterator[None]:
    state = app.state
    async with AsyncExitStack() as stack:
        stack.enter_context(logs.redacting(state.secrets.redact))
        for client in state.outbound:
            stack.push_async_callback(client.aclose)
        stack.push_async_callback(state.platform.dispose)
        stack.push_async_callback(state.watching.dispose)
        stack.push_async_callback(state.database.dispose)
        await _check_schema(state.platform)
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
            asyncio.create_task(state.secrets.keep(), name="secrets"),
            asyncio.create_task(state.stored_models.keep(), name="models"),
            asyncio.create_task(keep_house(state.pool, state.authenticator, state.platform), name="housekeeping"),
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


def _tell_death(task: asyncio.Task[None]) -> None:
    """`/readyz` says no from now on: without it runs are not stopped, or servers not ended."""
    if not task.cancelled():
        _log.error("background.died", task=task.get_name(), exc_info=task.exception())


async def _end(task: asyncio.Task[None]) -> None:
    task.cancel()
    await asyncio.wait({task})


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
