"""A tenant's tool servers: what its policy declares, started in the sandbox or not at all."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import replace
from functools import partial
from typing import Any, Final
from uuid import UUID

import structlog
from anyio import to_thread
from mcp.types import Tool
from sqlalchemy.exc import SQLAlchemyError

from app.audit import repository as audit
from app.audit.events import Event, EventType
from app.db import Database, is_away
from app.errors import AppError, NotFound
from app.policies import definitions
from app.policies.document import DeclaredServer
from app.policies.engine import PinnedTool
from app.policies.versions import ActivePolicy
from app.sandbox.contract import SandboxUnavailable
from app.servers import quarantine, stderr
from app.servers.entries import ServerKey
from app.servers.errors import PublishUnderWay, ServerUnavailable
from app.servers.live import LiveServer
from app.servers.pool import ServerPool, ServerStatus
from app.servers.starting import Borrower, Starter
from app.servers.trial import Trial

_log = structlog.get_logger()
# Servers that are started to list their tools, beside those of the pool: publishing must not flood the machine.
_LISTED_AT_ONCE: Final = 4
# For how long a server is believed to have the tools that it last listed, unless it says otherwise, in seconds.
_LISTING_HOLDS_S: Final = 60.0
# Postgres stores no NUL: a definition with one could be neither pinned nor put into quarantine.
_NO_NUL: Final = "\ufffd"
_ESCAPED_NUL: Final = re.compile(r"(?<!\\)((?:\\\\)*)\\u0000")


class TenantServers:
    """Lends servers, started when they are first asked for.

    `redact` takes the tenant's and our secrets and this host's paths out of what a tenant's admin may read.
    """

    def __init__(
        self,
        *,
        database: Database,
        starter: Starter,
        pool: ServerPool,
        wait_s: float,
        redact: Callable[[UUID, str], str],
    ) -> None:
        self._database = database
        self._starter = starter
        self._pool = pool
        self._wait_s = wait_s
        self._redact = redact
        self._places = asyncio.Semaphore(_LISTED_AT_ONCE)
        self._listing: set[UUID] = set()
        pool.on_looping = self._record_looping

    async def close(self) -> None:
        """End all servers, and forget them."""
        await self._pool.close()
        await self._starter.close()

    @asynccontextmanager
    async def lend(self, borrower: Borrower, policy: ActivePolicy, server: str) -> AsyncIterator[LiveServer]:
        """A live server of the policy's version whose tools are those that were pinned.

        Raises ServerUnavailable, SandboxUnavailable, and ServerQuarantined where a tool's definition has changed since
        it was pinned.
        """
        declared = policy.document.servers[server]

        async def start() -> LiveServer:
            await quarantine.check(self._database, borrower.tenant_id, server)
            live = await self._start(borrower, server, declared)
            try:
                await self._compare(borrower, policy, server, live.tools)
            except BaseException:
                await live.close()
                raise
            return live

        key = _key(borrower, policy.version, server, declared)
        async with self._pool.lend(key, start, wait_s=self._wait_s, generation=borrower.generation) as live:
            async with live.comparing:  # who comes meanwhile calls nothing that is not compared
                await self._recompare(borrower, policy, live)
            yield live

    async def _recompare(self, borrower: Borrower, policy: ActivePolicy, live: LiveServer) -> None:
        """A server that has changed its tools while it ran is not asked again; what was not compared, is next time."""
        try:
            if (tools := await live.listed_anew(max_age_s=_LISTING_HOLDS_S)) is not None:
                await self._compare(borrower, policy, live.name, tools)
        except ServerUnavailable:
            live.retire()
            raise
        except BaseException:
            live.doubt()
            raise

    async def _compare(self, borrower: Borrower, policy: ActivePolicy, server: str, tools: Sequence[Tool]) -> None:
        found = self._pin(borrower.tenant_id, server, tools)
        pinned = [tool for tool in policy.tools if tool.server == server]
        if definitions.digest(found) != definitions.digest(pinned):
            await quarantine.enforce(self._database, borrower, server, version=policy.version, found=found)

    def _pin(self, tenant_id: UUID, server: str, tools: Sequence[Tool]) -> list[PinnedTool]:
        """Redacted: what a server declares of its tools is read by models and admins, as its results are."""
        redact = partial(self._redact, tenant_id)
        return [
            PinnedTool(
                name=tool.name.replace("\0", _NO_NUL),
                server=server,
                description=redact(tool.description).replace("\0", _NO_NUL),
                input_schema=_redacted(tool.input_schema, redact),
            )
            for tool in pin(server, tools)
        ]

    async def _start(self, borrower: Borrower, server: str, declared: DeclaredServer) -> LiveServer:
        """Whatever keeps a server from starting is one refusal to its run, and no defect of ours."""
        try:
            return await self._starter.start(borrower, server, declared)
        except (ServerUnavailable, SandboxUnavailable):
            raise
        except (AppError, SQLAlchemyError, OSError) as error:
            if is_away(error):
                raise  # a run that is taken up again finds it back
            _log.warning("server.not_started", server=server, error=type(error).__name__)
            detail = error.detail if isinstance(error, AppError) else f"The tool server {server!r} does not start now."
            raise ServerUnavailable(detail) from None

    def begin_run(self, run_id: UUID) -> None:
        """Let a run have servers of its own, also one that has left this process and comes back."""
        self._pool.begin_run(run_id)

    def end_run(self, run_id: UUID) -> None:
        """End the servers that were this run's alone."""
        self._pool.end_run(run_id)

    @contextmanager
    def trial(self, borrower: Borrower, version: int) -> Iterator[Trial]:
        """For what is started to list the tools of a version; what it has not handed over ends with the block."""
        trial = Trial(self._pool, borrower, version)
        try:
            yield trial
        finally:
            trial.end()

    async def list_tools(
        self, borrower: Borrower, name: str, declared: DeclaredServer, trial: Trial | None = None
    ) -> list[PinnedTool]:
        """The tools of a server that no published policy declares yet: started for that, a few at a time, and kept by
        `trial` where there is one and it can.
        """
        await self._starter.make_room(borrower, declared)  # it may take long, and holds up no other tenant
        async with self._places:
            live = await self._starter.start(borrower, name, declared)
            is_kept = False
            try:
                tools = self._pin(borrower.tenant_id, name, live.tools)
                is_kept = trial is not None and trial.keep(name, declared, live)
                return tools
            finally:
                if not is_kept:
                    await live.close()

    @asynccontextmanager
    async def listing(self, tenant_id: UUID) -> AsyncIterator[None]:
        """One tenant's turn to list the tools of a policy; raise PublishUnderWay where it has one already."""
        if tenant_id in self._listing:
            raise PublishUnderWay
        self._listing.add(tenant_id)
        try:
            yield
        finally:
            self._listing.discard(tenant_id)

    async def statuses(self, tenant_id: UUID) -> Sequence[ServerStatus]:
        """A tenant's servers with what they use now."""
        await self._pool.measure(tenant_id)
        return self._pool.statuses(tenant_id)

    async def read_stderr(self, tenant_id: UUID, name: str) -> str:
        """The newest 64 KiB of what a server has written to stderr, redacted; raise NotFound where there is none."""
        redact = partial(self._redact, tenant_id)
        text = await to_thread.run_sync(stderr.read_newest, self._starter.stderr_path(tenant_id, name), redact)
        if text is None:
            raise NotFound("No server of that name has been started yet.")
        return text

    async def _record_looping(self, key: ServerKey, failures: int, wait_s: int) -> None:
        data = {
            "server": key.server,
            "template": key.template,
            "policy_version": key.policy_version,
            "user_id": key.user_id,
            "failures": failures,
            "wait_s": wait_s,
        }
        try:
            async with self._database.transaction(key.tenant_id) as session:
                await audit.append(session, key.tenant_id, Event(EventType.SERVER_CRASH_LOOPING, data=data))
        except (SQLAlchemyError, OSError, TimeoutError) as error:  # nobody waits for it; the log has it
            _log.error("server.crash_looping_unrecorded", server=key.server, error=type(error).__name__)


