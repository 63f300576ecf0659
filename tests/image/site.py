"""What containers of the image are connected to: Postgres behind TLS, models on loopback, folders of their user."""

from __future__ import annotations

import asyncio
import json
import os
import secrets
import socket
import threading
from collections.abc import Iterator, Mapping
from contextlib import AbstractAsyncContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, TypeVar

import httpx
from sqlalchemy import make_url

from app.embedded.postgres import EmbeddedPostgres
from app.keyring import new_entry
from app.outbound.catalogue import ModelEndpoint
from tests.image import containers
from tests.image.containers import PROFILE, UID
from tests.servers.postgres.ground import Front, make_trust
from tests.service import NO_TLS

T = TypeVar("T")
POLICY: Final = """\
schema: bulkhead/1
model: {use: default}
servers:
  docs: {template: filesystem, root: docs}
tools: {allow: ["docs__*"]}
"""
_CLONE: Final = {
    "names": ["clone"],
    "action": "SCMP_ACT_ALLOW",
    "args": [{"index": 0, "value": 0x7E020000, "valueTwo": 0, "op": "SCMP_CMP_MASKED_EQ"}],
}


@dataclass(frozen=True, slots=True)
class Site:
    """What all processes of one deployment are told, and what only its migrations are."""

    folder: Path
    env: Mapping[str, str]
    owner_url: str

    @property
    def options(self) -> list[str]:
        """What their containers mount."""
        mounts = {"data": "/var/lib/bulkhead", "run": "/run/bulkhead", "trust/ca.pem": "/etc/postgres-ca.pem:ro"}
        return [word for source, target in mounts.items() for word in ("--volume", f"{self.folder / source}:{target}")]

    @property
    def url(self) -> str:
        """Where its service answers."""
        return f"http://127.0.0.1:{self.env['BULKHEAD_PORT']}"

    def client(self, key: str = "") -> httpx.Client:
        """A caller of it."""
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        return httpx.Client(base_url=self.url, headers=headers, timeout=60, trust_env=False, verify=NO_TLS)

    def readiness(self) -> tuple[int, dict[str, Any]]:
        """What `/readyz` says; 0 where nobody does."""
        with self.client() as client:
            try:
                response = client.get("/readyz")
            except httpx.TransportError:
                return 0, {}
            answer: dict[str, Any] = response.json()
            return response.status_code, answer

    def bootstrapped(self, *options: str) -> str:
        """Migrate and make the first admin, each in a container of its own; the admin's key."""
        env = {**self.env, "BULKHEAD_DATABASE_OWNER_URL": self.owner_url}
        for words in (("migrate",), ("migrate",), ("admin", "bootstrap")):
            ended = containers.run(*words, env=env, options=[*self.options, *options])
            assert ended.status == 0, ended.complaint
        return ended.output.strip()

    def new_tenant(self, platform_key: str, documents: Mapping[str, str]) -> str:
        """A tenant with documents and a published policy; the key of a user of it."""
        with self.client(platform_key) as platform:
            tenant_id = _made(platform, "/v1/tenants", {"slug": f"t-{secrets.token_hex(4)}"})["id"]
            keys = [self._new_key(platform, tenant_id, role) for role in ("tenant_admin", "user")]
        with self.client(keys[0]) as admin:
            for path, text in documents.items():
                assert admin.put(f"/v1/workspaces/docs/files/{path}", content=text.encode()).is_success
            stored = admin.post("/v1/policies", content=POLICY.encode())
            assert stored.is_success, stored.text
            _made(admin, f"/v1/policies/{stored.json()['version']}/publish", {})
        return keys[1]

    def _new_key(self, platform: httpx.Client, tenant_id: str, role: str) -> str:
        base = f"/v1/tenants/{tenant_id}"
        user = _made(platform, f"{base}/users", {"name": role, "role": role})
        key: str = _made(platform, f"{base}/keys", {"user_id": user["id"], "name": "test"})["key"]
        return key


