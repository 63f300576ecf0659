"""One tree of settings, the only one that takes them from the environment. Every field stands in .env.example."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from ipaddress import IPv4Network, IPv6Network
from pathlib import Path
from typing import Annotated, Final, Literal, Self
from uuid import UUID

from dotenv.parser import parse_stream
from pydantic import Field, FilePath, SecretStr, field_validator, model_validator
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict, SettingsError

__all__ = ["Settings", "SettingsError", "lost_line", "unknown_names"]  # the command explains the errors of the library

# What the demo writes for clients, who may have read it into the shell that starts the service.
_OF_CLIENTS: Final = frozenset(
    f"BULKHEAD_{name}"
    for name in ("URL", "API_KEY", "ADMIN_KEY", "OTHER_API_KEY", "PLATFORM_KEY", "DEMO_TENANT", "METRICS_TOKEN")
)
# Secrets of tenants that an operator keeps in the environment are named so.
_OF_TENANTS: Final = "BULKHEAD_SECRET_"
_HOST_NAME: Final = r"^([a-z0-9]([a-z0-9.-]*[a-z0-9])?|\[[0-9a-f:.]+\])$"
_HTTP_URL: Final = r"^https?://[A-Za-z0-9\[][^\s?#]*$"
_DATABASE_URL: Final = "postgresql+asyncpg://"
_RATE: Final = r"^[1-9][0-9]{0,5}/(second|minute|hour|day)$"


def tenants_variables(prefix: str) -> Mapping[str, str]:
    """What the environment holds for tenants: the variables of this prefix, which are no settings."""
    return {name: value for name, value in os.environ.items() if name.startswith(prefix)}


# Above zero: nothing could run within a budget of nothing.
_USD: Final = r"^(0\.0*[1-9][0-9]*|[1-9][0-9]{0,6}(\.[0-9]{1,6})?)$"


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
    # Says that a proxy with TLS stands in front: without it nothing is served beyond loopback.
    tls_in_front: bool = False
    # By which names requests may come, without ports; empty: loopback's, and the host of the public URL.
    trusted_hosts: Annotated[tuple[Annotated[str, Field(pattern=_HOST_NAME)], ...], NoDecode] = ()
    # The page /docs, which lets people read and try the API.
    api_docs: bool = True

    # What a request may be, before anybody knows who sends it: bytes, and levels within each other of JSON.
    max_body_bytes: Annotated[int, Field(ge=1024)] = 1_000_000
    max_json_depth: Annotated[int, Field(ge=8, le=500)] = 64
    max_url_bytes: Annotated[int, Field(ge=1024, le=65536)] = 8192
    max_headers: Annotated[int, Field(ge=20, le=1000)] = 100
    max_head_bytes: Annotated[int, Field(ge=4096, le=1_048_576)] = 65_536
    # How long its head may take, the next 64 KiB of its body, and a client to read as much of an answer.
    head_timeout_s: Annotated[float, Field(gt=0, le=300)] = 10
    body_timeout_s: Annotated[float, Field(gt=0, le=300)] = 30
    send_timeout_s: Annotated[float, Field(gt=0, le=300)] = 30
    # How long a connection stays open between two requests.
    keep_alive_s: Annotated[int, Field(ge=1, le=3600)] = 5
    # Connections that are open at once, in all and of one address that is no trusted proxy's.
    connections_max: Annotated[int, Field(ge=16)] = 4000
    connections_per_address: Annotated[int, Field(ge=4)] = 500
    # How long a run goes on after its client has gone, in seconds.
    client_grace_s: Annotated[float, Field(ge=0)] = 30

    # postgresql+asyncpg:// URLs of the four roles; without them `bulkhead up` starts its own Postgres.
    database_owner_url: SecretStr | None = None
    database_app_url: SecretStr | None = None
    database_platform_url: SecretStr | None = None
    database_sealer_url: SecretStr | None = None
    database_pool: Annotated[int, Field(ge=2, le=200)] = 16

    # `id:base64url(32 bytes)[,id:...]`; the first is the active one, the others still open what they sealed.
    root_keys: SecretStr | None = None
    metrics_token: SecretStr | None = None
    # Keys of the same form, from which those follow that sign the audit chain; without them the root keys are used.
    audit_keys: SecretStr | None = None
    # Public keys of signing keys that are gone, as `bulkhead audit keys` prints them: what they signed still holds.
    audit_retired_keys_file: FilePath | None = None
    # How often what has been recorded is chained, in seconds.
    audit_seal_s: Annotated[float, Field(gt=0, le=60)] = 1
    # Where the signed heads of all chains are appended, and how often, in seconds.
    audit_heads_file: Path | None = None
    audit_heads_s: Annotated[float, Field(ge=1)] = 60
    # How long events are kept, in days; 0 is for ever, and the database itself keeps 30 days in any case.
    audit_retention_days: Annotated[int, Field(ge=0)] = 400

    # The catalogue's entry `default`: any OpenAI-compatible endpoint.
    model_base_url: Annotated[str, Field(pattern=_HTTP_URL)] = "https://api.openai.com/v1"
    model_api_key: SecretStr | None = None
    model_names: Annotated[tuple[str, ...], NoDecode] = ("gpt-4.1-mini",)
    # What its models cost, by name: [{"from": day, "input": USD, "output": USD}] of a million tokens, as texts.
    model_prices: Mapping[str, tuple[Mapping[str, str], ...]] = {}
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
    # What a tenant's policy may allow its runs together at most; without the last three, a policy needs no budget.
    policy_max_concurrent_runs: Annotated[int, Field(ge=1)] = 1000
    policy_max_user_concurrent_runs: Annotated[int, Field(ge=1)] = 1000
    policy_max_tokens_per_day: Annotated[int, Field(ge=1)] | None = None
    policy_max_cost_usd_per_day: Annotated[str, Field(pattern=_USD)] | None = None
    policy_max_tool_calls_per_day: Annotated[int, Field(ge=1)] | None = None
    # Of queries in a moving window, of one user and of the tenant: both hold whatever has been published.
    policy_max_requests: Annotated[str, Field(pattern=_RATE)] = "6000/minute"
    policy_max_tenant_requests: Annotated[str, Field(pattern=_RATE)] = "6000/minute"

    # Runs that one process has under way at once. Those beyond wait in turn: so many, so many of one tenant, so long.
    runs_max: Annotated[int, Field(ge=1)] = 64
    queue_max: Annotated[int, Field(ge=0)] = 500
    queue_per_tenant: Annotated[int, Field(ge=0)] = 50
    queue_wait_s: Annotated[float, Field(ge=0)] = 30

    # async+valkey:// or async+valkeys://, user:password@host:port/0: where many processes count requests together.
    limits_url: SecretStr | None = None
    # The processes that serve: while the storage of the limits is away, each lets through its part of every limit.
    replicas: Annotated[int, Field(ge=1)] = 1
    # Requests of one caller on all routes but the query's, which the policy bounds.
    api_rate: Annotated[str, Field(pattern=_RATE)] = "600/minute"
    # Requests of one address without a credential that holds.
    address_rate: Annotated[str, Field(pattern=_RATE)] = "120/minute"
    # Networks of proxies whose X-Forwarded-For is believed.
    trusted_proxies: Annotated[tuple[IPv4Network | IPv6Network, ...], NoDecode] = ()

    # Background runs that one worker has under way at once, and where it answers probes and gives its metrics.
    worker_runs: Annotated[int, Field(ge=2, le=1000)] = 32
    worker_port: Annotated[int, Field(ge=0, le=65535)] = 8001
    # Background runs of one tenant: under way or next at once, on all workers together, and queued.
    background_per_tenant: Annotated[int, Field(ge=1)] = 8
    background_queued: Annotated[int, Field(ge=1)] = 10_000
    # How many processes may die with a background run; that the database is lost is no death.
    run_attempts: Annotated[int, Field(ge=1, le=1000)] = 5
    # For how long in all a background run is put off that no process can take up, before it ends, in seconds.
    run_claim_s: Annotated[int, Field(ge=1, le=604_800)] = 3600
    # How long runs under way may go on once their process is asked to end, in seconds.
    drain_s: Annotated[float, Field(ge=0, le=3600)] = 25
    # Streams of events that are open at once: of this process, and of one user on it.
    streams_max: Annotated[int, Field(ge=1, le=100_000)] = 2_000
    streams_per_user: Annotated[int, Field(ge=1)] = 20
    # How often a stream says that it lives, and how long a client may take to read before it is cut off, in seconds.
    stream_heartbeat_s: Annotated[float, Field(ge=1, le=300)] = 15
    stream_send_s: Annotated[float, Field(ge=0.1, le=300)] = 20
    # How long the events of runs are kept at least, in days: they go by whole months.
    events_retention_days: Annotated[int, Field(ge=1, le=3650)] = 30
    # How long a run outlives the last sign of its process, in seconds, by the database's clock.
    run_lease_s: Annotated[float, Field(ge=2)] = 6
    # How often stop orders for runs in flight are read, in seconds.
    run_watch_s: Annotated[float, Field(gt=0, le=0.5)] = 0.3

    log_level: Literal["debug", "info", "warning", "error"] = "info"
    # Where lines of the log go instead of stdout; see docs/observability.md.
    log_file: Path | None = None
    # The collector that takes traces as OTLP over HTTP, as a whole URL; without it there are none.
    otlp_endpoint: Annotated[str, Field(pattern=r"^https?://[^\s]+$")] | None = None
    # `name=value,...`: what is sent to it along with traces, such as its credential.
    otlp_headers: SecretStr | None = None
    trace_ratio: Annotated[float, Field(ge=0, le=1)] = 1.0
    # Lets the sampled flag of a request's traceparent decide: for a proxy of yours that sets it for everybody.
    trace_trust_callers: bool = False
    # Entries of the model catalogue that are told the trace of each turn.
    trace_models: Annotated[tuple[str, ...], NoDecode] = ()
    # Puts queries, answers, tool arguments and results into traces: whoever reads those reads all tenants' texts.
    trace_content: bool = False
    # Puts user ids on metrics; off, since every user is a series of its own.
    metrics_user_labels: bool = False
    # Tenants that get series of their own; all the others are one, `other`.
    metrics_tenants: Annotated[tuple[UUID, ...], NoDecode, Field(max_length=100)] = ()

    @model_validator(mode="before")
    @classmethod
    def _split_names(cls, values: dict[str, object]) -> dict[str, object]:
        lists = ("model_names", "secrets_azure_vaults", "trusted_proxies", "trusted_hosts", "metrics_tenants")
        for field in (*lists, "trace_models"):
            names = values.get(field)
            if isinstance(names, str):
                values = values | {field: tuple(part.strip() for part in names.split(",") if part.strip())}
        return values

    @field_validator("database_owner_url", "database_app_url", "database_platform_url", "database_sealer_url")
    @classmethod
    def _names_the_driver(cls, url: SecretStr | None) -> SecretStr | None:
        if url is not None and not url.get_secret_value().startswith(_DATABASE_URL):
            raise ValueError(f"must begin with {_DATABASE_URL}")
        return url

    @property
    def sandbox_uid_range(self) -> tuple[int, int]:
        first, _, last = self.sandbox_uids.partition("-")
        return int(first), int(last)

    @model_validator(mode="after")
    def _uids_in_order(self) -> Self:
        first, last = self.sandbox_uid_range
        if not first <= last < 2**31:
            raise ValueError("BULKHEAD_SANDBOX_UIDS must be a first and a last host user below 2147483648")
        return self

    @model_validator(mode="after")
    def _tenants_share_a_worker(self) -> Self:
        if self.background_per_tenant >= self.worker_runs:
            raise ValueError(
                "BULKHEAD_BACKGROUND_PER_TENANT must be less than BULKHEAD_WORKER_RUNS,"
                " else one tenant can fill a worker"
            )
        return self

    @model_validator(mode="after")
    def _kept_for_a_month(self) -> Self:
        if 0 < self.audit_retention_days <= 30:
            raise ValueError("BULKHEAD_AUDIT_RETENTION_DAYS must be 0, for ever, or more than 30")
        return self

    @model_validator(mode="after")
    def _all_urls_or_none(self) -> Self:
        serving = (self.database_app_url, self.database_platform_url, self.database_sealer_url)
        if any((self.database_owner_url, *serving)) and not all(serving):
            *others, last = (f"BULKHEAD_DATABASE_{role}_URL" for role in ("APP", "PLATFORM", "SEALER"))
            raise ValueError(f"{', '.join(others)} and {last} go together")
        return self


def unknown_names(env_file: Iterable[str]) -> set[str]:
    """What of the environment, or of these names of a file, looks like a setting and is none."""
    named = {name for name in (*env_file, *os.environ) if name.startswith("BULKHEAD_")}
    known = {f"BULKHEAD_{name}".upper() for name in Settings.model_fields}
    return {name for name in named - known - _OF_CLIENTS if not name.startswith(_OF_TENANTS)}


def lost_line(env_file: Path) -> int | None:
    """The number of the first line that is no NAME=value: it would be passed over, and with it what it should set."""
    if not env_file.is_file():
        return None
    with env_file.open(encoding="utf-8") as file:
        for statement in parse_stream(file):
            if statement.error or (statement.key is not None and statement.value is None):
                text = statement.original.string
                return statement.original.line + text[: len(text) - len(text.lstrip())].count("\n")
    return None
