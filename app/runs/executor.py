"""Executes runs: lends servers, runs the agent, and turns whatever happens into one ending. No session is held."""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final
from uuid import UUID

import structlog
from langchain_core.messages import BaseMessage
from mcp.types import CallToolResult

from app.policies.versions import ActivePolicy
from app.runs.agent import GovernedAgent, GovernedChat
from app.runs.chats import Chats
from app.runs.context import RunContext, running
from app.runs.gate import Gate
from app.runs.journal import Journal
from app.runs.redaction import Redactor
from app.runs.state import (
    INTERNAL,
    RUN_TIMEOUT,
    SANDBOX_UNAVAILABLE,
    SERVER_UNAVAILABLE,
    SUCCEEDED,
    Ending,
    RunEnded,
    StopCause,
    cancelled,
)
from app.sandbox.contract import SandboxUnavailable
from app.servers.errors import ServerUnavailable
from app.servers.starting import Borrower
from app.servers.tenant_servers import TenantServers
from app.telemetry.metrics import RUNS_IN_FLIGHT

_log = structlog.get_logger()
_MAX_AGENTS: Final = 500


@dataclass(slots=True, eq=False)
class _Flight:
    run: RunContext
    task: asyncio.Task[Ending]
    cause: StopCause | None = None


class Executor:
    """The runs of this process."""

    def __init__(
        self, *, journal: Journal, chats: Chats, servers: TenantServers, redact: Redactor, tool_timeout_s: float
    ) -> None:
        self._chats = chats
        self._servers = servers
        self._tool_timeout_s = tool_timeout_s
        self._gate = Gate(journal=journal, call_server=self._call_server, redact=redact)
        self._agents: OrderedDict[tuple[UUID, int], tuple[ActivePolicy, GovernedAgent]] = OrderedDict()
        self._flights: dict[UUID, _Flight] = {}

    async def execute(
        self, run: RunContext, query: str, history: Sequence[BaseMessage]
    ) -> tuple[Ending, StopCause | None]:
        """Run to the end, whatever it is, and say how it ended and, if it was stopped, why."""
        task = asyncio.create_task(self._attempt(run, query, history), name=f"run {run.run_id}")
        flight = self._flights[run.run_id] = _Flight(run, task)
        RUNS_IN_FLIGHT.inc()
        try:
            await asyncio.wait({task})
        finally:
            RUNS_IN_FLIGHT.dec()
            del self._flights[run.run_id]
            task.cancel()
        if task.cancelled():
            flight.cause = flight.cause or StopCause.SHUTDOWN
            return cancelled(flight.cause), flight.cause
        return task.result(), flight.cause

    async def _attempt(self, run: RunContext, query: str, history: Sequence[BaseMessage]) -> Ending:
        patience_s = 0.0
        try:
            async with asyncio.timeout(run.policy.document.limits.timeout_s) as deadline:
                with running(run):
                    await self._agent(run).run(query, external_history=history)
        except RunEnded as ended:
            # At a limit the calls under way may still end; what stops the run otherwise stops them too.
            patience_s = self._tool_timeout_s if ended.ending.answers else 0
            return ended.ending
        except Exception:  # noqa: BLE001  a defect of ours or a library's still ends the run, once, and is logged
            if deadline.expired():
                return RUN_TIMEOUT
            _log.exception("run.failed", run_id=str(run.run_id))
            return INTERNAL
        finally:
            try:
                await run.settle(patience_s=patience_s)
            finally:
                self._servers.end_run(run.run_id)
        return SUCCEEDED

    def _agent(self, run: RunContext) -> GovernedAgent:
        """What the runs of one published version share, made for the first of them."""
        policy, key = run.policy, (run.caller.tenant_id, run.policy.version)
        cached = self._agents.get(key)
        if cached is None or cached[0] is not policy:
            self._agents[key] = cached = (policy, self._new_agent(policy))
            if len(self._agents) > _MAX_AGENTS:
                self._agents.popitem(last=False)
        self._agents.move_to_end(key)
        return cached[1]

    def _new_agent(self, policy: ActivePolicy) -> GovernedAgent:
        model = policy.document.model
        chat: GovernedChat = self._chats.get(model.use, model.name, temperature=model.temperature)
        return GovernedAgent(
            chat,
            gate=self._gate,
            tools=policy.compiled.visible_tools,
            instructions=policy.document.instructions,
        )

    async def _call_server(self, run: RunContext, tool: str, arguments: Mapping[str, Any]) -> CallToolResult:
        server, _, name = tool.partition("__")
        try:
            async with self._servers.lend(_borrower(run), run.policy, server) as live:
                return await live.call(name, arguments, timeout_s=self._tool_timeout_s)
        except SandboxUnavailable as error:
            detail = f"{error.detail} `bulkhead sandbox probe` and /readyz tell the operator what would help."
            raise RunEnded(replace(SANDBOX_UNAVAILABLE, detail=detail)) from None
        except ServerUnavailable as error:
            raise RunEnded(replace(SERVER_UNAVAILABLE, detail=error.detail)) from None

    def in_flight(self) -> Mapping[UUID, RunContext]:
        """The runs that this process executes now."""
        return {run_id: flight.run for run_id, flight in self._flights.items()}

    def stop(self, run_id: UUID, cause: StopCause) -> None:
        """Interrupt a run wherever it is; nothing happens where it has ended."""
        flight = self._flights.get(run_id)
        if flight is not None and flight.cause is None:
            flight.cause = cause
            flight.task.cancel()

    async def close(self) -> None:
        """Stop every run; each is ended and recorded by whoever awaits it."""
        for run_id in list(self._flights):
            self.stop(run_id, StopCause.SHUTDOWN)
        tasks = [flight.task for flight in self._flights.values()]
        if tasks:
            await asyncio.wait(tasks, timeout=10)


def _borrower(run: RunContext) -> Borrower:
    caller = run.caller
    return Borrower(caller.tenant_id, caller.user_id, run.run_id, caller.generation)
