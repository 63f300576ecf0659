"""The procedures of docs/operations.md that need a service: incidents, backup and restore, new root keys.

Each block is run as the page has it. One service is all of theirs: what it has been through is in its backup.
"""

from __future__ import annotations

import asyncio
import re
import secrets
import subprocess
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any, Final
from uuid import UUID

import httpx
import pytest
from pydantic import SecretStr
from sqlalchemy import make_url
from typer.testing import CliRunner

from app.audit_cli.commands import audit
from app.db import DatabaseUrls
from app.embedded.postgres import EmbeddedPostgres
from app.keyring import new_entry
from app.operator_cli.keys import keys
from app.settings import Settings
from tests.operations.pages import CLIENTS, block, make_folder, run
from tests.service import DEFAULT_MODEL_POLICY, Client, Databases, Service, Tenant, running_service, started
from tests.slow_model import SlowModel, Turn, slow_model

# The promise is a second; the machine that tests this may be busy with other things.
SOON: Final = timedelta(seconds=3)
ONCE: Final = {"Idempotency-Key": "before-the-backup"}
SINCE: Final = {"Idempotency-Key": "after-the-backup"}
NONCE: Final = "barometer-7f3a"
_PASSWORD: Final = "of-the-backup"


@dataclass(slots=True)
class Scene:
    """A service whose model holds every second turn, and a folder to run the page's blocks in."""

    service: Service
    model: SlowModel
    folder: Path
    tenant: Tenant

    async def run(self, heading: str, number: int = 0, **more: str) -> str:
        """Run a block as an operator with the keys of both admins."""
        keys = {"ADMIN": self.tenant.admin, "PLATFORM": self.service.platform}
        named = {f"BULKHEAD_{name}_KEY": text_of(client) for name, client in keys.items()}
        return await run(block(heading, number), self.folder, {"BULKHEAD_URL": self.service.url, **named, **more})

    async def take_off(self, user: Client) -> tuple[asyncio.Task[httpx.Response], Turn]:
        """A run that has called its tool once and waits for the model."""
        query = secrets.token_hex(8)
        turn = self.model.turns[query]
        asking = asyncio.create_task(user.ask(query))
        await asyncio.wait_for(turn.arrived.wait(), 30)
        return asking, turn

    async def asks(self, user: Client) -> httpx.Response:
        """A query whose model does not wait."""
        query = secrets.token_hex(8)
        self.model.turns[query].released.set()
        return await user.ask(query)


def text_of(client: Client) -> str:
    return client.headers["Authorization"].removeprefix("Bearer ")


@pytest.fixture(scope="module")
async def scene(databases: Databases, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Scene]:
    folder = make_folder(tmp_path_factory.mktemp("operator"))
    async with (
        slow_model() as (model, endpoint),
        running_service(databases, folder / "data", model=endpoint, audit_heads_file=folder / "heads.jsonl") as service,
    ):
        tenant = await service.new_tenant(policy=DEFAULT_MODEL_POLICY, files={"note.md": "hello"})
        yield Scene(service, model, folder, tenant)
        model.release_all()


@pytest.fixture(autouse=True)
def _nobody_is_held(scene: Scene) -> Iterator[None]:
    yield
    scene.model.release_all()


# Incidents


async def test_the_kill_switch_stops_a_run_in_flight_and_what_is_lifted_goes_on(scene: Scene) -> None:
    asking, _ = await scene.take_off(scene.tenant.user)
    engaged = await scene.run("The kill switch")
    answer = await asking
    assert (answer.status_code, answer.json()["code"]) == (409, "cancelled")
    at = moments(await scene.service.platform.events(type="switch.engaged"))[-1]
    ended = moments(await scene.tenant.admin.events(type="run.finished"))[-1]
    assert ended - at < SOON
    assert '"scope":"all"' in engaged
    assert (await scene.asks(scene.tenant.user)).json()["code"] == "cancelled"
    await scene.run("The kill switch", 1)
    assert (await scene.asks(scene.tenant.user)).json()["answer"] == "done"


async def test_a_leaked_key_ends_with_its_runs_and_the_record_says_what_it_did(scene: Scene) -> None:
    user, row, key = await scene.service.new_user(scene.tenant.id)
    asking, _ = await scene.take_off(user)
    said = await scene.run("A leaked API key", KEY_ID=key["id"], USER_ID=row["id"])
    assert (await asking).json()["code"] == "cancelled"
    assert (await user.get("/v1/me")).status_code == 401
    assert {"auth.succeeded", "query.received", "tool.decided"} <= types(said)


