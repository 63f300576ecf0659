"""What is done to whom at which moment: each time a run of its own is brought there, and held where that can be."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from enum import StrEnum
from itertools import cycle, islice, product
from typing import Final

import psutil

from tests.faults import scripted_model as model
from tests.faults.customers import Customer
from tests.faults.ledger import Asked, Kind
from tests.faults.load import Load, new_query
from tests.faults.phases import HELD_S, IN_TOOL, PLANS, Phase
from tests.faults.plant import Plant

# One try in ten or so fails, since what the other lanes do meets its run first.
_TRIES: Final = 6
_LANES: Final = 3
_SOON_S: Final = 0.03  # what follows an answer is over after so long


class Target(StrEnum):
    """What is killed or stalled."""

    API = "api"
    WORKER = "worker"
    POSTGRES = "postgres"
    BACKEND = "backend"
    STORAGE = "valkey"
    TOOL = "tool server"
    RELAY = "relay"
    MODEL = "model"


# Which a promise is about: of the faults that are drawn beside one of each, all kill one of these.
SERVICE: Final = (Target.API, Target.WORKER, Target.POSTGRES, Target.BACKEND)
# How long each stands still, in seconds; two are longer than a lease.
_STALLS: Final = {
    Target.API: (0.2, 2.4),
    Target.WORKER: (0.2, 2.4),
    Target.POSTGRES: (0.2, 0.8),
    Target.BACKEND: (0.3,),
    Target.STORAGE: (0.2, 0.5),
    Target.TOOL: (0.2, 0.6),
    Target.RELAY: (0.2, 0.6),
    Target.MODEL: (0.2, 0.8),
}


@dataclass(frozen=True, slots=True)
class Injection:
    """One of them: at a moment of a run that was asked in that way."""

    target: Target
    is_kill: bool
    phase: Phase
    kind: Kind

    def __str__(self) -> str:
        return f"{'kill' if self.is_kill else 'stall'} {self.target} {self.phase} ({self.kind})"


def possible() -> list[Injection]:
    """All that there are. A worker is hit at its own runs; who has no answer yet was not accepted."""
    found = []
    for target, is_kill, phase, kind in product(Target, (True, False), Phase, Kind):
        is_another = target is Target.WORKER and kind is not Kind.BACKGROUND and phase is not Phase.WAITING
        if not is_another and not (phase is Phase.ACCEPTED and kind is Kind.QUERY):
            found.append(Injection(target, is_kill, phase, kind))
    return found


def history(rng: random.Random, count: int) -> list[Injection]:
    """So many: each target in both ways and then kills of the service and its Postgres, each phase as often as any
    other; from some hundreds on, each that is possible as often as any other.
    """
    everything = possible()
    rng.shuffle(everything)
    if count >= len(everything):
        return list(islice(cycle(everything), count))
    pairs = list(product(Target, (True, False)))
    kills = [(target, True) for target in rng.sample(SERVICE, len(SERVICE))]
    ways = [*pairs, *islice(cycle(kills), max(0, count - len(pairs)))][:count]
    rng.shuffle(ways)
    phases = cycle(rng.sample(list(Phase), len(Phase)))
    chosen = []
    for (target, is_kill), phase in zip(ways, phases, strict=False):
        fits = (it for it in everything if (it.target, it.is_kill, it.phase) == (target, is_kill, phase))
        chosen.append(next(fits))
    return chosen


async def injected(plant: Plant, work: Load, injections: Sequence[Injection], *, seed: str) -> list[str]:
    """Do them all, some at a time, while everybody works; give those for which no run came to the moment, and why."""
    missed: list[str] = []
    alone = {target: asyncio.Lock() for target in Target}
    alone[Target.BACKEND] = alone[Target.POSTGRES]

    async def lane(first: int) -> None:
        for number in range(first, len(injections), _LANES):
            rng = random.Random(f"{seed}-{number}")  # noqa: S311  a history to repeat, no secret
            injector = Injector(plant, work, rng, alone)
            if not await injector.inject(injections[number]):
                missed.append(f"{injections[number]}: {injector.tried}")

    async with asyncio.TaskGroup() as group:
        for first in range(_LANES):
            group.create_task(lane(first))
    return missed


@dataclass(slots=True)
class Injector:
    """Does one; what is one of a kind has one thing done to it at a time."""

    plant: Plant
    work: Load
    rng: random.Random
    alone: Mapping[Target, asyncio.Lock]
    tried: list[Asked] = field(default_factory=list)

    async def inject(self, injection: Injection) -> bool:
        """True if a run was at the moment; else, after some tries, nothing is done."""
        for _ in range(_TRIES):
            await self.plant.can_work()
            if await self._try(injection):
                return True
        return False

    async def _try(self, injection: Injection) -> bool:
        customer = self.rng.choice([one for one in self.work.customers if one.limit.get("concurrent_runs") == 20])
        user_id, client = self.rng.choice(list(customer.users.items()))
        asked = new_query(customer, user_id, self.rng, turns=PLANS[injection.phase], kind=injection.kind)
        self.tried.append(asked)
        with self._bringing(asked, customer, injection.phase) as (reached, release):
            self.work.begin(self.work.asker.ask(asked, client, self.rng))
            if not await reached():
                return False
            async with self.alone[injection.target]:
                with self._done(injection, asked):
                    release()
                    if not injection.is_kill:
                        await asyncio.sleep(self.rng.choice(_STALLS[injection.target]))
                await self._repaired(injection)
        return True

    @contextmanager
    def _bringing(
        self, asked: Asked, customer: Customer, phase: Phase
    ) -> Iterator[tuple[Callable[[], Awaitable[bool]], Callable[[], None]]]:
        """What tells that the run is there, and what lets it go on."""
        if moment := IN_TOOL.get(phase):
            note = model.note(asked.nonce, 0)
            customer.hold(note, moment)
            try:
                yield lambda: customer.reached(note, moment), lambda: customer.release(note, moment)
            finally:
                customer.release(note, moment)
        elif phase in {Phase.ACCEPTED, Phase.WAITING}:
            self.work.held.add(asked.nonce)
            is_there = asked.is_accepted if phase is Phase.ACCEPTED else asked.is_waiting
            try:
                yield lambda: _within(is_there), lambda: self.work.held.discard(asked.nonce)
            finally:
                self.work.held.discard(asked.nonce)
        else:
            trap = self.plant.model.traps.set(asked.nonce, phase)
            try:
                yield lambda: _within(trap.is_sprung), trap.is_released.set
            finally:
                trap.is_released.set()

    @contextmanager
    def _done(self, injection: Injection, asked: Asked) -> Iterator[None]:
        """While the block runs, it stands still, or has just died."""
        pid = self.plant.model.executor(asked.nonce)
        doing: dict[Target, Callable[[], AbstractContextManager[None]]] = {
            Target.API: lambda: self._of_port(injection, pid, self.plant.ports),
            Target.WORKER: lambda: self._of_port(injection, pid, self.plant.worker_ports),
            Target.POSTGRES: lambda: self._of(injection, self.plant.postgres()),
            Target.BACKEND: lambda: self._of(injection, self._backend()),
            Target.STORAGE: lambda: self._of_storage(injection),
            Target.TOOL: lambda: self._of(injection, self.plant.tool_servers(asked.tenant_id, pid)),
            Target.RELAY: lambda: self._of(injection, self.plant.relays(pid)),
            Target.MODEL: lambda: self._of_model(injection),
        }
        with doing[injection.target]():
            yield

    def _of_port(self, injection: Injection, pid: int | None, ports: Sequence[int]) -> AbstractContextManager[None]:
        alive = [port for port in ports if self.plant.pid(port)]
        executor = self.plant.port_of(pid)
        port = executor if executor in alive else self.rng.choice(alive)
        assert port is not None
        if injection.is_kill:
            self.plant.kill(port)
            self.plant.restart(port)
            return nullcontext()
        return self.plant.stalled([psutil.Process(self.plant.pid(port))])

    def _of(self, injection: Injection, processes: Sequence[psutil.Process]) -> AbstractContextManager[None]:
        assert processes or injection.phase not in IN_TOOL, f"there is nobody to {injection}"
        if injection.is_kill:
            for process in processes:
                with suppress(psutil.NoSuchProcess):
                    process.kill()
            if injection.target is Target.POSTGRES:  # which is started again once all of it has gone
                psutil.wait_procs(processes, 10)
            return nullcontext()
        return self.plant.stalled(processes)

    def _backend(self) -> list[psutil.Process]:
        others = sorted(self.plant.postgres()[1:], key=lambda process: process.pid)
        return [self.rng.choice(others)] if others else []

    def _of_storage(self, injection: Injection) -> AbstractContextManager[None]:
        assert self.plant.storage is not None
        if not injection.is_kill:
            return self.plant.storage.hung()
        self.plant.storage.kill()
        return nullcontext()

    @contextmanager
    def _of_model(self, injection: Injection) -> Iterator[None]:
        scripted = self.plant.model
        if injection.is_kill:  # until it is repaired
            scripted.outage = self.rng.choice(model.OUTAGES)
        else:
            scripted.is_going.clear()
        try:
            yield
        finally:
            scripted.is_going.set()

    async def _repaired(self, injection: Injection) -> None:
        """What was killed and does not come back by itself."""
        await asyncio.sleep(self.rng.uniform(0, 0.3))
        self.plant.model.outage = None
        if injection.is_kill and injection.target is Target.POSTGRES:
            await self.plant.start_postgres()
        if injection.is_kill and injection.target is Target.STORAGE and self.plant.storage is not None:
            await asyncio.to_thread(self.plant.storage.start)


async def _within(event: asyncio.Event) -> bool:
    with suppress(TimeoutError):
        await asyncio.wait_for(event.wait(), HELD_S - 1)
    return event.is_set()
