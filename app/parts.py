"""Builds every part of the service from the settings, with explicit arguments."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from app.audit.aggregate import MinuteCounts
from app.auth import jwks
from app.auth.service import Authenticator
from app.cursors import Cursors
from app.db import Database, DatabaseUrls, create_engine
from app.errors import ConfigurationError
from app.keyring import Keyring
from app.limits.rates import RateLimiter
from app.model_endpoints.following import StoredModels
from app.outbound import catalogue
from app.outbound.catalogue import ModelCatalogue, ModelEndpoint
from app.outbound.client import fetch, outbound_client
from app.platform_db import PlatformDatabase
from app.policies.caps import Caps
from app.policies.turns import Turns
from app.policies.versions import PolicyCache
from app.runs.backtests import Backtests
from app.runs.chats import Chats
from app.runs.executor import Executor
from app.runs.journal import Journal
from app.runs.redaction import Redactor
from app.runs.service import RunService
from app.runs.watch import Watch
from app.sandbox.cgroup_search import NoCgroups
from app.sandbox.choice import ProbedSandbox
from app.secrets.locators import ENVIRONMENT_PREFIX
from app.secrets.providers.aws import SecretsManager
from app.secrets.providers.azure import KeyVaults
from app.secrets.providers.environment import Environment
from app.secrets.providers.file import Files
from app.secrets.providers.vault import Vault
from app.secrets.store import TenantSecrets
from app.servers import installs, templates
from app.servers.egress import Egress
from app.servers.identity import Identities
from app.servers.offers import ServerOffers
from app.servers.pool import ServerPool
from app.servers.relay import EgressRelay
from app.servers.starting import Premises, Starter
from app.servers.tenant_servers import TenantServers
from app.settings import Settings, tenants_variables
from app.tenants.images import Size
from app.tenants.volumes import Volumes
from app.tenants.workspaces import WorkspaceStore


def build(
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