async def test_a_hijacked_server_is_called_no_more_and_its_doings_are_listed(scene: Scene) -> None:
    asking, turn = await scene.take_off(scene.tenant.user)
    said = await scene.run("A hijacked tool server")
    turn.released.set()
    decisions = [(call["decision"], call["rule"]) for call in (await asking).json()["tool_calls"]]
    assert [decision for decision, _ in decisions] == ["allowed", "denied"]
    assert decisions[1][1] == "kill_switch"
    assert "tool.decided" in said
    switch = (await scene.tenant.admin.get("/v1/switches")).json()["items"][0]["id"]
    assert (await scene.tenant.admin.delete(f"/v1/switches/{switch}")).is_success


async def test_a_compromised_model_endpoint_serves_no_run_any_more(scene: Scene) -> None:
    body = {"name": "evil", "base_url": "https://models.example", "models": ["a"], "credential": "sk-none"}
    endpoint = (await scene.service.platform.make("/v1/platform/models", json=body))["id"]
    asking, _ = await scene.take_off(scene.tenant.user)
    await scene.run("A compromised model endpoint", ENDPOINT_ID=endpoint)
    assert (await asking).json()["code"] == "cancelled"
    assert not (await scene.service.platform.get(f"/v1/platform/models/{endpoint}")).json()["is_enabled"]
    await scene.run("The kill switch", 1)


async def test_a_runaway_tenant_is_disabled_and_enabled(scene: Scene) -> None:
    said = await scene.run("A runaway tenant", TENANT_ID=scene.tenant.id)
    assert '"model":"default/slow"' in said
    assert (await scene.tenant.user.get("/v1/me")).status_code == 401
    await scene.run("A runaway tenant", 1, TENANT_ID=scene.tenant.id)
    assert (await scene.tenant.user.get("/v1/me")).status_code == 200


async def test_an_api_key_gets_a_successor(scene: Scene) -> None:
    said = await scene.run("API keys", KEY_ID=scene.tenant.user_key_id)
    assert '"key":"bh_' in said
    assert (await scene.tenant.user.get("/v1/me")).status_code == 200, "the old one goes on for as long as was named"


async def test_a_tenant_is_erased_by_these_steps(scene: Scene) -> None:
    tenant = await scene.service.new_tenant(policy=None)
    slug = (await scene.service.platform.get(f"/v1/tenants/{tenant.id}")).json()["slug"]
    await scene.run("Erasing a tenant", TENANT_ID=tenant.id, SLUG=slug)
    assert (await scene.service.platform.get(f"/v1/tenants/{tenant.id}")).json()["status"] == "erased"
    assert (await tenant.user.get("/v1/me")).status_code == 401


def moments(events: list[dict[str, Any]]) -> list[datetime]:
    return [datetime.fromisoformat(event["at"]) for event in events]


def types(said: str) -> set[str]:
    """The types of all events that were printed."""
    return {part.partition('"')[0] for part in said.split('"type":"')[1:]}


# Backup and restore


@dataclass(slots=True)
class Backup:
    """What was backed up of a service that went on, and a database that was made from the backup."""

    settings: Settings
    restored: DatabaseUrls = field(repr=False)
    tenant: Tenant
    run: dict[str, Any]
    queued: str
    made: str
    revoked: Client
    since: dict[str, str]
    owner_refused: str

    @property
    def old(self) -> str:
        """The root key that all was made with, `k1`."""
        assert self.settings.root_keys is not None
        return self.settings.root_keys.get_secret_value()

    async def command(self, group: Any, *words: str, retired: Path | None = None, root_keys: str) -> tuple[int, str]:
        """A command on the restored database: exit code and output."""
        roles = ("owner", "app", "platform", "sealer")
        changes: dict[str, Any] = {f"database_{role}_url": SecretStr(getattr(self.restored, role)) for role in roles}
        changes |= {"root_keys": SecretStr(root_keys), "audit_retired_keys_file": retired}
        settings = self.settings.model_copy(update=changes)
        result = await asyncio.to_thread(CliRunner().invoke, group, list(words), obj=lambda: settings)
        assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
        return result.exit_code, result.output


