"""Credentials from outside: API keys from their making to their end, and tokens of registered issuers."""

from __future__ import annotations

import asyncio
import json
import secrets
import time
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from typing import Any, Final
from uuid import UUID, uuid4

import pytest
import structlog
from cryptography.hazmat.primitives.asymmetric import ec
from sqlalchemy import text

from app.auth import repository
from app.auth.jwks import DevelopmentIssuer
from tests.auth.forgery import Issuer, ec_jwk
from tests.outbound.origin import Origin, serving
from tests.service import Client, Service, Tenant

ISSUER: Final = "https://login.example"
ROWS: Final = "select to_jsonb(t)::text from {} t"


@pytest.fixture(scope="module")
async def tenant(service: Service) -> Tenant:
    return await service.new_tenant(files={"note.md": "hello"})


async def new_key(tenant: Tenant, **body: Any) -> dict[str, Any]:
    return await tenant.admin.make("/v1/keys", json={"user_id": tenant.user_id, "name": "test", **body})


async def status(service: Service, credential: str) -> int:
    return (await (await service.client(credential)).get("/v1/me")).status_code


async def listed(tenant: Tenant, key_id: str) -> dict[str, Any]:
    keys = (await tenant.admin.get("/v1/keys", params={"limit": 200})).json()["items"]
    return next(key for key in keys if key["id"] == key_id)


async def ended_within(service: Service, credential: str, *, seconds: float) -> bool:
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        if await status(service, credential) == 401:
            return True
        await asyncio.sleep(0.1)
    return False


# API keys


async def test_a_key_is_shown_once_and_kept_nowhere(service: Service, tenant: Tenant) -> None:
    with structlog.testing.capture_logs() as logs:
        key = await new_key(tenant)
        assert await status(service, key["key"]) == 200
        assert await status(service, key["key"][:-1] + "x") == 401
        await (await service.client(key["key"])).get("/v1/runs", params={"cursor": key["key"]})
        successor = await tenant.admin.make(f"/v1/keys/{key['id']}/rotate", json={})
        structlog.get_logger().info("something is logged at all")
    everything = [
        (await tenant.admin.get("/v1/keys")).text,
        json.dumps(await tenant.admin.events()),
        await dump(service, tenant),
        repr(logs),
    ]
    assert logs
    for shown in (key["key"], successor["key"]):
        lookup, secret = shown.split("_")[1:]
        assert lookup in everything[0], "the control: the prefix is shown"
        assert not [place for place in everything if secret in place or secret[:20] in place]


async def dump(service: Service, tenant: Tenant) -> str:
    """All that the database keeps of keys and users, and the whole audit record, of one tenant."""
    database = service.app.state.database
    rows: list[str] = []
    async with database.transaction(UUID(tenant.id)) as session:
        for table in ("api_keys", "users", "audit_events"):
            rows += await session.scalars(text(ROWS.format(table)))
    assert len(rows) > 5
    return "".join(rows)


async def test_a_key_ends_when_it_expires(service: Service, tenant: Tenant) -> None:
    expires_at = datetime.now(UTC) + timedelta(seconds=2)
    key = await new_key(tenant, expires_at=expires_at.isoformat())
    assert await status(service, key["key"]) == 200
    assert await ended_within(service, key["key"], seconds=8)
    assert datetime.now(UTC) >= expires_at
    assert datetime.fromisoformat((await listed(tenant, key["id"]))["expires_at"]) == expires_at


@pytest.mark.parametrize(
    "moment", ["2024-01-01T00:00:00", "9999-12-31T23:59:59-14:00", "0001-01-01T00:00:00Z", "soon", 1e30]
)
async def test_an_expiry_that_is_no_moment_is_refused(tenant: Tenant, moment: Any) -> None:
    body = {"user_id": tenant.user_id, "name": "test", "expires_at": moment}
    assert (await tenant.admin.post("/v1/keys", json=body)).status_code == 422


async def test_a_rate_that_is_none_is_told_its_form(tenant: Tenant) -> None:
    body = {"user_id": tenant.user_id, "name": "test", "rate": "100 a minute"}
    refused = await tenant.admin.post("/v1/keys", json=body)
    assert refused.json()["errors"] == [{"path": "/body/rate", "message": 'must be a rate such as "100/minute"'}]


