"""Secrets from outside: who may write and bind them, and that no text ever comes back."""

from __future__ import annotations

import json
import secrets
import uuid
from typing import Any
from uuid import UUID

import pytest
from sqlalchemy import text
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import create_async_engine

from app.caller import PLATFORM_TENANT
from app.secrets import service as service_module
from tests.secrets.ground import Ground, resolve, write
from tests.service import Tenant


@pytest.fixture(scope="module")
async def tenant(ground: Ground) -> Tenant:
    return await ground.new_tenant()


def of(answer: Any) -> tuple[int, str | None]:
    return answer.status_code, answer.json()["code"]


async def test_a_secret_is_written_listed_replaced_and_deleted(ground: Ground) -> None:
    tenant = await ground.new_tenant()
    made = (await tenant.admin.put("/v1/secrets/reports-dsn", json={"value": "first-text"})).json()
    assert (made["name"], made["source"], made["version"]) == ("reports-dsn", "sealed", 1)
    assert await write(tenant, "reports-dsn", "second-text") == 2
    await write(tenant, "another", "text-of-another")
    await ground.bind(tenant, "bound", provider="environment", variable="BULKHEAD_SECRET_SHARED")
    listed = (await tenant.admin.get("/v1/secrets", params={"limit": 2})).json()
    rest = (await tenant.admin.get("/v1/secrets", params={"limit": 2, "cursor": listed["next_cursor"]})).json()
    items = listed["items"] + rest["items"]
    expected = [("another", "sealed", 1), ("bound", "environment", 1), ("reports-dsn", "sealed", 2)]
    assert [(item["name"], item["source"], item["version"]) for item in items] == expected
    assert "BULKHEAD_SECRET_SHARED" not in json.dumps(items)
    assert [(await tenant.admin.delete("/v1/secrets/another")).status_code for _ in range(2)] == [204, 404]


async def test_a_text_goes_in_and_comes_out_nowhere(ground: Ground, capfd: pytest.CaptureFixture[str]) -> None:
    tenant, value = await ground.new_tenant(), f"v{secrets.token_hex(12)}"
    written = await tenant.admin.put("/v1/secrets/key", json={"value": value})
    secret = await resolve(ground.store, tenant, "key")
    assert secret.texts == {"key": value}
    engine = create_async_engine(ground.service.urls.owner or "")
    async with engine.connect() as connection:
        await connection.execute(text("select set_config('app.tenant_id', :id, true)"), {"id": tenant.id})
        rows = (
            await connection.execute(text("select to_jsonb(s)::text, encode(sealed, 'escape') from secrets s"))
        ).all()
    await engine.dispose()
    assert len(rows) == 1
    seen = [
        written.text,
        (await tenant.admin.get("/v1/secrets")).text,
        (await tenant.admin.get("/v1/secrets/key")).text,
        (await tenant.admin.put("/v1/secrets/key", json={"value": value, "more": value})).text,
        (await tenant.admin.put("/v1/secrets/key", json={"value": [value]})).text,
        (await tenant.admin.put("/v1/secrets/key", json={"value": value * 500})).text,
        (await tenant.admin.put(f"/v1/secrets/{value}-A", json={"value": value})).text.replace(f"{value}-A", ""),
        (await ground.service.platform.get("/openapi.json")).text,
        json.dumps(await tenant.admin.events()),
        json.dumps(await ground.service.platform.events()),
        repr(secret) + repr(ground.store) + repr(ground.store._held) + repr(ground.store._known),
        str(rows),
        *capfd.readouterr(),
    ]
    assert [place for place in seen if value in place] == []


@pytest.mark.parametrize(
    "value", ["", "a\0b", "x" * 8193, "ä" * 4097, "\ud800", None, 7], ids=["empty", "nul", "long", "wide", *"snt"]
)
async def test_what_is_no_text_of_at_most_8_kib_is_refused(tenant: Tenant, value: object) -> None:
    body = json.dumps({"value": value}).encode()
    answer = await tenant.admin.put("/v1/secrets/odd", content=body, headers={"Content-Type": "application/json"})
    assert of(answer) == (422, "invalid_request")
    assert (await tenant.admin.delete("/v1/secrets/odd")).status_code == 404


