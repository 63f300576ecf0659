"""Isolation levels through the whole service: whose files and processes a server sees, and for how long it lives."""

from __future__ import annotations

import asyncio
import errno
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from sqlalchemy.exc import SQLAlchemyError

from app.runs.redaction import Redactor
from app.servers import stderr
from app.tenants.disk import NoRoom
from app.tenants.workspaces import TooManyWorkspaces
from tests.runs.faults import ScriptedModel
from tests.service import DEFAULT_MODEL_POLICY, Client, Databases, Service, Tenant, running_service


@pytest.fixture(scope="module")
async def isolating(
    scripted: ScriptedModel, databases: Databases, tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[Service]:
    folder = tmp_path_factory.mktemp("isolating")
    async with running_service(databases, folder, model=scripted.endpoint) as service:
        yield service


def policy(isolation: str, *, readonly: bool = False) -> str:
    declared = f"{{template: filesystem, root: docs, isolation: {isolation}, readonly: {str(readonly).lower()}}}"
    return DEFAULT_MODEL_POLICY.replace("{template: filesystem, root: docs}", declared)


async def told(client: Client, model: ScriptedModel, tool: str, **arguments: Any) -> str:
    """What the one tool call of a run of its own was answered."""
    model.calls(f"docs__{tool}", **arguments)
    model.says("done")
    answer = await client.ask("Do it.")
    assert answer.status_code == 200, answer.text
    text: str = model.bodies[-1]["messages"][-1]["content"]
    return text


async def servers(tenant: Tenant) -> list[dict[str, Any]]:
    items: list[dict[str, Any]] = (await tenant.admin.get("/v1/servers")).json()["items"]
    return [item for item in items if item["state"] != "ending"]


@pytest.mark.parametrize("isolation", ["tenant", "user", "run"])
async def test_who_sees_what_another_user_has_written(isolating: Service, model: ScriptedModel, isolation: str) -> None:
    tenant = await isolating.new_tenant(policy=policy(isolation))
    other, _, _ = await isolating.new_user(tenant.id)
    await told(tenant.user, model, "write_file", path="mine.md", content="the nonce of the first user")
    theirs = await told(other, model, "read_file", path="mine.md")
    listed = await told(other, model, "list_directory", path=".")
    again = await told(tenant.user, model, "read_file", path="mine.md")
    is_shared, is_kept = isolation == "tenant", isolation != "run"
    assert ("nonce" in theirs, "mine.md" in listed) == (is_shared, is_shared)
    assert ("nonce" in again) == is_kept
    assert len(await servers(tenant)) == {"tenant": 1, "user": 2, "run": 0}[isolation]


@pytest.mark.parametrize("isolation", ["tenant", "user", "run"])
async def test_a_read_only_workspace_is_the_tenants_at_every_level(
    isolating: Service, model: ScriptedModel, isolation: str
) -> None:
    tenant = await isolating.new_tenant(policy=policy(isolation, readonly=True), files={"note.md": "of all"})
    other, _, _ = await isolating.new_user(tenant.id)
    for client in (tenant.user, other):
        assert "of all" in await told(client, model, "read_file", path="note.md")
    assert len(await servers(tenant)) == {"tenant": 1, "user": 2, "run": 0}[isolation]


async def test_the_calls_of_one_run_share_its_server_which_ends_with_it(
    isolating: Service, model: ScriptedModel
) -> None:
    tenant = await isolating.new_tenant(policy=policy("run"))
    model.calls("docs__write_file", path="note.md", content="of this run")
    model.calls("docs__read_file", path="note.md")
    model.says("done")
    answer = await tenant.user.ask("Do it.")
    assert answer.status_code == 200, answer.text
    assert "of this run" in model.bodies[-1]["messages"][-1]["content"]
    assert await servers(tenant) == []
    journal = isolating.server_journal(tenant)
    assert len(journal) == 2


async def test_a_run_that_is_cancelled_ends_its_server_too(isolating: Service, model: ScriptedModel) -> None:
    tenant = await isolating.new_tenant(policy=policy("run"))
    model.calls("docs__list_directory", path=".", times=15)
    asked = asyncio.create_task(tenant.user.ask("Do it."))
    async with asyncio.timeout(20):
        while not (there := await servers(tenant)):  # noqa: ASYNC110  the service tells nobody
            await asyncio.sleep(0.01)
    assert there[0]["isolation"] == "run"
    assert there[0]["user_id"] == tenant.user_id
    await tenant.user.post(f"/v1/runs/{there[0]['run_id']}/cancel")
    await asked
    assert await servers(tenant) == []


async def test_servers_are_told_to_the_tenants_admin_with_what_they_use(
    isolating: Service, model: ScriptedModel
) -> None:
    tenant, other = await isolating.new_tenant(policy=policy("tenant")), await isolating.new_tenant(policy=None)
    await told(tenant.user, model, "list_directory", path=".")
    (server,) = await servers(tenant)
    assert (server["name"], server["template"], server["state"]) == ("docs", "filesystem", "idle")
    assert server["memory_bytes"] > 1 << 20
    assert server["memory_peak_bytes"] >= server["memory_bytes"]
    assert server["cpu_seconds"] > 0
    assert (server["failures"], server["retry_after_s"]) == (0, 0)
    assert await servers(other) == []
    metrics = (await isolating.platform.get("/metrics", headers=_bearer(isolating))).text
    assert 'bulkhead_server_cpu_seconds_total{template="filesystem"}' in metrics


def _bearer(service: Service) -> dict[str, str]:
    return {"Authorization": f"Bearer {service.metrics_token}"}


async def test_stderr_is_read_redacted_and_by_nobody_else(isolating: Service, model: ScriptedModel) -> None:
    tenant, other = await isolating.new_tenant(policy=policy("tenant")), await isolating.new_tenant(policy=None)
    await told(tenant.user, model, "list_directory", path=".")
    path = isolating.data_dir / "servers" / tenant.id / "docs.stderr"
    secret = isolating.app.state.settings.root_keys.get_secret_value()
    with path.open("a") as file:
        file.write(f"\x1b[2Jopen {isolating.data_dir.resolve()}/x failed, key {secret}\n")
    read = await tenant.admin.get("/v1/servers/docs/stderr")
    assert read.status_code == 200
    assert read.headers["content-type"].startswith("text/plain")
    assert "list_directory" in read.text
    assert "open [redacted]/x failed, key [redacted]" in read.text
    assert "\x1b" not in read.text
    assert secret not in read.text
    for stranger in (other.admin, tenant.user):
        assert (await stranger.get("/v1/servers/docs/stderr")).status_code in {403, 404}
    for name in ("..", "docs.stderr", "Docs", "%2e%2e%2fx"):
        assert (await tenant.admin.get(f"/v1/servers/{name}/stderr")).status_code in {404, 422}
    assert (await tenant.admin.get("/v1/servers/nothing/stderr")).status_code == 404


async def test_a_crash_loop_is_on_the_record_and_told_to_the_caller(isolating: Service, model: ScriptedModel) -> None:
    tenant = await isolating.new_tenant(policy=policy("tenant", readonly=True))
    await isolating.end_servers(tenant)
    starting = isolating.app.state.starter
    real, broken = starting._sandbox, _Broken(starting._sandbox)
    starting._sandbox = broken
    try:
        for _ in range(4):
            model.calls("docs__list_directory", path=".")
            answer = await tenant.user.ask("Do it.")
            assert answer.status_code == 503
    finally:
        starting._sandbox = real
    assert "may start again in 1 s" in answer.json()["detail"]
    assert broken.launches == 3
    (event,) = [event for event in await tenant.admin.events() if event["type"] == "server.crash_looping"]
    assert event["data"] == {
        "server": "docs",
        "template": "filesystem",
        "policy_version": 1,
        "user_id": None,
        "failures": 3,
        "wait_s": 1,
    }
    (server,) = await servers(tenant)
    assert (server["state"], server["failures"], server["retry_after_s"]) == ("waiting", 3, 1)


class _Broken:
    """The real sandbox with a program that ends at once."""

    name = "broken"

    def __init__(self, sandbox: Any) -> None:
        self._sandbox = sandbox
        self.launches = 0

    def launch(self, profile: Any) -> Any:
        self.launches += 1
        return self._sandbox.launch(replace(profile, argv=(profile.argv[0], "-c", "raise SystemExit(1)")))


@pytest.mark.parametrize(
    "error",
    [OSError(errno.EMFILE, "/srv/bulkhead/secret"), SQLAlchemyError("select secret"), TooManyWorkspaces(), NoRoom()],
)
async def test_what_keeps_a_server_from_starting_ends_the_run_as_unavailable(
    isolating: Service, model: ScriptedModel, error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    def launch(_profile: Any) -> Any:
        raise error

    tenant = await isolating.new_tenant(policy=policy("tenant", readonly=True))
    await isolating.end_servers(tenant)
    monkeypatch.setattr(isolating.app.state.starter, "_sandbox", SimpleNamespace(launch=launch))
    model.calls("docs__list_directory", path=".")
    answer = await tenant.user.ask("Do it.")
    assert (answer.status_code, answer.json()["code"]) == (503, "server_unavailable")
    assert "secret" not in answer.text


def test_stderr_that_is_cut_shows_no_rest_of_a_secret(tmp_path: Path) -> None:
    secret = "s3cret-of-some-length"
    redact = Redactor([secret])
    path = tmp_path / "docs.stderr"
    for offset in range(len(secret)):
        body = (secret * 8000)[offset:]
        path.write_text(body)
        shown = stderr.read_newest(path, redact) or ""
        assert len(shown) <= stderr.SHOWN_BYTES
        assert "cret-of" not in shown
    path.write_text("x" * 100)
    assert stderr.read_newest(path, redact) == "x" * 100
    assert stderr.read_newest(tmp_path / "none", redact) is None
