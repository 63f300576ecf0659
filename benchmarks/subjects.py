"""What is measured: the service, and mcp-use bare, in processes of their own, asked the same questions."""

from __future__ import annotations

import asyncio
import json
import os
import secrets
import shutil
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, Protocol

import httpx
import psutil

from app.embedded.demo import ENV_FILE, read_env
from benchmarks.population import Population

ROOT: Final = Path(__file__).resolve().parents[1]
BARE: Final = ("fresh", "live", "reused")
BULKHEAD, FRESH, LIVE, REUSED = "bulkhead", *(f"mcp-use {variant}" for variant in BARE)
_POLICY: Final = """\
schema: bulkhead/1
model: {use: default}
instructions: You answer from the tenant's documents.
limits:
  {max_steps: 8, timeout_s: 60, max_tool_calls: 10, requests: 900000/minute, tenant_requests: 900000/minute,
   concurrent_runs: 1000, user_concurrent_runs: 1000}
input: {preset: balanced}
servers:
  docs: {template: filesystem, root: docs, readonly: true, max_file_size: 1MB, allowed_extensions: [.md, .txt]}
tools:
  allow: ["docs__*"]
  deny: ["*__delete*"]
  rules: |
    @id("drafts-are-private")
    forbid (principal, action == Action::"docs__read_file", resource)
    when { context.arguments.path like "drafts/*" };
"""
_SERVER: Final = ("app/servers/filesystem/server.py", "app/tenants/beneath.py")
# As the template `filesystem` starts it for this policy.
_SERVER_FLAGS: Final = ("--readonly", "--max-file-size", "1048576", "--allowed-extensions", ".md,.txt")
_PATIENCE_S: Final = 120


@dataclass(frozen=True, slots=True)
class Documents:
    """Files by name, each with a nonce of its own, so that only whoever read one can quote it."""

    texts: Mapping[str, str] = field(
        default_factory=lambda: {
            f"note-{number}.md": f"# Note {number}\n\nThe word of note {number} is {secrets.token_hex(8)}.\n"
            for number in range(50)
        }
    )

    def names(self, count: int) -> list[str]:
        """`count` names, in turn."""
        return [f"note-{number % len(self.texts)}.md" for number in range(count)]


@dataclass(frozen=True, slots=True)
class Answered:
    """An answer, and how long its asker waited for it (seconds)."""

    wall_s: float
    text: str


class Subject(Protocol):
    """One way of answering queries."""

    name: str
    process: psutil.Process

    async def ask(self, names: Sequence[str], *, concurrency: int) -> list[Answered]:
        """One query for each file, at most `concurrency` at a time; the answers in the same order."""

    def journal(self) -> Counter[str]:
        """How often the tool server says that it has read each file."""


class Bare:
    """A process of benchmarks.processes.mcp_use_bare."""

    def __init__(self, variant: str, child: subprocess.Popen[str], journal: Path) -> None:
        self.name = f"mcp-use {variant}"
        self.process = psutil.Process(child.pid)
        self._child = child
        self._journal = journal

    async def ask(self, names: Sequence[str], *, concurrency: int) -> list[Answered]:
        """See Subject."""
        order = {"queries": [query_for(name) for name in names], "concurrency": concurrency}
        assert self._child.stdin is not None
        assert self._child.stdout is not None
        print(json.dumps(order), file=self._child.stdin, flush=True)
        line = await asyncio.to_thread(self._child.stdout.readline)
        assert line, f"{self.name} has ended: {self._journal.read_text()[-2000:]}"
        done = json.loads(line)
        return [Answered(wall, text) for wall, text in zip(done["walls_s"], done["answers"], strict=True)]

    def journal(self) -> Counter[str]:
        """See Subject."""
        return read_journal(self._journal)


class Bulkhead:
    """A service that `bulkhead up` started, asked over HTTP from this process."""

    name = BULKHEAD

    def __init__(self, child: subprocess.Popen[str], data: Path) -> None:
        self.process = psutil.Process(child.pid)
        self._data = data
        self._env = read_env(data / ENV_FILE)
        self._journal = data / "servers" / self._env["BULKHEAD_DEMO_TENANT"] / "docs.stderr"

    async def prepare(self, documents: Documents, *, isolation: str = "tenant") -> None:
        """Upload the documents and publish the benchmark's policy, as the demo tenant's admin."""
        async with self.client("BULKHEAD_ADMIN_KEY") as admin:
            for name, text in documents.texts.items():
                _checked(await admin.put(f"/v1/workspaces/docs/files/{name}", content=text.encode()))
            policy = _POLICY.replace("root: docs,", f"root: docs, isolation: {isolation},")
            created = _checked(await admin.post("/v1/policies", content=policy.encode()))
            _checked(await admin.post(f"/v1/policies/{created.json()['version']}/publish", json={}))

    async def ask(self, names: Sequence[str], *, concurrency: int) -> list[Answered]:
        """See Subject."""
        places = asyncio.Semaphore(concurrency)
        async with self.client("BULKHEAD_API_KEY") as client:

            async def ask(name: str) -> Answered:
                async with places:
                    started = time.perf_counter()
                    response = await client.post("/query", json={"query": query_for(name)})
                    return Answered(time.perf_counter() - started, _answer_of(response))

            return await asyncio.gather(*map(ask, names))

    def journal(self) -> Counter[str]:
        """See Subject."""
        return read_journal(*self.journals)

    @property
    def journals(self) -> tuple[Path, ...]:
        """Where the tool server's stderr goes."""
        return self._journal.with_suffix(".stderr.1"), self._journal

    def population(self) -> Population:
        """Its database, to be filled with tenants; once it is prepared."""
        return Population(self._data, self._env["BULKHEAD_DEMO_TENANT"], _POLICY)

    @property
    def url(self) -> str:
        """Where it serves."""
        return self._env["BULKHEAD_URL"]

    def client(self, key: str) -> httpx.AsyncClient:
        """A caller with one of the demo's keys, by its name there, or with any other."""
        headers = {"Authorization": f"Bearer {self._env.get(key, key)}"}
        return httpx.AsyncClient(base_url=self.url, headers=headers, timeout=_PATIENCE_S, trust_env=False)


