"""Events of runs: written once, in order and only by who executes the run; followed from anywhere, by who may."""

from __future__ import annotations

import asyncio
import json
import socket
import time
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from typing import Any, Final
from uuid import UUID

import pytest
from pydantic import TypeAdapter
from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncSession, create_async_engine

from app.db import new_id
from app.keyring import SecretKey
from app.platform_db import PlatformDatabase
from app.runs.events import log as events
from app.runs.events.following import Following
from app.runs.events.log import EventKind, EventLog, Events
from app.runs.events.schemas import EventOut, EventsOut
from app.tenants import keys as tenant_keys
from app.tenants import repository as tenants
from app.tenants.service import open_tenant_key
from tests.runs.faults import watched
from tests.service import DEFAULT_MODEL_POLICY, Client, Databases, Service, Tenant, running_service
from tests.slow_model import SlowModel, slow_model

STREAM: Final = {"Accept": "text/event-stream"}
_OPEN: Final = {"policy_version": 1, "attempt": 1}


@dataclass(slots=True)
class Ground:
    """A service whose model waits in its second turn, and a tenant whose user has had an answer."""

    service: Service
    model: SlowModel
    tenant: Tenant
    done: str
    key: SecretKey

    @property
    def following(self) -> Following:
        found: Following = self.service.app.state.following
        return found

    @asynccontextmanager
    async def transaction(self) -> AsyncIterator[AsyncSession]:
        async with self.service.app.state.database.transaction(UUID(self.tenant.id)) as session:
            yield session

    async def run(self, *, attempt: int = 1) -> UUID:
        """A row of a run that is under way, of which nobody knows."""
        run_id = new_id()
        statement = text(
            "insert into runs (tenant_id, id, user_id, policy_version, state, model, kind, attempt, lease_until)"
            " select tenant_id, :id, user_id, policy_version, 'running', model, 'background', :attempt,"
            " now() + interval '1 hour' from runs limit 1"
        )
        async with self.transaction() as session:
            await session.execute(statement, {"id": run_id, "attempt": attempt})
        return run_id

    async def begun(self, run_id: UUID, events: Events, *, is_live: bool = True) -> EventLog:
        log = events.log(run_id, UUID(self.tenant.id), self.key, is_live=is_live)
        log.emit(EventKind.RUN_STARTED, _OPEN)
        async with self.transaction() as session:
            await log.write(session, attempt=1)
        return log

    async def stored(self, run_id: UUID) -> list[tuple[int, str, Any]]:
        async with self.transaction() as session:
            statement = text("select sequence, type, data from run_events where run_id = :id order by sequence, at")
            rows = (await session.execute(statement, {"id": run_id})).all()
        return [(row.sequence, row.type, json.loads(row.data)) for row in rows]


@pytest.fixture(scope="module")
async def ground(databases: Databases, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Ground]:
    settings: dict[str, Any] = {
        "client_grace_s": 0.2,
        "streams_per_user": 3,
        "stream_send_s": 0.5,
        "stream_heartbeat_s": 1,
    }
    async with slow_model() as (model, endpoint):
        folder = tmp_path_factory.mktemp("events")
        async with running_service(databases, folder, model=endpoint, **settings) as service:
            tenant = await service.new_tenant(policy=DEFAULT_MODEL_POLICY, files={"note.md": "a note"})
            model.turns["first"].released.set()
            answer = await tenant.user.ask("first")
            yield Ground(service, model, tenant, answer.json()["run_id"], await _key(service, tenant))


async def _key(service: Service, tenant: Tenant) -> SecretKey:
    """What seals the texts of the tenant's user."""
    state, user_id = service.app.state, UUID(tenant.user_id)
    async with state.database.transaction(UUID(tenant.id)) as session:
        user = await tenants.get_user(session, user_id)
        tenant_key = await open_tenant_key(session, state.keyring, UUID(tenant.id))
    return tenant_keys.open_user_key(tenant_key, user.wrapped_key, user_id=user_id)


@pytest.fixture
async def hub(ground: Ground) -> AsyncIterator[Events]:
    """The events of another process, whose rounds are the test's."""
    engine = create_async_engine(ground.service.urls.platform)
    yield Events(PlatformDatabase(engine), ground.service.app.state.events.redact)
    await engine.dispose()


# Writing


