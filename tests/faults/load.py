"""Everybody at work: users ask in every way, admins decide approvals and make users, until they are told to stop."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Coroutine, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from typing import Any, Final

import httpx

from tests.faults.asking import Asker
from tests.faults.customers import SELF, Customer, customers
from tests.faults.ledger import Asked, Decided, Kind, Ledger, Made
from tests.faults.phases import Plan
from tests.faults.plant import Plant
from tests.service import Client

# Of each tenant its own, in turn. The first is who the faults are for: its budgets are reserved from, given back and
# charged again and again, and last all the same. Each of the others' is used up.
_LIMITS: Final[Sequence[Mapping[str, object]]] = (
    {
        "concurrent_runs": 20,
        SELF: False,
        "tokens_per_day": 10**9,
        "cost_usd_per_day": "1000",
        "tool_calls_per_day": 10**6,
    },
    {"concurrent_runs": 1},
    {"tokens_per_day": 50_000},
    {"cost_usd_per_day": "0.045"},
    {"tool_calls_per_day": 30},
)
_PLANS: Final[Sequence[Plan]] = (
    (("record",),),
    (("record",), ("keep",)),
    (("record", "record"), ("erase",)),
    (("erase", "send"),),
    (("keep",), ("sign",)),
    (("contraband",),),  # refused by screening
)
_VERDICTS: Final = ("approve", "approve", "edit", "deny")
_PAUSE_S: Final = 0.15
_LONG_PAUSES: Final = 12
_EXHAUSTED: Final = "budget_exhausted"
_CANCELLED: Final = 0.08  # of those whose run is known before it ends


@dataclass(slots=True)
class Load:
    """Customers at work; what the nonces in `held` ask to have approved is left to whoever holds them."""

    plant: Plant
    customers: list[Customer]
    asker: Asker
    held: set[str] = field(default_factory=set)
    _stopping: asyncio.Event = field(default_factory=asyncio.Event)
    _group: asyncio.TaskGroup | None = None

    @property
    def ledger(self) -> Ledger:
        """What was sent and answered."""
        return self.asker.ledger

    @asynccontextmanager
    async def going(self, seed: float) -> AsyncIterator[None]:
        """Everybody works while the block runs; at its end what is under way is still waited for."""
        async with asyncio.TaskGroup() as approving:
            deciders = [
                approving.create_task(self._decide_on(customer, _random(f"{seed}-{place}-approver")))
                for place, customer in enumerate(self.customers)
            ]
            async with asyncio.TaskGroup() as self._group:
                self._begin_all(seed)
                try:
                    yield
                finally:
                    self._stopping.set()
            for decider in deciders:
                decider.cancel()

    def _begin_all(self, seed: float) -> None:
        for place, customer in enumerate(self.customers):
            self.begin(self._administer(customer, _random(f"{seed}-{place}-admin")))
            for seat, user_id in enumerate(customer.users):
                self.begin(self._ask_on(customer, user_id, _random(f"{seed}-{place}-{seat}")))

    def begin(self, work: Coroutine[Any, Any, None]) -> None:
        """Something to be waited for at the end."""
        assert self._group is not None
        self._group.create_task(work)

    async def _ask_on(self, customer: Customer, user_id: str, rng: random.Random) -> None:
        while not self._stopping.is_set():
            asked = new_query(customer, user_id, rng)
            if rng.random() < _CANCELLED and asked.kind is not Kind.QUERY:
                self.begin(self._cancel(asked, customer.users[user_id], rng))
            await self.asker.ask(asked, customer.users[user_id], rng)
            is_refused = _EXHAUSTED in {asked.body.get("code"), (asked.end or {}).get("code")}
            await asyncio.sleep(rng.uniform(0, (_LONG_PAUSES if is_refused else 2) * _PAUSE_S))

    async def ask_once_more(self, seed: float, customers: Sequence[Customer] | None = None) -> list[Asked]:
        """Everybody asks at once, when all is quiet; or those of these customers."""
        rng, asked = random.Random(seed), []  # noqa: S311  a history to repeat, no secret
        async with asyncio.TaskGroup() as group:
            for customer in self.customers if customers is None else customers:
                for user_id, client in customer.users.items():
                    asked.append(new_query(customer, user_id, rng, turns=_PLANS[0], kind=Kind.QUERY))
                    group.create_task(self.asker.ask(asked[-1], client, rng))
        return asked

    async def use_up(self, rng: random.Random, *, times: int) -> None:
        """When all is quiet: let those who have little of a budget ask until it has no room; so often at most."""
        left = [customer for customer in self.customers if customer.is_bounded]
        for _ in range(times):
            asked = await self.ask_once_more(rng.random(), left)
            going_on = {one.tenant_id for one in asked if one.body.get("code") != _EXHAUSTED}
            left = [customer for customer in left if customer.id in going_on]
            if not left:
                return
        raise AssertionError(f"{left} have room for ever")

    async def _cancel(self, asked: Asked, client: Client, rng: random.Random) -> None:
        with suppress(TimeoutError):
            await asyncio.wait_for(asked.is_accepted.wait(), 5)
        await asyncio.sleep(rng.uniform(0, 0.4))
        for _ in range(50):
            if asked.run_id is None or asked.end is not None:
                return
            asked.is_cancelled = True
            url = f"{rng.choice(self.plant.addresses)}/v1/runs/{asked.run_id}/cancel"
            with suppress(httpx.TransportError):
                answer = await client.post(url, headers={"Idempotency-Key": f"cancel-{asked.nonce}"}, timeout=10)
                if not answer.is_server_error:
                    return
            await asyncio.sleep(_PAUSE_S)

    async def _decide_on(self, customer: Customer, rng: random.Random) -> None:
        while True:
            for waiting in await self._waiting(customer, rng):
                await self.decide(customer, waiting, rng)
            await asyncio.sleep(_PAUSE_S)

    async def _waiting(self, customer: Customer, rng: random.Random) -> list[dict[str, Any]]:
        """The inbox, each with its arguments; without those that somebody holds."""
        found = []
        with suppress(httpx.TransportError):
            base = f"{rng.choice(self.plant.addresses)}/v1/approvals"
            answer = await customer.admin.get(base, params={"state": "waiting"}, timeout=10)
            for item in answer.json().get("items", ()):
                shown = await customer.admin.get(f"{base}/{item['id']}", timeout=10)
                if shown.is_success and note_of(shown.json()).partition("-")[0] not in self.held:
                    found.append(shown.json())
        return found

    async def decide(
        self, customer: Customer, waiting: dict[str, Any], rng: random.Random, *, verdict: str = ""
    ) -> None:
        """By a second person, who may be asked to by the first."""
        decided = Decided(
            customer.id, waiting["id"], waiting["run_id"], note_of(waiting), verdict or rng.choice(_VERDICTS)
        )
        if customer.limit.get(SELF) is False and rng.random() < 1 / 2:
            own = Decided(customer.id, decided.approval_id, decided.run_id, decided.note, "approve", by_asker=True)
            await self._send(own, customer.users[waiting["user_id"]], rng)
        await self._send(decided, customer.admin, rng)

    async def _send(self, decided: Decided, client: Client, rng: random.Random) -> None:
        self.ledger.decided.append(decided)
        verb = "deny" if decided.verdict == "deny" else "approve"
        body: dict[str, Any] = {"reason": "not now"} if verb == "deny" else {}
        if decided.verdict == "edit":
            body = {"arguments": {"note": edited(decided.note)}}
        key = f"{decided.approval_id}-{decided.verdict}"
        for _ in range(100):
            url = f"{rng.choice(self.plant.addresses)}/v1/approvals/{decided.approval_id}/{verb}"
            with suppress(httpx.TransportError):
                answer = await client.post(url, json=body, headers={"Idempotency-Key": key}, timeout=10)
                self.ledger.saw(decided.tenant_id, answer.text)
                if not answer.is_server_error:
                    decided.status, decided.code = answer.status_code, answer.json().get("code")
                    return
            await asyncio.sleep(_PAUSE_S)

    async def _administer(self, customer: Customer, rng: random.Random) -> None:
        while not self._stopping.is_set():
            made = Made(customer.id, f"user-{rng.getrandbits(64):016x}")
            self.ledger.made.append(made)
            await self._make_user(customer.admin, made, rng)
            await asyncio.sleep(rng.uniform(0, _LONG_PAUSES * _PAUSE_S))

    async def _make_user(self, admin: Client, made: Made, rng: random.Random) -> None:
        """A connection that breaks leaves open whether it was done, so it is sent again."""
        while made.user_id is None and not self._stopping.is_set():
            with suppress(httpx.TransportError):
                answer = await admin.post(
                    f"{rng.choice(self.plant.addresses)}/v1/users",
                    json={"name": made.name, "role": "user"},
                    headers={"Idempotency-Key": made.name},
                    timeout=10,
                )
                if answer.status_code == httpx.codes.CREATED:
                    made.user_id = answer.json()["id"]
                else:
                    assert answer.status_code == httpx.codes.SERVICE_UNAVAILABLE, answer.text
            await asyncio.sleep(_PAUSE_S)


def new_query(
    customer: Customer, user_id: str, rng: random.Random, *, turns: Plan | None = None, kind: Kind | None = None
) -> Asked:
    """A query with a nonce of its own."""
    return Asked(
        customer.id,
        user_id,
        f"{rng.getrandbits(64):016x}",
        turns or rng.choice(_PLANS),
        kind or rng.choice(tuple(Kind)),
    )


def note_of(approval: dict[str, Any]) -> str:
    """What the call that waits is to write."""
    return str(approval["arguments"]["note"])


def edited(note: str) -> str:
    """What it is to write instead."""
    return f"{note}-edited"


def _random(seed: str) -> random.Random:
    return random.Random(seed)  # noqa: S311  a history to repeat, no secret


@asynccontextmanager
async def load(plant: Plant, *, tenants: int, users: int) -> AsyncIterator[Load]:
    """So many customers, with one limit or another."""
    limits = [_LIMITS[number % len(_LIMITS)] for number in range(tenants)]
    async with customers(plant, limits, users=users) as made:
        yield Load(plant, made, Asker(plant.addresses))
