"""The record against ledgers that it has no part in: the client's of what it did, and a tool server's own journal."""

from __future__ import annotations

import asyncio
import json
from collections import Counter
from collections.abc import AsyncIterator, Iterable
from typing import Any, Final
from uuid import UUID

import pytest
from sqlalchemy import text

from app.keyring import SecretKey
from app.runs.arguments import canonical
from app.tenants.service import open_tenant_key
from tests.auth.forgery import Issuer
from tests.openapi import crashing
from tests.service import POLICY, Databases, Service, running_service

Seen = tuple[str, dict[str, Any]]
# Fails the commit of whatever changes a tenant, once all of it has been done.
FAIL: Final = "create function fail_commit() returns trigger language plpgsql as 'begin raise exception $x$no$x$; end'"
FAILING: Final = (
    "create constraint trigger failing after update on tenants deferrable initially deferred"
    " for each row execute function fail_commit()"
)


@pytest.fixture(scope="module")
async def ground(databases: Databases, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Service]:
    async with running_service(databases, tmp_path_factory.mktemp("ledger")) as running:
        yield running


def matched(ledger: Iterable[Seen], events: Iterable[dict[str, Any]]) -> list[Seen]:
    """The record, of each event only what the ledger says of the one in its place."""
    told = [(event["type"], event["data"]) for event in events]
    pairs = zip(ledger, told, strict=False)
    seen = [(kind, {name: data.get(name) for name in wanted}) for (_, wanted), (kind, data) in pairs]
    return seen + told[len(seen) :]


async def tenant_key(service: Service, tenant_id: str) -> SecretKey:
    async with service.app.state.database.transaction(UUID(tenant_id)) as session:
        return await open_tenant_key(session, service.app.state.keyring, UUID(tenant_id))


