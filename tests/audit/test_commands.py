"""`bulkhead audit`: on a database, and offline on what has left it."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any, Final
from uuid import UUID

import pytest
from pydantic import SecretStr
from typer.testing import CliRunner, Result

from app.audit import export
from app.audit.heads import HeadFile
from app.audit_cli.commands import audit
from app.caller import PLATFORM_TENANT
from app.settings import Settings
from tests.audit.chains import Ground
from tests.service import Databases, Service, running_service

ROOT: Final = Path(__file__).resolve().parents[2]


async def run(ground: Ground, *arguments: str | Path, with_database: bool = True, with_keys: bool = True) -> Result:
    """The command in this process, with these settings alone."""
    urls = ground.urls
    database = {f"database_{role}_url": SecretStr(getattr(urls, role)) for role in ("app", "platform", "sealer")}
    own: dict[str, Any] = {"data_dir": Path("/nonexistent"), **(database if with_database else {})}
    settings = Settings(_env_file=None, audit_keys=SecretStr(ground.keys) if with_keys else None, **own)
    words = [str(argument) for argument in arguments]
    return await asyncio.to_thread(CliRunner().invoke, audit, words, obj=lambda: settings)


async def written(ground: Ground, tenant_id: UUID, folder: Path) -> tuple[Path, Path, Path]:
    """An export of the tenant's chain, the heads and the public keys."""
    files = folder / "export", folder / "heads", folder / "keys"
    async with ground.app.transaction(tenant_id) as session:
        span = await export.span(session, from_seq=1, to_seq=None)
    files[0].write_bytes(b"".join([piece async for piece in export.chained(ground.app, tenant_id, span)]))
    await HeadFile(ground.sealing, files[1], keys=ground.signers.public, every_s=60).export()
    files[2].write_text((await run(ground, "keys")).output)
    return files


async def test_a_database_is_verified_and_the_first_broken_row_named(ground: Ground, tmp_path: Path) -> None:
    tenant_id, other = await ground.sealed(12), await ground.sealed(3)
    await ground.fill(PLATFORM_TENANT, 3)
    await ground.sealer().finish()
    _, heads, keys = await written(ground, tenant_id, tmp_path)
    trusting = "verify", "--heads", heads, "--keys", keys
    whole = await run(ground, *trusting, with_keys=False)
    assert whole.exit_code == 0, whole.output
    assert f"tenant {tenant_id}: rows 1 to 12 hold" in whole.output
    assert "cut off" not in whole.output
    (moved := tmp_path / "moved").write_bytes(heads.read_bytes() + heads.read_bytes()[:100])
    assert (await run(ground, *trusting, "--heads", moved)).exit_code == 0, "a crash has torn its last line"
    absent = await run(ground, "verify", "--tenant", str(UUID(int=9)))
    assert (absent.exit_code, "there is no row" in absent.output) == (1, True)
    assert "may have been cut off" in (await run(ground, "verify")).output
    await ground.as_superuser(
        ("update audit_chain set hash = sha256('x') where tenant_id = :id and seq = 7", {"id": tenant_id})
    )
    broken = await run(ground, *trusting)
    assert broken.exit_code == 1
    assert f"BROKEN: tenant {tenant_id}, row 7: the hash does not follow" in broken.output
    assert "may have been cut off" in (await run(ground, "verify")).output, "whether or not all holds"
    assert f"tenant {other}: rows 1 to 3 hold" in broken.output
    assert (await run(ground, "verify", "--tenant", str(other))).exit_code == 0
    await ground.as_superuser(("delete from audit_chain where tenant_id = :id", {"id": tenant_id}))


WIPE: Final = [f"delete from audit_{table}" for table in ("events", "pending", "chain", "heads", "checkpoints")]  # noqa: S608  the tables are the test's


async def test_a_record_that_was_wiped_does_not_hold(ground: Ground, tmp_path: Path) -> None:
    await ground.as_superuser(*WIPE)  # what other tests have broken, too
    await ground.fill(PLATFORM_TENANT, 3)
    tenant_id = await ground.sealed(3)
    _, heads, _ = await written(ground, tenant_id, tmp_path)
    assert (await run(ground, "verify")).exit_code == 0, "the control"
    await ground.as_superuser(*WIPE)
    wiped = await run(ground, "verify")
    assert wiped.exit_code == 1
    assert f"BROKEN: tenant {PLATFORM_TENANT}, there is no row of the platform" in wiped.output
    assert "may have been cut off" in wiped.output
    (newer := tmp_path / "newer").touch()
    told = await run(ground, "verify", "--heads", heads, "--heads", newer)
    assert (told.exit_code, f"BROKEN: tenant {tenant_id}, row 1: there is no chain" in told.output) == (1, True)
    await ground.fill(PLATFORM_TENANT, 3)
    await ground.sealer().finish()


