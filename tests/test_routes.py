"""One walk over all routes: without a credential 401, without the scope 403, and no route that nobody decided about."""

from __future__ import annotations

import asyncio
import uuid
from typing import Final

import httpx
import pytest
from fastapi import FastAPI

from app.auth.keys import mint
from app.scopes import Role
from tests.auth.forgery import Issuer
from tests.routes import ADMIN, AUDITOR, METRICS, PLATFORM, PUBLIC, ROLES, USER, Operation, operations
from tests.service import NO_TLS, Client, Service, new_client

ABSENT: Final = {
    "version": "2000000000",
    "sequence": "1",
    "name": "nowhere",
    "path": "absent.md",
    **dict.fromkeys(("run_id", "switch_id", "tenant_id", "user_id", "key_id", "issuer_id"), str(uuid.uuid4())),
    **dict.fromkeys(("endpoint_id", "quarantine_id", "approval_id", "conversation_id"), str(uuid.uuid4())),
}


async def sent(operation: Operation, client: httpx.AsyncClient) -> httpx.Response:
    """The operation on what is not there, with a body that no scope would save."""
    json: dict[str, str] | None = None if operation.method in {"GET", "HEAD", "DELETE"} else {}
    return await client.request(operation.method, operation.url(ABSENT), json=json)


def undecided(app: FastAPI) -> set[Operation]:
    return operations(app) ^ (PUBLIC | {METRICS} | set(ROLES))


def test_every_route_is_public_or_has_its_roles_written_down(service: Service) -> None:
    assert undecided(service.app) == set()


def test_a_route_that_is_added_without_a_decision_is_found(service: Service) -> None:
    app = FastAPI()
    app.router.routes.extend(service.app.routes)
    app.add_api_route("/v1/backdoor", lambda: None, methods=["POST"])
    assert Operation("POST", "/v1/backdoor") in undecided(app)


@pytest.fixture(scope="module")
async def refused(service: Service) -> dict[str, dict[str, str]]:
    """Headers of everything that is no credential."""
    tenant = await service.new_tenant(policy=None)
    assert (await tenant.admin.delete(f"/v1/keys/{tenant.user_key_id}")).status_code == 204
    secret = f"bh_{'a' * 12}_{'b' * 46}"
    bearers = {
        "garbage": "garbage",
        "unknown key": mint().text,
        "key with a wrong checksum": secret,
        "revoked key": tenant.user_key,
        "lookup of a real key": tenant.user_key[:16] + mint().text[16:],
        "token of an unknown issuer": Issuer().token(aud=f"bulkhead:{tenant.id}"),
        "very long": "x" * 20_000,
    }
    return {
        "none": {},
        "no value": {"Authorization": "Bearer"},
        "another scheme": {"Authorization": f"Basic {tenant.user_key}"},
        **{name: {"Authorization": f"Bearer {bearer}"} for name, bearer in bearers.items()},
    }


@pytest.mark.parametrize("operation", sorted(ROLES), ids=" ".join)
async def test_nothing_answers_without_a_credential(
    service: Service, refused: dict[str, dict[str, str]], operation: Operation
) -> None:
    service.app.state.gate._failed.clear()  # the same few on every route: they would be slowed
    async with httpx.AsyncClient(base_url=service.url, trust_env=False, verify=NO_TLS) as stranger:
        bodies = set()
        for name, headers in refused.items():
            stranger.headers.pop("authorization", None)
            stranger.headers.update(headers)
            response = await sent(operation, stranger)
            assert response.status_code == 401, name
            assert response.headers["content-type"] == "application/problem+json"
            assert response.headers["www-authenticate"] == 'Bearer realm="bulkhead"'
            problem = response.json()
            assert problem["code"] == "unauthenticated"
            del problem["request_id"]
            bodies.add(str(problem))
        assert len(bodies) == 1, "the answer tells one bad credential from another"


@pytest.mark.parametrize("operation", sorted(PUBLIC), ids=" ".join)
async def test_what_is_public_answers_without_a_credential(service: Service, operation: Operation) -> None:
    async with httpx.AsyncClient(base_url=service.url, trust_env=False, verify=NO_TLS) as stranger:
        assert (await sent(operation, stranger)).status_code == 200


@pytest.mark.parametrize("operation", sorted(ROLES), ids=" ".join)
async def test_a_parameter_that_a_route_does_not_take_is_refused_by_name(
    service: Service, callers: dict[Role, Client], operation: Operation
) -> None:
    """Whoever may not call is told that first, and nothing of parameters."""
    url = f"{operation.url(ABSENT)}?limti=1"
    for role in ROLES[operation]:
        answer = await callers[role].request(operation.method, url)
        assert answer.status_code == 422, answer.text
        assert answer.json()["errors"] == [{"path": "/query/limti", "message": "is not a known parameter"}]
    async with httpx.AsyncClient(base_url=service.url, trust_env=False, verify=NO_TLS) as stranger:
        assert (await stranger.request(operation.method, url)).status_code == 401


def test_all_parameters_that_are_described_are_known(service: Service) -> None:
    """The control: those that a route takes by itself and those of what it depends on."""
    known = {each for names in service.app.state.parameters.values() for each in names.items()}
    described = {
        (each["name"], "'array'" in str(each["schema"]))
        for path in service.app.openapi()["paths"].values()
        for operation in path.values()
        for each in operation.get("parameters", ())
        if each["in"] == "query"
    }
    assert known == described
    assert {("state", True), ("type", True), ("limit", False)} <= known


@pytest.fixture(scope="module")
async def callers(service: Service) -> dict[Role, Client]:
    tenant = await service.new_tenant()
    auditor, _, _ = await service.new_user(tenant.id, "auditor")
    return {ADMIN: tenant.admin, AUDITOR: auditor, USER: tenant.user, PLATFORM: service.platform}


@pytest.mark.parametrize("role", list(Role))
async def test_a_role_reaches_what_its_scopes_name_and_nothing_else(callers: dict[Role, Client], role: Role) -> None:
    answers = await asyncio.gather(*(sent(operation, callers[role]) for operation in ROLES))
    reached = {operation for operation, answer in zip(ROLES, answers, strict=True) if answer.status_code != 403}
    assert reached == {operation for operation, roles in ROLES.items() if role in roles}
    for answer in answers:
        # They meet: what one of them makes, another may find and delete.
        assert answer.status_code in {200, 201, 204, 403, 404, 409, 422}, answer.text
        if answer.status_code == 403:
            assert answer.json()["code"] == "forbidden"


async def test_the_metrics_want_their_own_token(service: Service, callers: dict[Role, Client]) -> None:
    for client in callers.values():
        assert (await client.get("/metrics")).status_code == 401
    async with new_client(service.url, service.metrics_token) as scraper:
        assert (await scraper.get("/metrics")).status_code == 200
        assert (await scraper.get("/v1/me")).status_code == 401
