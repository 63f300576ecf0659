"""A request that arrives twice with the same Idempotency-Key happens once and is answered alike."""

from __future__ import annotations

import asyncio
import secrets
from typing import Any, Final

import httpx
import pytest
from fastapi import FastAPI
from sqlalchemy import text
from sqlalchemy.ext.asyncio import create_async_engine

from app.idempotency.once import forget_expired
from tests.routes import Operation, operations
from tests.service import POLICY, Client, Service, Tenant


@pytest.fixture(scope="module")
async def tenant(service: Service) -> Tenant:
    return await service.new_tenant(policy=None)


def user() -> dict[str, str]:
    return {"name": secrets.token_hex(8), "role": "user"}


async def keyed(client: Client, path: str, key: str, **body: Any) -> httpx.Response:
    return await client.post(path, headers={"Idempotency-Key": key}, **body)


# What is said of this very request, and not of what it made.
_OF_THE_REQUEST: Final = ("x-request-id", "date", "ratelimit-", "x-ratelimit-", "traceparent")
_ALIASES: Final = {"/query": "/v1/query"}
_OF_A_DRAFT: Final = ("backtest", "check", "dry-run")


def same(first: httpx.Response, second: httpx.Response) -> bool:
    headers = [
        {name: value for name, value in answer.headers.items() if not name.startswith(_OF_THE_REQUEST)}
        for answer in (first, second)
    ]
    assert headers[1].pop("idempotency-replayed") == "true"
    return (first.status_code, headers[0], first.content) == (second.status_code, headers[1], second.content)


async def age(service: Service, tenant: Tenant, key: str) -> None:
    """Let it be older than a day."""
    older = "update idempotency_keys set created_at = created_at - interval '25 hours' where key = "
    await as_owner(service, tenant, f"{older}'{key}'")


async def as_owner(service: Service, tenant: Tenant, statement: str) -> list[Any]:
    """The owner of the tables is bound to a tenant as everybody is."""
    engine = create_async_engine(service.urls.owner or "")
    async with engine.begin() as connection:
        await connection.execute(text("select set_config('app.tenant_id', :id, true)"), {"id": tenant.id})
        result = await connection.execute(text(statement))
        found = list(result.all()) if result.returns_rows else []
    await engine.dispose()
    return found


async def made(client: Client, kind: str) -> int:
    return sum(event["type"] == kind for event in await client.events())


async def test_the_same_request_again_makes_nothing_and_is_answered_alike(tenant: Tenant) -> None:
    body, before = user(), await made(tenant.admin, "user.created")
    first = await keyed(tenant.admin, "/v1/users", "k-1", json=body)
    second = await keyed(tenant.admin, "/v1/users", "k-1", json=body)
    assert first.status_code == 201
    assert "idempotency-replayed" not in first.headers
    assert same(first, second)
    assert await made(tenant.admin, "user.created") == before + 1
    assert (await tenant.admin.post("/v1/users", json=body)).status_code == 409, (
        "control: without a key it is made anew"
    )


async def test_a_key_for_another_body_is_refused(tenant: Tenant) -> None:
    assert (await keyed(tenant.admin, "/v1/users", "k-2", json=user())).status_code == 201
    answer = await keyed(tenant.admin, "/v1/users", "k-2", json=user())
    assert (answer.status_code, answer.json()["code"]) == (422, "idempotency_mismatch")


async def test_twins_at_once_make_one(service: Service, tenant: Tenant) -> None:
    body = {"user_id": tenant.user_id, "name": secrets.token_hex(8)}
    answers = await asyncio.gather(*(keyed(tenant.admin, "/v1/keys", "twins", json=body) for _ in range(8)))
    assert {answer.status_code for answer in answers} == {201}
    assert len({answer.content for answer in answers}) == 1
    assert sum("idempotency-replayed" in answer.headers for answer in answers) == 7
    keys = (await tenant.admin.get("/v1/keys", params={"limit": 200})).json()["items"]
    assert sum(key["name"] == body["name"] for key in keys) == 1
    assert (await (await service.client(answers[0].json()["key"])).get("/v1/me")).status_code == 200


