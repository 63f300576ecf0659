"""A tenant's admin on every route that takes a body: nothing of the platform's, nothing of another tenant's."""

from __future__ import annotations

from typing import Any, Final

import pytest
from fastapi import FastAPI

from tests.openapi import unconnected_app
from tests.routes import ADMIN, ROLES, Operation
from tests.service import Service, Tenant

# What only the platform decides about, by whatever name a row or a setting of ours has it.
PLATFORMS: Final[dict[str, Any]] = {
    "tenant_id": None,
    "status": "active",
    "sandbox_uid": 0,
    "generation": 0,
    "scopes": ["tenants:write"],
    "audience": "bulkhead:other",
    "limits": {"max_steps": 100_000},
    "caps": {"max_steps": 100_000},
    "quota": 10**12,
    "provider": "environment",
    "locator": {"provider": "environment", "variable": "BULKHEAD_ROOT_KEYS"},
    "base_url": "http://127.0.0.1",
}


def taking_json(app: FastAPI) -> list[Operation]:
    """Every operation of a tenant's admin with a body of members."""
    paths = app.openapi()["paths"]
    found = []
    for operation in ROLES:
        described = paths.get(operation.path.replace(":path", ""), {}).get(operation.method.lower(), {})
        if ADMIN in ROLES[operation] and "application/json" in described.get("requestBody", {}).get("content", {}):
            found.append(operation)
    return sorted(found)


OPERATIONS: Final = taking_json(unconnected_app())
READING: Final = sorted(
    operation
    for operation, roles in ROLES.items()
    if operation.method == "GET" and ADMIN in roles and not operation.parameters
)


@pytest.fixture(scope="module")
async def tenants(service: Service) -> tuple[Tenant, Tenant]:
    return await service.new_tenant(), await service.new_tenant(policy=None)


def test_the_walk_is_not_empty() -> None:
    assert {Operation("POST", "/v1/users"), Operation("PATCH", "/v1/users/{user_id}")} <= set(OPERATIONS)


@pytest.mark.parametrize("operation", OPERATIONS, ids=" ".join)
async def test_a_member_that_only_the_platform_decides_about_is_refused_by_name(
    tenants: tuple[Tenant, Tenant], operation: Operation
) -> None:
    tenant, other = tenants
    values = {"version": "1", "sequence": "1", "name": "name"}
    url = operation.url({name: values.get(name, other.user_id) for name in operation.parameters})
    for name, value in PLATFORMS.items():
        answer = await tenant.admin.request(operation.method, url, json={name: value or other.id})
        assert answer.status_code == 422, answer.text
        faults = {fault["path"]: fault["message"] for fault in answer.json()["errors"]}
        assert faults[f"/body/{name}"] == "is not a known member"


@pytest.mark.parametrize("operation", READING, ids=" ".join)
async def test_a_parameter_or_header_that_names_another_tenant_reads_nothing_of_it(
    tenants: tuple[Tenant, Tenant], operation: Operation
) -> None:
    tenant, other = tenants
    theirs = (other.id, other.user_id, other.user_key_id)
    answer = await tenant.admin.get(
        operation.path,
        params={"tenant_id": other.id, "tenant": other.id, "user_id": other.user_id},
        headers={"X-Tenant-Id": other.id, "X-Forwarded-User": other.user_id},
    )
    assert answer.status_code in {200, 403, 404, 422}
    assert not any(text in answer.text for text in theirs)


@pytest.mark.parametrize("role", ["platform_admin", "owner", "bulkhead_platform", "TENANT_ADMIN"])
async def test_no_role_above_the_tenants_own_is_made_or_taken(tenants: tuple[Tenant, Tenant], role: str) -> None:
    tenant, _ = tenants
    me = (await tenant.admin.get("/v1/me")).json()["user_id"]
    for answer in (
        await tenant.admin.post("/v1/users", json={"name": role, "role": role}),
        await tenant.admin.patch(f"/v1/users/{me}", json={"role": role}),
        await tenant.admin.patch(f"/v1/users/{tenant.user_id}", json={"role": role}),
    ):
        assert answer.status_code in {403, 422}
    assert (await tenant.admin.get("/v1/me")).json()["role"] == "tenant_admin"
