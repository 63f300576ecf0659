"""Tenant B on every id of tenant A: what is not yours is not there, and no byte of it comes back."""

from __future__ import annotations

import asyncio
import secrets
import uuid
from collections.abc import AsyncIterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Final

import httpx
import pytest
from sqlalchemy import make_url

from app.db import DatabaseUrls
from app.embedded.postgres import EmbeddedPostgres
from tests.auth.forgery import Issuer
from tests.openapi import crashing
from tests.routes import ROLES, Operation
from tests.runs.approvals.waiting import waiting_run
from tests.service import POLICY, Client, Databases, Service, Tenant, running_service

WITH_IDS: Final = sorted(operation for operation in ROLES if operation.parameters)
WITHOUT_IDS: Final = sorted(operation for operation in ROLES if not operation.parameters)
# Numbers that every tenant has.
COUNTED: Final = {"version", "sequence"}
# A file's or a secret's name is no id: each tenant has names of its own, and may give one that another tenant uses.
OWN_NAMES: Final = {
    Operation("PUT", "/v1/workspaces/{name}/files/{path:path}"),
    Operation("PUT", "/v1/secrets/{name}"),
}


@dataclass(slots=True)
class World:
    """One of each thing that a tenant can have, with a nonce in every text."""

    tenant: Tenant
    ids: dict[str, str] = field(default_factory=dict)
    nonces: list[str] = field(default_factory=list)
    conversation: str = field(default_factory=lambda: str(uuid.uuid4()))
    cursors: dict[str, str] = field(default_factory=dict)

    def nonce(self) -> str:
        """A text that nobody else has."""
        self.nonces.append(f"n{secrets.token_hex(12)}")
        return self.nonces[-1]

    @property
    def secrets(self) -> list[str]:
        """All that must not come back to somebody else."""
        return [*self.nonces, self.conversation, *(value for name, value in self.ids.items() if name not in COUNTED)]

    def found_in(self, response: httpx.Response, *, supplied: str = "") -> list[str]:
        """What of it a whole response holds, but for what the caller itself has sent."""
        whole = f"{response.headers}{response.text}".lower()
        return [secret for secret in self.secrets if secret in whole and secret not in supplied]


async def new_world(service: Service) -> World:
    tenant = await service.new_tenant(policy=None)
    world, admin = World(tenant), tenant.admin
    name, file = world.nonce(), f"{world.nonce()}.md"
    await admin.put_file(file, f"The word is {world.nonce()}.", workspace=name)
    for _ in range(3):
        policy = POLICY.replace("root: docs", f"root: {name}") + f"instructions: {world.nonce()}\n"
        version = await admin.publish(policy)
    user = await admin.make("/v1/users", json={"name": world.nonce(), "role": "tenant_admin"})
    key = await admin.make("/v1/keys", json={"user_id": user["id"], "name": world.nonce()})
    issuer = await admin.make("/v1/issuers", json={"issuer": f"https://{world.nonce()}", "jwks": Issuer().jwks})
    switch = await admin.make("/v1/switches", json={"scope": "server", "target": "other", "reason": world.nonce()})
    assert (await admin.put(f"/v1/secrets/{name}", json={"value": world.nonce()})).is_success
    asked = await tenant.user.ask(f"What does {file} say?", conversation=world.conversation)
    assert world.nonces[2] in asked.json()["answer"]
    world.nonces.append(key["key"].lower())
    waiting = await waiting_run(service, tenant, {"path": world.nonce()})
    world.ids = {
        "tenant_id": tenant.id,
        "user_id": user["id"],
        "key_id": key["id"],
        "issuer_id": issuer["id"],
        "switch_id": switch["id"],
        "run_id": asked.json()["run_id"],
        "approval_id": str(waiting.ids[1]),
        "conversation_id": (await tenant.user.make("/v1/conversations"))["id"],
        "version": str(version),
        "sequence": "1",
        "name": name,
        "path": file,
        # None that is a tenant's own: of the platform, and what takes a hostile server to have.
        "endpoint_id": str(uuid.uuid4()),
        "quarantine_id": str(uuid.uuid4()),
    }
    for path in ("/v1/users", "/v1/keys", "/v1/policies", "/v1/approvals", "/v1/audit/events"):
        world.cursors[path] = (await admin.get(path, params={"limit": 1})).json()["next_cursor"]
    return world


@pytest.fixture(scope="module")
async def world(service: Service) -> World:
    return await new_world(service)


@pytest.fixture(scope="module")
async def other(service: Service) -> Tenant:
    return await service.new_tenant(policy=POLICY, files={"note.md": "nothing of interest"})