async def test_what_is_told_is_written_in_order_and_text_in_pieces_at_one_go(ground: Ground, hub: Events) -> None:
    run_id = await ground.run()
    log = await ground.begun(run_id, hub)
    deltas = log.deltas(1)
    for piece in ("a ", "whole ", "text"):
        deltas.say(piece)
    deltas.end()
    log.emit(EventKind.USAGE, {"turn": 1, "input_tokens": 1, "output_tokens": 2, "prompt": "is not declared"})
    await hub.flush()
    assert await ground.stored(run_id) == [
        (1, "run.started", _OPEN),
        (2, "message.delta", {"turn": 1, "offset": 0}),
        (3, "usage", {"turn": 1, "input_tokens": 1, "output_tokens": 2}),
    ]
    chunk = await ground.following.page(UUID(ground.tenant.id), (run_id, 1), ground.key, limit=10)
    assert json.loads(chunk.items[0].body)["text"] == "a whole text"
    assert b"whole" not in b"".join(await _sealed(ground, run_id)), "the text is not there in the clear"


async def _sealed(ground: Ground, run_id: UUID) -> list[bytes]:
    async with ground.transaction() as session:
        found = await session.scalars(text("select sealed from run_events where run_id = :id"), {"id": run_id})
        return [each for each in found if each]


async def test_who_has_lost_the_run_writes_nothing_more(ground: Ground, hub: Events) -> None:
    run_id = await ground.run()
    log = await ground.begun(run_id, hub)
    log.emit(EventKind.USAGE, {"turn": 1})
    await hub.flush()
    assert len(await ground.stored(run_id)) == 2, "the control: under its own claim it does"
    async with ground.transaction() as session:
        await session.execute(text("update runs set attempt = 2 where id = :id"), {"id": run_id})
    log.emit(EventKind.USAGE, {"turn": 2})
    await hub.flush()
    assert len(await ground.stored(run_id)) == 2
    assert log.is_empty


async def test_of_a_run_that_somebody_is_just_changing_it_waits_and_holds_nobody_up(
    ground: Ground, hub: Events
) -> None:
    held, other = await ground.run(), await ground.run()
    logs = [await ground.begun(run_id, hub) for run_id in (held, other)]
    async with ground.transaction() as session:
        await session.execute(text("select 1 from runs where id = :id for update"), {"id": held})
        for log in logs:
            log.emit(EventKind.USAGE, {"turn": 1})
        await asyncio.wait_for(hub.flush(), 5)
        assert [len(await ground.stored(run_id)) for run_id in (held, other)] == [1, 2]
    await hub.flush()
    assert len(await ground.stored(held)) == 2


async def test_what_a_transaction_takes_back_is_told_by_whoever_goes_on_with_the_run(
    ground: Ground, hub: Events
) -> None:
    run_id = await ground.run()
    log = await ground.begun(run_id, hub)
    log.emit(EventKind.RUN_FINISHED, {"status": "succeeded"})
    with suppress(ZeroDivisionError):
        async with ground.transaction() as session:
            await log.write(session, attempt=1)
            await asyncio.wait_for(hub.flush(), 5)  # which waits for the transaction's end, and not in the database
            raise ZeroDivisionError
    await hub.flush()
    assert log.is_empty
    assert [(number, kind) for number, kind, _ in await ground.stored(run_id)] == [(1, "run.started")]


async def test_a_run_that_nobody_follows_writes_with_its_ending(ground: Ground, hub: Events) -> None:
    run_id = await ground.run()
    log = await ground.begun(run_id, hub, is_live=False)
    log.emit(EventKind.USAGE, {"turn": 1})
    await hub.flush()
    assert len(await ground.stored(run_id)) == 1
    async with ground.transaction() as session:
        await log.write(session, attempt=1)
    assert len(await ground.stored(run_id)) == 2


async def test_a_run_that_is_taken_up_goes_on_with_the_numbers(ground: Ground, hub: Events) -> None:
    run_id = await ground.run()
    await ground.begun(run_id, hub)
    async with ground.transaction() as session:
        await events.append(session, UUID(ground.tenant.id), run_id, EventKind.RUN_QUEUED, {})
        await session.execute(text("update runs set attempt = 2 where id = :id"), {"id": run_id})
        log = hub.log(run_id, UUID(ground.tenant.id), ground.key, is_live=True)
        log.go_on_after(await events.last(session, run_id))
        log.emit(EventKind.RUN_RESUMED, {"policy_version": 1, "attempt": 2})
        await log.write(session, attempt=2)
    log.emit(EventKind.USAGE, {"turn": 1})
    await hub.flush()
    assert [number for number, _, _ in await ground.stored(run_id)] == [1, 2, 3, 4]


