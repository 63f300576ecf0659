"""Runs are begun in the background, listed by what they are, read and cancelled."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any, Final
from uuid import UUID

import httpx
import pytest
from sqlalchemy import Uuid, bindparam, text

from app.db import new_id
from app.runs import reading
from app.runs.reading import Wanted
from app.runs.state import RunKind, State
from tests.service import POLICY, Client, Service, Tenant

_NOW: Final = datetime.now(UTC)
_INSERT: Final = text(
    "insert into runs (tenant_id, id, user_id, policy_version, state, kind, model, conversation_id, created_at)"
    " values (:tenant, :id, :user, 1, :state, :kind, 'm', :conversation, :at)"
)


def id_at(at: datetime) -> UUID:
    """As it would have been made then."""
    milliseconds = int(at.timestamp() * 1000)
    return UUID(int=milliseconds << 80 | new_id().int & (1 << 80) - 1)


@dataclass(slots=True)
class History:
    """A tenant whose runs were written as they might have gone, the oldest first."""

    service: Service
    tenant: Tenant
    colleague: Client
    colleague_id: str
    conversation: UUID = field(default_factory=new_id)

    async def add(self, state: str, *, ago_h: float, kind: str = "interactive", user_id: str = "", **more: Any) -> str:
        at = _NOW - timedelta(hours=ago_h)
        user = UUID(user_id or self.tenant.user_id)
        values: dict[str, Any] = {"tenant": UUID(self.tenant.id), "id": id_at(at), "user": user}
        values |= {"state": state, "kind": kind, "at": at, "conversation": None} | more
        async with self.service.app.state.database.transaction(UUID(self.tenant.id)) as session:
            await session.execute(_INSERT, values)
        return str(values["id"])


@pytest.fixture(scope="module")
async def history(service: Service) -> History:
    tenant = await service.new_tenant(policy=POLICY)
    colleague, row, _ = await service.new_user(tenant.id)
    return History(service, tenant, colleague, row["id"])


@pytest.fixture(scope="module")
async def ids(history: History) -> dict[str, str]:
    """By what each of them is."""
    add = history.add
    return {
        "failed": await add("failed", ago_h=72),
        "colleague's": await add("succeeded", ago_h=60, user_id=history.colleague_id),
        "succeeded": await add("succeeded", ago_h=48, conversation=history.conversation),
        "timed out": await add("timed_out", ago_h=30, conversation=history.conversation),
        "waiting": await add("waiting_approval", ago_h=20, kind="background"),
        "first queued": await add("queued", ago_h=2, kind="background", user_id=history.colleague_id),
        "queued": await add("queued", ago_h=1, kind="background"),
    }


async def listed(client: Client, *, limit: int = 200, **params: Any) -> list[str]:
    """All pages, turned so that the oldest run is first."""
    found: list[str] = []
    cursor: dict[str, str] = {}
    for _ in range(20):
        answer = await client.get("/v1/runs", params={"limit": limit, **params, **cursor})
        assert answer.status_code == httpx.codes.OK, answer.text
        page = answer.json()
        found += [item["run_id"] for item in page["items"]]
        if page["next_cursor"] is None:
            return found[::-1]
        cursor = {"cursor": page["next_cursor"]}
    raise AssertionError("the list has no end")


def ago(hours: float) -> str:
    return (_NOW - timedelta(hours=hours)).isoformat()


@pytest.mark.parametrize(
    ("wanted", "expected"),
    [
        ({}, ["failed", "succeeded", "timed out", "waiting", "queued"]),
        ({"state": "queued"}, ["queued"]),
        ({"state": ["queued", "waiting_approval"]}, ["waiting", "queued"]),
        ({"state": ["failed", "timed_out", "denied"]}, ["failed", "timed out"]),
        ({"state": "denied"}, []),
        ({"kind": "background"}, ["waiting", "queued"]),
        ({"kind": "interactive", "state": "succeeded"}, ["succeeded"]),
        ({"since": 48}, ["succeeded", "timed out", "waiting", "queued"]),
        ({"until": 48}, ["failed"]),
        ({"since": 47.999, "until": 1}, ["timed out", "waiting"]),
        ({"since": 1, "until": 2}, []),
    ],
    ids=str,
)
async def test_runs_are_found_by_what_they_are(
    history: History, ids: dict[str, str], wanted: dict[str, Any], expected: Sequence[str]
) -> None:
    moments = {name: ago(value) for name, value in wanted.items() if name in {"since", "until"}}
    for limit in (200, 2):
        found = await listed(history.tenant.user, limit=limit, **wanted | moments)
        assert found == [ids[name] for name in expected]


async def test_a_conversation_and_a_user_may_be_asked_for(history: History, ids: dict[str, str]) -> None:
    tenant, conversation = history.tenant, str(history.conversation)
    assert await listed(tenant.user, conversation=conversation) == [ids["succeeded"], ids["timed out"]]
    assert await listed(tenant.admin) == list(ids.values())
    colleagues = [ids["colleague's"], ids["first queued"]]
    assert await listed(tenant.admin, user=history.colleague_id) == colleagues
    assert await listed(history.colleague) == colleagues
    assert await listed(history.colleague, user=history.colleague_id) == colleagues


async def test_no_filter_shows_what_is_not_ones_own(service: Service, history: History, ids: dict[str, str]) -> None:
    other = await service.new_tenant(policy=None)
    of_user = {"user": history.tenant.user_id}
    of_thread = {"conversation": str(history.conversation)}
    filters: list[dict[str, Any]] = [of_user, of_thread, {"state": "waiting_approval"}]
    for wanted in (*filters, {"since": ago(49), "until": ago(47)}):
        assert await listed(history.colleague, **wanted) == []
        assert await listed(other.admin, **wanted) == []
        assert await listed(history.tenant.admin, **wanted) != [], "control: they are there"


@pytest.mark.parametrize(
    "wanted",
    [
        {"state": "asleep"},
        {"state": ["queued"] * 21},
        {"kind": "x"},
        {"since": "2026-01-01T00:00:00"},
        {"until": "9999-12-31T23:59:59Z"},
        {"since": "0001-01-01T00:00:00Z"},
        {"conversation": "1"},
        {"user": "me"},
    ],
    ids=str,
)
async def test_what_cannot_be_asked_for_is_refused(history: History, wanted: dict[str, Any]) -> None:
    answer = await history.tenant.user.get("/v1/runs", params=wanted)
    assert (answer.status_code, answer.json()["code"]) == (422, "invalid_request")


async def test_a_queued_run_says_how_many_are_before_it(history: History, ids: dict[str, str]) -> None:
    run = (await history.tenant.user.get(f"/v1/runs/{ids['queued']}")).json()
    assert (run["status"], run["kind"], run["ahead"], run["approvals"]) == ("queued", "background", 1, [])
    assert (run["attempt"], run["started_at"], run["finished_at"]) == (1, None, None)
    first = (await history.colleague.get(f"/v1/runs/{ids['first queued']}")).json()
    assert first["ahead"] == 0
    assert (await history.tenant.user.get(f"/v1/runs/{ids['failed']}")).json()["ahead"] is None


async def cancel(client: Client, run_id: str) -> int:
    answer = await client.post(f"/v1/runs/{run_id}/cancel")
    assert bool(answer.content) == answer.is_error, "what is done needs no word"
    return answer.status_code


@pytest.mark.parametrize("state", ["queued", "waiting_approval"])
async def test_what_nobody_executes_is_cancelled_at_once(service: Service, history: History, state: str) -> None:
    other, tenant = await service.new_tenant(policy=None), history.tenant
    run_id = await history.add(state, ago_h=0.5, kind="background")
    assert [await cancel(client, run_id) for client in (other.admin, history.colleague)] == [404, 404]
    assert (await tenant.user.get(f"/v1/runs/{run_id}")).json()["status"] == state
    assert await cancel(tenant.user, run_id) == 202
    run = (await tenant.user.get(f"/v1/runs/{run_id}")).json()
    assert (run["status"], run["code"], run["cancel_cause"]) == ("cancelled", "cancelled", "user")
    assert await cancel(tenant.user, run_id) == 409
    ends = [each["data"]["state"] for each in await tenant.admin.events(run_id=run_id, type="run.finished")]
    assert ends == ["cancelled"]
    by_admin = await history.add(state, ago_h=0.5, kind="background")
    assert await cancel(tenant.admin, by_admin) == 202


async def test_a_background_run_is_accepted_with_its_place(history: History) -> None:
    thread = str(new_id())
    answer = await history.tenant.user.post("/v1/runs", json={"query": "hello", "conversation": thread})
    body = answer.json()
    assert answer.status_code == 202
    assert answer.headers["location"] == f"/v1/runs/{body['run_id']}"
    assert (body["status"], body["kind"], body["code"]) == ("queued", "background", None)
    assert (body["user_id"], body["conversation"]) == (history.tenant.user_id, thread)
    run = (await history.tenant.user.get(answer.headers["location"])).json()
    assert run["query"] == "hello"
    assert {name: run[name] for name in body if name not in {"status", "code"}} == cleaned(body)
    events = {event["type"] for event in await history.tenant.admin.events(run_id=body["run_id"])}
    assert {"query.received", "query.screened"} <= events


def cleaned(body: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in body.items() if name not in {"status", "code"}}


async def test_a_background_run_that_is_refused_is_a_problem_and_on_record(history: History) -> None:
    answer = await history.tenant.user.post("/v1/runs", json={"query": "../../etc/passwd; rm -rf /"})
    assert (answer.status_code, answer.json()["code"]) == (422, "query_refused")
    assert "rule" in answer.json()["detail"]
    assert "location" not in answer.headers
    run = (await history.tenant.user.get(f"/v1/runs/{answer.json()['run_id']}")).json()
    assert (run["status"], run["kind"], run["code"]) == ("denied", "background", "query_refused")


async def test_who_may_not_ask_may_not_in_the_background_either(service: Service, history: History) -> None:
    auditor, _, _ = await service.new_user(history.tenant.id, "auditor")
    assert (await auditor.post("/v1/runs", json={"query": "hello"})).status_code == 403
    none = await service.new_tenant(policy=None)
    refused = await none.user.post("/v1/runs", json={"query": "hello"})
    assert (refused.status_code, refused.json()["code"]) == (409, "no_policy")
    for body in ({}, {"query": ""}, {"query": "x" * 100_001}, {"query": "hello", "user": history.tenant.user_id}):
        assert (await history.tenant.user.post("/v1/runs", json=body)).status_code == 422


async def test_both_ways_of_asking_are_counted_together(service: Service, history: History) -> None:
    body = {"user_id": history.tenant.user_id, "name": secrets.token_hex(4), "rate": "2/hour"}
    client = await service.client((await history.tenant.admin.make("/v1/keys", json=body))["key"])
    refused = {"query": "../../etc/passwd; rm -rf /"}
    statuses = [(await client.post(path, json=refused)).status_code for path in ("/query", "/v1/runs") * 2]
    assert statuses == [422, 422, 429, 429]
    assert await listed(client, limit=200) != [], "control: reading is counted otherwise"


# Plans

_FILL: Final = text("""
insert into runs (tenant_id, id, user_id, policy_version, state, model, kind, created_at, conversation_id)
select :tenant, (left(hex, 8) || '-' || right(hex, 4) || '-7' || substr(gen_random_uuid()::text, 16))::uuid, :user, 1,
       case when n % 1000 = 1 then 'timed_out' when n % 2000 = 7 then 'waiting_approval' else 'succeeded' end, 'm',
       case when n % 2000 = 7 then 'background' else 'interactive' end, at, case when n % 1000 = 3 then :thread end
