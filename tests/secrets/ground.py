"""What tests of secrets stand on: a service with providers, stores beside its own, and real servers of providers."""

from __future__ import annotations

import socket
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Final, Protocol
from uuid import UUID

import boto3
import hvac
import orjson
import trustme

from app.secrets.contract import Secrets
from app.secrets.locators import EnvironmentLocator
from app.secrets.providers.reading import Outcome, Unreadable
from app.secrets.store import TenantSecrets
from tests.runs.faults import ScriptedModel
from tests.service import Service, Tenant

ROOT_TOKEN: Final = "root-token-of-a-test"
REGION: Final = "us-east-1"


class NewStore(Protocol):
    """Makes a store like that of another process of the service."""

    def __call__(
        self, *, ttl_s: float = 300, providers: Mapping[str, Any] | None = None, root_keys: str | None = None
    ) -> TenantSecrets:
        """On the same database, with the same root keys unless others are given."""


@dataclass(frozen=True, slots=True)
class Ground:
    """The service, the folder below which its provider `file` reads, and the model that says what it is told to."""

    service: Service
    mounted: Path
    model: ScriptedModel

    @property
    def store(self) -> TenantSecrets:
        """The service's own."""
        store: TenantSecrets = self.service.app.state.secrets
        return store

    async def new_tenant(self) -> Tenant:
        """One without a policy."""
        return await self.service.new_tenant(policy=None)

    async def bind(self, tenant: Tenant, name: str, **locator: Any) -> None:
        """As an admin of the platform."""
        path = f"/v1/tenants/{tenant.id}/secret-bindings/{name}"
        answer = await self.service.platform.put(path, json={"locator": locator})
        assert answer.status_code == 200, answer.text


async def write(tenant: Tenant, name: str, value: str) -> int:
    """As the tenant's admin; the version."""
    answer = await tenant.admin.put(f"/v1/secrets/{name}", json={"value": value})
    assert answer.status_code == 200, answer.text
    version: int = answer.json()["version"]
    return version


async def resolve(store: TenantSecrets, tenant: Tenant, *names: str) -> Secrets:
    return await store.resolve(UUID(tenant.id), frozenset(names))


@dataclass(slots=True)
class Scripted:
    """A provider that says what it is told to, and counts how often it was asked."""

    text: str | Outcome = "first-text"
    asked: int = 0

    async def read(self, _locator: EnvironmentLocator) -> str:
        """Raise Unreadable where it is told to fail."""
        self.asked += 1
        if isinstance(self.text, Outcome):
            raise Unreadable(self.text)
        return self.text


@contextmanager
def _process(*command: str, is_up: Callable[[], bool]) -> Iterator[None]:
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        for _ in range(400):
            assert process.poll() is None, "it has ended"
            if is_up():
                break
            time.sleep(0.05)
        else:
            raise AssertionError("it does not come up")
        yield
    finally:
        process.terminate()
        process.wait(10)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def _listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


@dataclass(frozen=True, slots=True)
class VaultServer:
    """A Vault, and its admin."""

    url: str
    admin: hvac.Client

    def put(self, path: str, **fields: Any) -> int:
        """A new version of a secret; its number."""
        made = self.admin.secrets.kv.v2.create_or_update_secret(path, fields)
        version: int = made["data"]["version"]
        return version

    def token(self, *, ttl: str = "1h", path: str = "*") -> str:
        """One that may read below `path` of the engine."""
        self.admin.sys.create_or_update_policy("reader", f'path "secret/data/{path}" {{capabilities = ["read"]}}')
        made = self.admin.auth.token.create(policies=["reader"], ttl=ttl, no_default_policy=True)
        token: str = made["auth"]["client_token"]
        return token


