"""Time, connections, rows and bytes have an end, and the database is the one that its certificate says."""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import AsyncIterator
from dataclasses import replace

import asyncpg
import pytest

from app.servers.errors import ServerFailed, ServerLost, ToolTimedOut
from app.servers.live import LiveServer
from app.servers.postgres import server
from app.settings import Settings
from tests.servers.postgres.ground import HOST, Front, Ground, Weak, declared, make_trust, query, rows, text_of

# 1,600 columns; JSON has six characters for each one of their names.
_NAMED = ", ".join(f'1 "{chr(1) * 59}{number}"' for number in range(100, 300))
LONG_NAMES = " ".join(
    ["with named as (select", _NAMED, ") select * from", ", ".join(f"named {at}" for at in "abcdefgh")]
)
QUICK = declared(statement_timeout_s=1, max_connections=5)


@pytest.fixture(scope="module")
async def quick(ground: Ground) -> AsyncIterator[LiveServer]:
    async with ground.started(QUICK) as live:
        yield live


async def busy(ground: Ground, role: str) -> int:
    """Connections of the role that run a statement of ours."""
    return int(
        await ground.database.value(
            "select count(*) from pg_stat_activity where usename = $1 and query like '%pg_sleep%'", role
        )
    )


async def test_a_statement_that_takes_too_long_is_ended(ground: Ground, quick: LiveServer, weak: Weak) -> None:
    began = time.monotonic()
    result = await query(quick, "select pg_sleep(60)")
    assert time.monotonic() - began < 10
    assert "statement timeout" in text_of(result)
    assert "statement timeout" in text_of(
        await query(quick, "select set_config('statement_timeout', '0', false), pg_sleep(60)")
    )
    assert await busy(ground, "reader") == 0
    control = await weak.without("time", statement_s=1)
    assert await rows(control, "select pg_sleep(1.5)::text") == [[""]]


async def test_a_statement_that_lifts_its_own_limit_is_ended(quick: LiveServer, weak: Weak) -> None:
    """It may, but only for the next message of its client's. Without a limit it would outlive a client that dies."""
    lifts = (
        "select case g when 1 then set_config('statement_timeout', '0', false)"
        " when 2 then set_config('client_connection_check_interval', '0', false)"
        " when 12 then pg_sleep(1.5)::text end from generate_series(1, 12) g"
    )
    assert "statement timeout" in text_of(await query(quick, lifts))
    assert len(await rows(await weak.without("batches", statement_s=1), lifts)) == 12


async def test_a_statement_ends_with_the_server_that_asked_for_it(ground: Ground) -> None:
    async with ground.started(declared(statement_timeout_s=25)) as live:
        asked = asyncio.create_task(query(live, "select pg_sleep(60)"))
        await until(ground, at_least=1)
    asked.cancel()
    await asyncio.wait({asked})
    await until(ground, at_most=0)


async def until(ground: Ground, *, at_least: int = 0, at_most: int = 100) -> None:
    for _ in range(100):
        if at_least <= await busy(ground, "reader") <= at_most:
            return
        await asyncio.sleep(0.1)
    raise AssertionError("it does not come to that")


async def most_at_once(ground: Ground, live: LiveServer, role: str, *, calls: int) -> int:
    """Connections of the role, while so many calls are made at once."""
    sql = "select pg_sleep(0.1)"
    asked = asyncio.gather(*(query(live, sql) for _ in range(calls)), return_exceptions=True)
    most = 0
    async with ground.database.connected() as connection:
        while not asked.done():
            count = "select count(*) from pg_stat_activity where usename = $1 and backend_type = 'client backend'"
            most = max(most, await connection.fetchval(count, role))
            await asyncio.sleep(0.02)
    await asked
    return most


async def test_fifty_calls_have_no_more_connections_than_the_policy_says(
    ground: Ground, quick: LiveServer, weak: Weak
) -> None:
    assert 1 < await most_at_once(ground, quick, "reader", calls=50) <= 5
    by_the_role = await weak.without("room")
    assert 1 < await most_at_once(ground, by_the_role, "reader", calls=15) <= 5
    control = await weak.without("room", "role", role="mighty")
    assert await most_at_once(ground, control, "mighty", calls=15) > 5


async def test_an_answer_has_an_end(weak: Weak) -> None:
    live = await weak.without(rows=3)
    assert len(await rows(live, "select generate_series(1, 1000000)")) == 3
    assert len(await rows(live, "select 1", max_rows=1)) == 1
    cut = text_of(await query(live, "select generate_series(1, 4)"))
    assert '"is_cut": true' in cut
    ((shown,),) = await rows(live, "select repeat('x', 10000000)")
    assert shown == "x" * 2000 + "... (10000000 characters)"
    wide = await query(live, f"select {', '.join(['repeat($$x$$, 2000)'] * 40)}")
    assert "too long to be shown" in text_of(wide)
    assert "first row is too long to be shown" in text_of(await query(live, LONG_NAMES))
    assert "too long names to be shown" in text_of(await query(live, f"{LONG_NAMES} limit 0"))
    control = await weak.without("bounds")
    assert len(text_of(await query(control, "select repeat('x', 1000000)"))) > 1_000_000
    assert len(text_of(await query(control, f"{LONG_NAMES} limit 0"))) > 500_000