async def test_the_largest_text_is_kept_whole(ground: Ground, tenant: Tenant) -> None:
    value = "ä" * 4096
    await write(tenant, "large", value)
    assert (await resolve(ground.store, tenant, "large")).texts["large"] == value


@pytest.mark.parametrize("name", ["A", "-a", "a_b", "a" * 64, "a%2Fb", "%00", "a.b"])
async def test_a_secret_has_a_plain_name(tenant: Tenant, name: str) -> None:
    assert (await tenant.admin.put(f"/v1/secrets/{name}", json={"value": "some-text"})).status_code in {404, 422}


async def test_a_tenant_has_a_bounded_number_of_them(ground: Ground, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(service_module, "_MAX_SECRETS", 2)
    tenant = await ground.new_tenant()
    for name in ("one", "two", "one"):
        await write(tenant, name, "some-text")
    assert of(await tenant.admin.put("/v1/secrets/three", json={"value": "some-text"})) == (409, "conflict")


async def test_another_tenants_secrets_are_not_there(ground: Ground, tenant: Tenant) -> None:
    other = await ground.new_tenant()
    await write(tenant, "mine", "text-of-the-first")
    assert (await other.admin.get("/v1/secrets")).json()["items"] == []
    assert (await other.admin.delete("/v1/secrets/mine")).status_code == 404
    await write(other, "mine", "text-of-the-second")
    assert (await resolve(ground.store, tenant, "mine")).texts["mine"] == "text-of-the-first"
    assert (await resolve(ground.store, other, "mine")).texts["mine"] == "text-of-the-second"


# Bindings


async def test_no_tenant_names_a_provider(ground: Ground, tenant: Tenant) -> None:
    locator = {"provider": "environment", "variable": "BULKHEAD_SECRET_SHARED"}
    path = f"/v1/tenants/{tenant.id}/secret-bindings/stolen"
    assert of(await tenant.admin.put(path, json={"locator": locator})) == (403, "forbidden")
    for body in ({"locator": locator}, {"value": "some-text", "locator": locator}, {"value": "x", **locator}):
        assert of(await tenant.admin.put("/v1/secrets/stolen", json=body)) == (422, "invalid_request")
    await write(tenant, "literal", "${BULKHEAD_SECRET_SHARED}")
    assert (await resolve(ground.store, tenant, "literal")).texts["literal"] == "${BULKHEAD_SECRET_SHARED}"
    assert (await ground.service.platform.put(path, json={"locator": locator})).status_code == 200, "the control"


_BIND = "insert into secret_bindings (tenant_id, name, id, version, provider, locator, created_by, updated_by)"
_BIND += " values (:tenant, 'planted', :id, 1, 'environment', '{}', :id, :id)"


@pytest.mark.parametrize("role", ["app", "platform"])
async def test_in_the_database_too_only_the_platform_binds(ground: Ground, tenant: Tenant, role: str) -> None:
    engine = create_async_engine(getattr(ground.service.urls, role))
    try:
        async with engine.connect() as connection:
            await connection.execute(text("select set_config('app.tenant_id', :id, true)"), {"id": tenant.id})
            values = {"tenant": UUID(tenant.id), "id": uuid.uuid4()}
            if role == "platform":
                assert (await connection.execute(text(_BIND), values)).rowcount == 1
                return
            with pytest.raises(DBAPIError, match="permission denied"):
                await connection.execute(text(_BIND), values)
    finally:
        await engine.dispose()


async def test_a_binding_is_made_read_replaced_and_removed_on_both_records(ground: Ground) -> None:
    tenant, platform = await ground.new_tenant(), ground.service.platform
    base = f"/v1/tenants/{tenant.id}/secret-bindings"
    locator = {"provider": "aws", "region": "us-east-1", "secret_id": "prod/mcp-use/openai-key", "field": "key"}
    await ground.bind(tenant, "key", **locator)
    found = (await platform.get(f"{base}/key")).json()
    assert (found["version"], found["locator"]) == (1, locator | {"stage": "AWSCURRENT"})
    await ground.bind(tenant, "key", provider="vault", path="mcp-use/api-keys", field="openai_key")
    assert [(row["name"], row["version"]) for row in (await platform.get(base)).json()["items"]] == [("key", 2)]
    assert [(await platform.delete(f"{base}/key")).status_code for _ in range(2)] == [204, 404]
    assert (await platform.get(f"{base}/key")).status_code == 404
    events = [event for event in await tenant.admin.events() if event["type"].startswith("secret.")]
    assert [(event["type"], event["data"]) for event in events] == [
        ("secret.bound", {"name": "key", "provider": "aws", "version": 1}),
        ("secret.bound", {"name": "key", "provider": "vault", "version": 2}),
        ("secret.unbound", {"name": "key", "provider": "vault", "version": 2}),
    ]
    acted = [event["data"] for event in await platform.events() if event["type"] == "platform.acted"]
    assert {"tenant_id": tenant.id, "action": "secret.bind"} in acted


async def test_a_name_has_one_source(ground: Ground) -> None:
    tenant = await ground.new_tenant()
    locator = {"provider": "environment", "variable": "BULKHEAD_SECRET_SHARED"}
    await ground.bind(tenant, "bound", **locator)
    await write(tenant, "sealed", "some-text")
    path = f"/v1/tenants/{tenant.id}/secret-bindings/sealed"
    assert of(await ground.service.platform.put(path, json={"locator": locator})) == (409, "conflict")
    assert of(await tenant.admin.put("/v1/secrets/bound", json={"value": "some-text"})) == (409, "conflict")
    assert of(await tenant.admin.delete("/v1/secrets/bound")) == (409, "conflict")


@pytest.mark.parametrize("tenant_id", [str(uuid.UUID(int=7)), str(PLATFORM_TENANT)])
async def test_a_tenant_that_is_not_there_has_no_bindings(ground: Ground, tenant_id: str) -> None:
    base, platform = f"/v1/tenants/{tenant_id}/secret-bindings", ground.service.platform
    locator = {"provider": "environment", "variable": "BULKHEAD_SECRET_SHARED"}
    answers = [
        await platform.put(f"{base}/key", json={"locator": locator}),
        await platform.get(f"{base}/key"),
        await platform.get(base),
        await platform.delete(f"{base}/key"),
    ]
    assert [answer.status_code for answer in answers] == [404] * 4


LOCATORS: list[dict[str, Any]] = [
    {"provider": "environment", "variable": "PATH"},
    {"provider": "environment", "variable": "BULKHEAD_ROOT_KEYS"},
    {"provider": "environment", "variable": "BULKHEAD_SECRETS_VAULT_TOKEN"},
    {"provider": "environment", "variable": "BULKHEAD_SECRET_A\n"},
    {"provider": "file", "path": "../outside"},
    {"provider": "file", "path": "/etc/passwd"},
    {"provider": "file", "path": "a/../../outside"},
    {"provider": "file", "path": "a//b"},
    {"provider": "file", "path": "a\0b"},
    {"provider": "aws", "region": "us-east-1.evil.test/", "secret_id": "a"},
    {"provider": "aws", "region": "us-east-1", "secret_id": "a", "endpoint_url": "http://evil.test"},
    {"provider": "azure", "vault": "http://vault.azure.net", "name": "a"},
    {"provider": "azure", "vault": "https://vault.azure.net/secrets", "name": "a"},
    {"provider": "azure", "vault": "https://a@evil.test", "name": "a"},
    {"provider": "azure", "vault": "https://vault.azure.net", "name": "a/../b"},
    {"provider": "vault", "path": "../sys/raw", "field": "a"},
    {"provider": "vault", "path": "a?b", "field": "a"},
    {"provider": "vault", "mount": "secret/../sys", "path": "a", "field": "a"},
    {"provider": "vault", "path": "a", "field": "a", "version": 0},
    {"provider": "keychain", "name": "a"},
    {"provider": "file"},
    {},
]


@pytest.mark.parametrize("locator", LOCATORS, ids=lambda locator: json.dumps(locator)[:60])
async def test_a_locator_that_leads_elsewhere_is_refused(
    ground: Ground, tenant: Tenant, locator: dict[str, Any]
) -> None:
    path = f"/v1/tenants/{tenant.id}/secret-bindings/odd"
    assert of(await ground.service.platform.put(path, json={"locator": locator})) == (422, "invalid_request")