async def test_a_rotated_key_goes_on_beside_its_successor_until_the_overlap_is_over(
    service: Service, tenant: Tenant
) -> None:
    old = await new_key(tenant)
    new = await tenant.admin.make(f"/v1/keys/{old['id']}/rotate", json={"overlap_s": 2})
    assert [await status(service, key["key"]) for key in (old, new)] == [200, 200]
    assert await ended_within(service, old["key"], seconds=8)
    assert await status(service, new["key"]) == 200


async def test_a_rotation_without_overlap_ends_the_old_key_at_once(service: Service, tenant: Tenant) -> None:
    old = await new_key(tenant)
    new = await tenant.admin.make(f"/v1/keys/{old['id']}/rotate", json={"overlap_s": 0})
    assert [await status(service, key["key"]) for key in (old, new)] == [401, 200]


async def test_a_rotation_makes_no_key_live_longer(service: Service, tenant: Tenant) -> None:
    key = await new_key(tenant, expires_at=(datetime.now(UTC) + timedelta(seconds=2)).isoformat())
    await tenant.admin.make(f"/v1/keys/{key['id']}/rotate", json={"overlap_s": 3600})
    assert await ended_within(service, key["key"], seconds=8)


async def test_a_revoked_key_ends_at_once_and_for_good(service: Service, tenant: Tenant) -> None:
    key = await new_key(tenant)
    path = f"/v1/keys/{key['id']}"
    assert await status(service, key["key"]) == 200
    assert (await tenant.admin.delete(path)).status_code == 204
    assert await status(service, key["key"]) == 401
    revoked_at = (await listed(tenant, key["id"]))["revoked_at"]
    assert (await tenant.admin.delete(path)).status_code == 204
    assert (await listed(tenant, key["id"]))["revoked_at"] == revoked_at
    assert (await tenant.admin.post(f"{path}/rotate", json={})).status_code == 409


async def test_the_last_use_of_a_key_is_kept(service: Service, tenant: Tenant) -> None:
    key = await new_key(tenant)
    assert (await listed(tenant, key["id"]))["last_used_at"] is None
    await status(service, key["key"])
    await service.app.state.authenticator.note_uses()  # as the house is kept, every few seconds
    last_used = datetime.fromisoformat((await listed(tenant, key["id"]))["last_used_at"])
    assert abs(datetime.now(UTC) - last_used) < timedelta(minutes=1)


async def test_a_process_that_ends_notes_when_keys_were_used_and_takes_nothing_back(
    service: Service, tenant: Tenant
) -> None:
    earlier, later = await new_key(tenant), await new_key(tenant)
    for key in (earlier, later):
        await status(service, key["key"])
    used_by = datetime.now(UTC)
    await asyncio.sleep(0.1)
    noted = "update api_keys set last_used_at = now() where id = :id returning last_used_at"
    ((of_another,),) = await service.sql(noted, role="platform", id=UUID(later["id"]))
    await service.app.state.authenticator.finish()
    found = [datetime.fromisoformat((await listed(tenant, key["id"]))["last_used_at"]) for key in (earlier, later)]
    assert found[0] < used_by, "when it was used, and not when that is written"
    assert found[1] == of_another > used_by, "another process has seen it later"


async def test_when_keys_were_used_is_kept_until_the_database_has_it(service: Service, tenant: Tenant) -> None:
    key, authenticator = await new_key(tenant), service.app.state.authenticator
    await status(service, key["key"])
    noting = asyncio.create_task(authenticator.note_uses())
    await asyncio.sleep(0)
    noting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await noting
    await authenticator.note_uses()
    assert (await listed(tenant, key["id"]))["last_used_at"] is not None


