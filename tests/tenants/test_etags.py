"""What has been changed since it was read is not changed by who has not seen that; roles stay within the tenant."""

from __future__ import annotations

import asyncio

import pytest

from app.etags import PreconditionFailed, etag, read_if_match
from app.schemas import Answer
from tests.service import POLICY, Client, Service, Tenant


class Shown(Answer):
    """Something with a text."""

    text: str


@pytest.mark.parametrize(
    ("header", "holds"),
    [
        (None, True),
        ("*", True),
        ("{tag}", True),
        ('"other", {tag}', True),
        ("W/{tag}", False),
        ('"other"', False),
        ("", False),
        ("{tag}, nonsense", False),
        ("nonsense", False),
    ],
)
def test_an_if_match_holds_for_a_strong_tag_of_what_is_there(header: str | None, *, holds: bool) -> None:
    shown = Shown(text="as it is")
    if_match = read_if_match(header.format(tag=etag(shown)) if header else header)
    if holds:
        if_match.check(shown)
    else:
        with pytest.raises(PreconditionFailed):
            if_match.check(shown)


@pytest.fixture
async def tenant(service: Service) -> Tenant:
    return await service.new_tenant(policy=None)


async def tag_of(client: Client, path: str) -> str:
    tag: str = (await client.get(path)).headers["etag"]
    return tag


async def test_a_change_of_what_was_changed_meanwhile_is_refused(tenant: Tenant) -> None:
    path = f"/v1/users/{tenant.user_id}"
    seen = {"If-Match": await tag_of(tenant.admin, path)}
    first = await tenant.admin.patch(path, json={"role": "auditor"}, headers=seen)
    assert first.status_code == 200
    for change in (
        tenant.admin.patch(path, json={"role": "tenant_admin"}, headers=seen),
        tenant.admin.post(f"{path}/disable", headers=seen),
        tenant.admin.post(f"{path}/enable", headers=seen),
    ):
        answer = await change
        assert (answer.status_code, answer.json()["code"]) == (412, "precondition_failed")
    assert (await tenant.admin.get(path)).json() == first.json()
    assert first.headers["etag"] == await tag_of(tenant.admin, path)
    assert (await tenant.admin.patch(path, json={"role": "user"})).status_code == 200, "control: without If-Match"


async def test_of_two_who_have_seen_the_same_one_changes_it(tenant: Tenant) -> None:
    path = f"/v1/users/{tenant.user_id}"
    seen = {"If-Match": await tag_of(tenant.admin, path)}
    changes = [tenant.admin.patch(path, json={"role": role}, headers=seen) for role in ("auditor", "tenant_admin") * 3]
    assert sorted(answer.status_code for answer in await asyncio.gather(*changes)) == [200, *[412] * 5]


async def test_tenants_issuers_and_the_published_version_have_tags(service: Service, tenant: Tenant) -> None:
    path = f"/v1/tenants/{tenant.id}"
    stale = {"If-Match": await tag_of(service.platform, path)}
    assert (await service.platform.post(f"{path}/disable", headers=stale)).status_code == 204
    assert (await service.platform.post(f"{path}/enable", headers=stale)).status_code == 412
    assert (await service.platform.post(f"{path}/enable")).status_code == 204

    issuer = await tenant.admin.make(
        "/v1/issuers", json={"issuer": f"https://{tenant.id}", "jwks_uri": "https://k.example"}
    )
    path = f"/v1/issuers/{issuer['id']}"
    assert (await tenant.admin.delete(path, headers={"If-Match": '"old"'})).status_code == 412
    assert (await tenant.admin.delete(path, headers={"If-Match": await tag_of(tenant.admin, path)})).status_code == 204

    assert (await tenant.admin.get("/v1/policies/published")).status_code == 404
    nothing = await tenant.admin.make("/v1/policies", content=POLICY.encode())
    publish = f"/v1/policies/{nothing['version']}/publish"
    assert (await tenant.admin.post(publish, headers={"If-Match": '"old"'})).status_code == 412
    await tenant.admin.make(publish)
    seen = {"If-Match": await tag_of(tenant.admin, "/v1/policies/published")}
    assert (await tenant.admin.post(publish, headers=seen)).status_code == 200
    assert (await tenant.admin.post(publish, headers=seen)).status_code == 412