from (select n, at, lpad(to_hex((extract(epoch from at) * 1000)::bigint), 12, '0') as hex
      from (select n, now() - n * interval '1 minute' as at from generate_series(1, 20000) n) numbers) made
""").bindparams(bindparam("thread", type_=Uuid))
_THREAD: Final = UUID("c4ca4238-a0b9-7382-8dcc-509a6f75849b")
_DAY: Final = timedelta(days=1)
PLANS: Final = {
    "all": (Wanted(), "pk"),
    "of a rare state": (Wanted(states=[State.TIMED_OUT]), "state"),
    "of no run's state": (Wanted(states=[State.DENIED, State.FAILED]), "state"),
    "under way": (Wanted(states=[State.QUEUED, State.RUNNING, State.WAITING_APPROVAL]), "state"),
    "in the background": (Wanted(kind=RunKind.BACKGROUND), "background"),
    "of a conversation": (Wanted(conversation_id=_THREAD), "conversation"),
    "of a time": (Wanted(since=_NOW - 3 * _DAY, until=_NOW - 3 * _DAY + timedelta(hours=1)), "pk"),
}


@pytest.fixture(scope="module")
async def filled(service: Service) -> Tenant:
    """A tenant with 20,000 runs."""
    tenant = await service.new_tenant(policy=POLICY)
    values = {"tenant": UUID(tenant.id), "user": UUID(tenant.user_id), "thread": _THREAD}
    async with service.app.state.database.transaction(UUID(tenant.id)) as session:
        await session.execute(_FILL, values)
    await service.sql("analyze runs")
    return tenant


async def test_of_streams_that_are_opened_at_once_as_many_are_as_one_may_have(
    service: Service, history: History
) -> None:
    run = await history.add("queued", ago_h=0)
    opened, done = asyncio.Queue[int](), asyncio.Event()

    async def follow() -> None:
        headers = {"Accept": "text/event-stream"}
        async with history.tenant.user.stream("GET", f"/v1/runs/{run}/events", headers=headers) as response:
            opened.put_nowait(response.status_code)
            await done.wait()

    most = service.app.state.settings.streams_per_user
    following = [asyncio.create_task(follow()) for _ in range(most + 10)]
    codes = [await opened.get() for _ in following]
    done.set()
    await asyncio.gather(*following)
    assert (codes.count(200), codes.count(429)) == (most, 10)


@pytest.mark.long
@pytest.mark.parametrize("name", PLANS)
async def test_a_list_reads_little_more_than_it_shows(service: Service, filled: Tenant, name: str) -> None:
    wanted, index = PLANS[name]
    async with service.app.state.database.transaction(UUID(filled.id)) as session:
        statement = reading.statement(wanted, of_user=None, before=None, limit=50)
        compiled = statement.compile(dialect=session.get_bind().dialect, compile_kwargs={"literal_binds": True})
        explained = "explain (analyze, format json, timing off) " + str(compiled)
        plan = (await session.execute(text(explained.replace(":", "\\:")))).scalar_one()
    scans = list(_scans(plan[0]["Plan"]))
    assert sum(rows for _, rows in scans) <= 300, scans
    assert any(index in name for name, _ in scans), scans


def _scans(node: dict[str, Any]) -> Iterator[tuple[str, float]]:
    """Of each: its index or table, and how many rows it read."""
    if "Scan" in node["Node Type"] and node["Actual Loops"]:
        read = (node["Actual Rows"] + node.get("Rows Removed by Filter", 0)) * node["Actual Loops"]
        yield node.get("Index Name") or node.get("Relation Name", ""), read
    for child in node.get("Plans", ()):
        yield from _scans(child)
