"""The clients' side: who asks what, and a ledger of all that was sent and answered, which no kill reaches."""

from __future__ import annotations

import asyncio
import random
import secrets
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from typing import Any, Final

import httpx

from tests.faults import scripted_model as model
from tests.service import Client, new_client

_POLICY: Final = """\
schema: bulkhead/1
limits: {LIMITS}
input: {block: [contraband]}
servers:
  journal: {template: command, server: journal, root: notes, readonly: false}
tools:
  allow: ["journal__*"]
  deny: ["journal__erase"]
"""
# Of each tenant its own, in turn.
_LIMITS: Final[Sequence[Mapping[str, object]]] = (
    {"concurrent_runs": 20},
    {"concurrent_runs": 1},
    {"tokens_per_day": 30_000},
)
_UNLIMITED: Final[Mapping[str, object]] = {"requests": "100000/minute", "tenant_requests": "200000/minute"}
_PLANS: Final[Sequence[tuple[tuple[str, ...], ...]]] = (
    (("record",),),
    (("record",), ("record",)),
    (("record", "record"), ("erase",)),
    (("erase", "record"),),
    (("contraband",),),  # refused by screening
)
_PAUSE_S: Final = 0.15


@dataclass(slots=True)
class Asked:
    """One query; without a status nobody answered it."""

    tenant_id: str
    user_id: str
    nonce: str
    turns: tuple[tuple[str, ...], ...]
    status: int | None = None
    body: dict[str, Any] = field(default_factory=dict)

    @property
    def tools(self) -> list[str]:
        """Every call that the model makes."""
        return [tool for tools in self.turns for tool in tools]


@dataclass(slots=True)
class Made:
    """A user that an admin has made, sent again under the same key until it was answered."""

    tenant_id: str
    name: str
    user_id: str | None = None


@dataclass(slots=True)
class Customer:
    """A tenant with its people."""

    id: str
    limit: Mapping[str, object]
    admin: Client
    auditor: Client
    users: dict[str, Client]


@dataclass(slots=True)
class Load:
    """Customers who ask and administer until they are told to stop."""

    addresses: Sequence[str]
    customers: list[Customer]
    asked: list[Asked] = field(default_factory=list)
    made: list[Made] = field(default_factory=list)
    _stopping: asyncio.Event = field(default_factory=asyncio.Event)

    @asynccontextmanager
    async def going(self, seed: float) -> AsyncIterator[None]:
        """Everybody asks while the block runs; at its end what is under way is still waited for."""
        async with asyncio.TaskGroup() as group:
            for place, customer in enumerate(self.customers):
                group.create_task(self._administer(customer, random.Random(f"{seed}-{place}")))  # noqa: S311  to repeat
                for seat, (user_id, client) in enumerate(customer.users.items()):
                    rng = random.Random(f"{seed}-{place}-{seat}")  # noqa: S311  a history to repeat, no secret
                    group.create_task(self._ask_on(customer.id, user_id, client, rng=rng))
            try:
                yield
            finally:
                self._stopping.set()

    async def _ask_on(self, tenant_id: str, user_id: str, client: Client, *, rng: random.Random) -> None:
        while not self._stopping.is_set():
            asked = Asked(tenant_id, user_id, f"{rng.getrandbits(64):016x}", rng.choice(_PLANS))
            await self._ask(asked, client, rng=rng)
            was_served = asked.status not in {None, httpx.codes.SERVICE_UNAVAILABLE}
            await asyncio.sleep(rng.uniform(0, 2 * _PAUSE_S) if was_served else 3 * _PAUSE_S)

    async def _ask(self, asked: Asked, client: Client, *, rng: random.Random) -> None:
        self.asked.append(asked)
        text = model.query(asked.nonce, asked.turns)
        try:
            answer = await client.post(f"{rng.choice(self.addresses)}/query", json={"query": text})
            asked.status, asked.body = answer.status_code, answer.json()
        except httpx.TransportError:
            return  # nobody knows what became of it

    async def ask_once_more(self, seed: float) -> list[Asked]:
        """Everybody asks at once, when all is quiet."""
        rng = random.Random(seed)  # noqa: S311  a history to repeat, no secret
        before = len(self.asked)
        async with asyncio.TaskGroup() as group:
            for customer in self.customers:
                for user_id, client in customer.users.items():
                    asked = Asked(customer.id, user_id, f"{rng.getrandbits(64):016x}", _PLANS[0])
                    group.create_task(self._ask(asked, client, rng=rng))
        return self.asked[before:]

    async def _administer(self, customer: Customer, rng: random.Random) -> None:
        while not self._stopping.is_set():
            made = Made(customer.id, f"user-{rng.getrandbits(64):016x}")
            self.made.append(made)
            await self._make_user(customer.admin, made, rng)
            await asyncio.sleep(rng.uniform(0, 8 * _PAUSE_S))

    async def _make_user(self, admin: Client, made: Made, rng: random.Random) -> None:
        """A connection that breaks leaves open whether it was done, so it is sent again."""
        while made.user_id is None and not self._stopping.is_set():
            try:
                answer = await admin.post(
                    f"{rng.choice(self.addresses)}/v1/users",
                    json={"name": made.name, "role": "user"},
                    headers={"Idempotency-Key": made.name},
                )
            except httpx.TransportError:
                await asyncio.sleep(_PAUSE_S)
                continue
            if answer.status_code == httpx.codes.CREATED:
                made.user_id = answer.json()["id"]
            else:
                assert answer.status_code == httpx.codes.SERVICE_UNAVAILABLE, answer.text
                await asyncio.sleep(_PAUSE_S)


@asynccontextmanager
async def load(addresses: Sequence[str], platform_key: str, *, tenants: int, users: int) -> AsyncIterator[Load]:
    """So many customers, with one limit or another."""
    limits = [_LIMITS[number % len(_LIMITS)] for number in range(tenants)]
    async with customers(addresses, platform_key, limits, users=users) as made:
        yield Load(addresses, made)


@asynccontextmanager
async def customers(
    addresses: Sequence[str], platform_key: str, limits: Sequence[Mapping[str, object]], *, users: int
) -> AsyncIterator[list[Customer]]:
    """Tenants with an admin, an auditor and users each, and a policy whose tool server keeps a journal."""
    async with AsyncExitStack() as stack:

        async def caller(key: str) -> Client:
            return await stack.enter_async_context(new_client(addresses[0], key))

        platform = await caller(platform_key)
        yield [await _customer(platform, caller, limit, users=users) for limit in limits]


async def _customer(
    platform: Client, caller: Callable[[str], Awaitable[Client]], limit: Mapping[str, object], *, users: int
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
    await admin.put_file("welcome.txt", "notes", workspace="notes")
    chosen = {**_UNLIMITED, **limit}
    await admin.publish(_POLICY.replace("LIMITS", ", ".join(f"{name}: {bound}" for name, bound in chosen.items())))
    return Customer(tenant_id, limit, admin, auditor, people)
