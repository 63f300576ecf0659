"""A running service for tests: the real application on a real port, its own database, real sandboxed servers."""

from __future__ import annotations

import asyncio
import os
import secrets
import ssl
import time
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final
from uuid import UUID

import httpx
from fastapi import FastAPI
from pydantic import SecretStr
from sqlalchemy import text
from sqlalchemy.ext.asyncio import create_async_engine

from app.db import Database, DatabaseUrls, create_engine
from app.embedded.bootstrap import bootstrap
from app.embedded.machine import rehearsal
from app.keyring import Keyring, new_entry
from app.listening import bound, listening, url_of
from app.main import create_app
from app.outbound.catalogue import ModelEndpoint
from app.runs.grace import Grace
from app.sandbox.choice import choose
from app.settings import Settings
from tests.openapi import Documented

Databases = Callable[[], DatabaseUrls]

POLICY = """\
schema: bulkhead/1
model: {use: rehearsal}
limits: {requests: 100000/minute, tenant_requests: 200000/minute, max_tool_calls: 20}
servers:
  docs: {template: filesystem, root: docs}
tools: {allow: ["docs__*"]}
"""
# Only root can make volumes; without them no server may write, and some tests have one that does.
_SETTINGS: dict[str, Any] = {
    "model_loopback": True,
    "jwks_loopback": True,
    # All tests come from one address, and their admins do in a minute what others do in a day.
    "api_rate": "900000/minute",
    "address_rate": "900000/minute",
    "policy_max_requests": "900000/minute",
    "policy_max_tenant_requests": "900000/minute",
    "audit_seal_s": 0.3,
    "workspace_quota": "auto" if os.geteuid() == 0 else "volume",
}
DEFAULT_MODEL_POLICY = POLICY.replace("rehearsal", "default")
# Of a client on loopback without TLS. It trusts nobody; httpx would load all public authorities, 20 ms a client.
NO_TLS: Final = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)


class Client(httpx.AsyncClient):
    """A caller with a credential."""

    async def ask(self, query: str, **extra: Any) -> httpx.Response:
        """POST /query."""
        return await self.post("/query", json={"query": query, **extra})

    async def make(self, path: str, **body: Any) -> dict[str, Any]:
        """POST what must succeed, and give the answer."""
        response = await self.post(path, **body)
        assert response.is_success, response.text
        answer: dict[str, Any] = response.json()
        return answer

    async def publish(self, policy: str, *, revoke_running: bool = False) -> int:
        """Store and publish a policy; give its version."""
        version: int = (await self.make("/v1/policies", content=policy.encode()))["version"]
        await self.make(f"/v1/policies/{version}/publish", json={"revoke_running": revoke_running})
        return version

    async def put_file(self, path: str, content: str | bytes, *, workspace: str = "docs") -> None:
        """Write a file to a workspace."""
        data = content.encode() if isinstance(content, str) else content
        response = await self.put(f"/v1/workspaces/{workspace}/files/{path}", content=data)
        assert response.is_success, response.text

    async def events(self, *, logins: bool = False, **query: Any) -> list[dict[str, Any]]:
        """All audit events that fit, the oldest first; without `logins` those of a credential's first use are not."""
        found: list[dict[str, Any]] = []
        cursor: str | None = None
        while True:
            params = query | {"limit": 200} | ({"cursor": cursor} if cursor else {})
            response = await self.get("/v1/audit/events", params=params)
            assert response.is_success, response.text
            page = response.json()
            # Without their place in the chain, which each gets a moment after it is there.
            found += [{name: item[name] for name in item.keys() - {"seq", "hash"}} for item in page["items"]]
            cursor = page["next_cursor"]
            if cursor is None:
                return [event for event in found[::-1] if logins or event["type"] != "auth.succeeded"]


@dataclass(slots=True)
class Tenant:
    """A tenant with clients of an admin and of a user."""

    id: str
    admin: Client
    user: Client
    user_id: str
    user_key_id: str
    user_key: str = field(repr=False)