@pytest.fixture(scope="module")
async def backup(scene: Scene, postgres: EmbeddedPostgres) -> Backup:
    """The service is backed up and lives on; the backup is restored beside its database."""
    service, folder = scene.service, scene.folder
    (folder / "backup").mkdir()
    tenant = await service.new_tenant(files={"note.md": f"the word is {NONCE}"})
    answered = (await tenant.user.ask("What does note.md say?")).json()
    assert NONCE in answered["answer"]
    queued = (await tenant.user.make("/v1/runs", json={"query": "What does note.md say?"}))["run_id"]
    assert (await tenant.admin.put("/v1/secrets/tickets", json={"value": "a-sealed-text"})).is_success
    made = (await tenant.admin.make("/v1/users", json={"name": "before", "role": "user"}, headers=ONCE))["id"]
    endpoint = {"name": "kept", "base_url": "https://models.example", "models": ["a"], "credential": "sk-sealed"}
    await service.platform.make("/v1/platform/models", json=endpoint)
    revoked, _, key = await service.new_user(tenant.id)
    await _export(service)
    refused = await _back_up(postgres, service, folder)
    # What comes now is not in the backup.
    assert (await tenant.admin.delete(f"/v1/keys/{key['id']}")).is_success
    since = {"user": (await tenant.admin.make("/v1/users", json={"name": "s", "role": "user"}, headers=SINCE))["id"]}
    since["run"] = (await tenant.user.ask("list the files")).json()["run_id"]
    await _export(service)
    restored = await asyncio.to_thread(postgres.provision, "restored")
    url = _libpq(postgres.url("postgres", "restored"))
    await run(block("Restore into an empty machine", 1), folder, {"NEW_URL": url})
    settings = service.app.state.settings
    return Backup(settings, restored, tenant, answered, queued, made, revoked, since, refused)


async def _back_up(postgres: EmbeddedPostgres, service: Service, folder: Path) -> str:
    """By the page; gives what the owner is told who tries the same."""
    url = service.urls.owner or ""
    database = make_url(url).database or ""
    environment = {
        "ADMIN_URL": _libpq(postgres.url("postgres", database)),
        "BACKUP_PASSWORD": _PASSWORD,
        "BACKUP_URL": _libpq(url, username="bulkhead_backup", password=_PASSWORD),
    }
    await run(block("Back up a Postgres of your own"), folder, environment)
    await run(block("Back up a Postgres of your own", 1), folder, environment)
    as_owner = [str(CLIENTS / "pg_dump"), "--format=custom", "--file=/dev/null", _libpq(url)]
    done = await asyncio.to_thread(subprocess.run, as_owner, capture_output=True, text=True, check=False, timeout=60)
    return done.stderr


async def _export(service: Service) -> None:
    """Chain and sign everything, and append the heads to their file."""
    await service.app.state.sealer.finish()
    await service.app.state.head_file.export()


def _libpq(url: str, *, username: str | None = None, password: str | None = None) -> str:
    """The URL of a role as Postgres' own programs take it."""
    chosen = make_url(url).set(drivername="postgresql", username=username, password=password)
    return chosen.difference_update_query(["ssl"]).render_as_string(hide_password=False)


def test_a_dump_as_the_owner_is_refused_and_one_as_the_backup_s_role_is_whole(
    scene: Scene, backup: Backup, postgres: EmbeddedPostgres
) -> None:
    assert "query would be affected by row-level security policy" in backup.owner_refused
    before, after = (_schema(postgres, make_url(url).database) for url in (scene.service.urls.app, backup.restored.app))
    assert before == after, "tables, grants, policies, triggers and functions are those of before"
    assert "FORCE ROW LEVEL SECURITY" in after


def _schema(postgres: EmbeddedPostgres, database: str | None) -> str:
    """As SQL, but for a random word of each dump, and lists in checks, whose casts Postgres writes anew each time."""
    command = [str(CLIENTS / "pg_dump"), "--schema-only", _libpq(postgres.url("postgres", database or ""))]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
    return re.sub(r"^(\\(un)?restrict|.*ARRAY\[).*$", "", done.stdout, flags=re.MULTILINE)


async def test_an_older_database_is_told_from_the_newest_by_the_heads_that_were_exported(
    scene: Scene, backup: Backup
) -> None:
    old, newest = (str(scene.folder / name / "heads.jsonl") for name in ("backup", "."))
    code, said = await backup.command(audit, "verify", "--heads", old, root_keys=backup.old)
    assert (code, "BROKEN" in said, f"tenant {backup.tenant.id}: rows 1 to " in said) == (0, False, True)
    code, said = await backup.command(audit, "verify", "--heads", newest, root_keys=backup.old)
    assert (code, f"BROKEN: tenant {backup.tenant.id}" in said, "the chain ends at row" in said) == (1, True, True)


async def test_a_backup_without_its_root_keys_opens_nothing(scene: Scene, backup: Backup) -> None:
    command = [str(CLIENTS / "pg_restore"), "--file=-", str(scene.folder / "backup" / "bulkhead.dump")]
    dumped = await asyncio.to_thread(subprocess.run, command, capture_output=True, check=True, timeout=60)
    assert b"schema: bulkhead/1" in dumped.stdout, "the control: policies are read in the same way"
    assert not [text for text in (NONCE, "a-sealed-text", "sk-sealed") if text.encode() in dumped.stdout]
    # Another key by the same name, as every machine makes one.
    code, said = await backup.command(keys, "status", root_keys=new_entry("k1"))
    assert (code, said.count("BROKEN")) == (1, 3)
    code, said = await backup.command(keys, "status", root_keys=backup.old)
    assert (code, "BROKEN" in said) == (0, False), "the control: with its own it opens"