def query_for(name: str) -> str:
    """What each subject is asked about a file."""
    return f"What does {name} say?"


def _answer_of(response: httpx.Response) -> str:
    assert response.status_code == httpx.codes.OK, response.text
    return answer_of(response.json())


def answer_of(run: dict[str, Any]) -> str:
    """The answer of a run of ours, which has called one tool and was allowed to."""
    assert run["status"] == "succeeded", run
    assert [call["decision"] for call in run["tool_calls"]] == ["allowed"], run
    return str(run["answer"])


def read_journal(*paths: Path) -> Counter[str]:
    """How often the tool servers that write there say that they have read each file."""
    lines = (line for path in paths if path.exists() for line in path.read_text().splitlines())
    calls = (json.loads(line) for line in lines if line.startswith('{"seq"'))
    return Counter(call["paths"][0] for call in calls if (call["tool"], call["outcome"]) == ("read_file", "ok"))


def _checked(response: httpx.Response) -> httpx.Response:
    assert response.is_success, response.text
    return response


@contextmanager
def running(
    argv: Sequence[str],
    *,
    work: Path,
    log: Path,
    program: str = sys.executable,
    is_read: bool = True,
    environment: Mapping[str, str] | None = None,
) -> Iterator[subprocess.Popen[str]]:
    """A process in a clean environment, its stderr in `log`, and stdout unless it is read; it ends with the block."""
    own = {"PATH": os.defpath, "HOME": str(work), "LANG": "C.UTF-8", "PYTHONPATH": str(ROOT)}
    with log.open("x") as stderr:
        child = subprocess.Popen(
            [program, *argv],
            cwd=work,
            env={**own, **(environment or {})},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE if is_read else stderr,
            stderr=stderr,
            text=True,
        )
    with child:  # closes the pipes, by which two of the three would end too
        try:
            yield child
        finally:
            _end(child)


def _end(child: subprocess.Popen[str]) -> None:
    child.terminate()
    try:
        child.communicate(timeout=_PATIENCE_S)
    except subprocess.TimeoutExpired:
        child.kill()


@contextmanager
def stub_model(work: Path, *, latency_ms: int = 0) -> Iterator[str]:
    """The model of everybody; its base URL."""
    argv = ["-m", "benchmarks.processes.stub_model", "--latency-ms", str(latency_ms)]
    with running(argv, work=work, log=work / "model.log") as child:
        assert child.stdout is not None
        yield f"http://127.0.0.1:{int(child.stdout.readline())}/v1"


def tool_server(work: Path, documents: Documents) -> list[str]:
    """Arguments of Python by which it is our tool server, with the flags of our sandbox, in a new folder `work`."""
    program, folder = work / "program", work / "documents"
    for directory in (program, folder):
        directory.mkdir(parents=True)
    for source in _SERVER:
        shutil.copy(ROOT / source, program)
    for name, text in documents.texts.items():
        (folder / name).write_text(text)
    return ["-I", str(program / "server.py"), "--root", str(folder), *_SERVER_FLAGS]


@contextmanager
def bare(variant: str, *, work: Path, model_url: str, documents: Documents) -> Iterator[Bare]:
    """The very script that our sandbox runs, with the same flags, but bare."""
    config = {"mcpServers": {"docs": {"command": sys.executable, "args": tool_server(work / variant, documents)}}}
    argv = ["-m", "benchmarks.processes.mcp_use_bare", variant, model_url, json.dumps(config)]
    journal = work / f"{variant}.log"
    with running(argv, work=work, log=journal) as child:
        yield Bare(variant, child, journal)


@contextmanager
def bulkhead(
    *, work: Path, model_url: str, launch: Sequence[str] = ("-m", "app.cli", "up"), **settings: str
) -> Iterator[Bulkhead]:
    """Everything that `make up` starts, on an empty data directory; to be prepared before it is asked."""
    data, log = work / "bulkhead", work / "bulkhead.log"
    environment = {
        "BULKHEAD_DATA_DIR": str(data),
        "BULKHEAD_PORT": str(free_port()),
        "BULKHEAD_MODEL_BASE_URL": model_url,
        "BULKHEAD_MODEL_API_KEY": "benchmark-needs-no-key",
        "BULKHEAD_MODEL_NAMES": "stub",
        "BULKHEAD_LOG_FILE": str(work / "bulkhead.json"),  # nobody reads stdout here
        # What its policies ask for, so that no limit but the one that is measured is met.
        "BULKHEAD_POLICY_MAX_REQUESTS": "900000/minute",
        "BULKHEAD_POLICY_MAX_TENANT_REQUESTS": "900000/minute",
    }
    with running(launch, work=work, log=log, environment=environment | settings) as child:
        _await(child, data / ENV_FILE, log)
        yield Bulkhead(child, data)


def _await(child: subprocess.Popen[str], path: Path, log: Path) -> None:
    """The demo's file is the last thing that a start writes."""
    deadline = time.monotonic() + _PATIENCE_S
    while not path.exists():
        assert child.poll() is None, f"the service has ended: {log.read_text()[-2000:]}"
        assert time.monotonic() < deadline, f"the service does not get ready: {log.read_text()[-2000:]}"
        time.sleep(0.1)


def free_port() -> int:
    """A port of the loopback that nobody listens on now."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port: int = listener.getsockname()[1]
        return port
