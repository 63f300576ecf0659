"""The operator's procedures on machines of `bulkhead up`, by the blocks of docs/operations.md and real processes."""

from __future__ import annotations

import asyncio
import secrets
import shutil
import signal
import subprocess
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import pytest

from app.embedded.demo import read_env, write_env
from app.embedded.postgres import EmbeddedPostgres
from app.keyring import new_entry
from tests.machine.machines import Machine, Up
from tests.operations.pages import block, make_folder, run
from tests.service import DEFAULT_MODEL_POLICY, Client
from tests.slow_model import SlowModel, slow_model

pytestmark = pytest.mark.long


@dataclass(slots=True)
class Place:
    """An operator's folder with a machine in it."""

    folder: Path
    machine: Machine
    more: dict[str, str] = field(default_factory=dict)

    async def run(self, heading: str, number: int = 0) -> str:
        """Run a block of the page with the settings that the machine has."""
        settings = {f"BULKHEAD_{name}": value for name, value in {**self.machine.settings, **self.more}.items()}
        return await run(block(heading, number), self.folder, settings)

    async def up(self) -> Up:
        up = self.machine.spawn("up", **self.more)
        await up.ready(patience_s=180)
        return up

    def edit(self, **values: str) -> None:
        """Change lines of machine.env, as with an editor."""
        file = self.machine.directory / "machine.env"
        write_env(file, read_env(file) | values)


@pytest.fixture(scope="module")
async def model() -> AsyncIterator[tuple[SlowModel, dict[str, str]]]:
    async with slow_model() as (slow, endpoint):
        names = {"BASE_URL": endpoint.base_url, "API_KEY": endpoint.api_key, "NAMES": "slow", "LOOPBACK": "true"}
        yield slow, {f"MODEL_{name}": value for name, value in names.items()}


@pytest.fixture
def places(tmp_path: Path, model: tuple[SlowModel, dict[str, str]]) -> Any:
    made = []

    def make(name: str) -> Place:
        folder = make_folder(tmp_path / name)
        rates = {f"POLICY_MAX_{name}REQUESTS": "900000/minute" for name in ("", "TENANT_")}
        settings = {"AUDIT_HEADS_FILE": str(folder / "heads.jsonl"), "AUDIT_HEADS_S": "1", **rates, **model[1]}
        made.append(Place(folder, Machine(folder / ".bulkhead", settings=settings)))
        return made[-1]

    yield make
    for place in made:
        place.machine.end()


@dataclass(slots=True)
class Past:
    """What happened before and while the backup was made."""

    nonce: str
    ended: str
    interactive: str
    background: str
    user: Client
    admin: Client


async def test_a_machine_is_backed_up_restored_elsewhere_and_gets_new_keys(
    places: Any, model: tuple[SlowModel, dict[str, str]]
) -> None:
    first, second = places("first"), places("second")
    past = await _live_and_back_up(first, model[0])
    for name in ("backup", "keys"):
        shutil.copytree(first.folder / name, second.folder / name)
    said = await second.run("Restore into an empty machine")
    assert "(active): 3 tenants and 5 API keys" in said
    assert "BROKEN" not in said
    shutil.copy(first.folder / "heads.jsonl", second.folder)
    assert "the chain ends at row" in await second.run("Is it the newest?")
    (second.folder / "heads.jsonl").rename(second.folder / "heads-of-before.jsonl")
    await _goes_on(second, past, model[0])
    await _gets_new_keys(second, past)
    await _tampered(second)


async def _live_and_back_up(place: Place, slow: SlowModel) -> Past:
    """The backup is made while one run of each kind is in flight."""
    up = await place.up()
    nonce = secrets.token_hex(16)
    async with up.caller("BULKHEAD_ADMIN_KEY") as admin, up.caller() as user:
        await admin.put_file("note.md", nonce)
        asked = (await user.ask("What does note.md say?")).json()
        assert nonce in asked["answer"]
        await admin.publish(DEFAULT_MODEL_POLICY.replace("default}", "default, name: slow}"))
        asking = asyncio.create_task(user.ask("interactive"))
        background = (await user.make("/v1/runs", json={"query": "background"}))["run_id"]
        for query in ("interactive", "background"):
            await asyncio.wait_for(slow.turns[query].arrived.wait(), 60)
        await _soon((place.folder / "heads.jsonl").exists)
        await asyncio.sleep(3)  # a head of all that has been, so that the older database has less than the newest heads
        await place.run("Back up the embedded Postgres")
        slow.release_all()
        interactive = (await asking).json()["run_id"]
        await admin.put_file("since.md", "not in the backup")
        await asyncio.sleep(3)
    assert await up.interrupt() == 0
    return Past(nonce, asked["run_id"], interactive, background, user, admin)


