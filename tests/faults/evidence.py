"""What is there after it all, seen from outside: what the API says, what tool servers wrote, what the model saw."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import httpx
from sqlalchemy import text

from tests.faults import scripted_model as model
from tests.faults.customers import JOURNAL, Customer
from tests.faults.ledger import Asked, Decided, Ledger, Made
from tests.faults.load import Load
from tests.faults.plant import Plant, superuser
from tests.runs.faults import TERMINAL
from tests.service import Client

# Beyond the lease and the time after which a worker counts as dead, and a machine may be busy.
_ENDED_WITHIN_S: Final = 30
_SEALED_WITHIN_S: Final = 10
_AT_ONCE: Final = 8
_RESERVED: Final = text("select tenant_id, run_id from budget_reservations where tenant_id = any(cast(:ids as uuid[]))")


@dataclass(frozen=True, slots=True)
class Line:
    """What a tool server wrote when a call came, or when it acted."""

    moment: str
    tool: str
    nonce: str
    note: str
    key: str
    at: float


@dataclass(slots=True)
class Evidence:
    """All of it; what is by run has the nonce of the run's query beside it."""

    ledger: Ledger
    limits: Mapping[str, Mapping[str, Any]]
    audit_keys: Mapping[str, str]
    turns: Sequence[model.Turn]
    letters: Sequence[tuple[str, str]]
    events: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    runs: dict[str, dict[str, Any]] = field(default_factory=dict)
    nonces: dict[str, str] = field(default_factory=dict)
    run_events: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    lines: list[Line] = field(default_factory=list)
    approvals: dict[str, dict[str, Any]] = field(default_factory=dict)
    users: dict[str, list[str]] = field(default_factory=dict)
    chains: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    usage: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    calls: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    days: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    left: dict[str, dict[str, str]] = field(default_factory=dict)
    reserved: dict[str, list[str]] = field(default_factory=dict)

    @property
    def asked(self) -> list[Asked]:
        """All queries."""
        return self.ledger.asked

    @property
    def made(self) -> list[Made]:
        """All users that somebody wanted."""
        return self.ledger.made

    @property
    def decided(self) -> list[Decided]:
        """All that was said of approvals."""
        return self.ledger.decided

    @property
    def effects(self) -> list[Line]:
        """The lines of what was done."""
        return [line for line in self.lines if line.moment == "acted"]

    @property
    def states(self) -> dict[str, str]:
        """Where each run is."""
        return {run_id: run["status"] for run_id, run in self.runs.items()}

    @property
    def run_ids(self) -> dict[str, str]:
        """The run of each nonce, for those that have one."""
        return {nonce: run_id for run_id, nonce in self.nonces.items()}


async def no_run_is_left(customers: Sequence[Customer]) -> None:
    """Wait until each run has ended; after some patience, none may be left."""
    deadline = time.monotonic() + _ENDED_WITHIN_S
    for customer in customers:
        while left := [run for run in await pages(customer.admin, "/v1/runs") if run["status"] not in TERMINAL]:
            assert time.monotonic() < deadline, left
            await asyncio.sleep(0.2)


async def gathered(work: Load, *, sealed_within_s: float = _SEALED_WITHIN_S) -> Evidence:
    """Ask for all that there is to see."""
    keys = (await work.customers[0].auditor.get("/.well-known/bulkhead-audit-keys.json")).json()["keys"]
    limits = {customer.id: customer.limit for customer in work.customers}
    found = Evidence(work.ledger, limits, keys, list(work.plant.model.turns), list(work.plant.letterbox.letters))
    found.nonces = {asked.run_id: asked.nonce for asked in work.ledger.asked if asked.run_id}
    for customer in work.customers:
        await _runs(found, work.ledger, customer)
        await _approvals(found, work.ledger, customer)
        found.lines.extend(await _journal(customer))
        found.users[customer.id] = [user["name"] for user in await pages(customer.admin, "/v1/users")]
        found.usage[customer.id] = await pages(customer.auditor, "/v1/usage", group_by="user")
        found.calls[customer.id] = await pages(customer.auditor, "/v1/usage", group_by="tool")
        found.days[customer.id] = await pages(customer.auditor, "/v1/usage", group_by="day")
        found.left[customer.id] = await _left(customer)
        found.events[customer.id] = await _events(customer, sealed_within_s=sealed_within_s)
        found.chains[customer.id] = await _chain(customer)
    found.reserved = await _reserved(work.plant, list(limits))
    return found