async def test_a_database_that_is_away_loses_pieces_of_text_at_most_and_memory_is_bounded(
    ground: Ground, hub: Events
) -> None:
    run_id = await ground.run()
    log = await ground.begun(run_id, hub)
    deltas = log.deltas(1)
    for _ in range(200):
        deltas.say("x" * 10_000)
    log.emit(EventKind.TOOL_DECIDED, {"sequence": 1, "tool": "docs__read_file", "decision": "denied", "rule": "x"})
    await hub.flush()
    stored = await ground.stored(run_id)
    assert stored[-1][1] == "tool.decided"
    assert sum(map(len, await _sealed(ground, run_id))) < 1_000_000


# Reading


async def test_a_page_and_a_stream_hold_the_same_typed_events(ground: Ground) -> None:
    path = f"/v1/runs/{ground.done}/events"
    page = EventsOut.model_validate((await ground.tenant.user.get(path)).json())
    assert page.is_over
    assert [event.type for event in page.items][-1] == "run.finished"
    streamed = await _events(ground.tenant.user, path)
    assert [each["sequence"] for each in streamed] == [event.sequence for event in page.items]
    adapter: TypeAdapter[Any] = TypeAdapter(EventOut)
    assert [adapter.validate_python(each) for each in streamed] == page.items
    (requested, *_) = [each for each in streamed if each["type"] == "tool.requested"]
    assert json.loads(requested["text"]) == {"path": "note.md"}


async def _events(client: Client, path: str, **headers: str) -> list[dict[str, Any]]:
    async with client.stream("GET", path, headers=STREAM | headers) as response:
        assert response.status_code == 200, await response.aread()
        return [json.loads(line[6:]) async for line in response.aiter_lines() if line.startswith("data: ")]


async def test_a_reader_goes_on_where_it_has_stopped(ground: Ground) -> None:
    path = f"/v1/runs/{ground.done}/events"
    everything = await _events(ground.tenant.user, path)
    assert await _events(ground.tenant.user, path, **{"Last-Event-ID": "3"}) == everything[3:]
    assert await _events(ground.tenant.user, f"{path}?after=4") == everything[4:]
    page = (await ground.tenant.user.get(path, params={"after": 2, "limit": 2})).json()
    assert (page["items"], page["last"], page["is_over"]) == (everything[2:4], 4, False)
    for wrong in ({"Last-Event-ID": "x"}, {"Last-Event-ID": "9" * 30}):
        assert (await ground.tenant.user.get(path, headers=wrong)).status_code == 422


async def test_events_are_for_who_may_read_the_run_and_others_reading_is_recorded(ground: Ground) -> None:
    path = f"/v1/runs/{ground.done}/events"
    colleague, _, _ = await ground.service.new_user(ground.tenant.id)
    stranger = await ground.service.new_tenant(policy=None)
    auditor, row, _ = await ground.service.new_user(ground.tenant.id, "auditor")
    for client in (colleague, stranger.user, stranger.admin):
        for headers in ({}, STREAM):
            assert (await client.get(path, headers=headers)).status_code == 404
    assert (await _events(auditor, path))[-1]["type"] == "run.finished", "the control"
    recorded = await ground.tenant.admin.events(type="run.read", run_id=ground.done)
    assert [event["actor_id"] for event in recorded] == [row["id"]]


@asynccontextmanager
async def under_way(ground: Ground, query: str, **headers: str) -> AsyncIterator[tuple[str, AsyncIterator[Any]]]:
    """A query whose model waits, streamed to its asker: its run, and its events as they come."""
    async with ground.tenant.user.stream("POST", "/query", json={"query": query}, headers=STREAM | headers) as response:
        assert response.status_code == 200, await response.aread()
        lines = _data(response)
        first = await anext(lines)
        try:
            yield first["run_id"], lines
        finally:
            ground.model.turns[query].released.set()


async def _data(response: Any) -> AsyncIterator[Any]:
    async for line in response.aiter_lines():
        if line.startswith("data: "):
            yield json.loads(line[6:])