async def test_what_failed_is_tried_anew_under_its_key(tenant: Tenant) -> None:
    taken = user()
    await tenant.admin.make("/v1/users", json=taken)
    assert (await keyed(tenant.admin, "/v1/users", "k-3", json=taken)).status_code == 409
    assert (await keyed(tenant.admin, "/v1/users", "k-3", json=user())).status_code == 201


async def test_a_key_is_of_its_caller_and_its_path(service: Service, tenant: Tenant) -> None:
    other, body = await service.new_tenant(policy=None), user()
    colleague, _, _ = await service.new_user(tenant.id, "tenant_admin")
    answers = [
        await keyed(tenant.admin, "/v1/users", "k-4", json=body),
        await keyed(other.admin, "/v1/users", "k-4", json=body),
        await keyed(colleague, "/v1/users", "k-4", json=user()),
        await keyed(tenant.admin, "/v1/keys", "k-4", json={"user_id": tenant.user_id, "name": "n"}),
    ]
    assert [answer.status_code for answer in answers] == [201] * 4
    assert not any("idempotency-replayed" in answer.headers for answer in answers)


async def test_a_caller_who_may_no_longer_is_not_told_again(service: Service, tenant: Tenant) -> None:
    admin, row, _ = await service.new_user(tenant.id, "tenant_admin")
    body = {"user_id": tenant.user_id, "name": "n"}
    assert (await keyed(admin, "/v1/keys", "k-5", json=body)).status_code == 201
    assert (await keyed(admin, "/v1/keys", "k-5", json=body)).status_code == 201
    assert (await tenant.admin.patch(f"/v1/users/{row['id']}", json={"role": "auditor"})).status_code == 200
    assert (await keyed(admin, "/v1/keys", "k-5", json=body)).status_code == 403


# What makes nothing that a second time would make more of, and why.
_SAYS_WHAT_SHALL_BE: Final = {
    *(f"/v1/tenants/{{tenant_id}}/{change}" for change in ("disable", "enable", "erase")),
    *(f"/v1/users/{{user_id}}/{change}" for change in ("disable", "enable", "erase")),
    *(f"/v1/quarantines/{{quarantine_id}}/{change}" for change in ("accept", "dismiss")),
    "/v1/runs/{run_id}/cancel",
}
_LOOKS: Final = {f"/v1/policies/{what}" for what in ("validate", *(f"{{version}}/{at}" for at in _OF_A_DRAFT))}
# Waits for a run of its own; tests/runs/approvals/test_api.py sends these again.
_OF_AN_APPROVAL: Final = {f"/v1/approvals/{{approval_id}}/{ruling}" for ruling in ("approve", "deny")}


def posts(app: FastAPI) -> dict[str, bool]:
    """Every POST, and whether it takes a key."""
    described = app.openapi()["paths"]
    found = {}
    for operation in operations(app):
        if operation.method == "POST":
            parameters = described[_ALIASES.get(operation.path, operation.path)]["post"].get("parameters", [])
            found[operation.path] = any(each["name"].lower() == "idempotency-key" for each in parameters)
    return found