def _key(borrower: Borrower, version: int, server: str, declared: DeclaredServer) -> ServerKey:
    key = ServerKey(borrower.tenant_id, version, server, declared.template)
    match declared.isolation:
        case "tenant":
            return key
        case "user":
            return replace(key, user_id=borrower.user_id)
        case "run":
            if borrower.run_id is None:
                raise ValueError("a server of a run needs a run")
            return replace(key, user_id=borrower.user_id, run_id=borrower.run_id)


def _redacted(schema: Mapping[str, Any], redact: Callable[[str], str]) -> Mapping[str, Any]:
    text = json.dumps(schema)
    clean = _ESCAPED_NUL.sub(r"\1\\ufffd", redact(text))
    if clean == text:
        return schema
    try:
        found: Mapping[str, Any] = json.loads(clean)
    except ValueError:  # what looks like a secret was its form and not a text in it
        raise ServerUnavailable("A tool's schema holds one of the tenant's secrets.") from None
    return found


def pin(server: str, tools: Sequence[Tool]) -> list[PinnedTool]:
    """A server's tools as a published policy keeps them, under the names that the model sees."""
    return [
        PinnedTool(
            name=f"{server}__{tool.name}",
            server=server,
            description=tool.description or "",
            input_schema=tool.inputSchema,
        )
        for tool in tools
    ]