async def _runs(found: Evidence, ledger: Ledger, customer: Customer) -> None:
    """Each run, and what its user is shown of it."""
    places = asyncio.Semaphore(_AT_ONCE)

    async def look(run: dict[str, Any]) -> None:
        run_id, user = run["run_id"], customer.users[run["user_id"]]
        async with places:
            answer = await user.get(f"/v1/runs/{run_id}")
            ledger.saw(customer.id, answer.text)
            found.runs[run_id] = answer.json()
            found.nonces.setdefault(run_id, model.nonce_of(answer.json()["query"]))
            found.run_events[run_id] = await _run_events(user, run_id)
            ledger.saw(customer.id, json.dumps(found.run_events[run_id]))

    async with asyncio.TaskGroup() as group:
        for run in await pages(customer.admin, "/v1/runs"):
            group.create_task(look(run))


async def _run_events(user: Client, run_id: str) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []
    while True:
        answer = await user.get(f"/v1/runs/{run_id}/events", params={"limit": 200, "after": len(found)})
        assert answer.is_success, answer.text
        items = answer.json()["items"]
        found += items
        if not items:
            return found


async def _approvals(found: Evidence, ledger: Ledger, customer: Customer) -> None:
    for item in await pages(customer.admin, "/v1/approvals"):
        found.approvals[item["id"]] = item
        ledger.saw(customer.id, json.dumps(item))


async def _events(customer: Customer, *, sealed_within_s: float) -> list[dict[str, Any]]:
    """Once all are chained, or with those that are not when the time is up."""
    deadline = time.monotonic() + sealed_within_s
    while True:
        events = await pages(customer.auditor, "/v1/audit/events")
        if all(event["seq"] for event in events) or time.monotonic() > deadline:
            return events
        await asyncio.sleep(0.3)


async def _chain(customer: Customer) -> list[dict[str, Any]]:
    answer = await customer.auditor.get("/v1/audit/export")
    assert answer.is_success, answer.text
    return [json.loads(line) for line in answer.text.splitlines()]


async def _left(customer: Customer) -> dict[str, str]:
    """Of each budget, as one of the tenant is told."""
    answer = await customer.auditor.get("/v1/me")
    assert answer.is_success, answer.text
    return {budget["limit"]: budget["left"] for budget in answer.json()["budgets"]}


async def _reserved(plant: Plant, tenant_ids: list[str]) -> dict[str, list[str]]:
    """The runs that have anything set aside: no route tells, so it is read from the table."""
    async with superuser(plant) as connection:
        rows = (await connection.execute(_RESERVED, {"ids": tenant_ids})).all()
    return {each: [str(row.run_id) for row in rows if str(row.tenant_id) == each] for each in tenant_ids}


async def _journal(customer: Customer) -> list[Line]:
    answer = await customer.admin.get(JOURNAL)
    if answer.status_code == httpx.codes.NOT_FOUND:
        return []  # what died has used up the budget before any call
    assert answer.is_success, answer.text
    return [_line(*line.split()) for line in answer.text.splitlines()]


def _line(moment: str, tool: str, note: str, key: str, at: str) -> Line:
    return Line(moment, tool, note.partition("-")[0], note, key, float(at))


async def pages(client: Client, path: str, **query: str) -> list[dict[str, Any]]:
    """A whole list."""
    found: list[dict[str, Any]] = []
    cursor: str | None = None
    while True:
        answer = await client.get(path, params=query | {"limit": 200} | ({"cursor": cursor} if cursor else {}))
        assert answer.is_success, answer.text
        page = answer.json()
        found += page["items"]
        cursor = page["next_cursor"]
        if cursor is None:
            return found