async def test_after_a_rewrap_everything_opens_without_the_old_key_and_what_came_later_has_not_happened(
    scene: Scene, backup: Backup
) -> None:
    new, retired = new_entry("k2"), scene.folder / "retired-keys.json"
    await _rewrap(backup, new, retired)
    changes = {"root_keys": SecretStr(new), "audit_retired_keys_file": retired, "audit_heads_file": None}
    settings = backup.settings.model_copy(update=changes)
    platform_key = text_of(scene.service.platform)
    async with started(settings, backup.restored, platform_key, works=True) as service:
        clients = (backup.tenant.user, backup.tenant.admin, backup.revoked)
        user, admin, revoked = [await service.client(text_of(client)) for client in clients]
        await _assert_all_opens(service, user, admin, backup)
        assert (await revoked.get("/v1/me")).status_code == 200, "a key that was revoked since works again"
        assert (await user.get(f"/v1/runs/{backup.since['run']}")).status_code == 404
        again = await admin.make("/v1/users", json={"name": "s", "role": "user"}, headers=SINCE)
        assert again["id"] != backup.since["user"], "the same request happens again"
        ended = await _ended(user, backup.queued)
        assert (ended["status"], NONCE in ended["answer"]) == ("succeeded", True), "what was queued is executed"
    heads = str(scene.folder / "backup" / "heads.jsonl")
    code, said = await backup.command(audit, "verify", "--heads", heads, root_keys=new, retired=retired)
    assert (code, "BROKEN" in said) == (0, False), "and what was recorded since is signed by the new key"


async def _rewrap(backup: Backup, new: str, retired: Path) -> None:
    """By the commands of the page, with what each says."""
    both = f"{new},{backup.old}"
    _, before = await backup.command(keys, "status", root_keys=both)
    assert "k2 (active): 0 tenants and 0 API keys" in before
    count = re.search(r"k1: (\d+ tenants and \d+ API keys) need it", before)
    assert count is not None, before
    # The control: without a rewrap the old key is missed.
    code, said = await backup.command(keys, "status", root_keys=new)
    assert (code, f"k1: NOT HERE, and {count[1]} need it" in said) == (1, True)
    assert (await backup.command(keys, "rewrap", root_keys=both))[1] == f"Under k2 now, too: {count[1]}.\n"
    assert "0 tenants and 0 API keys" in (await backup.command(keys, "rewrap", root_keys=both))[1]
    assert "k1: the record has signatures by it" in (await backup.command(keys, "status", root_keys=both))[1]
    assert (await backup.command(audit, "verify", root_keys=new))[0] == 1, "so it has: without them it does not verify"
    _write(retired, (await backup.command(audit, "keys", root_keys=backup.old))[1])
    assert "k1: nothing needs it" in (await backup.command(keys, "status", root_keys=both, retired=retired))[1]
    said = (await backup.command(keys, "status", root_keys=new, retired=retired))[1]
    assert said == f"k2 (active): {count[1]}\n"


def _write(file: Path, text: str) -> None:
    file.write_text(text)


async def _assert_all_opens(service: Service, user: Client, admin: Client, backup: Backup) -> None:
    """Of each kind that is sealed or hashed, one."""
    old = (await user.get(f"/v1/runs/{backup.run['run_id']}")).json()
    assert NONCE in old["answer"], "a text that was sealed with the user's key"
    assert NONCE in (await user.ask("What does note.md say?")).json()["answer"]
    again = await admin.make("/v1/users", json={"name": "before", "role": "user"}, headers=ONCE)
    assert again["id"] == backup.made, "an answer that was sealed with the tenant's key"
    resolved = await service.app.state.secrets.resolve(UUID(backup.tenant.id), frozenset({"tickets"}))
    assert resolved.texts == {"tickets": "a-sealed-text"}
    assert service.app.state.catalogue.endpoints["kept"].api_key == "sk-sealed"


async def _ended(user: Client, run_id: str) -> dict[str, Any]:
    for _ in range(600):
        found: dict[str, Any] = (await user.get(f"/v1/runs/{run_id}")).json()
        if found["status"] not in {"queued", "running"}:
            return found
        await asyncio.sleep(0.1)
    raise AssertionError(found)