async def test_a_tenants_record_is_what_was_done_and_nothing_else(ground: Service) -> None:
    """From its making on: no event is missing and none too many."""
    platform, ledger = ground.platform, list[Seen]()
    tenant_id = (await platform.make("/v1/tenants", json={"slug": "ledger"}))["id"]
    ledger += [("tenant.created", {"tenant_id": tenant_id, "slug": "ledger"})]
    admin, row, key = await ground.new_user(tenant_id, "tenant_admin")
    ledger += [
        ("user.created", {"user_id": row["id"], "role": "tenant_admin", "by_token": False}),
        ("key.created", {"key_id": key["id"], "user_id": row["id"]}),
    ]
    user = await admin.make("/v1/users", json={"name": "a user", "role": "user"})
    ledger += [
        ("auth.succeeded", {"key_id": key["id"], "role": "tenant_admin", "address": "127.0.0.1", "count": 1}),
        ("user.created", {"user_id": user["id"], "role": "user"}),
    ]
    for role, before in (("auditor", "user"), ("user", "auditor")):
        assert (await admin.patch(f"/v1/users/{user['id']}", json={"role": role})).is_success
        ledger += [("user.role_changed", {"before": {"role": before}, "after": {"role": role}})]
    users_key = await admin.make("/v1/keys", json={"user_id": user["id"], "name": "a key"})
    issuer = await admin.make("/v1/issuers", json={"issuer": "https://a.example", "jwks": Issuer().jwks})
    assert (await admin.delete(f"/v1/issuers/{issuer['id']}")).is_success
    trusted = {"issuer_id": issuer["id"], "issuer": "https://a.example", "audience": issuer["audience"]}
    ledger += [
        ("key.created", {"key_id": users_key["id"]}),
        ("issuer.registered", trusted),
        ("issuer.removed", trusted),
    ]
    for value in ("first-text", "second-text"):
        assert (await admin.put("/v1/secrets/one", json={"value": value})).is_success
    assert (await admin.delete("/v1/secrets/one")).is_success
    ledger += [
        ("secret.written", {"version": 1}),
        ("secret.written", {"version": 2}),
        ("secret.deleted", {"version": 2}),
    ]
    client = await ground.client(users_key["key"])
    assert (await client.ask("hello")).json()["code"] == "no_policy"
    assert (await client.ask("hello")).json()["code"] == "no_policy"
    ledger += [("auth.succeeded", {"key_id": users_key["id"]}), ("query.refused", {"reason": "no_policy"})]
    mac = (await tenant_key(ground, tenant_id)).mac
    await admin.put_file("note.md", "hello")
    assert (await admin.get("/v1/workspaces/docs/files/note.md")).text == "hello"
    written = {"workspace": "docs", "path_hmac": mac("audit", b"note.md").hex(), "size": 5}
    ledger += [("workspace.file_written", written), ("workspace.file_read", written)]
    version = await admin.publish(f'{POLICY}input: {{block: ["forbidden-word"]}}\n')
    ledger += [
        ("policy.created", {"version": version}),
        ("policy.published", {"before": None, "after": version}),
    ]
    asked = await client.ask("What does note.md say?")
    refused = await client.ask("What does note.md say? forbidden-word")
    assert (asked.status_code, refused.status_code) == (200, 422)
    run_id = asked.json()["run_id"]
    ledger += [
        ("query.received", {"key_id": users_key["id"], "query_hmac": mac("audit", b"What does note.md say?").hex()}),
        ("query.screened", {"allowed": True, "policy_version": version}),
        ("run.started", {"policy_version": version}),
        *_of_calls(ground, tenant_id, mac, version=version),
        ("run.finished", {"state": "succeeded", "answer_hmac": mac("audit", asked.json()["answer"].encode()).hex()}),
        ("query.received", {"key_id": users_key["id"]}),
        ("query.screened", {"allowed": False}),
        ("run.finished", {"state": "denied", "code": "query_refused"}),
    ]
    assert (await client.get(f"/v1/runs/{run_id}")).is_success
    assert (await admin.get(f"/v1/runs/{run_id}")).json()["answer"] == asked.json()["answer"]
    ledger += [("run.read", {"user_id": user["id"]})]
    switch = await admin.make("/v1/switches", json={"scope": "server", "target": "docs", "reason": "a reason"})
    assert (await admin.delete(f"/v1/switches/{switch['id']}")).is_success
    assert (await admin.delete("/v1/workspaces/docs")).is_success
    assert (await admin.post(f"/v1/users/{user['id']}/erase")).is_success
    ledger += [
        ("switch.engaged", {"switch_id": switch["id"], "scope": "server", "target": "docs"}),
        ("switch.lifted", {"switch_id": switch["id"]}),
        ("workspace.deleted", {"workspace": "docs", "user_id": None}),
        ("user.erased", {"user_id": user["id"], "keys": 1}),
    ]
    for act in ("disable", "enable"):
        assert (await platform.post(f"/v1/tenants/{tenant_id}/{act}")).is_success
    ledger += [("tenant.disabled", {"before": "active"}), ("tenant.enabled", {"before": "disabled"})]
    events = await admin.events(logins=True)
    assert matched(ledger, events) == ledger
    hashes = {event["type"]: event["data"] for event in events}
    assert len(hashes["tool.decided"]["definition_hash"]) == len(hashes["tool.finished"]["sandbox_hash"]) == 64


def _of_calls(service: Service, tenant_id: str, mac: Any, *, version: int) -> list[Seen]:
    """What the tool server says that it was asked."""
    path = service.data_dir / "servers" / tenant_id / "docs.stderr"
    calls = [json.loads(line) for line in path.read_text().splitlines()]
    found: list[Seen] = []
    for number, call in enumerate(calls, 1):
        arguments = canonical({"path": call["paths"][0]}).encode()
        named = {"sequence": number, "tool": f"docs__{call['tool']}"}
        decided = {"decision": "allowed", "policy_version": version, "arguments_hmac": mac("audit", arguments).hex()}
        found += [("tool.decided", named | decided), ("tool.finished", named | {"outcome": "succeeded"})]
    assert found, "the server was asked"
    return found


