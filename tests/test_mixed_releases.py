"""The oldest release that today's schema says it works with, as processes beside today's, on one database."""

from __future__ import annotations

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
from app.outbound.catalogue import ModelEndpoint
from tests.machine.machines import ROOT, Machine
from tests.runs.faults import ended_run
from tests.service import DEFAULT_MODEL_POLICY, Client, Databases, Service, Tenant, new_client, running_service
from tests.test_upgrade import HEAD, floors

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
    async with (
        rehearsal() as model,
        running_service(databases, folder / "data", model=model) as today,
    ):
        machine = Machine(folder / "data", _settings(today, model), checkout=old_release)
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        serve, worker = machine.spawn("serve", PORT=str(port)), machine.spawn("worker", WORKER_PORT="0")
        try:
            await serve.says('"serving"')
            await worker.says('"working"')
            tenant = await today.new_tenant(policy=DEFAULT_MODEL_POLICY, files=FILES)
            async with new_client(f"http://127.0.0.1:{port}", tenant.user_key) as old:
                yield Fleet(today, tenant, old)
            assert [await each.interrupt() for each in (serve, worker)] == [0, 0]
            assert serve.troubles + worker.troubles == []
        finally:
            for each in (serve, worker):
                each.process.kill()
                each.process.wait(10)


def _settings(today: Service, model: ModelEndpoint) -> dict[str, str]:
    """Those of today's service."""
    settings = today.app.state.settings
    return {
        "DATABASE_APP_URL": today.urls.app,
        "DATABASE_PLATFORM_URL": today.urls.platform,
        "DATABASE_SEALER_URL": today.urls.sealer,
        "ROOT_KEYS": settings.root_keys.get_secret_value(),
        "MODEL_BASE_URL": model.base_url,
        "MODEL_API_KEY": model.api_key,
        "MODEL_NAMES": ",".join(model.models),
        "MODEL_LOOPBACK": "true",
        "WORKSPACE_QUOTA": settings.workspace_quota,
        "DRAIN_S": "1",
    }


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
