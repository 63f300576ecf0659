"""Approvals through the API: who sees them, who decides, what a decision is bound to, and what the record says."""

from __future__ import annotations

import json
import uuid
from dataclasses import dataclass
from typing import Any, Final

import pytest

from app.errors import Forbidden
from app.runs import contents
from app.runs.approvals.rulings import Ruling
from app.scopes import Role
from tests.runs.approvals.waiting import APPROVING, ARGUMENTS, RULE, TOOL, Waiting, caller_of, rule, waiting_run
from tests.service import Client, Service, Tenant

JSON: Final = {"Content-Type": "application/json"}
OTHER: Final = {"path": "other.md"}


@dataclass(frozen=True, slots=True)
class People:
    """A tenant whose policy wants approvals, and who is in it."""

    tenant: Tenant
    colleague: Client
    colleague_id: str
    auditor: Client

    @property
    def user(self) -> Client:
        """Who has asked."""
        return self.tenant.user

    @property
    def admin(self) -> Client:
        """Who may decide on everything."""
        return self.tenant.admin


@pytest.fixture(scope="module")
async def people(service: Service) -> People:
    tenant = await service.new_tenant(policy=f"{APPROVING}\ninput: {{block: [internal-only]}}\n")
    colleague, row, _ = await service.new_user(tenant.id)
    auditor, _, _ = await service.new_user(tenant.id, "auditor")
    return People(tenant, colleague, row["id"], auditor)


@pytest.fixture
async def waiting(service: Service, people: People) -> Waiting:
    return await waiting_run(service, people.tenant)


def path(waiting: Waiting, what: str = "") -> str:
    return f"/v1/approvals/{waiting.id}{what}"


async def told(client: Client, waiting: Waiting, what: str, **body: Any) -> tuple[int, str | None]:
    """Status and code of a decision, or the run's state where it was taken."""
    response = await client.post(path(waiting, f"/{what}"), content=json.dumps(body), headers=JSON)
    return response.status_code, response.json().get("code" if response.is_error else "status")


async def recorded(people: People, waiting: Waiting) -> list[tuple[str, dict[str, Any]]]:
    events = await people.admin.events(run_id=str(waiting.context.run_id))
    return [(event["type"], event["data"]) for event in events if event["type"].startswith("approval.")]


# Looking


async def test_the_inbox_lists_what_waits_the_newest_first(service: Service, people: People) -> None:
    old, new = await waiting_run(service, people.tenant), await waiting_run(service, people.tenant)
    items = (await people.user.get("/v1/approvals", params={"state": "waiting", "limit": 2})).json()["items"]
    assert [item["id"] for item in items] == [str(new.id), str(old.id)]
    of_run = {"run_id": str(old.context.run_id)}
    (item,) = (await people.user.get("/v1/approvals", params=of_run)).json()["items"]
    assert (item["tool"], item["rule"], item["state"], item["sequence"]) == (TOOL, RULE, "waiting", 1)
    assert (item["user_id"], item["policy_version"]) == (people.tenant.user_id, 1)
    assert (await people.user.get("/v1/approvals", params=of_run | {"state": "denied"})).json()["items"] == []


async def test_the_list_goes_on_where_a_page_ends(service: Service, people: People) -> None:
    made = await waiting_run(service, people.tenant, OTHER, OTHER)
    params: dict[str, Any] = {"run_id": str(made.context.run_id), "limit": 2}
    first = (await people.admin.get("/v1/approvals", params=params)).json()
    second = (await people.admin.get("/v1/approvals", params=params | {"cursor": first["next_cursor"]})).json()
    assert {item["id"] for item in first["items"] + second["items"]} == set(map(str, made.ids))
    assert second["next_cursor"] is None


async def test_who_may_look_sees_the_arguments_and_anybody_else_nothing(people: People, waiting: Waiting) -> None:
    for client in (people.user, people.admin, people.auditor):
        assert (await client.get(path(waiting))).json()["arguments"] == ARGUMENTS
        assert str(waiting.id) in (await client.get("/v1/approvals")).text
    missing = await people.colleague.get(f"/v1/approvals/{uuid.uuid4()}")
    found = await people.colleague.get(path(waiting))
    assert (found.status_code, found.json()["code"]) == (missing.status_code, missing.json()["code"])
    assert str(waiting.id) not in (await people.colleague.get("/v1/approvals")).text
    events = await people.admin.events(run_id=str(waiting.context.run_id))
    assert [event["type"] for event in events].count("run.read") == 2  # not the user's own look