async def test_a_value_past_its_memory_costs_that_call_alone(ground: Ground) -> None:
    """The driver waits for ever for a value that it has no room for, and a call past its time costs the server."""
    assert Settings.model_fields["tool_timeout_s"].default > server.CALL_S + server.CLOSE_S + 2
    small = replace(ground, query="?sslmode=disable", data_bytes=112 << 20, can_weaken=True)
    past_it = {"sql": "select repeat('x', 36 << 20)"}
    async with small.started() as started:
        live = await Weak(started).without("patience")
        assert (await live.call("query", past_it, timeout_s=5)).isError
        assert await rows(live, "select 1") == [[1]]
        control = await Weak(started).without("end")
        with pytest.raises(ToolTimedOut):
            await control.call("query", past_it, timeout_s=5)
        with pytest.raises(ServerLost):
            await rows(control, "select 1")


async def test_nobody_elses_work_is_held_up_or_ended(ground: Ground, live: LiveServer, weak: Weak) -> None:
    """A lock that any program may wait for, all the locks that there are, a call of another user."""
    holds, ends = "select pg_advisory_lock(7)", "select pg_terminate_backend(pid) from pg_stat_activity"
    everybodys = "function pg_advisory_lock(bigint), pg_terminate_backend(integer, bigint)"

    async def effect() -> tuple[bool, bool]:
        async with ground.database.connected("reader", "reader-password") as other:
            held = asyncio.create_task(query(control, f"{holds}, pg_sleep(0.7)"))
            is_held = False
            while not held.done():
                is_held |= not await ground.database.value("select pg_try_advisory_xact_lock(7)")
                await asyncio.sleep(0.05)
            await query(control, f"{ends} where usename = 'reader' and pid <> pg_backend_pid()")
            try:
                await other.fetchval("select 1")
            except (asyncpg.PostgresError, asyncpg.InterfaceError):
                return is_held, True
            return is_held, False

    for sql in (holds, ends):
        assert "permission denied for function" in text_of(await query(live, sql))
    control = await weak.without("role")
    assert await effect() == (False, False)
    await ground.database.run(f"grant execute on {everybodys} to reader")
    try:
        assert await effect() == (True, True)
    finally:
        await ground.database.run(f"revoke execute on {everybodys} from reader")


async def test_a_database_that_says_nothing_is_given_up(ground: Ground) -> None:
    async def silent(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read()
        writer.close()

    listening = await asyncio.start_server(silent, "127.0.0.1", 0)
    mute = replace(ground, port=listening.sockets[0].getsockname()[1])
    began = time.monotonic()
    with pytest.raises(ServerFailed, match="cannot be reached in time"):
        async with mute.started(declared(connect_timeout_s=1)):
            pass
    assert 1 <= time.monotonic() - began < 10
    asked = asyncio.create_task(_start(mute))
    await asyncio.wait({asked}, timeout=3)
    assert not asked.done()  # the control: with more time it waits
    asked.cancel()
    await asyncio.wait({asked})
    listening.close()


async def _start(ground: Ground) -> None:
    async with ground.started(declared(connect_timeout_s=30)):
        pass


async def test_another_ones_certificate_is_refused(ground: Ground) -> None:
    _, tls = make_trust(ground.folder / "other", HOST)
    front = Front(str(ground.database.cluster._reachable_sockets() / ".s.PGSQL.5432"), tls)
    async with front.serving():
        elsewhere = replace(ground, port=front.port)
        with pytest.raises(ServerFailed, match="certificate is not trusted"):
            async with elsewhere.started():
                pass
        async with replace(elsewhere, query="?sslmode=disable").started() as control:
            assert await rows(control, "select 1") == [[1]]


async def test_another_name_than_the_certificates_is_refused(ground: Ground) -> None:
    with pytest.raises(ServerFailed, match=r"certificate is not trusted.*other\.site\.test"):
        async with replace(ground, host="other.site.test").started():
            pass


async def test_why_the_database_is_not_reached_is_for_an_admin(ground: Ground) -> None:
    """The model is told that it is not; the journal, which an admin reads, says why and names the host."""
    front = Front(str(ground.database.cluster._reachable_sockets() / ".s.PGSQL.5432"), ground.tls)
    async with front.serving(), replace(ground, port=front.port).started() as live:
        assert await rows(live, "select 1") == [[1]]
        front.tls = None
        assert text_of(await query(live, "select 1")) == "the database cannot be reached, or lets nobody in"
    assert f'\\"{HOST}:5432\\" rejected SSL upgrade' in ground.journal()


async def test_what_was_asked_and_read_is_not_in_the_journal(ground: Ground, live: LiveServer) -> None:
    for sql in ("select 'a-secret'::int", "select customer::int from orders where id = 77", "select a_secret"):
        assert re.search("a.secret|customer 77", text_of(await query(live, sql)))  # in the database's own words
    assert "the database refuses: 22P02" in ground.journal()
    assert not re.search("a.secret|customer", ground.journal())


async def test_a_wrong_password_is_told_without_it(ground: Ground) -> None:
    with pytest.raises(ServerFailed, match="lets nobody in: password authentication failed") as refused:
        async with replace(ground, password="a-wrong-one").started():
            pass
    assert "a-wrong-one" not in str(refused.value)
