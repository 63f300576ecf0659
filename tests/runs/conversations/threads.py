"""Conversations to test with: a service whose model says what it was asked, and what it was told."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any, Final
from uuid import UUID

import httpx
import pytest
from sqlalchemy import text
from sqlalchemy.ext.asyncio import create_async_engine

from app.outbound.catalogue import ModelEndpoint
from tests.limits.site import Site, policy
from tests.runs.faults import calling, completion
from tests.service import Client, Service, Tenant
from tests.slow_model import SlowModel

_VERSION: Final = text(
    "insert into policy_versions (tenant_id, version, document, digest, created_by)"
    " select tenant_id, 2, :text, '', created_by from policy_versions"
)
_TEXTS: Final = """
select (select count(*) from contents c join runs r on r.id = c.run_id where r.conversation_id = :id)
     + (select count(e.sealed) from run_events e join runs r on r.id = e.run_id where r.conversation_id = :id)
"""
_RUN: Final = text(
    "insert into runs (tenant_id, id, user_id, conversation_id, policy_version, kind, state, model, started_at)"
    " values (:tenant, :id, :user, :conversation, 1, 'background', :state, 'x', :begun)"
)


class Echo(SlowModel):
    """Answers every query with its text, those that a test has named only when it lets them go, and "call" after a
    call.
    """

    async def _complete(self, request: Mapping[str, Any]) -> dict[str, Any]:
        messages = request["messages"]
        self.prompts.append(messages)
        query = [message["content"] for message in messages if message["role"] == "user"][-1]
        if query in self.turns:
            self.turns[query].arrived.set()
            await asyncio.wait_for(self.turns[query].released.wait(), 20)
        if query.startswith("call") and not [message for message in messages if message["role"] == "tool"]:
            return calling("docs__list_directory", "{}")
        return completion(f"answer to {query}")

    def told(self, query: str) -> list[str]:
        """What every prompt of this query says of queries before it and of their answers."""
        prompts = [[each for each in messages if each["role"] != "system"] for messages in self.prompts]
        places = [[each["content"] for each in messages if each["role"] == "user"] for messages in prompts]
        own = [messages for messages, asked in zip(prompts, places, strict=True) if asked[-1] == query]
        before = {tuple(said(messages, until=query)) for messages in own}
        assert len(before) == 1, before
        return list(before.pop())


def said(messages: Sequence[Mapping[str, Any]], *, until: str) -> Iterator[str]:
    """What comes before the query itself."""
    last = max(place for place, message in enumerate(messages) if message["content"] == until)
    return (message["content"] for message in messages[:last])


@asynccontextmanager
async def echo() -> AsyncIterator[tuple[Echo, ModelEndpoint]]:
    model = Echo()
    server = await asyncio.start_server(model.serve, "127.0.0.1")
    port = server.sockets[0].getsockname()[1]
    yield model, ModelEndpoint(f"http://127.0.0.1:{port}/v1", "no-secret", ("echo",))
    model.release_all()
    server.close()


def turns(*queries: str) -> list[str]:
    """What a run after these is told."""
    return [said for query in queries for said in (query, f"answer to {query}")]


@dataclass(slots=True)
class Threads:
    """A service whose model answers with what it was asked."""

    service: Service
    model: Echo
    site: Site

    async def tenant(self, *, approve: str = "", **rules: int) -> Tenant:
        """The rules are of `conversations`."""
        tenant = await self.site.new_tenant()
        if rules or approve:
            said = ", ".join(f"{name}: {value}" for name, value in rules.items())
            document = policy().replace('allow: ["docs__*"]', f'allow: ["docs__*"], approve: [{approve}]')
            async with self.service.app.state.database.transaction(UUID(tenant.id)) as session:
                await session.execute(_VERSION, {"text": f"{document}conversations: {{{said}}}\n"})
                await session.execute(text("update published_policies set version = 2"))
        return tenant

    async def hold(self, client: Client, query: str, conversation: str) -> asyncio.Task[httpx.Response]:
        """A query whose run waits for the model."""
        turn = self.model.turns[query]
        asking = asyncio.create_task(client.ask(query, conversation=conversation))
        await asyncio.wait_for(turn.arrived.wait(), 10)
        return asking

    async def rows(self, tenant: Tenant, statement: str, **values: Any) -> Sequence[Any]:
        """As the app, for the tenant."""
        async with self.service.app.state.database.transaction(UUID(tenant.id)) as session:
            result = await session.execute(text(statement), values)
            return result.all() if result.returns_rows else ()

    async def texts(self, tenant: Tenant, conversation: str) -> int:
        """How many sealed texts there are of it, in its runs' contents and in what was told of them."""
        ((count,),) = await self.rows(tenant, _TEXTS, id=UUID(conversation))
        return int(count)

    async def queued(self, tenant: Tenant, conversation: str, *, run_id: UUID, has_begun: bool = False) -> None:
        """A run in the background that nobody takes up here, in a thread that is there."""
        async with self.queueing(tenant, conversation, run_id=run_id, has_begun=has_begun):
            pass

    @asynccontextmanager
    async def queueing(
        self, tenant: Tenant, conversation: str, *, run_id: UUID, has_begun: bool = False
    ) -> AsyncIterator[None]:
        """The same, committed after the block."""
        values = {"tenant": UUID(tenant.id), "user": UUID(tenant.user_id), "conversation": UUID(conversation)}
        async with self.service.app.state.database.transaction(UUID(tenant.id)) as session:
            now = await session.scalar(text("select now()"))
            begun = now if has_begun else None
            await session.execute(_RUN, values | {"id": run_id, "state": "queued", "begun": begun})
            yield

    async def spoil(self, tenant: Tenant, run_id: UUID) -> None:
        """No key opens the run's texts any more; no role of the service could do that."""
        engine = create_async_engine(self.service.urls.owner or "")
        async with engine.begin() as connection:
            await connection.execute(text("select set_config('app.tenant_id', :id, true)"), {"id": tenant.id})
            spoilt = "update contents set sealed = overlay(sealed placing '\\x00' from 20 for 1) where run_id = :id"
            await connection.execute(text(spoilt), {"id": run_id})
        await engine.dispose()

    def impatient(self, patch: pytest.MonkeyPatch) -> None:
        """Whoever waits is refused soon."""
        patch.setattr(self.service.app.state.runs._queue, "_wait_s", 0.2)
