"""A rewrap that is cut off, meets what does not open, or is attacked."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from pathlib import Path
from typing import Final
from uuid import UUID

import pytest
from sqlalchemy import text
from sqlalchemy.ext.asyncio import create_async_engine

from app.auth import keys as api_keys
from app.db import Database, DatabaseUrls, create_engine, new_id
from app.keyring import Keyring, Mac, SecretKey, new_entry
from app.operator_cli import rewrapping
from app.platform_db import PlatformDatabase
from app.tenants import keys as tenant_keys
from app.tenants import repository
from app.tenants.service import open_tenant_key
from tests.service import Databases

ROOT: Final = Path(__file__).resolve().parents[2]
OLD: Final = new_entry("k1")
NEW: Final = new_entry("k2")
BOTH: Final = Keyring.parse(f"{NEW},{OLD}")


async def test_a_rewrap_that_is_cut_off_has_lost_nothing_and_the_next_one_goes_on(databases: Databases) -> None:
    """It is held up at a tenant that another transaction has locked, and ended there."""
    urls = await asyncio.to_thread(databases)
    made = await _fill(urls, Keyring.parse(OLD), tenants=5)
    engine = create_async_engine(urls.owner or "")
    async with engine.connect() as holding:
        await holding.execute(text("select set_config('app.tenant_id', :id, true)"), {"id": str(made[3])})
        await holding.execute(text("select 1 from tenants where id = :id for update"), {"id": made[3]})
        task = asyncio.create_task(rewrapping.rewrap(urls, BOTH))
        for _ in range(400):
            if (await rewrapping.needed(urls, BOTH)).of("k2") == (3, 0):
                break
            await asyncio.sleep(0.05)
        task.cancel()
        await asyncio.wait([task])
    await engine.dispose()
    assert (await rewrapping.needed(urls, BOTH)).tenants == {"k1": 2, "k2": 3}
    await assert_all_open(urls, BOTH, made)
    done = await rewrapping.rewrap(urls, BOTH)
    assert (done.tenants, done.api_keys, done.broken) == (2, 0, set())
    await assert_all_open(urls, Keyring.parse(NEW), made)


@pytest.mark.long
async def test_a_rewrap_that_is_killed_at_any_moment_has_lost_nothing(databases: Databases, tmp_path: Path) -> None:
    urls = await asyncio.to_thread(databases)
    made = await _fill(urls, Keyring.parse(OLD), tenants=400)
    roles = ("owner", "app", "platform", "sealer")
    environment = {f"BULKHEAD_DATABASE_{role.upper()}_URL": getattr(urls, role) for role in roles}
    environment |= {"PATH": os.defpath, "PYTHONPATH": str(ROOT), "BULKHEAD_ROOT_KEYS": f"{NEW},{OLD}"}
    for least in (1, 120, 300):
        command = [sys.executable, "-m", "app.cli", "keys", "rewrap"]
        process = await asyncio.create_subprocess_exec(*command, cwd=tmp_path, env=environment)
        for _ in range(3000):
            if (await rewrapping.needed(urls, BOTH)).of("k2")[0] >= least:
                break
            await asyncio.sleep(0.01)
        process.kill()
        assert await process.wait() == -signal.SIGKILL, "it was at work still"
        assert sum((await rewrapping.needed(urls, BOTH)).tenants.values()) == len(made)
        await assert_all_open(urls, BOTH, made)
    assert (await rewrapping.rewrap(urls, BOTH)).broken == set()
    assert (await rewrapping.needed(urls, BOTH)).tenants == {"k2": len(made)}
    await assert_all_open(urls, Keyring.parse(NEW), made)


async def test_what_does_not_open_is_named_and_the_rest_is_done(databases: Databases) -> None:
    urls = await asyncio.to_thread(databases)
    made = await _fill(urls, Keyring.parse(OLD), tenants=3)
    stranger = Keyring.parse(f"{NEW},{new_entry('k1')}")
    assert (await rewrapping.rewrap(urls, stranger)).broken == set(made)
    assert (await rewrapping.needed(urls, stranger)).tenants == {"k1": 3}
    erased = text("update tenants set status = 'erased', key_id = '', wrapped_key = '' where id = :id")
    database = Database(create_engine(urls.owner or "", pool_size=1))
    async with database.transaction(made[0]) as session:
        await session.execute(erased, {"id": made[0]})
    await database.dispose()
    assert (await rewrapping.rewrap(urls, BOTH)).tenants == 2
    assert (await rewrapping.needed(urls, stranger)).tenants == {"k2": 2}


def test_a_stolen_old_key_makes_no_api_key_once_it_is_gone() -> None:
    """The thief can write to the database, too: rows of his own making, and parts of others."""
    stolen, new = Keyring.parse(OLD), Keyring.parse(NEW)
    own, forged = api_keys.mint(), api_keys.mint()
    forged = api_keys.PlainKey(lookup=own.lookup, secret=forged.secret)
    taken = api_keys.under_active(BOTH, api_keys.fingerprint(stolen, own), lookup=own.lookup)
    assert api_keys.matches(new, own, stored=taken), "the key that was made under the old one goes on"
    by_thief = api_keys.fingerprint(stolen, forged)
    attempts = [
        by_thief,
        Mac("k2", by_thief.digest),
        Mac("k2", taken.digest[: -len(by_thief.digest)] + by_thief.digest),
        Mac("k2", stolen.seal(by_thief.digest, aad=b"").blob),
        api_keys.under_active(BOTH, api_keys.fingerprint(stolen, api_keys.mint()), lookup="0" * 12),
    ]
    assert not any(api_keys.matches(new, forged, stored=attempt) for attempt in attempts)
    # The control: for as long as the old key is there, the first of them is let in.
    assert api_keys.matches(BOTH, forged, stored=by_thief)
    # And a fingerprint that is bound to no place would go with whoever moves it.
    moved = api_keys.PlainKey(lookup=api_keys.mint().lookup, secret=own.secret)
    assert not api_keys.matches(new, moved, stored=taken)
    again = api_keys.under_active(Keyring.parse(f"{new_entry('k3')},{NEW}"), taken, lookup=own.lookup)
    assert again.key_id == "k3"


async def _fill(urls: DatabaseUrls, keyring: Keyring, *, tenants: int) -> list[UUID]:
    """Tenants with a data key each, in the order in which they are rewrapped."""
    platform = PlatformDatabase(create_engine(urls.platform, pool_size=1))
    made = []
    async with platform.transaction() as session:
        for number in range(tenants):
            made.append(new_id())
            key = tenant_keys.wrap_tenant_key(keyring, SecretKey.generate(), tenant_id=made[-1])
            await repository.insert_tenant(session, made[-1], slug=f"t{number}", key=key)
    await platform.dispose()
    return made


async def assert_all_open(urls: DatabaseUrls, keyring: Keyring, made: list[UUID]) -> None:
    platform = PlatformDatabase(create_engine(urls.platform, pool_size=1))
    async with platform.transaction() as session:
        for tenant_id in made:
            await open_tenant_key(session, keyring, tenant_id)  # raises Unsealable
    await platform.dispose()