async def test_no_use_of_a_key_is_lost_to_who_holds_its_row(service: Service, tenant: Tenant) -> None:
    """Not even as the process ends; and a run that has just begun with a key holds nothing up."""
    held, begun = await new_key(tenant), await new_key(tenant)
    authenticator, platform = service.app.state.authenticator, service.app.state.platform
    async with platform.transaction() as holding:
        for key, lock in ((held, "for update"), (begun, "for key share")):
            await status(service, key["key"])
            await holding.execute(text(f"select from api_keys where id = :id {lock}"), {"id": UUID(key["id"])})
        await authenticator.note_uses()
        ending = asyncio.create_task(authenticator.finish())
        assert not (await asyncio.wait({ending}, timeout=0.5))[0], "it tries again"
        noted = [(await listed(tenant, key["id"]))["last_used_at"] is not None for key in (held, begun)]
        assert noted == [False, True]
    await ending
    assert (await listed(tenant, held["id"]))["last_used_at"] is not None
    async with platform.transaction() as session:
        of_none = {uuid4(): (UUID(tenant.id), datetime.now(UTC))}
        assert await repository.note_uses(session, of_none) == [], "what is gone is not kept for ever"


async def test_a_key_is_for_a_user_of_the_tenant(service: Service, tenant: Tenant) -> None:
    me = (await service.platform.get("/v1/me")).json()
    body = {"user_id": me["user_id"], "name": "platform"}
    assert (await tenant.admin.post("/v1/keys", json=body)).status_code == 404
    assert (await service.platform.post(f"/v1/tenants/{tenant.id}/keys", json=body)).status_code == 404


# Tokens


@pytest.fixture(scope="module")
def development(tmp_path_factory: pytest.TempPathFactory) -> DevelopmentIssuer:
    return DevelopmentIssuer(tmp_path_factory.mktemp("issuer") / "key.pem")


@pytest.fixture(scope="module")
def forger() -> Issuer:
    return Issuer()


async def trust(tenant: Tenant, **body: Any) -> dict[str, Any]:
    return await tenant.admin.make("/v1/issuers", json={"issuer": ISSUER, **body})


async def me(service: Service, token: str) -> dict[str, Any]:
    response = await (await service.client(token)).get("/v1/me")
    assert response.status_code == 200, response.text
    answer: dict[str, Any] = response.json()
    return answer


def for_tenant(forger: Issuer, tenant: Tenant, **claims: Any) -> str:
    return forger.token(**{"iss": ISSUER, "aud": f"bulkhead:{tenant.id}", "sub": secrets.token_hex(8)} | claims)


async def test_the_development_issuers_token_makes_its_user_with_the_lowest_role(
    service: Service, development: DevelopmentIssuer
) -> None:
    tenant = await service.new_tenant(files={"note.md": "hello"})
    row = await trust(tenant, issuer=development.issuer, jwks=development.public_jwks())
    assert row["audience"] == f"bulkhead:{tenant.id}"
    token = development.mint("alice", audience=row["audience"], now=datetime.now(UTC))
    first, again = await me(service, token), await me(service, token)
    assert (first["role"], first["tenant_id"], first["key_id"]) == ("user", tenant.id, None)
    assert again["user_id"] == first["user_id"]
    user = (await tenant.admin.get(f"/v1/users/{first['user_id']}")).json()
    assert (user["issuer"], user["subject"], user["role"]) == (development.issuer, "alice", "user")
    asked = await (await service.client(token)).ask("What does note.md say?")
    assert asked.json()["status"] == "succeeded"


async def test_many_first_requests_of_one_subject_make_one_user(service: Service, forger: Issuer) -> None:
    tenant = await service.new_tenant(policy=None)
    await trust(tenant, jwks=forger.jwks)
    client = await service.client(for_tenant(forger, tenant))
    answers = await asyncio.gather(*(client.get("/v1/me") for _ in range(8)))
    assert len({answer.json()["user_id"] for answer in answers}) == 1


@pytest.fixture
async def origin() -> AsyncIterator[Origin]:
    async with serving("127.0.0.1") as running:
        yield running