def _made(client: httpx.Client, path: str, body: Mapping[str, Any]) -> dict[str, Any]:
    response = client.post(path, json=body)
    assert response.is_success, response.text
    answer: dict[str, Any] = response.json()
    return answer


class Beside:
    """A loop in a thread of its own, so that what containers ask for answers while a test waits for them."""

    def __init__(self) -> None:
        self.loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self.loop.run_forever, daemon=True)
        self._thread.start()

    @contextmanager
    def inside(self, context: AbstractAsyncContextManager[T]) -> Iterator[T]:
        """The context, entered and left in that loop."""
        entered = asyncio.run_coroutine_threadsafe(context.__aenter__(), self.loop).result(30)
        try:
            yield entered
        finally:
            asyncio.run_coroutine_threadsafe(context.__aexit__(None, None, None), self.loop).result(30)

    def end(self) -> None:
        """Leave no thread."""
        self.loop.call_soon_threadsafe(self.loop.stop)
        self._thread.join(10)
        self.loop.close()


@contextmanager
def site(beside: Beside, postgres: EmbeddedPostgres, folder: Path, model: ModelEndpoint) -> Iterator[Site]:
    """A deployment of which nothing runs yet; its database is there, and empty."""
    authority, tls = make_trust(folder / "trust", "localhost")
    front = Front(str(postgres._reachable_sockets() / ".s.PGSQL.5432"), tls)
    urls = postgres.provision(f"image_{secrets.token_hex(4)}")
    for name in ("data", "run"):
        (folder / name).mkdir(mode=0o700)
        os.chown(folder / name, UID, UID)
    with beside.inside(front.serving()):

        def public(url: str) -> str:
            """The same role at the place where others find it."""
            parsed = make_url(url).set(host="localhost", port=front.port, query={"ssl": "verify-full"})
            return parsed.render_as_string(hide_password=False)

        env = {
            "PGSSLROOTCERT": "/etc/postgres-ca.pem",
            "BULKHEAD_HOST": "127.0.0.1",
            "BULKHEAD_PORT": str(_free_port()),
            "BULKHEAD_WORKER_PORT": str(_free_port()),
            "BULKHEAD_DATABASE_APP_URL": public(urls.app),
            "BULKHEAD_DATABASE_PLATFORM_URL": public(urls.platform),
            "BULKHEAD_DATABASE_SEALER_URL": public(urls.sealer),
            "BULKHEAD_ROOT_KEYS": new_entry("k1"),
            "BULKHEAD_MODEL_BASE_URL": model.base_url,
            "BULKHEAD_MODEL_API_KEY": model.api_key,
            "BULKHEAD_MODEL_NAMES": ",".join(model.models),
            "BULKHEAD_MODEL_LOOPBACK": "true",
            "BULKHEAD_EGRESS_SOCKET": "/run/bulkhead/egress.sock",
        }
        assert authority == folder / "trust/ca.pem"
        yield Site(folder, env, public(urls.owner or ""))


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def walls(folder: Path) -> dict[str, list[str]]:
    """The options of each kind of node, by the backend that holds there."""
    return {
        "landlock": ["--security-opt", f"seccomp={moby_like(folder)}"],
        "bubblewrap": ["--security-opt", f"seccomp={PROFILE}", "--security-opt", "unmask=/proc/*"],
    }


def moby_like(folder: Path) -> Path:
    """Our profile without what we have added: no new namespaces, no mounts, as in Docker's and containerd's own."""
    profile = json.loads(PROFILE.read_text())
    profile["syscalls"][-1] = _CLONE
    return _written(folder / "moby.json", profile)


def without(folder: Path, call: str) -> Path:
    """Our profile without one of the calls that we have added."""
    profile = json.loads(PROFILE.read_text())
    profile["syscalls"][-1]["names"].remove(call)
    if call == "clone":
        profile["syscalls"].append(_CLONE)
    return _written(folder / f"without-{call}.json", profile)


def _written(path: Path, profile: Mapping[str, Any]) -> Path:
    path.write_text(json.dumps(profile))
    return path
