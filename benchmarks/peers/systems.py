"""The systems that are compared: each is started as its documentation says, one process, and asked by POST.

All have the same model and the same tool server. Bulkhead's is a program in its sandbox; mcp-use has it both ways; for
the others it is one server over HTTP, a process for each system, whose CPU is theirs as Bulkhead's is Bulkhead's.
"""

from __future__ import annotations

import asyncio
import json
import secrets
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Final
from urllib.parse import urlencode

import httpx
import psutil

from app.embedded.postgres import EmbeddedPostgres
from benchmarks.peers.environments import AEGRA, AGNO, LITELLM, Environment
from benchmarks.subjects import (
    BULKHEAD,
    Documents,
    answer_of,
    bulkhead,
    free_port,
    read_journal,
    running,
    tool_server,
)

_APPS: Final = Path(__file__).parent / "apps"
_PATIENCE_S: Final = 120
_NO_KEY: Final = "none"
_JSON: Final = {"Content-Type": "application/json"}
# Policy and settings let all of it pass, so that what is measured is the counting and not a refusal.
_LIMITS: Final = {"BULKHEAD_API_RATE": "900000/minute", "BULKHEAD_ADDRESS_RATE": "900000/minute"}


@dataclass(frozen=True, slots=True)
class System:
    """One that runs and can be asked."""

    name: str
    process: psutil.Process
    url: str
    body: Callable[[str], str]
    """What is posted for a question."""
    answer: Callable[[dict[str, Any]], str]
    """The text of what came back; raises where that does not say that all went well."""
    journals: tuple[Path, ...]
    beside: tuple[psutil.Process, ...] = ()
    """Processes that are its own though it did not start them."""
    headers: Mapping[str, str] = field(default_factory=lambda: _JSON)

    def journal(self) -> Counter[str]:
        """How often the tool server says that it has read each file."""
        return read_journal(*self.journals)


@dataclass(frozen=True, slots=True)
class Ground:
    """What all systems share."""

    work: Path
    model_url: str
    documents: Documents

    def folder(self, name: str) -> Path:
        """A new folder of one system."""
        path = self.work / name.replace(" ", "-").replace(",", "")
        path.mkdir()
        return path


Starting = Callable[[Ground], AbstractContextManager[System]]


@contextmanager
def _bulkhead(ground: Ground) -> Iterator[System]:
    folder = ground.folder(BULKHEAD)
    with bulkhead(work=folder, model_url=ground.model_url, **_LIMITS) as service:
        asyncio.run(service.prepare(ground.documents))
        authorization = service.client("BULKHEAD_API_KEY").headers["authorization"]
        yield System(
            name=BULKHEAD,
            process=service.process,
            url=f"{service.url}/query",
            body=lambda question: json.dumps({"query": question}),
            answer=answer_of,
            journals=service.journals,
            headers={**_JSON, "Authorization": authorization},
        )


@contextmanager
def _mcp_use(ground: Ground, *, variant: str, transport: str) -> Iterator[System]:
    name = f"mcp-use {variant}, {transport}"
    folder, port = ground.folder(name), free_port()
    with ExitStack() as stack:
        if transport == "http":
            tools = stack.enter_context(_tools(folder, ground.documents))
            server: dict[str, Any] = {"url": tools.url}
            beside: tuple[psutil.Process, ...] = (tools.process,)
        else:
            server = {"command": sys.executable, "args": tool_server(folder / "tools", ground.documents)}
            beside = ()
        config = json.dumps({"mcpServers": {"docs": server}})
        argv = ["-m", "benchmarks.peers.apps.mcp_use_app", variant, ground.model_url, config, str(port)]
        process = stack.enter_context(_serving(argv, folder, port=port))
        yield System(
            name=name,
            process=process,
            url=f"http://127.0.0.1:{port}/",
            body=lambda question: json.dumps({"query": question}),
            answer=lambda reply: str(reply["answer"]),
            journals=(tools.journal if transport == "http" else folder / "system.log",),
            beside=beside,
        )


@contextmanager
def _agno(ground: Ground) -> Iterator[System]:
    folder, port = ground.folder("agno"), free_port()
    argv = ["-m", "uvicorn", "agno_app:app", "--port", str(port)]
    with (
        _tools(folder, ground.documents) as tools,
        _serving(argv, folder, port=port, of=AGNO, MODEL_URL=ground.model_url, TOOLS_URL=tools.url) as process,
    ):
        yield System(
            name="agno",
            process=process,
            url=f"http://127.0.0.1:{port}/agents/docs/runs",
            body=lambda question: urlencode({"message": question, "stream": "false"}),
            answer=lambda reply: str(reply["content"]),
            journals=(tools.journal,),
            beside=(tools.process,),
            headers={"Content-Type": "application/x-www-form-urlencoded"},
        )


@contextmanager
def _litellm(ground: Ground) -> Iterator[System]:
    folder, port, key = ground.folder("litellm"), free_port(), f"sk-{secrets.token_hex(32)}"
    with _tools(folder, ground.documents) as tools:
        parameters = {"model": "openai/stub", "api_base": ground.model_url, "api_key": _NO_KEY}
        config = {
            "model_list": [{"model_name": "stub", "litellm_params": parameters}],
            "mcp_servers": {"docs": {"url": tools.url, "transport": "http", "allow_all_keys": True}},
            "general_settings": {"master_key": key},
            "litellm_settings": {"telemetry": False},
        }
        (folder / "config.yaml").write_text(json.dumps(config))
        argv = [LITELLM.program("litellm"), "--config", "config.yaml", "--host", "127.0.0.1", "--port", str(port)]
        with _serving(argv, folder, port=port, of=LITELLM, LITELLM_LOCAL_MODEL_COST_MAP="True") as process:
            yield System(
                name="litellm",
                process=process,
                url=f"http://127.0.0.1:{port}/v1/chat/completions",
                body=_litellm_body,
                answer=lambda reply: str(reply["choices"][0]["message"]["content"]),
                journals=(tools.journal,),
                beside=(tools.process,),
                headers={**_JSON, "Authorization": f"Bearer {key}"},
            )