async def test_what_ran_and_in_what_has_the_same_hashes_after_a_restart_of_the_server(ground: Service) -> None:
    tenant = await ground.new_tenant(files={"note.md": "hello"})
    for again in (False, True):
        if again:  # no server outlives a change of its tenant's users
            assert (await tenant.admin.post(f"/v1/users/{tenant.user_id}/enable")).is_success
            async with asyncio.timeout(10):
                while UUID(tenant.id) in ground.app.state.pool.tenants():  # noqa: ASYNC110  a state, no event
                    await asyncio.sleep(0.05)
        assert (await tenant.user.ask("What does note.md say?")).status_code == 200
    events = await tenant.admin.events()
    for kind, name in (("tool.decided", "definition_hash"), ("tool.finished", "sandbox_hash")):
        found = Counter(event["data"][name] for event in events if event["type"] == kind)
        assert list(found.values()) == [2], name


async def test_an_error_that_a_caller_saw_is_on_the_record_by_its_request(ground: Service) -> None:
    tenant = await ground.new_tenant(policy=None)
    await ground.sql("alter table issuers rename to elsewhere")
    try:
        seen = await tenant.admin.get("/v1/issuers")
    finally:
        await ground.sql("alter table elsewhere rename to issuers")
    assert seen.status_code == 503
    await ground.app.state.outbox.flush()
    raised = [event["data"] for event in await tenant.admin.events() if event["type"] == "error.raised"]
    request_id = seen.headers["X-Request-Id"]
    told = {"route": "/v1/issuers", "status": 503, "code": "unavailable", "error": "ProgrammingError", "count": 1}
    assert raised == [{"request_id": request_id, **told}]
    assert (await tenant.admin.get("/v1/issuers")).status_code == 200


async def test_a_crash_is_on_the_platforms_record_where_no_tenant_is_known_yet(ground: Service) -> None:
    tenant = await ground.new_tenant(policy=None)
    change = text("update users set role = :role where id = :id")
    await ground.sql("alter table users drop constraint ck_users_role")
    seen = None
    for role in ("one of a newer version", "user"):
        async with ground.app.state.database.transaction(UUID(tenant.id)) as session:
            await session.execute(change, {"role": role, "id": UUID(tenant.user_id)})
        with crashing():
            seen = seen or await tenant.user.get("/v1/me")
    assert seen is not None
    assert (seen.status_code, seen.json()["code"], "newer" in seen.text) == (500, "internal", False)
    await ground.app.state.outbox.flush()
    raised = [event["data"] for event in await ground.platform.events() if event["type"] == "error.raised"]
    told = {"route": "/v1/me", "status": 500, "code": "internal", "error": "ValueError", "count": 1}
    assert raised == [{"request_id": seen.headers["X-Request-Id"], **told}]
    assert (await tenant.user.get("/v1/me")).status_code == 200, "the control"


async def test_what_was_done_to_files_is_told_even_where_its_commit_fails(ground: Service) -> None:
    tenant = await ground.new_tenant(policy=None, files={"note.md": "hello"})
    for statement in (FAIL, FAILING):
        await ground.sql(statement)
    try:
        answer = await tenant.admin.delete("/v1/workspaces/docs")
    finally:
        await ground.sql("drop trigger failing on tenants")
        await ground.sql("drop function fail_commit()")
    assert answer.status_code == 503
    assert (await tenant.admin.get("/v1/workspaces/docs/files")).status_code == 404, "it is gone"
    async with asyncio.timeout(10):
        while "workspace.deleted" not in (kinds := [event["type"] for event in await tenant.admin.events()]):  # noqa: ASYNC110  what the outbox has written tells nobody
            await asyncio.sleep(0.05)
    assert kinds.count("workspace.deleted") == 1


async def test_the_first_use_of_a_credential_in_an_hour_is_one_event(ground: Service) -> None:
    tenant = await ground.new_tenant(policy=None)
    for _ in range(3):
        assert (await tenant.user.get("/v1/me")).is_success
    used = [event for event in await tenant.admin.events(logins=True) if event["type"] == "auth.succeeded"]
    assert [event["data"]["key_id"] for event in used if event["actor_id"] == tenant.user_id] == [tenant.user_key_id]