async def test_a_secret_is_not_overwritten_by_who_has_not_seen_the_last_one(tenant: Tenant) -> None:
    path, old = "/v1/secrets/key", {"If-Match": '"old"'}
    assert (await tenant.admin.put(path, json={"value": "a-text"}, headers=old)).status_code == 412
    seen = {"If-Match": (await tenant.admin.put(path, json={"value": "a-text"})).headers["etag"]}
    assert seen["If-Match"] == await tag_of(tenant.admin, path)
    assert (await tenant.admin.put(path, json={"value": "another"}, headers=seen)).status_code == 200
    for late in (
        tenant.admin.put(path, json={"value": "third"}, headers=seen),
        tenant.admin.delete(path, headers=seen),
    ):
        assert (await late).status_code == 412
    assert (await tenant.admin.get(path)).json()["version"] == 2


async def test_a_role_is_changed_and_holds_from_the_next_request(tenant: Tenant) -> None:
    path = f"/v1/users/{tenant.user_id}"
    assert (await tenant.user.get("/v1/users")).status_code == 403
    assert (await tenant.admin.patch(path, json={"role": "auditor"})).json()["role"] == "auditor"
    assert (await tenant.user.get("/v1/users")).status_code == 200
    assert (await tenant.user.patch(path, json={"role": "tenant_admin"})).status_code == 403
    (event,) = [event for event in await tenant.admin.events() if event["type"] == "user.role_changed"]
    assert event["data"] == {"user_id": tenant.user_id, "before": {"role": "user"}, "after": {"role": "auditor"}}


async def test_no_role_of_a_tenant_is_one_of_the_platform(service: Service, tenant: Tenant) -> None:
    answer = await tenant.admin.patch(f"/v1/users/{tenant.user_id}", json={"role": "platform_admin"})
    assert answer.status_code == 403
    me = (await service.platform.get("/v1/me")).json()["user_id"]
    assert (await service.platform.patch(f"/v1/users/{me}", json={"role": "tenant_admin"})).status_code == 403


async def test_the_last_admin_stays_one(service: Service, tenant: Tenant) -> None:
    me = (await tenant.admin.get("/v1/me")).json()["user_id"]
    for change in (
        tenant.admin.patch(f"/v1/users/{me}", json={"role": "user"}),
        tenant.admin.post(f"/v1/users/{me}/disable"),
    ):
        answer = await change
        assert (answer.status_code, answer.json()["code"]) == (409, "last_admin")
    second, row, _ = await service.new_user(tenant.id, "tenant_admin")
    answers = await asyncio.gather(
        tenant.admin.patch(f"/v1/users/{row['id']}", json={"role": "user"}),
        second.patch(f"/v1/users/{me}", json={"role": "user"}),
    )
    assert sorted(answer.status_code for answer in answers) in ([200, 409], [200, 403])


async def test_of_many_who_remove_the_same_one_does(tenant: Tenant) -> None:
    for n in range(3):
        body = {"issuer": f"https://{tenant.id}/{n}", "jwks_uri": "https://k.example"}
        path = f"/v1/issuers/{(await tenant.admin.make('/v1/issuers', json=body))['id']}"
        answers = await asyncio.gather(*(tenant.admin.delete(path) for _ in range(6)))
        assert sorted(answer.status_code for answer in answers) == [204, *[404] * 5]
    assert sum(event["type"] == "issuer.removed" for event in await tenant.admin.events()) == 3


async def test_issuers_are_listed_by_pages(tenant: Tenant) -> None:
    made = [
        (
            await tenant.admin.make(
                "/v1/issuers", json={"issuer": f"https://{tenant.id}/{n}", "jwks_uri": "https://k.example"}
            )
        )
        for n in range(3)
    ]
    first = (await tenant.admin.get("/v1/issuers", params={"limit": 2})).json()
    rest = (await tenant.admin.get("/v1/issuers", params={"limit": 2, "cursor": first["next_cursor"]})).json()
    assert first["items"] + rest["items"] == made
    assert rest["next_cursor"] is None
