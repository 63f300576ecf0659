"""Executes runs: lends servers, runs the agent, and turns whatever happens into one ending. No session is held."""

from __future__ import annotations

import asyncio
import time
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Final
from uuid import UUID
from weakref import ReferenceType, WeakValueDictionary, ref

import structlog
from anyio import to_thread
from mcp.types import CallToolResult
from sqlalchemy.exc import DataError, DBAPIError, IntegrityError, ProgrammingError

from app.db import is_away
from app.policies.engine import PinnedTool
from app.policies.versions import ActivePolicy
from app.runs.agent.chats import Chats
from app.runs.agent.gate import Gate
from app.runs.agent.governed import GovernedAgent, GovernedChat
from app.runs.agent.tool_search import search_again
from app.runs.context import Call, RunContext, running
from app.runs.lifecycle.journal import Journal
from app.runs.lifecycle.opening import Opened
from app.runs.redaction import Redactor
from app.runs.state import (
    DATABASE_FAILED,
    DATABASE_LOST,
    INTERNAL,
    RUN_TIMEOUT,
    SANDBOX_UNAVAILABLE,
    SERVER_UNAVAILABLE,
    SUCCEEDED,
    WAITING,
    Ending,
    RunEnded,
    StopCause,
    cancelled,
)
from app.sandbox.contract import SandboxUnavailable
from app.servers.errors import ServerRefused, ServerUnavailable
from app.servers.identity import OnBehalf
from app.servers.starting import Borrower
from app.servers.tenant_servers import TenantServers
from app.telemetry.metrics import RUNS_IN_FLIGHT

_log = structlog.get_logger()
# The same for a call that is made again by the process that takes the run up: a server may know it by that.
IDEMPOTENCY_KEY: Final = "bulkhead/idempotency-key"
# What a database that is there and in trouble shows itself as.
_REFUSED: Final = (IntegrityError, DataError, ProgrammingError)  # it would say so again
_DATABASE_FAILED: Final = (DBAPIError, ConnectionError, FileNotFoundError, TimeoutError)
# In bytes, as `footprint` has them.
_MAX_AGENTS: Final = 820 << 20
# Overrides can make one for each user.
_MAX_OF_A_TENANT: Final = 20
_MADE_AT_ONCE: Final = 4
_ENDING_S: Final = 10.0
_Key = tuple[UUID, int, frozenset[str]]
_Claim = tuple[UUID, int]


@dataclass(slots=True, eq=False)
class _Flight:
    run: RunContext
    task: asyncio.Task[Ending]
    cause: StopCause | None = None


@dataclass(frozen=True, slots=True)
class _Shared:
    policy: ReferenceType[ActivePolicy]  # of which it keeps the tools, and no more
    chat: GovernedChat
    agent: GovernedAgent
    weight: int


