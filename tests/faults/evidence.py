"""What is there after the kills, seen from outside: what the API says, and what the tool servers wrote themselves."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from tests.faults import scripted_model as model
from tests.faults.ledger import Asked, Customer, Load, Made
from tests.runs.faults import TERMINAL
from tests.service import Client

# Beyond the lease: the reaper looks once a second, and a machine may be busy.
_REAPED_WITHIN_S: Final = 15
_SEALED_WITHIN_S: Final = 10


@dataclass(frozen=True, slots=True)
class Effect:
    """A line that a tool server wrote when it acted."""

    tool: str
    nonce: str
    note: str
    at: float


@dataclass(slots=True)
class Evidence:
    """All of it; what is by run has the nonce of the run's query beside it."""

    asked: list[Asked]
    made: list[Made]
    events: dict[str, list[dict[str, Any]]]
    states: dict[str, str]
    nonces: dict[str, str]
    effects: list[Effect]
    users: dict[str, list[str]]
    chains: dict[str, list[dict[str, Any]]]
    audit_keys: Mapping[str, str]
    usage: dict[str, list[dict[str, Any]]]
    calls: dict[str, list[dict[str, Any]]]
    limits: Mapping[str, Mapping[str, Any]]
    spans: Mapping[str, tuple[float, float]]

    @property
    def runs(self) -> dict[str, str]:
        """The run of each nonce, for those that have one."""
        return {nonce: run_id for run_id, nonce in self.nonces.items()}


async def no_run_is_left(customers: list[Customer]) -> None:
    """Wait until each run has ended; after the lease and some patience, none may be left."""
    deadline = time.monotonic() + _REAPED_WITHIN_S
    for customer in customers:
        while left := [run for run in await pages(customer.admin, "/v1/runs") if run["status"] not in TERMINAL]:
            assert time.monotonic() < deadline, left
            await asyncio.sleep(0.2)


async def gathered(
    load: Load, spans: Mapping[str, tuple[float, float]], *, sealed_within_s: float = _SEALED_WITHIN_S
) -> Evidence:
    """Ask for all that there is to see."""
    nonces = {asked.body["run_id"]: asked.nonce for asked in load.asked if "run_id" in asked.body}
    keys = (await load.customers[0].auditor.get("/.well-known/bulkhead-audit-keys.json")).json()["keys"]
    limits = {customer.id: customer.limit for customer in load.customers}
    found = Evidence(load.asked, load.made, {}, {}, nonces, [], {}, {}, keys, {}, {}, limits, dict(spans))
    for customer in load.customers:
        for run in await pages(customer.admin, "/v1/runs"):
            found.states[run["run_id"]] = run["status"]
            if run["run_id"] not in nonces:
                detail = (await customer.users[run["user_id"]].get(f"/v1/runs/{run['run_id']}")).json()
                nonces[run["run_id"]] = model.nonce_of(detail["query"])
        found.effects.extend(await _journal(customer))
        found.users[customer.id] = [user["name"] for user in await pages(customer.admin, "/v1/users")]
        found.usage[customer.id] = await pages(customer.auditor, "/v1/usage", group_by="user")
        found.calls[customer.id] = await pages(customer.auditor, "/v1/usage", group_by="tool")
        found.events[customer.id] = await _events(customer, sealed_within_s=sealed_within_s)
        found.chains[customer.id] = await _chain(customer)
    return found


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


async def _journal(customer: Customer) -> list[Effect]:
    answer = await customer.admin.get("/v1/workspaces/notes/files/journal.txt")
    assert answer.is_success, answer.text
    lines = (line.split() for line in answer.text.splitlines())
    return [Effect(tool, note.partition("-")[0], note, float(at)) for tool, note, at in lines]


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