async def _goes_on(place: Place, past: Past, slow: SlowModel) -> None:
    up = await place.up()
    async with up.caller() as user, up.caller("BULKHEAD_ADMIN_KEY") as admin:
        assert past.nonce in (await user.get(f"/v1/runs/{past.ended}")).json()["answer"]
        assert (await _ended(user, past.interactive))["status"] == "interrupted"
        ended = await _ended(user, past.background)
        assert (ended["status"], ended["answer"]) == ("succeeded", "done"), "the worker has taken it up"
        assert past.nonce in (await admin.get("/v1/workspaces/docs/files/note.md")).text
        assert (await admin.get("/v1/workspaces/docs/files/since.md")).status_code == 404
        slow.turns["again"].released.set()
        assert (await user.ask("again")).json()["answer"] == "done"
    assert await up.interrupt() == 0


async def _gets_new_keys(place: Place, past: Past) -> None:
    """Root keys and audit keys, the metrics token, the development issuer."""
    file = place.machine.directory / "machine.env"
    old, new = read_env(file), new_entry("k2")
    name = old["ROOT_KEYS"].partition(":")[0]
    place.edit(ROOT_KEYS=f"{new},{old['ROOT_KEYS']}", METRICS_TOKEN="another-token")
    token = (await place.machine.run("token", "ada")).output.strip()
    (place.machine.directory / "development-issuer.pem").unlink()
    up = await place.up()
    said = await place.run("Root keys")
    assert f"{name}: the record has signatures by it" in said
    await place.run("Audit keys")
    async with httpx.AsyncClient(base_url=place.machine.env["BULKHEAD_URL"], trust_env=False) as client:
        for known, status in ((old["METRICS_TOKEN"], 401), ("another-token", 200)):
            answer = await client.get("/metrics", headers={"Authorization": f"Bearer {known}"})
            assert answer.status_code == status
        newer = (await place.machine.run("token", "ada")).output.strip()
        for presented, status in ((token, 200), (newer, 401)):
            answer = await client.get("/v1/me", headers={"Authorization": f"Bearer {presented}"})
            assert answer.status_code == status, "the demo's issuer is still trusted by its old key"
    assert await up.interrupt() == 0

    place.more["AUDIT_RETIRED_KEYS_FILE"] = str(place.folder / "retired-keys.json")
    assert f"{name}: nothing needs it" in await place.run("Root keys")
    place.edit(ROOT_KEYS=new)
    up = await place.up()
    async with up.caller() as user:
        assert past.nonce in (await user.get(f"/v1/runs/{past.ended}")).json()["answer"]
        assert (await user.ask("again")).json()["answer"] == "done"
    assert await up.interrupt() == 0
    heads = str(place.folder / "heads.jsonl")
    verified = await place.machine.run("audit", "verify", "--heads", heads, **place.more)
    assert (verified.status, "BROKEN" in verified.output) == (0, False)


async def _tampered(place: Place) -> None:
    cluster = EmbeddedPostgres(place.machine.directory / "postgres")
    await asyncio.to_thread(cluster.start)
    edit = "update audit_events set body = replace(body, 'run.', 'ran.')"
    words = [word for each in ("set session_replication_role = replica", edit) for word in ("-c", each)]
    command, environment = cluster.client("psql", "-q", "-d", "bulkhead", *words)
    await asyncio.to_thread(subprocess.run, command, env=environment, check=True, timeout=60)
    await asyncio.to_thread(cluster.stop)
    assert "BROKEN: tenant " in await place.run("A tampered record")


async def test_a_restore_that_is_killed_leaves_nothing_and_the_next_one_is_whole(places: Any) -> None:
    place = places("killed")
    up = await place.up()
    assert await up.interrupt() == 0
    file = str(place.folder / "dump")
    assert (await place.machine.run("db", "dump", file)).status == 0
    assert (await place.machine.run("db", "dump", file)).complaint.endswith("is there already, and stays as it is.\n")
    refused = await place.machine.run("db", "restore", file)
    assert "stays as it is: move it away first" in refused.complaint
    postgres = place.machine.directory / "postgres"
    postgres.rename(place.folder / "aside")
    for moment in ("data", "data/postmaster.pid", "socket/.s.PGSQL.5432"):
        restoring = place.machine.spawn("db", "restore", file)
        await restoring.until(lambda moment=moment: (postgres.with_name("postgres.new") / moment).exists())
        restoring.process.send_signal(signal.SIGKILL)
        restoring.process.wait(10)
        assert not postgres.exists()
    assert (await place.machine.run("db", "restore", file)).status == 0
    assert not postgres.with_name("postgres.new").exists()
    up = await place.up()
    assert await up.interrupt() == 0
    assert await place.machine.is_empty(), "no Postgres of a killed restore is left"


async def _ended(user: Client, run_id: str) -> dict[str, Any]:
    for _ in range(600):
        found: dict[str, Any] = (await user.get(f"/v1/runs/{run_id}")).json()
        if found["status"] not in {"queued", "running"}:
            return found
        await asyncio.sleep(0.1)
    raise AssertionError(found)


async def _soon(holds: Any) -> None:
    for _ in range(200):
        if holds():
            return
        await asyncio.sleep(0.1)
