"""Who asks: tenants with their people, and a policy whose tool server keeps a journal."""

from __future__ import annotations

import asyncio
import json
import secrets
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from tests.faults.phases import HELD_S
from tests.faults.plant import Plant
from tests.service import Client, new_client

_POLICY: Final = """\
schema: bulkhead/1
limits: {LIMITS}
input: {block: [contraband]}
servers:
  journal: {template: command, server: journal, root: notes, readonly: false, allowed_hosts: ["LETTERBOX"]}
tools:
  allow: ["journal__*"]
  deny: ["journal__erase"]
  approve: ["journal__sign"]
  idempotent: ["journal__keep"]
approvals: {self_approval: SELF}
"""
_UNLIMITED: Final[Mapping[str, object]] = {"requests": "100000/minute", "tenant_requests": "200000/minute"}
JOURNAL: Final = "/v1/workspaces/notes/files/journal.txt"
SELF: Final = "self_approval"
# Those of a day that a limit may name.
BUDGETS: Final = ("tokens_per_day", "cost_usd_per_day", "tool_calls_per_day")


@dataclass(slots=True)
class Customer:
    """A tenant with its people, and where the journal of its tool servers lies."""

    id: str
    limit: Mapping[str, object]
    admin: Client
    auditor: Client
    users: dict[str, Client]
    notes: Path = field(repr=False)

    @property
    def is_bounded(self) -> bool:
        """Whether it has a budget that it uses up."""
        return "concurrent_runs" not in self.limit and not self.limit.keys().isdisjoint(BUDGETS)

    def hold(self, note: str, moment: str) -> None:
        """The tool server shall wait at that moment of the call."""
        (self.notes / f"hold-{note}-{moment}").touch()

    def release(self, note: str, moment: str) -> None:
        """It shall go on."""
        (self.notes / f"hold-{note}-{moment}").unlink(missing_ok=True)

    async def reached(self, note: str, moment: str) -> bool:
        """Wait until the call is there."""
        for _ in range(HELD_S * 100):
            if f" {note} " in self._lines(moment):
                return True
            await asyncio.sleep(0.01)
        return False

    def _lines(self, moment: str) -> str:
        path = self.notes / "journal.txt"
        lines = path.read_text().splitlines() if path.exists() else []
        return "\n".join(line for line in lines if line.startswith(moment))


@asynccontextmanager
async def customers(
    plant: Plant, limits: Sequence[Mapping[str, object]], *, users: int
) -> AsyncIterator[list[Customer]]:
    """One with each of the limits: an admin, an auditor and users."""
    async with AsyncExitStack() as stack:

        async def caller(key: str) -> Client:
            return await stack.enter_async_context(new_client(plant.addresses[0], key))

        platform = await caller(plant.platform_key)
        made = (_customer(plant, platform, caller, limit=limit, users=users) for limit in limits)
        yield await asyncio.gather(*made)


async def _customer(
    plant: Plant,
    platform: Client,
    caller: Callable[[str], Awaitable[Client]],
    *,
    limit: Mapping[str, object],
    users: int,
) -> Customer:
    tenant_id = (await platform.make("/v1/tenants", json={"slug": f"customer-{secrets.token_hex(8)}"}))["id"]

    async def person(role: str, name: str) -> tuple[str, Client]:
        base = f"/v1/tenants/{tenant_id}"
        user = await platform.make(f"{base}/users", json={"name": name, "role": role})
        key = await platform.make(f"{base}/keys", json={"user_id": user["id"], "name": name})
        return user["id"], await caller(key["key"])

    _, admin = await person("tenant_admin", "admin")
    _, auditor = await person("auditor", "auditor")
    people = dict([await person("user", f"user-{place}") for place in range(users)])
    await admin.put_file("letterbox.txt", plant.letterbox.host, workspace="notes")
    await admin.publish(policy(limit, plant.letterbox.host))
    (notes,) = {path.parent for path in plant.machine.directory.rglob(f"{tenant_id}/**/letterbox.txt")}
    return Customer(tenant_id, limit, admin, auditor, people, notes)


def policy(limit: Mapping[str, Any], host: str) -> str:
    """With these limits, and that host to write to."""
    chosen = {name: bound for name, bound in {**_UNLIMITED, **limit}.items() if name != SELF}
    limits = ", ".join(f"{name}: {json.dumps(bound)}" for name, bound in chosen.items())
    said = _POLICY.replace("LIMITS", limits).replace("LETTERBOX", host)
    return said.replace("SELF", str(limit.get(SELF, True)).lower())