async def test_an_export_is_verified_without_the_database(ground: Ground, tmp_path: Path) -> None:
    tenant_id = await ground.sealed(12)
    exported, heads, keys = await written(ground, tenant_id, tmp_path)
    offline = "verify", "--export", exported, "--keys", keys, "--heads", heads
    whole = await run(ground, *offline, with_database=False, with_keys=False)
    assert (whole.exit_code, whole.output) == (0, f"tenant {tenant_id}: rows 1 to 12 hold\n")
    of_other = await run(ground, *offline, "--tenant", str(UUID(int=7)), with_database=False, with_keys=False)
    assert (of_other.exit_code, f"the export is of tenant {tenant_id}" in of_other.output) == (1, True)
    lines = exported.read_text().splitlines(keepends=True)
    heads.write_text("".join(line for line in heads.read_text().splitlines(True) if str(tenant_id) not in line))
    assert f"no heads of {tenant_id}" in (await run(ground, *offline)).output
    edited = json.loads(lines[4])
    edited["body"] = edited["body"].replace("query.received", "query.screened")
    for tampered in (
        [*lines[:4], json.dumps(edited, sort_keys=True, separators=(",", ":")) + "\n", *lines[5:]],
        [*lines[:4], *lines[5:]],
        [*lines[:4], lines[5], lines[4], *lines[6:]],
    ):
        exported.write_text("".join(tampered))
        broken = await run(ground, *offline, with_database=False, with_keys=False)
        assert broken.exit_code == 1
        assert f"BROKEN: tenant {tenant_id}, row 5: " in broken.output
    await HeadFile(ground.sealing, heads, keys=ground.signers.public, every_s=60).export()
    exported.write_text("".join(lines[:-4]))
    assert "row 11: the chain ends at row 10" in (await run(ground, *offline)).output


async def test_what_is_missing_or_no_such_file_is_said(ground: Ground, tmp_path: Path) -> None:
    (tmp_path / "other").write_text("{}\n")
    for arguments, said in (
        (("--keys", "/nowhere"), "/nowhere cannot be read (No such file or directory)."),
        (("--keys", tmp_path / "other"), "does not hold keys as `bulkhead audit keys` prints them"),
        (("--heads", tmp_path / "other"), "other is not what this version writes"),
        (("--export", tmp_path / "other"), "Line 1 of the export is not what this version writes"),
    ):
        failed = await run(ground, "verify", *arguments)
        assert failed.exit_code == 1
        assert said in str(failed.exception)
    assert "BULKHEAD_AUDIT_KEYS" in str((await run(ground, "keys", with_keys=False)).exception)
    assert "--export" in str((await run(ground, "verify", with_database=False)).exception)


@asynccontextmanager
async def a_service(databases: Databases, folder: Path) -> AsyncIterator[Service]:
    async with running_service(databases, folder, audit_seal_s=60, audit_heads_file=folder / "heads") as service:
        yield service


async def test_a_service_that_ends_has_sealed_what_it_answered(databases: Databases, tmp_path: Path) -> None:
    """Its loop seals once a minute here: all but the first round is the last one's work."""
    async with a_service(databases, tmp_path) as service:
        tenant = await service.new_tenant(policy=None)
        assert await service.sql("select 1 from audit_pending", role="sealer"), "the control: it has not come to them"
        keys = (await service.platform.get("/.well-known/bulkhead-audit-keys.json", headers={"Authorization": ""})).text
    (tmp_path / "keys").write_text(keys)
    roles = ("APP", "PLATFORM", "SEALER")
    environment = {f"BULKHEAD_DATABASE_{role}_URL": getattr(service.urls, role.lower()) for role in roles}
    command = [sys.executable, "-m", "app.cli", "audit", "verify", "--heads", "heads", "--keys", "keys"]
    environment |= {"PATH": os.defpath, "PYTHONPATH": str(ROOT)}
    options: dict[str, Any] = {"capture_output": True, "text": True, "timeout": 60, "check": False}
    done = await asyncio.to_thread(partial(subprocess.run, command, cwd=tmp_path, env=environment, **options))
    assert (done.returncode, done.stderr) == (0, "")
    assert f"tenant {tenant.id}: rows 1 to " in done.stdout
    assert await service.sql("select 1 from audit_pending", role="sealer") == []


async def test_the_heads_file_must_be_writable_for_the_service_to_start(databases: Databases, tmp_path: Path) -> None:
    (tmp_path / "heads").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(Exception, match="BULKHEAD_AUDIT_HEADS_FILE"):
        async with a_service(databases, tmp_path):
            pytest.fail("it started")
    assert not (tmp_path / "elsewhere").exists()
