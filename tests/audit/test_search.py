"""Searching the record: every filter finds what it names and nothing else, by an index, and on the record."""

from __future__ import annotations

import json
import uuid
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from typing import Any, Final
from uuid import UUID

import pytest
from sqlalchemy import text

from app.audit import search
from app.audit.events import EventType
from app.audit.search import Wanted
from tests.audit.chains import Ground
from tests.audit.sealing import all_sealed
from tests.service import POLICY, Service, Tenant

# A tool that is denied altogether would not be called: the model would not see it.
DENIED: Final = (
    POLICY.partition("tools:")[0]
    + """\
tools:
  allow: ["docs__*"]
  rules: |
    forbid (principal, action == Action::"docs__read_file", resource)
    when { context.arguments has path && context.arguments.path like "*.md" };
"""
)


@pytest.fixture(scope="module")
async def lively(service: Service) -> Tenant:
    """A tenant with runs of two users, and calls that were allowed and denied."""
    tenant = await service.new_tenant(files={"note.md": "hello"})
    await tenant.user.ask("What does note.md say?")
    await tenant.admin.publish(DENIED)
    await tenant.user.ask("What does note.md say?")
    await tenant.admin.ask("List the files")
    return tenant


async def found(tenant: Tenant, **query: Any) -> list[dict[str, Any]]:
    return await tenant.admin.events(**query)


