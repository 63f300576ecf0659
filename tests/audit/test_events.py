"""The audit record: what was done stands in it once, in its order, by whom, and with no text of anybody."""

from __future__ import annotations

import json
import secrets
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any, Final
from uuid import UUID

import httpx
import pytest
from sqlalchemy import text

from app.audit.aggregate import MinuteCounts
from app.audit.events import EventType
from app.auth.keys import mint
from tests.auth.forgery import Issuer
from tests.service import POLICY, Service, Tenant

BODIES: Final = text("select body from audit_events")


def kinds(events: list[dict[str, Any]]) -> list[str]:
    return [event["type"] for event in events]


# The client's ledger


async def test_what_an_admin_did_is_what_the_record_says(service: Service) -> None:
    tenant = await service.new_tenant(policy=None)
    admin, before = tenant.admin, len(await tenant.admin.events())
    actor = (await admin.get("/v1/me")).json()["user_id"]
    user = await admin.make("/v1/users", json={"name": "a user", "role": "user"})
    key = await admin.make("/v1/keys", json={"user_id": user["id"], "name": "a key"})
    successor = await admin.make(f"/v1/keys/{key['id']}/rotate", json={})
    await admin.delete(f"/v1/keys/{key['id']}")
    await admin.post(f"/v1/users/{user['id']}/disable")
    await admin.post(f"/v1/users/{user['id']}/enable")
    issuer = await admin.make("/v1/issuers", json={"issuer": "https://a.example", "jwks": Issuer().jwks})
    await admin.delete(f"/v1/issuers/{issuer['id']}")
    await admin.put_file("note.md", "hello")
    await admin.delete("/v1/workspaces/docs/files/note.md")
    version = await admin.publish(POLICY)
    switch = await admin.make("/v1/switches", json={"scope": "server", "target": "docs", "reason": "a reason"})
    await admin.delete(f"/v1/switches/{switch['id']}")
    events = (await admin.events())[before:]
    ledger = [
        ("user.created", "user_id", user["id"]),
        ("key.created", "key_id", key["id"]),
        ("key.created", "key_id", successor["id"]),
        ("key.rotated", "successor_id", successor["id"]),
        ("key.revoked", "key_id", key["id"]),
        ("user.disabled", "user_id", user["id"]),
        ("user.enabled", "user_id", user["id"]),
        ("issuer.registered", "issuer_id", issuer["id"]),
        ("issuer.removed", "issuer_id", issuer["id"]),
        ("workspace.file_written", "workspace", "docs"),
        ("workspace.file_deleted", "workspace", "docs"),
        ("policy.created", "version", version),
        ("policy.published", "after", version),
        ("switch.engaged", "switch_id", switch["id"]),
        ("switch.lifted", "switch_id", switch["id"]),
    ]
    assert [
        (event["type"], name, event["data"][name]) for event, (_, name, _) in zip(events, ledger, strict=True)
    ] == ledger
    assert {event["actor_id"] for event in events} == {actor}


async def test_what_is_not_valid_or_only_lists_leaves_no_event(service: Service) -> None:
    tenant = await service.new_tenant(policy=None)
    name = secrets.token_hex(8)
    await tenant.admin.make("/v1/users", json={"name": name, "role": "user"})
    before = await tenant.admin.events()
    refused = [
        await tenant.admin.post("/v1/users", json={"name": name, "role": "user"}),
        await tenant.admin.post("/v1/policies", content=b"schema: bulkhead/2"),
        await tenant.admin.post("/v1/policies/99/publish", json={}),
        await tenant.admin.put("/v1/workspaces/docs/files/..%2Fa", content=b"x"),
        await tenant.admin.delete("/v1/workspaces/docs/files/absent.md"),
    ]
    assert not [answer for answer in refused if answer.is_success]
    for path in ("/v1/me", "/v1/runs", "/v1/users", "/v1/keys", "/v1/policies", "/v1/switches", "/v1/issuers"):
        assert (await tenant.admin.get(path)).status_code == 200
    assert await tenant.admin.events() == before


