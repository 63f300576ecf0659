"""What the tests of faults share: a scripted model, a raw one, and the claim that every run ends once and clearly."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from typing import Any, Final
from uuid import UUID

import httpx
from llmock.scenarios import Reply, ToolCall
from llmock.simulation import MockResponseSettings
from llmock.state import LLMockState
from llmock.testing import LLMockServer

from app.outbound.catalogue import ModelEndpoint
from tests.servers.hostile import settled
from tests.service import Service, Tenant

MODEL_KEY: Final = "sk-the-model-credential-of-the-platform"
TERMINAL: Final = {"succeeded", "failed", "denied", "cancelled", "timed_out", "interrupted"}
_NOT_FOR_CALLERS: Final = re.compile(r"Traceback|File \"|site-packages|/home/|/root/|/tmp/|\.py\b|" + MODEL_KEY)


@dataclass(frozen=True, slots=True)
class ScriptedModel:
    """A real HTTP server that answers what is queued, and then in text."""

    endpoint: ModelEndpoint
    state: LLMockState

    def says(self, text: str, *, times: int | None = 1) -> None:
        """Queue a final answer."""
        self.state.scenarios.add(Reply(text=text, times=times))

    def calls(self, tool: str, *, times: int | None = 1, text: str | None = None, **arguments: Any) -> None:
        """Queue a turn that calls a tool."""
        self.state.scenarios.add(Reply(text=text, tool_calls=(ToolCall(tool, arguments),), times=times))

    @property
    def bodies(self) -> list[Any]:
        """What it has been sent."""
        return [record.body for record in self.state.journal.records()]


@contextmanager
def scripted_model() -> Iterator[ScriptedModel]:
    """A scripted model while the block runs."""
    with LLMockServer(responses=MockResponseSettings(response_style="static", tool_mode="off")) as server:
        yield ScriptedModel(ModelEndpoint(server.base_url("openai"), MODEL_KEY, ("scripted",)), server.state)


@dataclass(slots=True)
class RawModel:
    """A model endpoint that writes exactly the given bytes, one entry a request, and then hangs up."""

    port: int = 0
    script: list[bytes | float] = field(default_factory=list)
    requests: int = 0

    @property
    def endpoint(self) -> ModelEndpoint:
        """For the catalogue."""
        return ModelEndpoint(f"http://127.0.0.1:{self.port}/v1", MODEL_KEY, ("raw",))

    async def serve(self, reading: asyncio.StreamReader, writing: asyncio.StreamWriter) -> None:
        """Read one request; write the next entry's bytes, or be silent for the next entry's seconds."""
        head = await reading.readuntil(b"\r\n\r\n")
        await reading.readexactly(int(re.findall(rb"(?i)content-length: (\d+)", head)[0]))
        self.requests += 1
        entry = self.script.pop(0) if self.script else response(completion("all is well"))
        if isinstance(entry, bytes):
            writing.write(entry)
        else:
            await asyncio.sleep(entry)
        writing.close()


@asynccontextmanager
async def raw_model() -> AsyncIterator[RawModel]:
    """A raw model while the block runs."""
    model = RawModel()
    server = await asyncio.start_server(model.serve, "127.0.0.1", 0)
    model.port = server.sockets[0].getsockname()[1]
    async with server:
        yield model


def response(body: Any, *, status: str = "200 OK", more: int = 0, kind: str = "application/json") -> bytes:
    """An HTTP response; `more` bytes are promised beyond those that come."""
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    head = f"HTTP/1.1 {status}\r\nContent-Type: {kind}\r\nContent-Length: {len(data) + more}\r\nConnection: close"
    return head.encode() + b"\r\n\r\n" + data


def completion(text: str | None = None, **more: Any) -> dict[str, Any]:
    """A chat completion as an endpoint sends it."""
    message = {"role": "assistant", "content": text, **more.pop("message", {})}
    choice = {"index": 0, "finish_reason": "stop", "message": message}
    usage = {"prompt_tokens": 3, "completion_tokens": 2, "total_tokens": 5}
    envelope = {"id": "c1", "object": "chat.completion", "created": 1, "model": "raw", "usage": usage}
    return envelope | {"choices": [choice]} | more


def calling(name: Any, arguments: Any, *, call_id: Any = "call_1") -> dict[str, Any]:
    """A chat completion that calls a tool; `arguments` is sent as it is."""
    call = {"id": call_id, "type": "function", "function": {"name": name, "arguments": arguments}}
    return completion(message={"tool_calls": [call]})


async def assert_ended(tenant: Tenant, answer: httpx.Response, *, status: int, state: str, code: str | None) -> Any:
    """The answer, the stored run and the audit record tell one and the same end; give the stored run."""
    body = answer.json()
    assert (answer.status_code, body.get("code")) == (status, code), answer.text
    if status != httpx.codes.OK:
        assert answer.headers["content-type"] == "application/problem+json"
        assert body["detail"]
    assert not _NOT_FOR_CALLERS.search(answer.text), answer.text
    return await assert_recorded(tenant, body["run_id"], state=state, code=code)


async def assert_recorded(tenant: Tenant, run_id: str, *, state: str, code: str | None) -> Any:
    """The stored run and its one final event tell this end; give the stored run."""
    stored = await tenant.user.get(f"/v1/runs/{run_id}")
    run = stored.json()
    assert (run["status"], run["code"]) == (state, code), stored.text
    assert state in TERMINAL
    assert not _NOT_FOR_CALLERS.search(stored.text), stored.text
    events = await tenant.admin.events(run_id=run_id)
    ends = [event["data"] for event in events if event["type"] == "run.finished"]
    assert [(end["state"], end["code"]) for end in ends] == [(state, code)]
    return run


async def assert_next_works(tenant: Tenant) -> None:
    """Whatever has happened, the next query is answered."""
    answer = await tenant.user.ask("Are you well?")
    assert answer.status_code == httpx.codes.OK, answer.text
    assert answer.json()["status"] == "succeeded"


async def journal(service: Service, tenant: Tenant) -> list[str]:
    """What the tenant's tool server has been asked, in its own words."""
    return await settled(lambda: service.server_journal(tenant))


async def ended_run(tenant: Tenant, run_id: str, *, within_s: float = 5) -> Any:
    """The stored run, once it has ended."""
    async with asyncio.timeout(within_s):
        while True:
            run = (await tenant.user.get(f"/v1/runs/{run_id}")).json()
            if run["status"] in TERMINAL:
                return run
            await asyncio.sleep(0.05)


async def running_run(service: Service, tenant: Tenant, *, with_call: bool = False) -> str:
    """The id of the tenant's run in flight, once there is one (and it waits for a tool)."""
    async with asyncio.timeout(10):
        while True:
            flights = service.app.state.runs._executor.in_flight()
            for run_id, run in flights.items():
                if str(run.caller.tenant_id) == tenant.id and (run.tools_in_flight or not with_call):
                    return str(run_id)
            await asyncio.sleep(0.02)


async def watched(service: Service, run_id: str) -> None:
    """Wait until somebody who follows the run is on record."""
    watches = "select id from runs where id = :id and watched_until > now()"
    async with asyncio.timeout(10):
        while not await service.sql(watches, role="platform", id=UUID(run_id)):  # noqa: ASYNC110  a row wakes nobody
            await asyncio.sleep(0.02)
