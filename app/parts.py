"""Builds every part of the service from the settings, with explicit arguments."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import httpx

from app import run_parts
from app.audit.aggregate import MinuteCounts
from app.audit.heads import HeadFile
from app.audit.outbox import Outbox
from app.audit.raised import RaisedErrors
from app.audit.retention import Retention
from app.audit.sealer import Sealer
from app.audit.signing import Signers, read_keys
from app.auth import jwks
from app.auth.service import Authenticator
from app.checklist.service import Checklist
from app.cursors import Cursors
from app.db import Database, DatabaseUrls, create_engine
from app.errors import ConfigurationError
from app.keyring import Keyring
from app.limits.admission import Admission, Most
from app.limits.attempts import Attempts
from app.limits.rates import RateLimiter
from app.limits.shared import SharedWindows
from app.limits.turns import TIMEOUT_S
from app.model_endpoints.following import StoredModels
from app.outbound import catalogue
from app.outbound.catalogue import ModelCatalogue, ModelEndpoint
from app.outbound.client import fetch, outbound_client
from app.outbound.prices import micro_usd
from app.platform_db import PlatformDatabase
from app.policies.caps import Caps
from app.policies.turns import Turns
from app.policies.versions import PolicyCache
from app.runs.agent.chats import Chats
from app.runs.lifecycle.budgets import Budgets
from app.runs.redaction import Redactor
from app.sandbox.cgroup_search import NoCgroups
from app.sandbox.choice import ProbedSandbox
from app.secrets.providers import configured
from app.secrets.store import TenantSecrets
from app.servers import installs, templates
from app.servers.egress import Egress
from app.servers.identity import Identities
from app.servers.offers import ServerOffers
from app.servers.pool import ServerPool
from app.servers.relay import EgressRelay
from app.servers.starting import Premises, Starter
from app.servers.tenant_servers import TenantServers
from app.settings import Settings
from app.telemetry.traces import Off, Tracer, headers
from app.tenants.discarding import Discarding
from app.tenants.forgetting import Forgetting
from app.tenants.images import Size
from app.tenants.volumes import Volumes
from app.tenants.workspaces import WorkspaceStore


def build(
    settings: Settings, urls: DatabaseUrls, sandbox: ProbedSandbox, rehearsal: ModelEndpoint | None
) -> Mapping[str, Any]:
    """Every part by the name that routes ask for it."""
    models = _checked_models(settings, rehearsal)
    keyring = _keyring(settings)
    database = Database(create_engine(urls.app, pool_size=settings.database_pool), is_shared=True)
    platform = PlatformDatabase(create_engine(urls.platform, pool_size=settings.database_pool))
    # Connections of its own: a flood of credentials to look up must not hold up what stops runs.
    watching = PlatformDatabase(create_engine(urls.platform, pool_size=2))
    outbound, key_client = _build_clients(settings, has_rehearsal=rehearsal is not None)
    secrets = _build_secrets(settings, database, watching, keyring)
    redact = Redactor(_unspeakable(settings, models), of_tenant=secrets.redact, open_from=secrets.open_from)
    relay = EgressRelay(path=settings.egress_socket, ca_file=settings.server_ca_file)
    egress = _build_egress(settings, urls, relay, database, keyring)
    identities = Identities(keyring, settings.public_url)
    serving = _build_servers(settings, database, sandbox, egress, redact, identities, secrets)
    policies = _build_policies(settings, database)
    ground = run_parts.Ground(
        settings=settings,
        urls=urls,
        database=database,
        watching=watching,
        keyring=keyring,
        policies=policies["policies"],
        budgets=Budgets(database, models),
        chats=_build_chats(settings, models, outbound),
        serving=serving,
        redact=redact,
    )
    runs = run_parts.build(ground)
    return {
        **_build_process(settings),
        **serving,
        **_build_callers(database, platform, keyring, key_client),
        **_build_sealing(settings, urls, keyring, database),
        **_build_limits(settings, database, platform),
        **runs,
        **policies,
        **_build_watched(watching, keyring, models, redact),
        "remembered": Forgetting(watching, policies["policies"], runs["executor"], secrets),
        "secrets": secrets,
        "relay": relay,
        **_build_checklist(settings, urls, sandbox, serving, is_demo=rehearsal is not None),
        "database": database,
        "platform": platform,
        "watching": watching,
        "identities": identities,
        "outbound": (outbound, key_client),
    }


def _build_checklist(
    settings: Settings, urls: DatabaseUrls, sandbox: ProbedSandbox, serving: Mapping[str, Any], *, is_demo: bool
) -> dict[str, Any]:
    """The checklist, and the sandbox that it attacks."""
    refusal = serving["workspaces"].writable_refusal
    return {"sandbox": sandbox, "checklist": Checklist(settings, urls, sandbox, is_demo, refusal)}


def check(settings: Settings) -> None:
    """Raise ConfigurationError for settings that nothing can be built with, before the database is asked anything."""
    _checked_models(settings, None)
    _keyring(settings)


def _build_process(settings: Settings) -> dict[str, Any]:
    """What is about the process; the rest of it is set once it is at work."""
    later = {"cgroups": NoCgroups("nothing has been started yet"), "background": (), "is_ending": False}
    return {"settings": settings, "tracer": _build_tracer(settings)} | later


def _build_callers(
    database: Database, platform: PlatformDatabase, keyring: Keyring, key_client: httpx.AsyncClient
) -> dict[str, Any]:
    """What knows who calls, and what they have been told."""
    remote_keys = jwks.JwksCache(lambda url: fetch(key_client, url, max_bytes=jwks.MAX_DOCUMENT_BYTES))
    return {
        "keyring": keyring,
        "cursors": Cursors(keyring),
        "refusals": MinuteCounts(),
        "authenticator": Authenticator(database=database, platform=platform, keyring=keyring, remote_keys=remote_keys),
    }


def _build_watched(
    watching: PlatformDatabase, keyring: Keyring, models: ModelCatalogue, redact: Redactor
) -> dict[str, Any]:
    stored = StoredModels(platform=watching, keyring=keyring, catalogue=models, conceal=redact.learn)
    outbox = Outbox(watching)
    return {"outbox": outbox, "raised": RaisedErrors(outbox), "catalogue": models, "stored_models": stored}


def _build_clients(settings: Settings, *, has_rehearsal: bool) -> tuple[httpx.AsyncClient, httpx.AsyncClient]:
    """For models, and for key sets. The demo's model is on loopback; the key sets that tenants name never are, unless
    an operator says so.
    """
    allow_loopback = settings.model_loopback or has_rehearsal
    models = outbound_client(allow_loopback=allow_loopback, read_timeout_s=settings.model_timeout_s)
    return models, outbound_client(allow_loopback=settings.jwks_loopback)


def _build_policies(settings: Settings, database: Database) -> dict[str, Any]:
    caps = _caps(settings)
    return {"caps": caps, "policies": PolicyCache(database, caps), "turns": Turns()}


def _caps(settings: Settings) -> Caps:
    cost = settings.policy_max_cost_usd_per_day
    return Caps(
        settings.policy_max_steps,
        settings.policy_max_timeout_s,
        settings.policy_max_tool_calls,
        settings.policy_max_concurrent_runs,
        settings.policy_max_user_concurrent_runs,
        settings.policy_max_tokens_per_day,
        None if cost is None else micro_usd(cost),
        settings.policy_max_tool_calls_per_day,
        settings.policy_max_requests,
        settings.policy_max_tenant_requests,
    )


def _checked_models(settings: Settings, rehearsal: ModelEndpoint | None) -> ModelCatalogue:
    models = catalogue.from_settings(settings, rehearsal)
    if not models.endpoints:
        raise ConfigurationError("There is no model: set BULKHEAD_MODEL_API_KEY, or start the demo with `make up`.")
    if unknown := sorted(settings.egress_private_networks.keys() - templates.names()):
        raise ConfigurationError(f"BULKHEAD_EGRESS_PRIVATE_NETWORKS: there is no template {', '.join(unknown)}.")
    return models


def _build_limits(settings: Settings, database: Database, platform: PlatformDatabase) -> dict[str, Any]:
    url = settings.limits_url
    shared = SharedWindows(url.get_secret_value(), timeout_s=50 * TIMEOUT_S) if url else None
    limiter = RateLimiter(shared, replicas=settings.replicas)
    most = Most(settings.policy_max_requests, settings.policy_max_tenant_requests)
    return {
        "rate_limiter": limiter,
        "admission": Admission(limiter, database, api_rate=settings.api_rate, most=most),
        "gate": Attempts(limiter, platform, address_rate=settings.address_rate),
    }


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
    return TenantSecrets(
        database=database,
        platform=platform,
        keyring=keyring,
        providers=configured.from_settings(settings),
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
    erasing = {"discard": Discarding(data_dir / "workspaces", volumes), "forgetting": (starter.forget,)}
    return {**erasing, "workspaces": workspaces, "pool": pool, "starter": starter, "servers": servers, "offers": offers}


def _build_sealing(settings: Settings, urls: DatabaseUrls, keyring: Keyring, database: Database) -> dict[str, Any]:
    sealing = Database(create_engine(urls.sealer, pool_size=4))
    own = settings.audit_keys
    retired = read_keys(settings.audit_retired_keys_file) if settings.audit_retired_keys_file else None
    keys = Keyring.parse(own.get_secret_value(), source="BULKHEAD_AUDIT_KEYS") if own else keyring
    signers = Signers(keys, retired=retired)
    heads = HeadFile(sealing, settings.audit_heads_file, keys=signers.public, every_s=settings.audit_heads_s)
    sealer = Sealer(sealing, signers, every_s=settings.audit_seal_s)
    days = settings.audit_retention_days
    retention = Retention(sealing=sealing, database=database, signers=signers, days=days)
    return {"sealer": sealer, "signers": signers, "head_file": heads, "retention": retention}


def _build_chats(settings: Settings, models: ModelCatalogue, client: httpx.AsyncClient) -> Chats:
    timeout_s, retries = settings.model_timeout_s, settings.model_retries
    return Chats(models, client, timeout_s=timeout_s, retries=retries, traced=settings.trace_models)


def _build_tracer(settings: Settings) -> Tracer:
    if settings.otlp_endpoint is None:
        return Off()
    from app.telemetry.otlp import OtlpTracer  # noqa: PLC0415  the SDK, which a service without traces does not load

    return OtlpTracer(
        settings.otlp_endpoint,
        headers=headers(settings.otlp_headers.get_secret_value() if settings.otlp_headers else ""),
        ratio=settings.trace_ratio,
        trusts_callers=settings.trace_trust_callers,
        with_content=settings.trace_content,
    )


def _keyring(settings: Settings) -> Keyring:
    if settings.root_keys is None:
        raise ConfigurationError("Set BULKHEAD_ROOT_KEYS: without root keys nothing can be sealed or verified.")
    return Keyring.parse(settings.root_keys.get_secret_value(), source="BULKHEAD_ROOT_KEYS")


def _unspeakable(settings: Settings, models: ModelCatalogue) -> list[str]:
    """What no tool result may carry to a model and no stderr to an admin: our secrets, and where things lie here."""
    own = (
        *(settings.metrics_token, settings.root_keys, settings.audit_keys, settings.secrets_vault_token),
        settings.limits_url,
    )
    secrets = [secret.get_secret_value() for secret in own if secret]
    secrets += headers(settings.otlp_headers.get_secret_value() if settings.otlp_headers else "").values()
    return [*secrets, *(endpoint.api_key for endpoint in models.endpoints.values()), str(settings.data_dir.resolve())]