async def test_a_missing_scope_and_a_missing_credential_are_recorded_once_a_minute(service: Service) -> None:
    tenant = await service.new_tenant(policy=None)
    for _ in range(3):
        assert (await tenant.user.post("/v1/policies", content=b"x")).status_code == 403
    refused = [event for event in await tenant.admin.events() if event["type"] == "auth.failed"]
    assert {event["data"]["reason"] for event in refused} == {"lacks_scope:policies:write"}
    assert 1 <= len(refused) <= 2  # two where a minute has turned
    assert {event["actor_id"] for event in refused} == {tenant.user_id}
    async with httpx.AsyncClient(base_url=service.url, trust_env=False) as stranger:
        assert (await stranger.get("/v1/me")).status_code == 401
    reasons = {event["data"].get("reason") for event in await service.platform.events()}
    assert "no_credential" in reasons


async def test_what_the_platform_does_to_a_tenant_stands_in_both_records(service: Service) -> None:
    tenant = await service.new_tenant(policy=None)
    actor = (await service.platform.get("/v1/me")).json()["user_id"]
    for action in ("disable", "enable"):
        assert (await service.platform.post(f"/v1/tenants/{tenant.id}/{action}")).status_code == 204
    wanted = ["tenant.created", "tenant.disabled", "tenant.enabled"]
    for events in (await tenant.admin.events(), await service.platform.events()):
        about = [event for event in events if event["data"].get("tenant_id") == tenant.id]
        assert kinds([event for event in about if event["type"] != "platform.acted"]) == wanted
        assert {event["actor_id"] for event in about} == {actor}
    made = [event for event in await tenant.admin.events() if event["type"] in {"user.created", "key.created"}]
    assert {event["actor_id"] for event in made} == {actor}
    acted = [event["data"] for event in about if event["type"] == "platform.acted"]
    assert acted == [{"tenant_id": tenant.id, "action": action} for action in ("user.create", "key.create") * 2]


# The shape


@pytest.fixture(scope="module")
async def asked(service: Service) -> tuple[Tenant, list[str]]:
    """A tenant, and its two runs."""
    tenant = await service.new_tenant(files={"note.md": "hello"})
    return tenant, [(await tenant.user.ask("What does note.md say?")).json()["run_id"] for _ in range(2)]


async def test_an_event_is_stored_as_the_canonical_text_that_is_given_out(
    service: Service, asked: tuple[Tenant, list[str]]
) -> None:
    tenant, _ = asked
    events = await tenant.admin.events(logins=True)
    async with service.app.state.database.transaction(UUID(tenant.id)) as session:
        bodies = set(await session.scalars(BODIES))
    assert {json.dumps(event, sort_keys=True, separators=(",", ":"), ensure_ascii=False) for event in events} == bodies
    for event in events:
        assert set(event) == {"id", "tenant_id", "at", "type", "schema_version", "actor_id", "run_id", "data"}
        assert (event["tenant_id"], event["schema_version"] >= 1, event["at"][-1]) == (tenant.id, True, "Z")
        assert UUID(event["id"]).version == 7
        assert event["type"] in list(EventType)
    assert [event["id"] for event in events] == sorted(event["id"] for event in events)


async def test_no_text_of_a_person_or_a_tool_is_in_the_record(service: Service) -> None:
    name, file, content, query, reason, instructions = (secrets.token_hex(12) for _ in range(6))
    tenant = await service.new_tenant(policy=POLICY + f"instructions: {instructions}\n")
    user = await tenant.admin.make("/v1/users", json={"name": name, "role": "user"})
    await tenant.admin.make("/v1/keys", json={"user_id": user["id"], "name": name})
    await tenant.admin.put_file(f"{file}.md", content)
    await tenant.admin.make("/v1/switches", json={"scope": "server", "target": "other", "reason": reason})
    asked = await tenant.user.ask(f"What does {file}.md say of {query}?")
    assert content in asked.json()["answer"]
    record = json.dumps(await tenant.admin.events())
    assert not [text for text in (name, file, content, query, reason, instructions) if text in record]