def unknown(ids: dict[str, str]) -> dict[str, str]:
    """The same shapes, of what nobody has."""
    strangers = {name: str(uuid.uuid4()) for name in ids if name.endswith("_id")}
    return {"version": "999999", "sequence": "1", "name": "nowhere", "path": "absent.md"} | strangers


async def replay(client: Client, operation: Operation, ids: dict[str, str]) -> httpx.Response:
    body: dict[str, Any] | None = {} if operation.method == "POST" else None
    if operation.method == "PATCH":
        body = {"role": "user"}
    if operation.path.endswith("/accept"):
        body = {"digest": "0" * 64}
    if operation.path.endswith("/users"):
        body = {"name": secrets.token_hex(8), "role": "user"}
    if operation.path.endswith("/keys"):
        body = {"user_id": ids["user_id"], "name": "stolen"}
    if operation.path.endswith("/dry-run"):
        body = {"as": {"role": "user"}, "query": "hello"}
    return await client.request(operation.method, operation.url(ids), json=body)


def told(response: httpx.Response) -> tuple[int, Any]:
    """Status and body, without what differs with every request."""
    body = response.json() if response.content else {}
    return response.status_code, {name: value for name, value in body.items() if name != "request_id"}


@pytest.mark.parametrize("operation", WITH_IDS, ids=" ".join)
async def test_another_tenants_id_is_an_id_that_nobody_has(world: World, other: Tenant, operation: Operation) -> None:
    if operation in OWN_NAMES:
        return
    for client in (other.admin, other.user):
        theirs = await replay(client, operation, world.ids)
        nobodys = await replay(client, operation, unknown(world.ids))
        assert told(theirs) == told(nobodys)
        assert theirs.status_code in {404, 403}, theirs.text
        assert world.found_in(theirs) == []


async def test_of_those_ids_most_are_refused_as_missing_and_not_for_a_scope(world: World, other: Tenant) -> None:
    """A 403 for everything would pass the test above; a tenant's admin has the scopes, so it is told 404."""
    answers = {operation: await replay(other.admin, operation, world.ids) for operation in WITH_IDS}
    forbidden = {operation for operation, answer in answers.items() if answer.status_code == 403}
    platforms = ("/v1/tenants/", "/v1/platform/")
    assert forbidden == {operation for operation in WITH_IDS if operation.path.startswith(platforms)}


@pytest.mark.parametrize("operation", WITHOUT_IDS, ids=" ".join)
async def test_what_takes_no_id_tells_nothing_of_another_tenant(
    world: World, other: Tenant, operation: Operation
) -> None:
    body = {"query": "List the files"} if operation.path.endswith("/query") else {}
    for client in (other.admin, other.user):
        response = await client.request(
            operation.method, operation.path, json=body if operation.method == "POST" else None
        )
        # The other tenant has itself written to a workspace by that name, above.
        assert world.found_in(response, supplied=world.ids["name"]) == []


async def test_nothing_of_the_first_tenant_was_changed_by_all_that(world: World, other: Tenant) -> None:
    await asyncio.gather(*(replay(other.admin, operation, world.ids) for operation in WITH_IDS))
    admin, ids = world.tenant.admin, world.ids
    file = await admin.get(f"/v1/workspaces/{ids['name']}/files/{ids['path']}")
    assert world.nonces[2] in file.text
    keys = {key["id"]: key for key in (await admin.get("/v1/keys")).json()["items"]}
    assert keys[ids["key_id"]]["revoked_at"] is None
    assert keys[ids["key_id"]]["expires_at"] is None
    user = (await admin.get(f"/v1/users/{ids['user_id']}")).json()
    assert (user["disabled_at"], user["role"]) == (None, "tenant_admin")
    assert [row["id"] for row in (await admin.get("/v1/issuers")).json()["items"]] == [ids["issuer_id"]]
    assert [row["id"] for row in (await admin.get("/v1/switches")).json()["items"]] == [ids["switch_id"]]
    assert (await admin.get(f"/v1/approvals/{ids['approval_id']}")).json()["state"] == "waiting"
    found = (await admin.get("/v1/secrets")).json()["items"]
    assert [(row["name"], row["version"]) for row in found] == [(ids["name"], 1)]
    assert (await admin.get("/v1/me")).json()["policy_version"] == int(ids["version"])


async def test_an_id_in_a_body_or_a_parameter_reaches_no_further(world: World, other: Tenant) -> None:
    ids = world.ids
    for client in (other.admin, other.user):
        response = await client.post("/v1/keys", json={"user_id": ids["user_id"], "name": "stolen"})
        assert response.status_code in {403, 404}
        assert world.found_in(response) == []
    assert await other.admin.events(run_id=ids["run_id"]) == []
    asked = await other.user.ask("What did I ask before?", conversation=world.conversation)
    assert world.found_in(asked, supplied=world.conversation) == []