class Executor:
    """The runs of this process."""

    def __init__(
        self, *, journal: Journal, chats: Chats, servers: TenantServers, redact: Redactor, tool_timeout_s: float
    ) -> None:
        self._chats = chats
        self._servers = servers
        self._tool_timeout_s = tool_timeout_s
        self._redact = redact
        self._gate = Gate(journal=journal, call_server=self._call_server, redact=redact)
        self._agents: OrderedDict[_Key, _Shared] = OrderedDict()
        self._weight = 0
        self._turns: WeakValueDictionary[UUID, asyncio.Lock] = WeakValueDictionary()
        self._places = asyncio.Semaphore(_MADE_AT_ONCE)
        self._making: set[asyncio.Task[_Shared]] = set()
        self._flights: dict[UUID, _Flight] = {}
        self._held: dict[_Claim, RunContext] = {}

    async def execute(self, run: RunContext, opened: Opened) -> tuple[Ending, StopCause | None]:
        """Run to the end, whatever it is, and say how it ended and, if it was stopped, why.

        WAITING where calls wait for an approval: all others of that model turn have ended.
        """
        task = asyncio.create_task(self._attempt(run, opened), name=f"run {run.run_id}")
        flight = self._flights[run.run_id] = _Flight(run, task)
        RUNS_IN_FLIGHT.inc()
        try:
            await asyncio.wait({task})
        finally:
            RUNS_IN_FLIGHT.dec()
            del self._flights[run.run_id]
            task.cancel()
        run.answer = self._redact.for_tenant(run.caller.tenant_id, run.answer)
        if task.cancelled():
            flight.cause = flight.cause or StopCause.SHUTDOWN
            return cancelled(flight.cause), flight.cause
        ending = task.result()
        return ending, ending.cause or flight.cause  # what a call has met may be seen before the order that says it

    async def _attempt(self, run: RunContext, opened: Opened) -> Ending:
        patience_s = 0.0
        self._servers.begin_run(run.run_id)
        try:
            async with asyncio.timeout(run.terms.timeout_s) as deadline:
                with running(run):
                    agent = await self._agent(run)
                    run.index = agent.index
                    search_again(run)
                    await agent.run(opened.query, external_history=opened.history, resumption=opened.resumption)
        except RunEnded as ended:
            # At a limit, or before a wait, the calls under way may still end; what stops the run stops them too.
            patience_s = self._tool_timeout_s if ended.ending.answers or ended.ending is WAITING else 0
            return ended.ending
        except Exception as error:  # noqa: BLE001  a defect of ours or a library's still ends the run, once, and is logged
            if deadline.expired():
                return RUN_TIMEOUT
            if is_away(error) or (isinstance(error, _DATABASE_FAILED) and not isinstance(error, _REFUSED)):
                _log.warning("run.database_unavailable", error=type(error).__name__)
                return DATABASE_LOST if is_away(error) else DATABASE_FAILED
            _log.exception("run.failed", run_id=str(run.run_id))
            return INTERNAL
        finally:
            try:
                await run.settle(patience_s=patience_s)
            finally:
                self._servers.end_run(run.run_id)
        return SUCCEEDED

    async def _agent(self, run: RunContext) -> GovernedAgent:
        """What the runs share of one published version whose callers see the same tools, made for the first of them."""
        policy, tools = run.policy, run.visible_tools
        key = run.caller.tenant_id, policy.version, frozenset(tool.name for tool in tools)
        model = policy.document.model
        chat = self._chats.get(model.use, model.name, temperature=model.temperature)
        shared = self._find(key, policy, chat)
        if shared is None:
            # In a task of its own: a thread cannot be stopped, and a run that is does not wait for it.
            making = asyncio.create_task(self._make(key, policy, chat, tools), name=f"agent of {key[0]}")
            self._making.add(making)
            making.add_done_callback(self._making.discard)
            shared = await asyncio.shield(making)
        return shared.agent

    def _find(self, key: _Key, policy: ActivePolicy, chat: GovernedChat) -> _Shared | None:
        cached = self._agents.get(key)
        if cached is None or cached.policy() is not policy or cached.chat is not chat:
            return None
        self._agents.move_to_end(key)
        return cached

    async def _make(self, key: _Key, policy: ActivePolicy, chat: GovernedChat, tools: Sequence[PinnedTool]) -> _Shared:
        """Once for all who wait for it, one of a tenant at a time and a few in all: a thousand tools take a second."""
        async with self._turns.setdefault(key[0], asyncio.Lock()), self._places:
            shared = self._find(key, policy, chat)
            if shared is None:
                agent = await to_thread.run_sync(self._new_agent, policy, chat, tools)
                shared = _Shared(ref(policy), chat, agent, agent.weight)
                self._keep(key, shared)
            return shared

    def _keep(self, key: _Key, newest: _Shared) -> None:
        """In the place of what has not been used for longest: of a tenant that has many, else of all."""
        self._drop(key)
        self._agents[key] = newest
        self._weight += newest.weight
        own = [each for each in self._agents if each[0] == key[0]]
        if len(own) > _MAX_OF_A_TENANT:
            self._drop(own[0])
        while self._weight > _MAX_AGENTS and len(self._agents) > 1:
            self._drop(next(iter(self._agents)))

    def _drop(self, key: _Key) -> None:
        if (shared := self._agents.pop(key, None)) is not None:
            self._weight -= shared.weight

    def _new_agent(self, policy: ActivePolicy, chat: GovernedChat, tools: Sequence[PinnedTool]) -> GovernedAgent:
        return GovernedAgent(
            chat,
            gate=self._gate,
            tools=tools,
            instructions=policy.document.instructions,
            search_above=policy.document.tools.search_above,
        )

    async def _call_server(self, run: RunContext, call: Call) -> CallToolResult:
        server, _, name = call.tool.partition("__")
        try:
            async with self._servers.lend(_borrower(run), run.policy, server) as live:
                call.sandbox_hash = live.sandbox_hash
                own = {IDEMPOTENCY_KEY: f"{run.run_id}:{call.turn}:{call.position}"}
                whom = _on_behalf(run)
                await run.until_leased()  # the decision's commit, or the server, may have been long in coming
                return await live.call(name, call.arguments, timeout_s=self._tool_timeout_s, whom=whom, meta=own)
        except SandboxUnavailable as error:
            detail = f"{error.detail} `bulkhead sandbox probe` and /readyz tell the operator what would help."
            raise RunEnded(replace(SANDBOX_UNAVAILABLE, detail=detail)) from None
        except ServerRefused as error:
            raise RunEnded(replace(SERVER_UNAVAILABLE, detail=error.for_callers(server))) from None
        except ServerUnavailable as error:
            detail = self._redact.for_tenant(run.caller.tenant_id, error.detail)
            raise RunEnded(replace(SERVER_UNAVAILABLE, detail=detail)) from None

    def tenants(self) -> set[UUID]:
        """Whose agents are here."""
        return {tenant_id for tenant_id, _, _ in self._agents}

    def forget(self, tenant_id: UUID) -> None:
        """Let a tenant's agents go; runs in flight keep theirs."""
        for key in [key for key in self._agents if key[0] == tenant_id]:
            self._drop(key)

    @contextmanager
    def holding(self, run: RunContext) -> Iterator[None]:
        """Have the run's lease renewed for the block, so also while its end is being recorded."""
        claim = run.run_id, run.attempt
        self._held[claim] = run
        try:
            yield
        finally:
            del self._held[claim]

    @property
    def held(self) -> Mapping[tuple[UUID, int], RunContext]:
        """The runs, by run and attempt, whose leases are this process's to renew."""
        return dict(self._held)

    def in_flight(self) -> Mapping[UUID, RunContext]:
        """The runs that this process executes now."""
        return {run_id: flight.run for run_id, flight in self._flights.items()}

    def stop(self, run_id: UUID, cause: StopCause) -> None:
        """Interrupt a run wherever it is; nothing happens where it has ended.

        Whoever asks again interrupts it again, for a cancel may get lost: a library may wait where it swallows one.
        """
        flight = self._flights.get(run_id)
        if flight is not None and not flight.task.done():
            flight.cause = flight.cause or cause
            flight.task.cancel()

    async def close(self) -> None:
        """Stop every run; each is ended and recorded by whoever awaits it."""
        deadline = time.monotonic() + _ENDING_S
        while self._flights and time.monotonic() < deadline:
            for run_id in list(self._flights):
                self.stop(run_id, StopCause.SHUTDOWN)
            await asyncio.wait([flight.task for flight in self._flights.values()], timeout=1)


def _on_behalf(run: RunContext) -> OnBehalf:
    return OnBehalf(run.caller.tenant_id, run.caller.user_id, run.caller.role, run.run_id)


def _borrower(run: RunContext) -> Borrower:
    caller = run.caller
    return Borrower(caller.tenant_id, caller.user_id, run.run_id, caller.generation)