async def test_keys_are_fetched_from_the_issuer_and_kept(service: Service, forger: Issuer, origin: Origin) -> None:
    origin.jwks = json.dumps(forger.jwks).encode()
    tenant = await service.new_tenant(policy=None)
    row = await trust(tenant, jwks_uri=f"http://127.0.0.1:{origin.port}/jwks")
    assert row["jwks_uri"].endswith("/jwks")
    for _ in range(3):
        await me(service, for_tenant(forger, tenant))
    assert [request["path"] for request in origin.requests] == ["/jwks"]
    assert "authorization" not in origin.requests[0]


async def test_an_issuer_whose_keys_cannot_be_had_is_unavailable_and_lets_nobody_in(
    service: Service, forger: Issuer, origin: Origin
) -> None:
    tenant = await service.new_tenant(policy=None)
    await trust(tenant, jwks_uri=f"http://127.0.0.1:{origin.port}/moved")
    token = for_tenant(forger, tenant)
    with structlog.testing.capture_logs() as logs:
        response = await (await service.client(token)).get("/v1/me")
    assert (response.status_code, response.json()["code"]) == (503, "unavailable")
    assert str(origin.port) not in response.text
    # The service's own loops may speak meanwhile.
    assert [entry["event"] for entry in logs if entry["event"].startswith("request.")] == ["request.failed"]
    assert token not in repr(logs)


@pytest.mark.parametrize(
    ("claimed", "role"),
    [
        ("tenant_admin", "tenant_admin"),
        ("auditor", "auditor"),
        ("user", "user"),
        ("platform_admin", "user"),
        ("root", "user"),
        (["tenant_admin"], "user"),
        ({"tenant_admin": True}, "user"),
        (None, "user"),
    ],
)
async def test_a_claim_gives_a_role_of_the_tenant_and_no_other(
    service: Service, forger: Issuer, claimed: Any, role: str
) -> None:
    tenant = await service.new_tenant(policy=None)
    await trust(tenant, jwks=forger.jwks, role_claim="groups")
    token = for_tenant(forger, tenant, groups=claimed, role="tenant_admin", scopes=["tenants:write"])
    caller = await me(service, token)
    assert caller["role"] == role
    assert not {"tenants:read", "tenants:write"} & set(caller["scopes"])
    assert (await (await service.client(token)).get("/v1/tenants")).status_code == 403


async def test_without_a_role_claim_no_claim_gives_a_role(service: Service, forger: Issuer) -> None:
    tenant = await service.new_tenant(policy=None)
    await trust(tenant, jwks=forger.jwks)
    assert (await me(service, for_tenant(forger, tenant, role="tenant_admin", groups="tenant_admin")))["role"] == "user"


async def test_a_squatter_on_an_issuer_reaches_itself_alone(service: Service, forger: Issuer) -> None:
    """Tenant B registers A's issuer with keys of its own: what it signs is good for B's audience and no other."""
    a, b, squatter = await service.new_tenant(policy=None), await service.new_tenant(policy=None), Issuer()
    await trust(a, jwks=forger.jwks)
    assert (await trust(b, jwks=squatter.jwks))["audience"] == f"bulkhead:{b.id}"
    assert await status(service, for_tenant(squatter, a)) == 401
    assert await status(service, for_tenant(forger, b)) == 401
    assert (await me(service, for_tenant(squatter, b)))["tenant_id"] == b.id
    assert (await me(service, for_tenant(forger, a)))["tenant_id"] == a.id
    both = [f"bulkhead:{a.id}", f"bulkhead:{b.id}"]
    assert await status(service, for_tenant(squatter, a, aud=both)) == 401
    assert await status(service, for_tenant(forger, a, aud=both)) == 401


async def test_an_issuer_is_registered_once_and_for_ones_own_audience(service: Service, forger: Issuer) -> None:
    a, b = await service.new_tenant(policy=None), await service.new_tenant(policy=None)
    await trust(a, jwks=forger.jwks)
    again = await a.admin.post("/v1/issuers", json={"issuer": ISSUER, "jwks": forger.jwks})
    assert (again.status_code, again.json()["code"]) == (409, "issuer_taken")
    body = {"issuer": ISSUER, "jwks": forger.jwks, "audience": f"bulkhead:{a.id}"}
    assert (await b.admin.post("/v1/issuers", json=body)).status_code == 422