async def test_a_run_is_followed_from_another_process_while_it_goes_on(ground: Ground) -> None:
    async with elsewhere(ground) as other, under_way(ground, "elsewhere") as (run_id, _):
        await asyncio.wait_for(ground.model.turns["elsewhere"].arrived.wait(), 10)
        seen = follower(ground, other, run_id)
        kinds = [kind async for kind in until(seen, "tool.finished")]
        assert kinds == ["run.started", "usage", "tool.requested", "tool.decided", "tool.finished"]
        ground.model.turns["elsewhere"].released.set()
        released = time.monotonic()
        assert [kind async for kind in until(seen, "run.finished")][-1] == "run.finished"
        assert time.monotonic() - released < 1.5
        await seen.aclose()


@asynccontextmanager
async def elsewhere(ground: Ground) -> AsyncIterator[Following]:
    """What another process has of it, on the same database."""
    state, engine = ground.service.app.state, create_async_engine(ground.service.urls.platform)
    platform = PlatformDatabase(engine)
    url = ground.service.urls.app
    other = Following(database=state.database, platform=platform, url=url, most=10, most_of_a_user=10)
    keeping = asyncio.create_task(other.keep())
    yield other
    keeping.cancel()
    await asyncio.wait({keeping})
    await engine.dispose()


async def follower(ground: Ground, following: Following, run_id: str) -> AsyncGenerator[str, None]:
    """The types of the events that come."""
    caller = await ground.service.app.state.authenticator.authenticate(ground.tenant.user_key, address="test")
    async for chunk in following.chunks(following.open(caller, UUID(run_id), None)):
        for item in chunk.items:
            yield item.kind


async def until(kinds: AsyncIterator[str], last: str) -> AsyncIterator[str]:
    async with asyncio.timeout(10):
        async for kind in kinds:
            yield kind
            if kind == last:
                return


async def test_without_notifications_it_is_found_by_looking(ground: Ground, postgres: Any) -> None:
    async with elsewhere(ground) as other, under_way(ground, "deaf") as (run_id, _):
        seen = follower(ground, other, run_id)
        assert [kind async for kind in until(seen, "tool.finished")]
        await _deafen(ground, postgres)
        ground.model.turns["deaf"].released.set()
        assert [kind async for kind in until(seen, "run.finished")]
        await seen.aclose()


async def _deafen(ground: Ground, postgres: Any) -> None:
    """End all connections that listen, as a failing network would."""
    name = ground.service.urls.app.rpartition("/")[2].partition("?")[0]
    engine = create_async_engine(postgres.url("postgres", name))
    async with engine.begin() as connection:
        ended = await connection.execute(
            text("select pg_terminate_backend(pid) from pg_stat_activity where query ilike 'listen %'")
        )
        assert ended.all(), "the control: somebody listened"
    await engine.dispose()


async def test_a_revoked_key_ends_its_streams_and_no_others(ground: Ground) -> None:
    user, _, key = await ground.service.new_user(ground.tenant.id, "auditor")
    async with under_way(ground, "revoked") as (run_id, lines):
        following = asyncio.create_task(_events(user, f"/v1/runs/{run_id}/events"))
        await asyncio.sleep(0.3)
        assert not following.done(), "the control"
        assert (await ground.tenant.admin.delete(f"/v1/keys/{key['id']}")).is_success
        revoked = time.monotonic()
        assert "run.finished" not in [event["type"] for event in await asyncio.wait_for(following, 5)]
        assert time.monotonic() - revoked < 2
        ground.model.turns["revoked"].released.set()
        assert [event async for event in lines][-1]["type"] == "run.finished"


async def test_streams_are_bounded_and_refused_before_anything_begins(ground: Ground) -> None:
    user, _, _ = await ground.service.new_user(ground.tenant.id)
    caller = await ground.service.app.state.authenticator.authenticate(
        user.headers["authorization"].removeprefix("Bearer "), address="test"
    )
    held = [ground.following.open(caller, UUID(ground.done), None) for _ in range(3)]
    refused = await user.post("/query", json={"query": "one too many"}, headers=STREAM)
    assert (refused.status_code, refused.json()["code"]) == (429, "too_many_streams")
    assert (await user.get("/v1/runs")).json()["items"] == []
    for stream in held:
        ground.following.leave(stream)
    ground.model.turns["room"].released.set()
    assert (await user.post("/query", json={"query": "room"}, headers=STREAM)).status_code == 200, "the control"


async def test_what_is_refused_before_a_run_begins_is_a_problem(ground: Ground) -> None:
    refused = await ground.tenant.user.post("/query", json={"query": "x; rm -rf / now"}, headers=STREAM)
    assert refused.status_code == 422, refused.text
    assert refused.headers["content-type"] == "application/problem+json"


# Clients that go, and that do not read


