"""One tree of settings, the only reader of the environment. Every field stands in .env.example."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from ipaddress import IPv4Network, IPv6Network
from pathlib import Path
from typing import Annotated, Final, Literal, Self

from pydantic import Field, FilePath, SecretStr, model_validator
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict, SettingsError

__all__ = ["Settings", "SettingsError", "unknown_names"]  # the command explains the errors of the library

# mcp-use would send queries and answers to two hosts, langsmith traces: both decide when they are imported.
_SILENCED: Final = {
    "MCP_USE_ANONYMIZED_TELEMETRY": "false",
    "LANGSMITH_TRACING": "false",
    "LANGSMITH_TRACING_V2": "false",
    "LANGCHAIN_TRACING_V2": "false",
}
os.environ.update(_SILENCED)
# What the demo writes for clients, who may have read it into the shell that starts the service.
_OF_CLIENTS: Final = frozenset(
    f"BULKHEAD_{name}"
    for name in ("URL", "API_KEY", "ADMIN_KEY", "OTHER_API_KEY", "PLATFORM_KEY", "DEMO_TENANT", "METRICS_TOKEN")
)
# Secrets of tenants that an operator keeps in the environment are named so.
_OF_TENANTS: Final = "BULKHEAD_SECRET_"


def tenants_variables(prefix: str) -> Mapping[str, str]:
    """What the environment holds for tenants: the variables of this prefix, which are no settings."""
    return {name: value for name, value in os.environ.items() if name.startswith(prefix)}


class Settings(BaseSettings):
    """What an operator may set: `BULKHEAD_<FIELD>` in the environment or in `.env`."""

    model_config = SettingsConfigDict(
        env_prefix="BULKHEAD_",
        env_file=".env",
        env_ignore_empty=True,  # an empty metrics token would open the metrics to everybody
        extra="ignore",
        frozen=True,
        hide_input_in_errors=True,
    )

    # Where workspaces, keys and the embedded Postgres live.
    data_dir: Path = Path(".bulkhead")

    host: str = "127.0.0.1"
    port: Annotated[int, Field(ge=0, le=65535)] = 8000
    # How others know this service: the issuer of the identities that remote tool servers are told.
    public_url: Annotated[str, Field(pattern=r"^https?://[A-Za-z0-9.:/_~-]+[A-Za-z0-9]$")] | None = None
    max_body_bytes: Annotated[int, Field(ge=1024)] = 1_000_000
    # How long a run goes on after its client has gone, in seconds.
    client_grace_s: Annotated[float, Field(ge=0)] = 30

    # postgresql+asyncpg:// URLs of the three roles; without them `bulkhead up` starts its own Postgres.
    database_owner_url: SecretStr | None = None
    database_app_url: SecretStr | None = None
    database_platform_url: SecretStr | None = None
    database_pool: Annotated[int, Field(ge=2, le=200)] = 16

    # `id:base64url(32 bytes)[,id:...]`; the first is the active one, the others still open what they sealed.
    root_keys: SecretStr | None = None
    metrics_token: SecretStr | None = None

    # The catalogue's entry `default`: any OpenAI-compatible endpoint.
    model_base_url: str = "https://api.openai.com/v1"
    model_api_key: SecretStr | None = None
    model_names: Annotated[tuple[str, ...], NoDecode] = ("gpt-4.1-mini",)
    model_timeout_s: Annotated[float, Field(gt=0)] = 60
    model_retries: Annotated[int, Field(ge=0, le=10)] = 2
    # Lets model endpoints live on loopback: for a local model.
    model_loopback: bool = False
    # Lets key sets (jwks_uri) live on loopback: for a local issuer. Tenants name them, so mind who they are.
    jwks_loopback: bool = False

    # `auto` is bubblewrap where it holds, else Landlock where that holds, else no tool server starts.
    sandbox: Literal["auto", "bubblewrap", "landlock"] = "auto"
    # The host users that tenants' servers get where the service is root: the first and the last. Each is given once.
    sandbox_uids: Annotated[str, Field(pattern=r"^[1-9][0-9]{3,9}-[1-9][0-9]{3,9}$")] = "2000000-2999999"
    servers_max: Annotated[int, Field(ge=1)] = 64
    servers_per_tenant: Annotated[int, Field(ge=1)] = 16
    servers_idle_s: Annotated[float, Field(gt=0)] = 300
    server_start_timeout_s: Annotated[float, Field(gt=0)] = 20
    tool_timeout_s: Annotated[float, Field(gt=0)] = 30
    # The programs that policies may name, each with its lock; without it `catalogue` in the data directory.
    server_catalogue: Path | None = None
    # A PEM bundle: the authorities that tool servers trust for https, instead of the public ones.
    server_ca_file: FilePath | None = None

    # Secrets that the platform binds to providers are read again after so long; see docs/secrets.md.
    secrets_ttl_s: Annotated[float, Field(ge=1)] = 300
    # The folder below which bindings to the provider `file` find theirs.
    secrets_dir: Path | None = None
    # Instead of AWS's own addresses: a VPC endpoint.
    secrets_aws_endpoint: str | None = None
    # The key vaults that bindings to the provider `azure` may name.
    secrets_azure_vaults: Annotated[tuple[str, ...], NoDecode] = ()
    secrets_vault_url: str | None = None
    secrets_vault_token: SecretStr | None = None
    secrets_vault_token_file: Path | None = None
    secrets_vault_namespace: str | None = None

    # Where `bulkhead egress` listens; without it the relay is a child of the service.
    egress_socket: Path | None = None
    # By template: networks that its servers may reach beside public addresses, where their policy names the host.
    egress_private_networks: Mapping[str, tuple[IPv4Network | IPv6Network, ...]] = {}

    workspaces_max: Annotated[int, Field(ge=1)] = 20
    workspace_max_file_bytes: Annotated[int, Field(ge=1)] = 10_000_000
    workspace_max_bytes: Annotated[int, Field(ge=1)] = 1_000_000_000
    workspace_max_files: Annotated[int, Field(ge=1)] = 10_000
    # What keeps servers that may write within bounds: `image` is a file system for each tenant, which takes root;
    # `volume` is the operator's word that the data directory has one of its own. `auto` is image, or nobody writes.
    workspace_quota: Literal["auto", "image", "volume"] = "auto"
    # The size of a tenant's volume, where `image` holds; of one that is there already it says nothing.
    workspace_volume_bytes: Annotated[int, Field(ge=8_000_000)] = 2_000_000_000
    workspace_volume_files: Annotated[int, Field(ge=100)] = 50_000

    # What a tenant's policy may allow one run at most; see `limits` in docs/policies.md.
    policy_max_timeout_s: Annotated[int, Field(ge=1)] = 3600
    policy_max_tool_calls: Annotated[int, Field(ge=1)] = 1000
    policy_max_steps: Annotated[int, Field(ge=1)] = 100

    # How long a run outlives the last sign of its process, in seconds, by the database's clock.
    run_lease_s: Annotated[float, Field(ge=2)] = 6
    # How often stop orders for runs in flight are read, in seconds.
    run_watch_s: Annotated[float, Field(gt=0, le=0.5)] = 0.3

    log_level: Literal["debug", "info", "warning", "error"] = "info"
    # Puts user ids on metrics; off, since every user is a series of its own.
    metrics_user_labels: bool = False

    @model_validator(mode="before")
    @classmethod
    def _split_names(cls, values: dict[str, object]) -> dict[str, object]:
        for field in ("model_names", "secrets_azure_vaults"):
            names = values.get(field)
            if isinstance(names, str):
                values = values | {field: tuple(part.strip() for part in names.split(",") if part.strip())}
        return values

    @property
    def sandbox_uid_range(self) -> tuple[int, int]:
        first, _, last = self.sandbox_uids.partition("-")
        return int(first), int(last)

    @model_validator(mode="after")
    def _uids_in_order(self) -> Self:
        first, last = self.sandbox_uid_range
        if not first <= last < 2**31:
            raise ValueError("SANDBOX_UIDS must be a first and a last host user below 2147483648")
        return self

    @model_validator(mode="after")
    def _all_urls_or_none(self) -> Self:
        urls = (self.database_owner_url, self.database_app_url, self.database_platform_url)
        if any(urls) and not (self.database_app_url and self.database_platform_url):
            raise ValueError("DATABASE_APP_URL and DATABASE_PLATFORM_URL go together")
        return self


def unknown_names(env_file: Iterable[str]) -> set[str]:
    """What of the environment, or of these names of a file, looks like a setting and is none."""
    named = {name for name in (*env_file, *os.environ) if name.startswith("BULKHEAD_")}
    known = {f"BULKHEAD_{name}".upper() for name in Settings.model_fields}
    return {name for name in named - known - _OF_CLIENTS if not name.startswith(_OF_TENANTS)}
