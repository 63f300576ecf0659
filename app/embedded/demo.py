"""The demo: two tenants with users, documents and policies, made through the service's own API."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import httpx
from pydantic import SecretStr

from app.auth.jwks import DevelopmentIssuer
from app.errors import ConfigurationError
from app.telemetry import logs

ENV_FILE: Final = "demo.env"
_CONFLICT: Final = 409
_POLICY: Final = """\
schema: bulkhead/1
model: {use: rehearsal}
instructions: You answer from the tenant's documents.
limits: {max_steps: 8, timeout_s: 60, max_tool_calls: 10, requests: 60/minute}
input: {preset: balanced}
servers:
  docs: {template: filesystem, root: docs, readonly: true, max_file_size: 1MB, allowed_extensions: [.md, .txt, .json]}
tools:
  allow: ["docs__*"]
  deny: ["*__delete*", "*__search*"]  # a search reads every file, so the rule below would not keep it out
  approve: ["docs__file_info"]  # each call waits for somebody's word, see docs/runs.md
  rules: |
    @id("drafts-are-private")
    forbid (principal, action == Action::"docs__read_file", resource)
    when { context.arguments.path like "drafts/*" };
"""
_TENANTS: Final[Mapping[str, Mapping[str, str]]] = {
    "harbor": {
        "welcome.md": "# Harbor Logistics\n\nWelcome. The night gate code of pier 7 is changed every Monday.\n",
        "tariffs.md": "# Tariffs\n\n- Container, 20 ft: 410 EUR\n- Container, 40 ft: 690 EUR\n- Reefer: 120 EUR more\n",
        "drafts/merger.md": "# Draft\n\nNobody but the board reads this: the rule drafts-are-private says so.\n",
    },
    "orchard": {
        "welcome.md": "# Orchard Clinics\n\nWelcome. Visiting hours are from 14:00 to 18:00.\n",
        "oncall.md": "# On call\n\nSurgery: Dr. Okafor. Pediatrics: Dr. Lindqvist.\n",
    },
}


@dataclass(frozen=True, slots=True)
class DemoTenant:
    """A demo tenant's credentials."""

    tenant_id: str
    admin_key: str = field(repr=False)
    user_key: str = field(repr=False)


class Demo:
    """The tenants on a running service, and the file that tells their keys."""

    def __init__(self, url: str, *, directory: Path, issuer: DevelopmentIssuer) -> None:
        self._url = url
        self._issuer = issuer
        self._file = directory / ENV_FILE

    async def prepare(self, *, platform_key: str, metrics_token: SecretStr | None) -> None:
        """Write the file of keys, readable by its owner alone; make the tenants where it holds no good keys yet."""
        values = read_env(self._file)
        with logs.without("http.request"):  # some twenty lines, of what nobody has asked for
            if not await self._is_good(values.get("BULKHEAD_API_KEY")):
                values = await self._make(platform_key)
        values["BULKHEAD_URL"] = self._url
        values["BULKHEAD_METRICS_TOKEN"] = metrics_token.get_secret_value() if metrics_token else ""
        write_env(self._file, values)

    async def _is_good(self, key: str | None) -> bool:
        if key is None:
            return False
        async with self._client(key) as client:
            return (await client.get("/v1/me")).status_code == 200

    async def _make(self, platform_key: str) -> dict[str, str]:
        async with self._client(platform_key) as client:
            harbor, orchard = [await self._make_tenant(client, slug) for slug in _TENANTS]
        return {
            "BULKHEAD_API_KEY": harbor.user_key,
            "BULKHEAD_ADMIN_KEY": harbor.admin_key,
            "BULKHEAD_OTHER_API_KEY": orchard.user_key,
            "BULKHEAD_PLATFORM_KEY": platform_key,
            "BULKHEAD_DEMO_TENANT": harbor.tenant_id,
        }

    async def _make_tenant(self, platform: httpx.AsyncClient, slug: str) -> DemoTenant:
        tenant_id = await self._free_tenant(platform, slug)
        keys = [await self._make_user(platform, tenant_id, name, role) for name, role in _USERS]
        tenant = DemoTenant(tenant_id, *keys)
        async with self._client(tenant.admin_key) as admin:
            for path, text in _TENANTS[slug].items():
                await _ask(admin, "PUT", f"/v1/workspaces/docs/files/{path}", content=text.encode())
            await _ask(
                admin, "POST", "/v1/issuers", json={"issuer": self._issuer.issuer, "jwks": self._issuer.public_jwks()}
            )
            version = (await _ask(admin, "POST", "/v1/policies", content=_POLICY.encode()))["version"]
            await _ask(admin, "POST", f"/v1/policies/{version}/publish", json={})
        return tenant

    async def _free_tenant(self, platform: httpx.AsyncClient, slug: str) -> str:
        """A start that was killed half-way leaves a tenant whose keys nobody has: the next one gets another name."""
        for name in (slug, *(f"{slug}-{number}" for number in range(2, 100))):
            response = await platform.post("/v1/tenants", json={"slug": name})
            if response.status_code != _CONFLICT:
                break
        tenant_id: str = _checked(response)["id"]
        return tenant_id

    async def _make_user(self, platform: httpx.AsyncClient, tenant_id: str, name: str, role: str) -> str:
        base = f"/v1/tenants/{tenant_id}"
        user = await _ask(platform, "POST", f"{base}/users", json={"name": name, "role": role})
        key = await _ask(platform, "POST", f"{base}/keys", json={"user_id": user["id"], "name": "demo"})
        text: str = key["key"]
        return text

    def _client(self, key: str) -> httpx.AsyncClient:
        return httpx.AsyncClient(
            base_url=self._url, headers={"Authorization": f"Bearer {key}"}, timeout=60, trust_env=False
        )


_USERS: Final = (("demo admin", "tenant_admin"), ("demo user", "user"))


async def _ask(client: httpx.AsyncClient, method: str, path: str, **body: Any) -> dict[str, Any]:
    return _checked(await client.request(method, path, **body))


def _checked(response: httpx.Response) -> dict[str, Any]:
    if response.is_error:
        asked = f"{response.request.method} {response.request.url.path}"
        raise ConfigurationError(f"The demo could not be made: {asked} answered {response.text}")
    answer: dict[str, Any] = response.json()
    return answer


def read_env(path: Path) -> dict[str, str]:
    """The NAME=value lines of a file; empty where there is none."""
    if not path.exists():
        return {}
    pairs = (line.partition("=") for line in path.read_text().splitlines() if "=" in line and not line.startswith("#"))
    return {name.strip(): value.strip() for name, _, value in pairs}


def write_env(path: Path, values: Mapping[str, str]) -> None:
    """Write NAME=value lines with mode 0600, whole or not at all."""
    staged = path.with_name(path.name + ".new")
    staged.unlink(missing_ok=True)
    descriptor = os.open(staged, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "w") as file:
        file.writelines(f"{name}={value}\n" for name, value in values.items())
        file.flush()
        os.fsync(file.fileno())
    staged.replace(path)