# Reading


async def test_the_record_is_paged_newest_first_and_by_run(service: Service, asked: tuple[Tenant, list[str]]) -> None:
    tenant, runs = asked
    auditor, _, _ = await service.new_user(tenant.id, "auditor")
    page = (await auditor.get("/v1/audit/events", params={"limit": 3})).json()
    items = [{name: item[name] for name in item.keys() - {"seq", "hash"}} for item in page["items"]]
    assert items == (await auditor.events(logins=True))[:-4:-1]
    assert page["next_cursor"]
    for run_id in runs:
        events = await auditor.events(run_id=run_id)
        assert {event["run_id"] for event in events} == {run_id}
        assert kinds(events)[0] == "query.received"
        assert kinds(events)[-1] == "run.finished"


# Failed logins


async def failed_logins(service: Service, tenant: Tenant | None = None) -> list[dict[str, Any]]:
    events = await (tenant.admin if tenant else service.platform).events()
    return [event for event in events if event["type"] == "auth.failed"]


async def test_a_flood_of_unknown_credentials_is_two_events_a_minute(
    fresh_service: Service, minute: list[float]
) -> None:
    service = fresh_service
    stranger = await service.client(mint().text)
    for _ in range(7):
        assert (await stranger.get("/v1/me")).status_code == 401
    (first,) = await failed_logins(service)
    assert first["data"] == {"reason": "unknown_key", "address": "127.0.0.1", "count": 1}
    assert first["actor_id"] is None
    minute[0] += 60
    await stranger.get("/v1/me")
    await service.app.state.authenticator.flush_failures()
    counts = [event["data"]["count"] for event in await failed_logins(service)]
    assert sorted(counts) == [1, 1, 6], "each minute's first at once, and the others of the first minute as a count"
    minute[0] += 60
    await service.app.state.authenticator.flush_failures()
    assert len(await failed_logins(service)) == 3, "a minute with one refusal has no count"


async def test_reasons_are_counted_apart(fresh_service: Service, minute: list[float]) -> None:
    for credential in (mint().text, mint().text, "x", Issuer().token(), "a.b.c"):
        await (await fresh_service.client(credential)).get("/v1/me")
    reasons = [event["data"]["reason"] for event in await failed_logins(fresh_service)]
    assert sorted(reasons) == ["rejected:malformed", "unknown_issuer", "unknown_key"]


async def test_a_known_users_refusal_is_in_its_tenants_record_alone(service: Service) -> None:
    tenant = await service.new_tenant(policy=None)
    await tenant.admin.delete(f"/v1/keys/{tenant.user_key_id}")
    assert (await tenant.user.get("/v1/me")).status_code == 401
    (event,) = await failed_logins(service, tenant)
    assert (event["actor_id"], event["data"]["reason"]) == (tenant.user_id, "key_not_valid")
    assert tenant.id not in json.dumps(await failed_logins(service))


@asynccontextmanager
async def no_event_written(service: Service) -> AsyncIterator[None]:
    """No role may insert one during the block."""
    roles = f'"{service.urls.app_role}", "{service.urls.platform_role}"'
    await service.sql(f"revoke insert on audit_events from {roles}")
    yield
    await service.sql(f"grant insert on audit_events to {roles}")


async def test_a_refused_credential_that_could_not_be_recorded_leaves_it_to_the_next(
    fresh_service: Service, minute: list[float]
) -> None:
    stranger = await fresh_service.client(mint().text)
    async with no_event_written(fresh_service):
        assert (await stranger.get("/v1/me")).status_code == 503
    for _ in range(3):
        assert (await stranger.get("/v1/me")).status_code == 401
    (first,) = await failed_logins(fresh_service)
    assert first["data"]["count"] == 1
    minute[0] += 60
    await fresh_service.app.state.authenticator.flush_failures()
    assert [event["data"]["count"] for event in await failed_logins(fresh_service)] == [1, 2]