async def test_each_filter_finds_what_it_names_and_nothing_else(lively: Tenant) -> None:
    everything = await found(lively)
    moment = everything[len(everything) // 2]["at"]
    of_tools = [event for event in everything if event["type"] in {"tool.decided", "tool.finished"}]
    cases: list[tuple[dict[str, Any], list[dict[str, Any]]]] = [
        ({"type": "tool.decided"}, [event for event in everything if event["type"] == "tool.decided"]),
        ({"type": ["tool.decided", "tool.finished"]}, of_tools),
        ({"actor_id": lively.user_id}, [event for event in everything if event["actor_id"] == lively.user_id]),
        ({"from": moment}, [event for event in everything if event["at"] >= moment]),
        ({"to": moment}, [event for event in everything if event["at"] < moment]),
        ({"tool": "docs__read_file"}, [event for event in of_tools if event["data"]["tool"] == "docs__read_file"]),
        *(
            ({"decision": decision}, [event for event in of_tools if event["data"].get("decision") == decision])
            for decision in ("allowed", "denied")
        ),
    ]
    for query, expected in cases:
        assert expected, f"{query}: the control has to find something"
        assert await found(lively, **query) == expected, query


async def test_filters_add_up(lively: Tenant) -> None:
    (denied,) = await found(lively, decision="denied", tool="docs__read_file", actor_id=lively.user_id)
    assert await found(lively, decision="denied", run_id=denied["run_id"]) == [denied]
    assert await found(lively, decision="denied", type="tool.finished") == []
    assert await found(lively, decision="denied", actor_id=str(uuid.uuid4())) == []


@pytest.mark.parametrize(
    "query",
    [
        {"type": "tool.guessed"},
        {"actor_id": "me"},
        {"from": "2026-01-01T00:00:00"},
        {"from": "0001-01-01T00:00:00+14:00"},
        {"to": "9999-12-31T23:59:59-14:00"},
        {"to": "tomorrow"},
        {"tool": "docs\0"},
        {"decision": "\0"},
    ],
)
async def test_what_is_no_filter_is_refused_and_not_ignored(lively: Tenant, query: dict[str, str]) -> None:
    response = await lively.admin.get("/v1/audit/events", params=query)
    assert (response.status_code, response.json()["code"]) == (422, "invalid_request")


async def test_a_moment_far_away_finds_all_or_nothing(lively: Tenant) -> None:
    for far, count in (("1970-01-01T00:00:00Z", 1), ("9998-12-31T23:59:59Z", 0)):
        response = await lively.admin.get("/v1/audit/events", params={"from": far, "limit": 1})
        assert len(response.json()["items"]) == count


async def test_an_event_tells_its_place_in_the_chain_once_it_is_sealed(service: Service) -> None:
    tenant = await service.new_tenant(policy=None)
    items = await all_sealed(tenant.admin)
    assert sorted(item["seq"] for item in items) == list(range(1, len(items) + 1))
    assert len({item["hash"] for item in items}) == len(items)
    assert all(len(bytes.fromhex(item["hash"])) == 32 for item in items)


# The platform


async def test_the_platform_reads_a_tenants_record_on_both_records(service: Service, lively: Tenant) -> None:
    path = f"/v1/tenants/{lively.id}/audit/events"
    actor = (await service.platform.get("/v1/me")).json()["user_id"]
    answer = await service.platform.get(path, params={"decision": "denied", "tool": "docs__read_file"})
    assert answer.status_code == 200, answer.text
    assert {item["tenant_id"] for item in answer.json()["items"]} == {lively.id}
    read = (await found(lively, type="audit.read"))[-1]
    assert (read["actor_id"], read["data"]) == (actor, {"filters": ["tool", "decision"]})
    acted = [event["data"] for event in await service.platform.events(type="platform.acted")]
    assert {"tenant_id": lively.id, "action": "audit.read"} in acted
    for client in (lively.admin, lively.user):
        assert (await client.get(path)).status_code == 403
    assert (await service.platform.get(f"/v1/tenants/{uuid.uuid4()}/audit/events")).status_code == 404


async def test_without_the_path_the_platform_reads_its_own_record_alone(service: Service, lively: Tenant) -> None:
    assert lively.id not in {event["tenant_id"] for event in await service.platform.events()}


# Plans


@pytest.fixture(scope="module")
async def filled(ground: Ground) -> tuple[Ground, UUID]:
    """A tenant with 20,000 events of all kinds among another's 5,000."""
    tenant_id, other = await ground.tenant(), await ground.tenant()
    await ground.as_superuser((_FILL, {"id": tenant_id, "count": 20_000}), (_FILL, {"id": other, "count": 5_000}))
    await ground.as_superuser("analyze audit_events")
    return ground, tenant_id


_FILL: Final = """
insert into audit_events (tenant_id, id, at, type, actor_id, run_id, body)
select :id, (left(hex, 8) || '-' || right(hex, 4) || substr(gen_random_uuid()::text, 14))::uuid,
       at, type, md5((n % 200)::text)::uuid, md5((n / 20)::text)::uuid, jsonb_build_object('data', jsonb_build_object(
           'tool', 'docs__tool_' || n % 500, 'decision', case when n % 1000 < 4 then 'denied' else 'allowed' end))::text
from (select n, at, lpad(to_hex((extract(epoch from at) * 1000)::bigint), 12, '0') as hex,
             (array['tool.decided', 'tool.finished', 'egress.opened', 'egress.closed'])[1 + n % 4] as type
      from (select n, now() - n * interval '1 second' as at from generate_series(1, :count) n) numbers) made
"""
MIDDLE: Final = timedelta(hours=5)
PLANS: Final = {
    "everything": (Wanted(), "pk"),
    "of a type": (Wanted(types=[EventType.EGRESS_OPENED]), ""),
    "of a rare type": (Wanted(types=[EventType.SECRET_DELETED, EventType.USER_ERASED]), "type_id"),
    "of an actor": (Wanted(actor_id=UUID("c4ca4238-a0b9-2382-0dcc-509a6f75849b")), "actor_id"),
    "of a run": (Wanted(run_id=UUID("c4ca4238-a0b9-2382-0dcc-509a6f75849b")), "run_id"),
    "of a time": (
        Wanted(since=datetime.now(UTC) - MIDDLE, until=datetime.now(UTC) - MIDDLE + timedelta(minutes=1)),
        "",
    ),
    "of a tool": (Wanted(tool="docs__tool_4"), "tool_id"),
    "refused": (Wanted(decision="denied"), "decision"),
    "allowed": (Wanted(decision="allowed"), ""),
}


@pytest.mark.parametrize("name", PLANS)
async def test_a_search_reads_little_more_than_it_finds(filled: tuple[Ground, UUID], name: str) -> None:
    world, tenant_id = filled
    wanted, index = PLANS[name]
    async with world.app.transaction(tenant_id) as session:
        statement = search.statement(wanted, before=None, limit=50)
        compiled = statement.compile(dialect=session.get_bind().dialect, compile_kwargs={"literal_binds": True})
        explained = "explain (analyze, format json, timing off) " + str(compiled)
        plan = (await session.execute(text(explained.replace(":", "\\:")))).scalar_one()
    scans = list(_scans(plan[0]["Plan"]))
    assert "Seq Scan" not in {kind for kind, _, _, rows in scans if rows}, json.dumps(plan)
    assert sum(rows for _, _, _, rows in scans) <= 1_000, scans
    assert not index or any(index in (name or "") for _, name, _, _ in scans), scans


def _scans(node: dict[str, Any]) -> Iterator[tuple[str, str | None, str | None, float]]:
    """Of each: kind, index, table, and how many rows it read."""
    if "Scan" in node["Node Type"] and node["Actual Loops"]:
        read = (node["Actual Rows"] + node.get("Rows Removed by Filter", 0)) * node["Actual Loops"]
        yield node["Node Type"], node.get("Index Name"), node.get("Relation Name"), read
    for child in node.get("Plans", ()):
        yield from _scans(child)