async def test_a_query_reaches_no_file_of_another_tenant(world: World, other: Tenant) -> None:
    ids = world.ids
    paths = (
        ids["path"],
        f"{ids['name']}/{ids['path']}",
        f"../{ids['name']}/{ids['path']}",
        f"../../{ids['tenant_id']}",
    )
    for path in paths:
        asked = await other.user.ask(f"Read the file {path}")
        assert world.found_in(asked, supplied=path) == []


async def test_a_cursor_of_another_tenant_is_no_cursor(world: World, other: Tenant) -> None:
    for path, cursor in world.cursors.items():
        response = await other.admin.get(path, params={"cursor": cursor})
        assert (response.status_code, response.json()["code"]) == (422, "invalid_cursor")
        assert (await world.tenant.admin.get(path, params={"cursor": cursor})).status_code == 200


async def test_a_policy_that_names_another_tenants_folder_finds_an_empty_one(service: Service, world: World) -> None:
    thief = await service.new_tenant(policy=POLICY.replace("root: docs", f"root: {world.ids['name']}"))
    asked = await thief.user.ask("List the files")
    assert asked.status_code == 200, asked.text
    assert world.found_in(asked, supplied=world.ids["name"]) == []


# One enforcement off: the app's role is one that row-level security does not bind.


@pytest.fixture
async def unbound(databases: Databases, postgres: EmbeddedPostgres, tmp_path: Path) -> AsyncIterator[Service]:
    def without_row_security() -> DatabaseUrls:
        urls = databases()
        return replace(urls, app=postgres.url("postgres", make_url(urls.app).database or ""))

    async with running_service(without_row_security, tmp_path) as service:
        yield service


async def test_without_row_level_security_the_same_replay_finds_the_first_tenant(unbound: Service) -> None:
    world, other = await new_world(unbound), await unbound.new_tenant(policy=None)
    with crashing():  # some of what is found does not open
        answers = {operation: await replay(other.admin, operation, world.ids) for operation in WITH_IDS}
    reached = {operation for operation, answer in answers.items() if answer.status_code in {200, 201, 204}}
    assert Operation("GET", "/v1/users/{user_id}") in reached
    assert Operation("DELETE", "/v1/keys/{key_id}") in reached
    assert any(world.found_in(answer) for answer in answers.values())


# Users of one tenant


@dataclass(frozen=True, slots=True)
class Colleagues:
    """A run of one user, and others of the same tenant."""

    run_id: str
    nonce: str
    conversation: str
    owner: Client
    colleague: Client
    auditor: Client
    admin: Client


@pytest.fixture(scope="module")
async def colleagues(service: Service) -> Colleagues:
    tenant = await service.new_tenant(files={"note.md": "hello"})
    colleague, _, _ = await service.new_user(tenant.id)
    auditor, _, _ = await service.new_user(tenant.id, "auditor")
    nonce, conversation = secrets.token_hex(16), str(uuid.uuid4())
    run = (await tenant.user.ask(f"What does note.md say of {nonce}?", conversation=conversation)).json()
    return Colleagues(run["run_id"], nonce, conversation, tenant.user, colleague, auditor, tenant.admin)


async def test_a_user_reads_and_cancels_no_run_of_another_user(colleagues: Colleagues) -> None:
    path = f"/v1/runs/{colleagues.run_id}"
    unknown_path = f"/v1/runs/{uuid.uuid4()}"
    assert told(await colleagues.colleague.get(path)) == told(await colleagues.colleague.get(unknown_path))
    assert (await colleagues.colleague.get(path)).status_code == 404
    assert (await colleagues.colleague.post(f"{path}/cancel")).status_code == 404
    assert colleagues.run_id not in (await colleagues.colleague.get("/v1/runs")).text


@pytest.mark.parametrize("role", ["owner", "auditor", "admin"])
async def test_who_may_read_a_run_is_its_owner_an_auditor_and_an_admin(colleagues: Colleagues, role: str) -> None:
    client: Client = getattr(colleagues, role)
    run = await client.get(f"/v1/runs/{colleagues.run_id}")
    assert colleagues.nonce in run.json()["query"]
    assert colleagues.run_id in (await client.get("/v1/runs")).text


async def test_a_run_that_has_ended_is_not_cancelled(colleagues: Colleagues) -> None:
    response = await colleagues.admin.post(f"/v1/runs/{colleagues.run_id}/cancel")
    assert (response.status_code, response.json()["code"]) == (409, "conflict")
