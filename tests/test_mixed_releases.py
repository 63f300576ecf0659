"""The oldest release that today's schema says it works with, as processes beside today's, on tomorrow's schema."""

from __future__ import annotations

import asyncio
import io
import shutil
import socket
import subprocess
import tarfile
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import pytest

from app.embedded.machine import rehearsal
from app.keyring import new_entry
from tests.machine.machines import ROOT, Machine
from tests.runs.faults import ended_run
from tests.service import DEFAULT_MODEL_POLICY, Client, Databases, Service, Tenant, new_client, running_service
from tests.test_upgrade import EXPANSION, HEAD, floors, upgraded

pytestmark = pytest.mark.long
QUERY: Final = {"query": "What does welcome.md say?"}
FILES: Final = {"welcome.md": "hello from both"}


@dataclass(slots=True)
class Fleet:
    """Today's service, and where the old one serves; the old one's worker is the only one."""

    today: Service
    tenant: Tenant
    old: Client


def oldest() -> str:
    """The commit that brought the migration from which on code works with today's schema."""
    (migrations,) = ROOT.glob(f"migrations/versions/{floors()[HEAD]}_*.py")
    told = git("log", "--diff-filter=A", "--format=%H", "--", str(migrations.relative_to(ROOT))).decode().split()
    if not told:
        pytest.skip(f"no commit has {migrations.name} yet")
    return told[-1]


def git(*arguments: str) -> bytes:
    """What git says of this repository."""
    program = shutil.which("git")
    if program is None or not (ROOT / ".git").exists():
        pytest.skip("there is no history here: this takes git and a clone")
    return subprocess.run([program, "-C", str(ROOT), *arguments], check=True, stdout=subprocess.PIPE).stdout


@pytest.fixture(scope="module")
def old_release(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its files; what it imports is today's."""
    folder = tmp_path_factory.mktemp("old")
    with tarfile.open(fileobj=io.BytesIO(git("archive", oldest()))) as archive:
        archive.extractall(folder, filter="data")
    return folder


@pytest.fixture(scope="module")
async def fleet(
    databases: Databases, old_release: Path, tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[Fleet]:
    folder = tmp_path_factory.mktemp("fleet")
    newer = upgraded(databases, folder, declaration=f"works_from = {floors()[HEAD]!r}", body=EXPANSION)
    async with (
        rehearsal() as model,
        running_service(newer, folder / "data", model=model) as today,
    ):
        machine = Machine(folder / "data", {**today.settings_of_another(), "DRAIN_S": "1"}, checkout=old_release)
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        serve, worker = machine.spawn("serve", PORT=str(port)), machine.spawn("worker", WORKER_PORT="0")
        try:
            await serve.says('"serving"')
            await worker.says('"working"')
            for each in (serve, worker):
                assert '"schema.newer"' in each.printed, "it has met a schema that it does not know"
            tenant = await today.new_tenant(policy=DEFAULT_MODEL_POLICY, files=FILES)
            async with new_client(f"http://127.0.0.1:{port}", tenant.user_key) as old:
                yield Fleet(today, tenant, old)
            assert [await each.interrupt() for each in (serve, worker)] == [0, 0]
            assert serve.troubles + worker.troubles == []
        finally:
            for each in (serve, worker):
                each.process.kill()
                each.process.wait(10)


async def test_queries_are_answered_by_both(fleet: Fleet) -> None:
    for client in (fleet.old, fleet.tenant.user):
        run = (await client.ask(**QUERY)).json()
        assert FILES["welcome.md"] in run["answer"]
        assert run["tool_calls"]


async def test_what_either_takes_the_old_worker_executes_and_both_tell(fleet: Fleet) -> None:
    for client in (fleet.old, fleet.tenant.user):
        accepted = await client.make("/v1/runs", json=QUERY)
        assert (await ended_run(fleet.tenant, accepted["run_id"], within_s=30))["status"] == "succeeded"
        for teller in (fleet.old, fleet.tenant.user):
            assert (await teller.get(f"/v1/runs/{accepted['run_id']}")).json()["status"] == "succeeded"


async def test_the_old_release_does_not_start_on_a_schema_that_was_contracted(
    databases: Databases, old_release: Path, tmp_path: Path
) -> None:
    """The control: it is asked what it works on."""
    contracted = upgraded(databases, tmp_path, declaration="works_from = 'tomorrow'", body=EXPANSION)
    urls = await asyncio.to_thread(contracted)
    settings = {
        "DATABASE_APP_URL": urls.app,
        "DATABASE_PLATFORM_URL": urls.platform,
        "DATABASE_SEALER_URL": urls.sealer,
        "ROOT_KEYS": new_entry("k1"),
        "MODEL_API_KEY": "any",
    }
    machine = Machine(tmp_path / "data", settings, checkout=old_release)
    for command in ("serve", "worker"):
        refused = await machine.run(command, WORKER_PORT="0")
        assert (refused.status, "works with code from tomorrow on" in refused.complaint) == (1, True)