@pytest.mark.parametrize("is_followed", [False, True])
async def test_a_run_whose_client_goes_is_cancelled_unless_somebody_follows_it(
    ground: Ground, *, is_followed: bool
) -> None:
    query = f"gone {is_followed}"
    follow: asyncio.Task[Any] | None = None
    async with ground.tenant.user.stream("POST", "/query", json={"query": query}, headers=STREAM) as response:
        run_id = (await anext(_data(response)))["run_id"]
        await asyncio.wait_for(ground.model.turns[query].arrived.wait(), 10)
        if is_followed:
            follow = asyncio.create_task(_events(ground.tenant.admin, f"/v1/runs/{run_id}/events"))
            await watched(ground.service, run_id)
    await asyncio.sleep(2.5 if is_followed else 0)
    if is_followed:
        ground.model.turns[query].released.set()
    status = await _ended(ground, run_id)
    assert (status["status"], status["cancel_cause"]) == (
        ("succeeded", None) if is_followed else ("cancelled", "client_gone")
    )
    if follow is not None:
        assert (await follow)[-1]["data"]["status"] == "succeeded"


async def _ended(ground: Ground, run_id: str) -> Any:
    async with asyncio.timeout(10):
        while True:
            run = (await ground.tenant.user.get(f"/v1/runs/{run_id}")).json()
            if run["finished_at"] is not None:
                return run
            await asyncio.sleep(0.1)


async def test_who_does_not_read_is_cut_off_and_slows_nobody(ground: Ground, hub: Events) -> None:
    run_id = await ground.run()
    log = await ground.begun(run_id, hub)
    for number in range(400):
        log.emit(EventKind.TOOL_FINISHED, {"sequence": number, "tool": "x", "outcome": "x"}, text="x" * 30_000)
    await hub.flush()
    path = f"/v1/runs/{run_id}/events"
    before = len(ground.following)
    host, port = ground.service.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port))) as idle:
        idle.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        head = f"GET {path} HTTP/1.1\r\nHost: {host}:{port}\r\nAccept: text/event-stream\r\n"
        idle.sendall(f"{head}Authorization: Bearer {ground.tenant.user_key}\r\n\r\n".encode())
        async with asyncio.timeout(5):
            while len(ground.following) == before:  # noqa: ASYNC110  nothing tells of it
                await asyncio.sleep(0.01)
        began = time.monotonic()
        page = (await ground.tenant.user.get(path, params={"limit": 1})).json()
        assert page["items"], "another reader is not slowed"
        assert time.monotonic() - began < 1
        async with asyncio.timeout(10):
            while len(ground.following) > before:  # noqa: ASYNC110  nothing tells of it
                await asyncio.sleep(0.05)
    assert await asyncio.wait_for(_events_until(ground, path, 401), 20) == list(range(1, 402)), "the control"


async def _events_until(ground: Ground, path: str, last: int) -> list[int]:
    """The numbers that a client gets which does read."""
    seen: list[int] = []
    async with ground.tenant.user.stream("GET", path, headers=STREAM) as response:
        async for event in _data(response):
            seen.append(event["sequence"])
            if seen[-1] == last:
                break
    return seen


async def test_a_stream_says_that_it_lives(ground: Ground) -> None:
    run_id = await ground.run()
    async with ground.tenant.user.stream("GET", f"/v1/runs/{run_id}/events", headers=STREAM) as response:
        async with asyncio.timeout(5):
            assert (await anext(response.aiter_lines())).strip() == ":"


# Retention


async def test_months_that_are_over_for_long_go_and_no_others(ground: Ground) -> None:
    retention = ground.service.app.state.event_retention
    make = (
        "create table run_events_2020_01 partition of run_events"
        " for values from ('2020-01-01T00:00:00Z') to ('2020-02-01T00:00:00Z')"
    )
    await ground.service.sql(make)
    run_id = await ground.run()
    async with ground.transaction() as session:
        for at in ("2020-01-31", "2019-01-01", "now"):
            statement = text(
                "insert into run_events (tenant_id, run_id, sequence, at, type, version, data)"
                " select tenant_id, id, 1, cast(:at as text)::timestamptz, 'usage', 1, '{}' from runs where id = :id"
            )
            await session.execute(statement, {"id": run_id, "at": at})
    assert len(await ground.stored(run_id)) == 3
    assert await retention.drop() == 1
    assert len(await ground.stored(run_id)) == 1
    assert await retention.drop() == 0