KEY: Final = ec.generate_private_key(ec.SECP256R1())
UNUSABLE: Final = {
    "no key": [],
    "a symmetric key": [{"kty": "oct", "k": "c2VjcmV0", "kid": "s"}],
    "a private key": [ec_jwk(KEY.public_key(), kid="e", d="c2VjcmV0")],
    "no key id": [ec_jwk(KEY.public_key())],
    "one key id twice": [ec_jwk(KEY.public_key(), kid="e")] * 2,
}


@pytest.mark.parametrize("fault", UNUSABLE)
async def test_a_key_set_that_nobody_should_trust_is_refused(tenant: Tenant, fault: str) -> None:
    response = await tenant.admin.post("/v1/issuers", json={"issuer": ISSUER, "jwks": {"keys": UNUSABLE[fault]}})
    assert (response.status_code, response.json()["code"]) == (422, "invalid_key_set")
    assert response.json()["errors"][0]["path"].startswith("/keys")
    assert "c2VjcmV0" not in response.text


@pytest.mark.parametrize(
    "body",
    [
        {},
        {"jwks_uri": "https://a.example", "jwks": {"keys": []}},
        {"jwks_uri": "file:///etc/passwd"},
        {"jwks_uri": "ftp://a"},
    ],
)
async def test_an_issuer_has_one_source_of_keys_on_the_web(tenant: Tenant, body: dict[str, Any]) -> None:
    assert (await tenant.admin.post("/v1/issuers", json={"issuer": ISSUER, **body})).status_code == 422


async def test_a_key_set_with_what_postgres_cannot_keep_is_refused(tenant: Tenant, forger: Issuer) -> None:
    body = {"issuer": "https://nul.example", "jwks": forger.jwks | {"note": "a\0b"}}
    response = await tenant.admin.post("/v1/issuers", json=body)
    assert (response.status_code, response.json()["code"]) == (422, "invalid_key_set")


async def test_a_disabled_user_and_a_removed_issuer_are_refused_at_once(service: Service, forger: Issuer) -> None:
    tenant = await service.new_tenant(policy=None)
    issuer = await trust(tenant, jwks=forger.jwks)
    token = for_tenant(forger, tenant)
    user = f"/v1/users/{(await me(service, token))['user_id']}"
    assert (await tenant.admin.post(f"{user}/disable")).status_code == 204
    assert await status(service, token) == 401
    assert (await tenant.admin.post(f"{user}/enable")).status_code == 204
    assert await status(service, token) == 200
    assert (await tenant.admin.delete(f"/v1/issuers/{issuer['id']}")).status_code == 204
    assert await status(service, token) == 401
    await trust(tenant, jwks=Issuer().jwks)
    assert await status(service, token) == 401, "another issuer by that name has other keys"


async def test_a_disabled_tenant_takes_no_token_and_makes_no_user(service: Service, forger: Issuer) -> None:
    tenant = await service.new_tenant(policy=None)
    await trust(tenant, jwks=forger.jwks)
    known, token = for_tenant(forger, tenant), for_tenant(forger, tenant)
    await me(service, known)
    before = await user_count(tenant.admin)
    await service.platform.post(f"/v1/tenants/{tenant.id}/disable")
    assert [await status(service, credential) for credential in (known, token)] == [401, 401]
    await service.platform.post(f"/v1/tenants/{tenant.id}/enable")
    assert await user_count(tenant.admin) == before
    assert await status(service, token) == 200


async def user_count(admin: Client) -> int:
    return len((await admin.get("/v1/users")).json()["items"])


@pytest.mark.parametrize(
    "claims", [{"exp": 1}, {"exp": ...}, {"aud": ...}, {"sub": ...}, {"aud": "bulkhead:"}, {"nbf": 4_000_000_000}]
)
async def test_a_token_with_a_bad_claim_is_refused(service: Service, forger: Issuer, claims: dict[str, Any]) -> None:
    tenant = await service.new_tenant(policy=None)
    await trust(tenant, jwks=forger.jwks)
    assert await status(service, for_tenant(forger, tenant, **claims)) == 401
    assert await status(service, for_tenant(forger, tenant)) == 200, "the control"
