"""Two tenants at once: each answer holds its own document and no other, and the records tell what the servers saw."""

from __future__ import annotations

import asyncio
import ctypes
import json
import random
import secrets
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import pytest

from app.caller import PLATFORM_TENANT
from app.servers import tenant_servers
from app.servers.entries import ServerKey
from tests.service import POLICY, Databases, Service, Tenant, running_service

QUERIES, AT_ONCE = 200, 50
SERVER = "/srv/server.py"


@dataclass(frozen=True)
class Document:
    name: str
    nonce: str


@dataclass
class Ledger:
    """What a client knows: its tenant, its documents, and the answers that it got for each."""

    tenant: Tenant
    documents: list[Document]
    runs: dict[str, Document] = field(default_factory=dict)
    answers: list[tuple[Document, str]] = field(default_factory=list)

    @property
    def mixed_up(self) -> list[Document]:
        """The documents whose answers lack their own nonce, or hold another's."""
        return [asked for asked, answer in self.answers if _nonces(answer) != {asked.nonce}]


def _nonces(text: str) -> set[str]:
    return {word for word in text.replace(".", " ").split() if word.startswith("nonce-")}


async def _ledger(service: Service, count: int) -> Ledger:
    documents = [Document(f"{secrets.token_hex(6)}.md", f"nonce-{secrets.token_hex(16)}") for _ in range(count)]
    files = {document.name: f"The word is {document.nonce}." for document in documents}
    tenant = await service.new_tenant(policy=POLICY, files=files)
    return Ledger(tenant, documents)


async def _ask_all(ledgers: list[Ledger]) -> None:
    """Every document once, in a random order, AT_ONCE at a time."""
    places = asyncio.Semaphore(AT_ONCE)

    async def ask(ledger: Ledger, document: Document) -> None:
        async with places:
            # A connection of its own: one kept alive may be closed by the server just as it is used again.
            query = {"query": f"What does {document.name} say?"}
            response = await ledger.tenant.user.post("/query", json=query, headers={"Connection": "close"})
        assert response.status_code == 200, response.text
        run = response.json()
        ledger.runs[run["run_id"]] = document
        ledger.answers.append((document, response.text))

    asked = [(ledger, document) for ledger in ledgers for document in ledger.documents]
    random.shuffle(asked)
    await asyncio.gather(*(ask(*one) for one in asked))


async def _check_record(service: Service, ledger: Ledger) -> None:
    """The client's ledger, the audit events and the server's own journal are one story."""
    events = await ledger.tenant.admin.events()
    calls = {kind: [event for event in events if event["type"] == kind] for kind in ("tool.decided", "tool.finished")}
    once = Counter(list(ledger.runs))
    for found in calls.values():
        assert Counter(event["run_id"] for event in found) == once
        assert {event["data"]["tool"] for event in found} == {"docs__read_file"}
    assert Counter(event["run_id"] for event in events if event["type"] == "run.finished") == once
    assert {event["data"]["outcome"] for event in calls["tool.finished"]} == {"succeeded"}
    journal: list[dict[str, Any]] = [json.loads(line) for line in service.server_journal(ledger.tenant)]
    assert Counter(line["paths"][0] for line in journal) == Counter(document.name for document in ledger.documents)
    assert {(line["tool"], line["outcome"]) for line in journal} == {("read_file", "ok")}


PR_SET_CHILD_SUBREAPER = 36


@contextmanager
def adopting() -> Iterator[None]:
    """Processes below us whose parent ends become our children, instead of getting out of our sight."""
    prctl = ctypes.CDLL(None).prctl
    assert prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0) == 0
    yield
    prctl(PR_SET_CHILD_SUBREAPER, 0, 0, 0, 0)


def _below_us() -> set[psutil.Process]:
    """Every process below us but the database's, which serves other tests too."""
    processes = psutil.Process().children(recursive=True)
    return {process for process in processes if _name(process) not in ("postgres", "")}


def _name(process: psutil.Process) -> str:
    with suppress(psutil.NoSuchProcess):
        return process.name()
    return ""


def _is_server(process: psutil.Process) -> bool:
    with suppress(psutil.NoSuchProcess):  # a zombie is none either
        return SERVER in process.cmdline()
    return False


async def _ends(processes: set[psutil.Process]) -> bool:
    """Whether they end by themselves; three seconds at most."""
    _, alive = await asyncio.to_thread(psutil.wait_procs, processes, timeout=3)
    return not alive


async def test_each_of_200_answers_holds_its_own_and_no_process_is_left(databases: Databases, tmp_path: Path) -> None:
    with adopting():
        before = _below_us()
        async with running_service(databases, tmp_path) as service:
            ledgers = [await _ledger(service, QUERIES // 2) for _ in range(2)]
            await _ask_all(ledgers)
            started = _below_us() - before
            assert sum(_is_server(process) for process in started) >= 2, "none ran, so none could be left"
            for ledger in ledgers:
                assert len(ledger.answers) == QUERIES // 2
                assert ledger.mixed_up == []
                await _check_record(service, ledger)
        assert await _ends(started | (_below_us() - before))


async def test_servers_that_tenants_shared_would_mix_up_their_answers(
    service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tenant_servers, "ServerKey", lambda _, *rest: ServerKey(PLATFORM_TENANT, *rest))
    ledgers = [await _ledger(service, 3) for _ in range(2)]
    await _ask_all(ledgers)
    assert [len(ledger.mixed_up) for ledger in ledgers] in ([0, 3], [3, 0])