async def test_every_route_that_makes_something_takes_a_key(service: Service, tenant: Tenant) -> None:
    issuer = {"issuer": f"https://{secrets.token_hex(8)}.example", "jwks_uri": "https://keys.example/jwks"}
    key = (await tenant.admin.make("/v1/keys", json={"user_id": tenant.user_id, "name": "n"}))["id"]
    switch = {"scope": "server", "target": "docs", "reason": "r"}
    model = {"base_url": "https://models.example/v1", "models": ["m"], "credential": "sk-" + "x" * 20}
    of_tenant = {"tenant_id": tenant.id}
    requests: list[tuple[Client, str, dict[str, str], dict[str, Any]]] = [
        (service.platform, "/v1/tenants", {}, {"json": {"slug": f"t-{secrets.token_hex(8)}"}}),
        (service.platform, "/v1/tenants/{tenant_id}/users", of_tenant, {"json": user()}),
        (service.platform, "/v1/tenants/{tenant_id}/keys", of_tenant, {"json": named(tenant)}),
        (service.platform, "/v1/platform/models", {}, {"json": model | {"name": f"m-{secrets.token_hex(4)}"}}),
        (tenant.admin, "/v1/users", {}, {"json": user()}),
        (tenant.admin, "/v1/keys", {}, {"json": named(tenant)}),
        (tenant.admin, "/v1/keys/{key_id}/rotate", {"key_id": key}, {"json": {}}),
        (tenant.admin, "/v1/issuers", {}, {"json": issuer}),
        (tenant.admin, "/v1/policies", {}, {"content": POLICY.encode()}),
        (tenant.admin, "/v1/policies/{version}/publish", {"version": "1"}, {}),
        (tenant.admin, "/v1/policies", {}, {"content": f"{POLICY}# again\n".encode()}),
        (tenant.admin, "/v1/policies/{version}/publish", {"version": "2"}, {"json": {"revoke_running": True}}),
        (tenant.admin, "/v1/policies/rollback", {}, {}),
        (tenant.user, "/query", {}, {"json": {"query": "hello"}}),
        (tenant.user, "/v1/query", {}, {"json": {"query": "hello"}}),
        (tenant.user, "/v1/runs", {}, {"json": {"query": "hello"}}),
        (tenant.user, "/v1/conversations", {}, {"json": {}}),
        (tenant.admin, "/v1/switches", {}, {"json": switch}),
    ]
    for client, path, values, body in requests:
        once, url = secrets.token_hex(4), Operation("POST", path).url(values)
        first = await keyed(client, url, once, **body)
        assert first.is_success, (path, first.text)
        assert same(first, await keyed(client, url, once, **body)), path
    taking = {path for path, takes_one in posts(service.app).items() if takes_one}
    assert taking - {path for _, path, _, _ in requests} == _OF_AN_APPROVAL


def test_every_other_post_makes_nothing(service: Service) -> None:
    none = {path for path, takes_one in posts(service.app).items() if not takes_one}
    assert none == _SAYS_WHAT_SHALL_BE | _LOOKS


def named(tenant: Tenant) -> dict[str, str]:
    return {"user_id": tenant.user_id, "name": "n"}


@pytest.mark.parametrize("key", ["", "with space", "x" * 256])
async def test_what_is_no_key_is_refused(tenant: Tenant, key: str) -> None:
    answer = await keyed(tenant.admin, "/v1/users", key, json=user())
    assert answer.status_code == 422


async def test_answers_are_kept_sealed_and_for_a_day(service: Service, tenant: Tenant) -> None:
    body = {"user_id": tenant.user_id, "name": "sealed"}
    first = await keyed(tenant.admin, "/v1/keys", "k-6", json=body)
    secret = first.json()["key"]
    kept = await as_owner(service, tenant, "select answer from idempotency_keys where key = 'k-6'")
    assert len(kept) == 1
    assert secret.encode() not in kept[0].answer
    await age(service, tenant, "k-6")
    again = await keyed(tenant.admin, "/v1/keys", "k-6", json=body)
    assert again.status_code == 201
    assert again.json()["key"] != secret


async def test_housekeeping_forgets_what_is_older_and_nothing_else(service: Service, tenant: Tenant) -> None:
    for key in ("old", "young"):
        assert (await keyed(tenant.admin, "/v1/users", key, json=user())).status_code == 201
    await age(service, tenant, "old")
    async with service.app.state.platform.transaction() as session:
        await forget_expired(session)
    rows = await as_owner(service, tenant, "select key from idempotency_keys where key in ('old', 'young')")
    assert [row.key for row in rows] == ["young"]