# Deciding


async def test_an_approved_call_lets_its_run_go_on(people: People, waiting: Waiting) -> None:
    response = await people.user.post(path(waiting, "/approve"))
    assert response.status_code == 202, response.text
    run_id = str(waiting.context.run_id)
    assert (response.json()["run_id"], response.headers["location"]) == (run_id, f"/v1/runs/{run_id}")
    assert await waiting.state() == ("queued", "approved")
    shown = (await people.user.get(path(waiting))).json()
    assert (shown["decided_by"], shown["is_edited"]) == (people.tenant.user_id, False)


async def test_a_denied_call_lets_its_run_go_on_and_keeps_the_reason_sealed(people: People, waiting: Waiting) -> None:
    assert await told(people.admin, waiting, "deny", reason="Not that file.") == (202, "queued")
    assert (await people.user.get(path(waiting))).json()["reason"] == "Not that file."
    assert (await waiting.standing())[1].state == "denied"
    tenant_id = waiting.context.caller.tenant_id
    async with waiting.database.transaction(tenant_id) as session:
        key, run_id = waiting.context.content_key, waiting.context.run_id
        assert await contents.read(session, key, run_id, contents.Kind.REASON, sequence=1) == "Not that file."


async def test_a_run_goes_on_only_after_the_word_on_its_last_call(service: Service, people: People) -> None:
    waiting = await waiting_run(service, people.tenant, OTHER)
    assert await told(people.user, waiting, "approve") == (202, "waiting_approval")
    assert (await waiting.state())[0] == "waiting_approval"
    response = await people.user.post(f"/v1/approvals/{waiting.ids[1]}/deny")
    assert response.json()["status"] == "queued"


@pytest.mark.parametrize("first", ["approve", "deny"])
@pytest.mark.parametrize("then", ["approve", "deny"])
async def test_what_is_decided_stays_so(people: People, waiting: Waiting, first: str, then: str) -> None:
    assert (await told(people.user, waiting, first))[0] == 202
    before = await waiting.state()
    assert await told(people.user, waiting, then) == (409, "approval_decided")
    assert await waiting.state() == before


async def test_a_decision_that_is_sent_twice_under_one_key_is_taken_once(people: People, waiting: Waiting) -> None:
    key = {"Idempotency-Key": str(uuid.uuid4())}
    answers = [await people.user.post(path(waiting, "/approve"), headers=key) for _ in range(2)]
    assert [answer.status_code for answer in answers] == [202, 202]
    assert answers[0].json() == answers[1].json()
    assert answers[1].headers["location"] == answers[0].headers["location"]
    other = await people.user.post(path(waiting, "/approve"), headers=key, json={"arguments": OTHER})
    assert (other.status_code, other.json()["code"]) == (422, "idempotency_mismatch")
    assert [kind for kind, _ in await recorded(people, waiting)].count("approval.decided") == 1


# Who decides


async def test_nobody_decides_who_may_not(people: People, waiting: Waiting) -> None:
    for what in ("approve", "deny"):
        assert await told(people.colleague, waiting, what) == (404, "not_found")
        assert await told(people.auditor, waiting, what) == (403, "forbidden")
    assert await waiting.state() == ("waiting_approval", "waiting")
    assert await told(people.admin, waiting, "approve") == (202, "queued")


async def test_who_has_asked_does_not_decide_where_the_policy_wants_somebody_else(service: Service) -> None:
    tenant = await service.new_tenant(policy=f"{APPROVING}\napprovals: {{self_approval: false}}\n")
    admin_id = (await tenant.admin.get("/v1/me")).json()["user_id"]
    of_admin = await waiting_run(service, tenant, user_id=admin_id)
    of_user = await waiting_run(service, tenant)
    for client, own in ((tenant.user, of_user), (tenant.admin, of_admin)):
        for what in ("approve", "deny"):
            assert await told(client, own, what) == (403, "self_approval")
    assert await of_user.state() == ("waiting_approval", "waiting")
    failures = [event["data"] for event in await tenant.admin.events() if event["type"] == "auth.failed"]
    assert "self_approval" in {data["reason"] for data in failures}
    assert await told(tenant.admin, of_user, "approve") == (202, "queued")