async def test_a_query_that_leaves_no_run_and_no_event_leaves_it_to_the_next(
    fresh_service: Service, minute: list[float]
) -> None:
    tenant = await fresh_service.new_tenant(policy=None)
    assert (await tenant.user.get("/v1/me")).status_code == 200  # its credential's first use is recorded before
    assert minute
    async with no_event_written(fresh_service):
        assert (await tenant.user.ask("Is anybody there?")).status_code == 503
    for _ in range(3):
        assert (await tenant.user.ask("Is anybody there?")).json()["code"] == "no_policy"
    refused = [event for event in await tenant.admin.events() if event["type"] == "query.refused"]
    assert [event["data"]["reason"] for event in refused] == ["no_policy"]


def is_first(counts: MinuteCounts[Any], key: object) -> bool:
    with counts.first(key) as first:
        return first


def test_those_that_came_while_the_first_could_not_be_recorded_stay_counted(minute: list[float]) -> None:
    counts: MinuteCounts[str] = MinuteCounts()

    def fail() -> None:
        with counts.first("address") as first:
            assert first
            assert [is_first(counts, "address") for _ in range(3)] == [False] * 3
            raise OSError("the database is away")

    with pytest.raises(OSError, match="database"):
        fail()
    assert [is_first(counts, "address") for _ in range(2)] == [True, False]
    minute[0] += 60
    assert [taken_from(counts) for _ in range(2)] == [4, 0]


def test_a_first_that_fails_in_the_minute_after_leaves_that_one_as_it_is(minute: list[float]) -> None:
    counts: MinuteCounts[str] = MinuteCounts()

    def fail() -> None:
        with counts.first("address"):
            minute[0] += 60
            assert is_first(counts, "address")
            raise OSError("the database is away")

    with pytest.raises(OSError, match="database"):
        fail()
    assert not is_first(counts, "address")


def taken_from(counts: MinuteCounts[str]) -> int:
    with counts.finished() as finished:
        return sum(count for _, count in finished)


def test_counts_that_could_not_be_recorded_are_there_the_next_time(minute: list[float]) -> None:
    counts: MinuteCounts[str] = MinuteCounts()
    for _ in range(3):
        is_first(counts, "address")
    minute[0] += 60
    with pytest.raises(OSError, match="database"), counts.finished():
        raise OSError("the database is away")
    assert [taken_from(counts) for _ in range(2)] == [2, 0]


def test_a_flood_across_the_turn_of_a_minute_loses_no_count(minute: list[float]) -> None:
    """Counts are taken every few seconds, so the next minute's first refusal comes before that."""
    counts: MinuteCounts[str] = MinuteCounts()
    firsts = taken = 0
    for second in range(300):
        minute[0] += 1
        firsts += sum(is_first(counts, "address") for _ in range(10))
        if second % 5 == 0:
            taken += taken_from(counts)
    minute[0] += 60
    taken += taken_from(counts)
    assert (firsts + taken, firsts) == (3_000, 6)


def test_at_the_end_the_minute_under_way_is_counted_too(minute: list[float]) -> None:
    counts: MinuteCounts[str] = MinuteCounts()
    for _ in range(3):
        is_first(counts, "address")
    minute[0] += 30
    assert (taken_from(counts), counts.untold) == (0, 2)
    with counts.finished(at_end=True) as finished:
        assert finished == [("address", 2)]
    assert counts.untold == 0


def test_a_flood_of_keys_is_bounded_in_memory(minute: list[float]) -> None:
    counts: MinuteCounts[int] = MinuteCounts()
    assert all(is_first(counts, key) for key in range(25_000))
    assert len(counts._counts) == 10_000