@contextmanager
def vault_server() -> Iterator[VaultServer]:
    """OpenBao in its development mode, through the Vault API."""
    port, program = free_port(), Path(sys.executable).with_name("bao")
    options = (f"-dev-root-token-id={ROOT_TOKEN}", f"-dev-listen-address=127.0.0.1:{port}", "-dev-no-store-token")
    with _process(str(program), "server", "-dev", *options, is_up=lambda: _listens(port)):
        url = f"http://127.0.0.1:{port}"
        admin = hvac.Client(url, token=ROOT_TOKEN)
        for _ in range(100):  # it listens before its engine is mounted
            try:
                admin.secrets.kv.v2.create_or_update_secret("ready", {"is": "ready"})
                break
            except hvac.exceptions.VaultError:
                time.sleep(0.05)
        yield VaultServer(url, admin)
        admin.adapter.close()


@dataclass(frozen=True, slots=True)
class AwsServer:
    """Secrets Manager of moto, and a client of its admin."""

    url: str
    admin: Any


@contextmanager
def aws_server() -> Iterator[AwsServer]:
    """Moto, as a process of its own."""
    port, program = free_port(), Path(sys.executable).with_name("moto_server")
    with _process(str(program), "-H", "127.0.0.1", "-p", str(port), is_up=lambda: _listens(port)):
        url = f"http://127.0.0.1:{port}"
        yield AwsServer(url, boto3.client("secretsmanager", region_name=REGION, endpoint_url=url))


@dataclass(slots=True)
class KeyVault:
    """A stand-in for Azure Key Vault and its token service; `secrets` by name, each with its versions in order."""

    ca_file: Path
    url: str = ""
    secrets: dict[str, list[str]] = field(default_factory=dict)
    status: int = 0
    tokens: list[str] = field(default_factory=list)


class _Handler(BaseHTTPRequestHandler):
    vault: KeyVault
    protocol_version = "HTTP/1.1"

    def log_message(self, *_args: object) -> None:
        return

    def do_GET(self) -> None:
        if "openid-configuration" in self.path:
            base = f"{self.vault.url}/tenant"
            names = {"token_endpoint": f"{base}/token", "authorization_endpoint": f"{base}/authorize"}
            self._say(200, names | {"issuer": f"{base}/v2.0"})
        elif not (token := self.headers.get("Authorization", "")):
            challenge = f'Bearer authorization="{self.vault.url}/tenant", resource="https://vault.azure.net"'
            self._say(401, {}, ("WWW-Authenticate", challenge))
        elif self.vault.status:
            self._say(self.vault.status, {"error": {"code": "Refused", "message": "no"}})
        else:
            self.vault.tokens.append(token)
            self._secret()

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        self._say(200, {"access_token": "an-access-token", "token_type": "Bearer", "expires_in": 3600})

    def _secret(self) -> None:
        _, _, name, version = self.path.partition("?")[0].split("/")
        versions = self.vault.secrets.get(name, [])
        number = int(version or len(versions))
        if not 0 < number <= len(versions):
            self._say(404, {"error": {"code": "SecretNotFound", "message": "no such secret"}})
            return
        self._say(200, {"value": versions[number - 1], "id": f"{self.vault.url}/secrets/{name}/{number}"})

    def _say(self, status: int, body: dict[str, Any], *headers: tuple[str, str]) -> None:
        data = orjson.dumps(body)
        self.send_response(status)
        for name, value in (("Content-Type", "application/json"), ("Content-Length", str(len(data))), *headers):
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(data)


@contextmanager
def key_vault(folder: Path) -> Iterator[KeyVault]:
    """Over TLS, by the name that its certificate has."""
    authority = trustme.CA()
    vault = KeyVault(folder / "key-vault-ca.pem")
    authority.cert_pem.write_to_path(str(vault.ca_file))
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert("127.0.0.1").configure_cert(context)
    with ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"vault": vault})) as server:
        server.socket = context.wrap_socket(server.socket, server_side=True)
        vault.url = f"https://127.0.0.1:{server.server_address[1]}"
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
        thread.start()
        yield vault
        server.shutdown()
        thread.join(10)