async def test_a_user_who_has_been_disabled_decides_nothing(service: Service, people: People, waiting: Waiting) -> None:
    client, row, _ = await service.new_user(people.tenant.id, "tenant_admin")
    caller = await caller_of(service, people.tenant, row["id"], Role.TENANT_ADMIN)
    assert (await people.admin.post(f"/v1/users/{row['id']}/disable")).is_success
    assert (await told(client, waiting, "approve"))[0] == 401
    # And one who was disabled after the credential was looked at.
    with pytest.raises(Forbidden):
        await rule(service, caller, waiting, Ruling(is_approved=True))
    assert await waiting.state() == ("waiting_approval", "waiting")
    assert (await people.admin.post(f"/v1/users/{row['id']}/enable")).is_success
    await rule(service, caller, waiting, Ruling(is_approved=True))
    assert await waiting.state() == ("queued", "approved")


# Texts


@pytest.mark.parametrize("reason", ["", "x" * 501, "two\nlines", "a bell \a", "two\u2028lines", "half \ud800"])
async def test_a_reason_is_one_line_of_text(people: People, waiting: Waiting, reason: str) -> None:
    assert await told(people.user, waiting, "deny", reason=reason) == (422, "invalid_request")
    assert await waiting.state() == ("waiting_approval", "waiting")


async def test_a_reason_is_screened_as_a_query_is(people: People, waiting: Waiting) -> None:
    refused = await people.user.post(path(waiting, "/deny"), json={"reason": "This is internal-only."})
    assert refused.status_code == 422
    assert "block[0]" in refused.json()["errors"][0]["message"]
    assert await waiting.state() == ("waiting_approval", "waiting")
    assert await told(people.user, waiting, "deny", reason="This is for us.") == (202, "queued")


async def test_the_record_tells_all_of_it_in_ids_and_hashes(people: People, waiting: Waiting) -> None:
    await people.admin.post(path(waiting, "/deny"), json={"reason": "A private reason."})
    requested, decided = await recorded(people, waiting)
    hashed = waiting.context.hash_key
    call = {"approval_id": str(waiting.id), "sequence": 1, "tool": TOOL, "policy_version": 1}
    arguments_hmac = hashed.mac("audit", b'{"path":"note.md"}').hex()
    definition = waiting.context.policy.definition_hashes[TOOL]
    expires_at = requested[1].pop("expires_at")
    bound = {"rule": RULE, "definition_hash": definition, "arguments_hmac": arguments_hmac}
    assert requested == ("approval.requested", call | bound)
    assert expires_at > "2026"
    reason_hmac = hashed.mac("audit", b"A private reason.").hex()
    more = {"decision": "denied", "is_edited": False, "arguments_hmac": None, "reason_hmac": reason_hmac}
    assert decided == ("approval.decided", call | more)
    events = await people.admin.get("/v1/audit/events", params={"run_id": str(waiting.context.run_id)})
    assert "private" not in events.text
    assert "note.md" not in events.text


async def test_the_texts_are_gone_with_their_user(service: Service, people: People) -> None:
    client, row, _ = await service.new_user(people.tenant.id)
    waiting = await waiting_run(service, people.tenant, user_id=row["id"])
    assert (await client.get(path(waiting))).json()["arguments"] == ARGUMENTS
    assert (await client.post(f"/v1/runs/{waiting.context.run_id}/cancel")).is_success
    assert (await waiting.state())[1] == "voided"
    for what in ("disable", "erase"):
        assert (await people.admin.post(f"/v1/users/{row['id']}/{what}")).is_success
    shown = (await people.admin.get(path(waiting))).json()
    assert (shown["arguments"], shown["reason"]) == (None, None)
