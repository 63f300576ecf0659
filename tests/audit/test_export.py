"""The export: all that is sealed, verifiable offline, on the record, and within bounds."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any

import pytest

from app.audit import export
from app.audit.exported import verify_export
from app.audit.signing import PublicKeys
from app.audit.verify import Break, Held
from tests.audit.chains import Ground
from tests.audit.sealing import all_sealed
from tests.audit.test_ocsf import faults
from tests.service import Client, Service, Tenant


@pytest.fixture(scope="module")
async def tenant(service: Service) -> Tenant:
    made = await service.new_tenant(files={"note.md": "hello"})
    await made.user.ask("What does note.md say?")
    await all_sealed(made.admin)
    return made


@pytest.fixture(scope="module")
async def keys(tenant: Tenant) -> PublicKeys:
    return PublicKeys.read((await tenant.user.get("/.well-known/bulkhead-audit-keys.json")).json())


async def exported(client: Client, **query: Any) -> list[bytes]:
    response = await client.get("/v1/audit/export", params=query)
    assert (response.status_code, response.headers["content-type"]) == (200, "application/x-ndjson"), response.text
    return response.content.splitlines(keepends=True)


def kinds(lines: list[bytes]) -> list[str]:
    return [
        next(name for name in ("head", "checkpoint", "after", "body") if name in json.loads(line)) for line in lines
    ]


async def test_an_export_is_the_whole_record_and_verifies(tenant: Tenant, keys: PublicKeys) -> None:
    items = await all_sealed(tenant.admin)
    lines = await exported(tenant.admin)
    rows = [json.loads(line) for line in lines if b'"body"' in line]
    assert [row["seq"] for row in rows] == list(range(1, len(rows) + 1))
    by_seq = {row["seq"]: row for row in rows}
    for item in items:
        row = by_seq[item["seq"]]
        assert (row["event_id"], row["hash"]) == (item["id"], item["hash"])
        assert json.loads(row["body"]) == {name: item[name] for name in item.keys() - {"seq", "hash"}}
    assert kinds(lines)[-1] == "head"
    assert isinstance(verify_export(lines, keys=keys, heads={}, is_part=False), Held)


async def test_an_export_that_lost_or_changed_a_line_does_not_verify(tenant: Tenant, keys: PublicKeys) -> None:
    lines = await exported(tenant.admin)
    rows = [place for place, kind in enumerate(kinds(lines)) if kind == "body"]  # heads stand where a round ended
    third = rows[2]
    changed = lines[third].replace(b"schema_v", b"schema_w")
    assert changed != lines[third]
    for edited in (
        lines[:third] + lines[third + 1 :],
        [*lines[:third], changed, *lines[third + 1 :]],
        lines[: rows[1]] + lines[rows[-1] + 1 :],
        lines[:-1],
    ):
        assert isinstance(verify_export(edited, keys=keys, heads={}, is_part=False), Break)


async def test_a_part_begins_where_it_was_asked_to_and_ends_at_a_head(tenant: Tenant, keys: PublicKeys) -> None:
    lines = await exported(tenant.admin, from_seq=3, to_seq=4)
    assert kinds(lines)[0] == "after"
    assert json.loads(lines[0])["after"]["seq"] == 2
    assert json.loads(lines[1])["seq"] == 3
    assert kinds(lines)[-1] == "head"
    assert json.loads(lines[-1])["head"]["seq"] >= 4
    assert isinstance(verify_export(lines, keys=keys, heads={}, is_part=True), Held)
    assert await exported(tenant.admin, from_seq=10**9) == []


@pytest.mark.parametrize("query", [{"from_seq": 0}, {"to_seq": -1}, {"from_seq": 2**63}, {"format": "csv"}])
async def test_what_cannot_be_exported_is_refused(tenant: Tenant, query: dict[str, str]) -> None:
    assert (await tenant.admin.get("/v1/audit/export", params=query)).status_code == 422


async def test_an_export_is_on_the_record(tenant: Tenant) -> None:
    await exported(tenant.admin, from_seq=2)
    actor = (await tenant.admin.get("/v1/me")).json()["user_id"]
    event = (await tenant.admin.events(type="audit.exported"))[-1]
    assert event["actor_id"] == actor
    assert (event["data"]["from_seq"], event["data"]["format"]) == (2, "chain")


async def test_an_export_as_ocsf_has_the_same_events(tenant: Tenant) -> None:
    rows = [json.loads(line) for line in await exported(tenant.admin) if b'"body"' in line]
    events = [json.loads(line) for line in await exported(tenant.admin, format="ocsf")]
    assert [event["unmapped"]["event"] for event in events][: len(rows)] == [json.loads(row["body"]) for row in rows]
    assert [event["metadata"]["sequence"] for event in events] == list(range(1, len(events) + 1))
    assert [fault for event in events for fault in faults(event)] == []


async def test_a_tenant_exports_its_own_record_and_nobody_elses(service: Service, tenant: Tenant) -> None:
    stranger = await service.new_tenant(policy=None)
    await all_sealed(stranger.admin)
    assert tenant.id.encode() not in b"".join(await exported(stranger.admin))
    assert tenant.id.encode() not in b"".join(
        line
        for line in await exported(service.platform)
        if json.loads(json.loads(line).get("body", "{}")).get("run_id")
    )


# Bounds


async def test_a_page_at_a_time_is_read_and_none_for_a_client_that_is_gone(
    ground: Ground, monkeypatch: pytest.MonkeyPatch
) -> None:
    tenant_id = await ground.sealed(1_200, batch=400)
    pages: list[int] = []
    read = export._rows

    async def counted(*bounds: Any) -> Any:
        pages.append(bounds[-1])
        return await read(*bounds)

    monkeypatch.setattr(export, "_rows", counted)
    async with ground.app.transaction(tenant_id) as session:
        span = await export.span(session, from_seq=1, to_seq=None)
    pieces = export.chained(ground.app, tenant_id, span)
    first = await anext(pieces)
    assert (len(first.splitlines()), pages) == (501, [500]), "500 rows and a head, and no page ahead"
    await pieces.aclose()
    assert pages == [500]
    lines = b"".join([piece async for piece in export.chained(ground.app, tenant_id, span)]).splitlines(keepends=True)
    assert isinstance(verify_export(lines, keys=ground.signers.public, heads={}, is_part=False), Held)


async def test_a_client_that_goes_away_ends_its_export(
    service: Service, tenant: Tenant, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun, ended = asyncio.Event(), asyncio.Event()

    async def endless(*_: Any) -> AsyncIterator[bytes]:
        begun.set()
        try:
            while True:
                yield b"x" * 100_000
                await asyncio.sleep(0.001)  # as a page of the database would
        finally:
            ended.set()

    monkeypatch.setitem(export.FORMATS, "chain", endless)
    async with tenant.admin.stream("GET", "/v1/audit/export") as response:
        await anext(response.aiter_raw())
        assert begun.is_set()
    async with asyncio.timeout(5):
        await ended.wait()
