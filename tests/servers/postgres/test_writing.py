"""Nothing is written: with any one of the lines of defence off as well, and only with all of them off it is."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass

import pytest

from app.servers.live import LiveServer
from tests.servers.postgres.ground import Ground, Weak, query, rows, text_of


@dataclass(frozen=True)
class Servers:
    """The server as it is, and one without some lines; without its own check it logs in as a superuser."""

    ground: Ground
    live: LiveServer
    weak: Weak

    async def without(self, *off: str) -> LiveServer:
        if not off:
            return self.live
        return await self.weak.without(*off, role="mighty" if "role" in off else "reader")


@pytest.fixture
def servers(ground: Ground, live: LiveServer, weak: Weak) -> Servers:
    return Servers(ground, live, weak)


@dataclass(frozen=True)
class Attack:
    """Calls, one after the other, and what is there once they have succeeded."""

    name: str
    calls: tuple[str, ...]
    done: str
    lines: tuple[str, ...] = ("role", "reading")


ANY = ("role", "reading", "columns")
INSERTED = "select from public.scrap where id = 2"
ATTACKS = [
    Attack("insert", ("insert into public.scrap values (2) returning id",), INSERTED),
    Attack("insert-in-a-query", ("with x as (insert into public.scrap values (2) returning 1) table x",), INSERTED),
    Attack("drop", ("drop table public.scrap",), "select 1 where to_regclass('public.scrap') is null", ANY),
    Attack("do", ("do $$ begin insert into public.scrap values (2); end $$",), INSERTED, ANY),
    Attack(
        "read-write-by-default",
        ("set default_transaction_read_only = off", "insert into public.scrap values (2) returning id"),
        INSERTED,
    ),
    Attack(
        "read-write-amid-the-query",
        (
            "with a as (select set_config('transaction_read_only', 'off', true)),\
            b as (insert into public.scrap values (2) returning 1) table a",
        ),
        INSERTED,
    ),
    Attack(
        "read-write-first",
        ("set transaction read write", "insert into public.scrap values (2) returning id"),
        INSERTED,
    ),
    Attack("copy-from", ("copy public.scrap from program 'echo 2'",), INSERTED, ANY),
    Attack(
        "large-object", ("select lo_from_bytea(4712, 'x')",), "select from pg_largeobject_metadata where oid = 4712"
    ),
    Attack(
        "commit-and-delete",
        ("commit; delete from public.scrap",),
        "select 1 where not exists (table public.scrap)",
        ("role", "single"),
    ),
]


@pytest.mark.parametrize("attack", ATTACKS, ids=lambda attack: attack.name)
async def test_nothing_is_written(servers: Servers, attack: Attack) -> None:
    database = servers.ground.database

    async def succeeds(*off: str) -> bool:
        live = await servers.without(*off)
        for sql in attack.calls:
            await query(live, sql)
        return await database.is_there(attack.done)

    try:
        assert not await succeeds()
        for line in attack.lines:
            # What an attack has to get past it needs in all: with only this line on, it still fails.
            assert not await succeeds(*(other for other in attack.lines if other != line)), line
        assert await succeeds(*attack.lines), "the attack proves nothing: it fails with all of it off"
    finally:
        await database.run(
            "create table if not exists public.scrap (id int); truncate public.scrap;"
            " insert into public.scrap values (1); grant select on public.scrap to reader;"
            " select lo_unlink(oid) from pg_largeobject_metadata where oid = 4712"
        )


async def test_what_no_privilege_is_asked_for_is_never_committed(servers: Servers) -> None:
    """A role may always change its own password and notify listeners: these it is kept from by the server alone."""
    told: list[str] = []
    notify = "select pg_notify('orders', 'all')"
    password = "alter role reader password 'reader2'"
    hash_of = "select rolpassword from pg_authid where rolname = 'reader'"
    async with servers.ground.database.connected() as listener:
        await listener.add_listener("orders", lambda *told_of: told.append(str(told_of[-1])))
        before = await listener.fetchval(hash_of)
        live = await servers.without()
        await query(live, notify)
        await query(live, password)
        await listener.fetchval("select 1")
        assert (told, await listener.fetchval(hash_of)) == ([], before)
        control = await servers.without("reading", "columns")
        await query(control, notify)
        await query(control, password)
        await listener.fetchval("select 1")
        await asyncio.sleep(0.1)
        assert told == ["all"]
        assert await listener.fetchval(hash_of) != before
        await listener.execute("alter role reader password 'reader-password'")


async def test_no_copy_of_a_blocked_table_is_made(servers: Servers) -> None:
    copy, read = "copy public.users to program 'cat > stolen'", "select pg_read_file('stolen', true)"
    for off in ([], ["columns"], ["role"]):
        live = await servers.without(*off)
        for sql in ("copy public.users to stdout", copy, read):
            assert "nonce-" not in text_of(await query(live, sql)), off
    control = await servers.without("role", "columns")
    await query(control, copy)
    assert "nonce-" in text_of(await query(control, read))


@pytest.mark.parametrize(
    "sql", ["listen orders", "set role mighty", "prepare x as select 1", "copy orders to stdout", ""]
)
async def test_what_gives_no_rows_is_not_run(servers: Servers, sql: str) -> None:
    result = await query(await servers.without(), sql)
    assert result.isError


async def test_nothing_of_one_call_is_there_for_the_next(servers: Servers) -> None:
    live = await servers.without()
    assert await rows(live, "select set_config('search_path', 'private', false)") == [["private"]]
    assert await rows(live, "show search_path") == [['"$user", public']]
    mighty = await servers.without("role")  # the lock is not for a fitting role
    assert await rows(mighty, "select pg_advisory_lock(1)::text") == [[""]]
    assert await rows(mighty, "select pg_try_advisory_lock(1)") == [[True]]


async def test_an_error_is_told_and_the_server_goes_on(servers: Servers) -> None:
    live = await servers.without()
    for sql, said in [
        ("select * from users", "permission denied for table users"),
        ("selec 1", "syntax error"),
        ("select 1; select 2", "cannot insert multiple commands"),
        ("select $1", "expects 1 argument"),
        ("select '10000-01-01'::date", "cast it to text"),
    ]:
        result = await query(live, sql)
        assert result.isError
        assert said in text_of(result)
    assert await rows(live, "select 1.5::float, 'nan'::float, null, array[1, 2], '\\x00ff'::bytea, true") == [
        [1.5, "nan", None, [1, 2], "\\x00ff", True]
    ]