@dataclass(slots=True)
class Service:
    """The running service, seen from outside and, where a test must, from inside."""

    url: str
    app: FastAPI
    data_dir: Path
    urls: DatabaseUrls = field(repr=False)
    platform: Client
    metrics_token: str = field(repr=False)
    _stack: AsyncExitStack = field(repr=False)

    async def client(self, key: str) -> Client:
        """A client with this credential, closed with the service."""
        return await self._stack.enter_async_context(new_client(self.url, key, Documented(self.app)))

    async def new_user(self, tenant_id: str, role: str = "user") -> tuple[Client, dict[str, Any], dict[str, Any]]:
        """A user of a tenant: client, user, key."""
        base = f"/v1/tenants/{tenant_id}"
        user = await self.platform.make(f"{base}/users", json={"name": secrets.token_hex(8), "role": role})
        key = await self.platform.make(f"{base}/keys", json={"user_id": user["id"], "name": "test"})
        return await self.client(key["key"]), user, key

    async def new_tenant(
        self, *, policy: str | None = POLICY, files: Mapping[str, str | bytes] | None = None
    ) -> Tenant:
        """A tenant with an admin, a user, files in the workspace `docs`, and a published policy."""
        slug = f"t-{secrets.token_hex(8)}"
        tenant_id = (await self.platform.make("/v1/tenants", json={"slug": slug}))["id"]
        admin, _, _ = await self.new_user(tenant_id, "tenant_admin")
        user, row, key = await self.new_user(tenant_id)
        for path, content in (files or {}).items():
            await admin.put_file(path, content)
        if policy is not None:
            await admin.publish(policy)
        return Tenant(tenant_id, admin, user, row["id"], key["id"], key["key"])

    def believe_leases(self) -> None:
        """As a process does that has been up for longer than a lease, of which no answer here takes a third."""
        self.app.state.watch.grace = grace = Grace(600)
        grace._ends = time.monotonic()

    async def end_servers(self, tenant: Tenant) -> None:
        """End those of the tenant that nobody uses, as time does: whoever asks next starts one."""
        pool = self.app.state.pool
        pool.end_outdated(UUID(tenant.id), None)
        if pool._closing:
            await asyncio.wait({*pool._closing})

    def server_journal(self, tenant: Tenant, server: str = "docs") -> list[str]:
        """The lines that a tool server has written to its stderr: its own journal."""
        path = self.data_dir / "servers" / tenant.id / f"{server}.stderr"
        return path.read_text().splitlines() if path.exists() else []

    def settings_of_another(self) -> dict[str, str]:
        """What a further process that serves on the same database, with the same model, has to be told."""
        settings = self.app.state.settings
        return {
            "DATABASE_APP_URL": self.urls.app,
            "DATABASE_PLATFORM_URL": self.urls.platform,
            "DATABASE_SEALER_URL": self.urls.sealer,
            "ROOT_KEYS": settings.root_keys.get_secret_value(),
            "METRICS_TOKEN": self.metrics_token,
            "MODEL_BASE_URL": settings.model_base_url,
            "MODEL_API_KEY": settings.model_api_key.get_secret_value(),
            "MODEL_NAMES": ",".join(settings.model_names),
            "MODEL_LOOPBACK": "true",
            "WORKSPACE_QUOTA": settings.workspace_quota,
        }

    async def sql(self, statement: str, *, role: str = "owner", **values: Any) -> list[Any]:
        """Run a statement as one of the roles, without a tenant."""
        engine = create_async_engine(getattr(self.urls, role))
        try:
            async with engine.begin() as connection:
                result = await connection.execute(text(statement), values)
                return list(result.all()) if result.returns_rows else []
        finally:
            await engine.dispose()


def new_client(url: str, key: str, check: Documented | None = None) -> Client:
    """A caller of the service at `url`; `check` sees every answer."""
    # Shorter than the server's 5 s, so that no request meets a connection that is just being closed.
    limits = httpx.Limits(max_connections=200, keepalive_expiry=2)
    headers = {"Authorization": f"Bearer {key}"}
    hooks: dict[str, list[Callable[..., Any]]] = {"response": [check] if check else []}
    return Client(
        base_url=url, headers=headers, timeout=60, trust_env=False, verify=NO_TLS, limits=limits, event_hooks=hooks
    )


@asynccontextmanager
async def running_service(
    databases: Databases,
    data_dir: Path,
    *,
    model: ModelEndpoint | None = None,
    works: bool = False,
    **settings: Any,
) -> AsyncIterator[Service]:
    """Start a service; `model` becomes the catalogue's entry `default`, beside the rehearsal.

    With `works` a worker executes background runs inside it.
    """
    urls = await asyncio.to_thread(databases)
    token = secrets.token_urlsafe(16)
    if model is not None:
        settings |= {
            "model_base_url": model.base_url,
            "model_api_key": SecretStr(model.api_key),
            "model_names": model.models,
        }
    chosen = Settings(
        _env_file=None,
        data_dir=data_dir,
        root_keys=SecretStr(new_entry("k1")),
        metrics_token=SecretStr(token),
        **(_SETTINGS | settings),
    )
    assert chosen.root_keys is not None
    owner = create_engine(urls.owner or "", pool_size=2)
    platform_key = await bootstrap(Database(owner), Keyring.parse(chosen.root_keys.get_secret_value()))
    await owner.dispose()
    async with started(chosen, urls, platform_key.text, works=works) as service:
        yield service


@asynccontextmanager
async def started(
    settings: Settings, urls: DatabaseUrls, platform_key: str, *, works: bool = False
) -> AsyncIterator[Service]:
    """Start a service on a database that is there, with its first admin."""
    assert settings.metrics_token is not None
    token, data_dir = settings.metrics_token.get_secret_value(), settings.data_dir
    async with AsyncExitStack() as stack:
        endpoint = await stack.enter_async_context(rehearsal())
        listener = stack.enter_context(bound("127.0.0.1", 0))
        chosen = settings.model_copy(update={"port": listener.getsockname()[1]})
        app = create_app(chosen, urls=urls, sandbox=await choose(chosen.sandbox), rehearsal=endpoint)
        await stack.enter_async_context(app.router.lifespan_context(app))
        await stack.enter_async_context(listening(app, listener))
        if works:
            from app.worker import at_work  # noqa: PLC0415  an engine and a driver that most tests do not need

            await stack.enter_async_context(at_work(app.state, urls, drain_s=0))
        stack.callback(app.state.following.close)
        stack.callback(app.state.twins.close)
        stack.push_async_callback(app.state.runs.close)  # before the connections that wait for their answers
        url = url_of(listener)
        platform = await stack.enter_async_context(new_client(url, platform_key, Documented(app)))
        yield Service(url, app, data_dir, urls, platform, token, stack)