def _litellm_body(question: str) -> str:
    tool = {"type": "mcp", "server_label": "litellm", "server_url": "litellm_proxy/mcp/docs"}
    messages = [{"role": "user", "content": question}]
    return json.dumps({"model": "stub", "messages": messages, "tools": [{**tool, "require_approval": "never"}]})


@contextmanager
def _aegra(ground: Ground) -> Iterator[System]:
    folder, port = ground.folder("aegra"), free_port()
    (folder / "aegra.json").write_text(json.dumps({"graphs": {"agent": f"{_APPS / 'aegra_graph.py'}:graph"}}))
    argv = [AEGRA.program("aegra"), "serve", "-c", "aegra.json", "--host", "127.0.0.1", "--port", str(port)]
    with _postgres(folder / "postgres") as (database, postgres), _tools(folder, ground.documents) as tools:
        settings = {"DATABASE_URL": database, "AUTH_TYPE": "noop", "REDIS_BROKER_ENABLED": "false"}
        settings |= {"MODEL_URL": ground.model_url, "TOOLS_URL": tools.url}
        with _serving(argv, folder, port=port, of=AEGRA, **settings) as command, _served_by(command) as process:
            yield System(
                name="aegra",
                process=process,
                url=f"http://127.0.0.1:{port}/runs/wait",
                body=_aegra_body,
                answer=lambda reply: str(reply["messages"][-1]["content"]),
                journals=(tools.journal,),
                beside=(tools.process, postgres),
            )


@contextmanager
def _served_by(command: psutil.Process) -> Iterator[psutil.Process]:
    """The server that a command has started, which the command's end would not end."""
    (process,) = (child for child in command.children() if "uvicorn" in child.cmdline())
    try:
        yield process
    finally:
        process.terminate()
        process.wait(_PATIENCE_S)


def _aegra_body(question: str) -> str:
    messages = [{"role": "user", "content": question}]
    return json.dumps({"assistant_id": "agent", "input": {"messages": messages}})


@contextmanager
def _postgres(folder: Path) -> Iterator[tuple[str, psutil.Process]]:
    """As Bulkhead has it, with fsync; the URL of its superuser in libpq's words."""
    postgres = EmbeddedPostgres(folder)
    known = set(psutil.Process().children())
    postgres.start()
    try:
        url = httpx.URL(postgres.url("postgres", "postgres").replace("+asyncpg", ""))
        (process,) = (child for child in set(psutil.Process().children()) - known if child.name() == "postgres")
        yield str(url.copy_remove_param("ssl")), process
    finally:
        postgres.stop()


@dataclass(frozen=True, slots=True)
class _ToolServer:
    url: str
    process: psutil.Process
    journal: Path


@contextmanager
def _tools(folder: Path, documents: Documents) -> Iterator[_ToolServer]:
    """The tool server over HTTP, of one system alone."""
    _, script, *flags = tool_server(folder / "tools", documents)
    port, journal = free_port(), folder / "tools.log"
    argv = ["-m", "benchmarks.processes.tool_server_http", str(port), script, *flags]
    with running(argv, work=folder, log=journal, is_read=False) as child:
        _await_port(child, port, journal)
        yield _ToolServer(f"http://127.0.0.1:{port}/mcp", psutil.Process(child.pid), journal)


@contextmanager
def _serving(
    argv: list[str], folder: Path, *, port: int, of: Environment | None = None, **environment: str
) -> Iterator[psutil.Process]:
    """A system's own process, once it takes connections; in our environment, or in a peer's."""
    log = folder / "system.log"
    if of is not None:
        environment |= {"PYTHONPATH": str(_APPS), "PATH": str(Path(of.program("python")).parent) + ":/usr/bin:/bin"}
    program = of.program("python") if of is not None else sys.executable
    with running(argv, work=folder, log=log, program=program, is_read=False, environment=environment) as child:
        _await_port(child, port, log)
        yield psutil.Process(child.pid)


def _await_port(child: subprocess.Popen[str], port: int, log: Path) -> None:
    deadline = time.monotonic() + _PATIENCE_S
    while True:
        assert child.poll() is None, f"has ended: {log.read_text()[-4000:]}"
        assert time.monotonic() < deadline, f"does not get ready: {log.read_text()[-4000:]}"
        try:
            httpx.get(f"http://127.0.0.1:{port}/", trust_env=False, timeout=10)
        except httpx.TransportError:
            time.sleep(0.1)
        else:
            return


# Each with the environment that it needs; None is ours, which `make` makes.
SYSTEMS: Final[Mapping[str, tuple[Starting, Environment | None]]] = {
    BULKHEAD: (_bulkhead, None),
    **{
        f"mcp-use {variant}, {transport}": (partial(_mcp_use, variant=variant, transport=transport), None)
        for variant in ("reused", "live", "fresh")
        for transport in ("stdio", "http")
    },
    "agno": (_agno, AGNO),
    "litellm": (_litellm, LITELLM),
    "aegra": (_aegra, AEGRA),
}
