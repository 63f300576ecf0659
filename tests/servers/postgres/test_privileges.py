"""What a role could do beyond the policy: found with the statement that ends it, used by an attack, and ended by it."""

from __future__ import annotations

from dataclasses import dataclass

import pytest

from app.servers.errors import ServerFailed
from app.servers.live import LiveServer
from tests.servers.postgres.ground import Ground, Weak, declared, query, text_of

NONCE = "nonce-"
ANY_CODE = "create function public.any_code() returns int language unlimited as 'begin return 1; end'"
FAR = "create extension postgres_fdw; create server far foreign data wrapper postgres_fdw; "
# The condition that a view of Postgres' own has had since 2024.
PRESENT = "WHERE (pg_has_role(c.relowner, ''USAGE''::text)"
ONCE = (
    "set allow_system_table_mods = on; do $$ begin execute 'create or replace view pg_catalog.pg_stats_ext_exprs as '"
    " || replace(pg_get_viewdef('pg_stats_ext_exprs'::regclass), 'OLD', 'NEW'); end $$"
)
INVOKER = "create view public.people with (security_invoker = on) as select * from public.users"


@pytest.fixture
async def unchecked(weak: Weak) -> LiveServer:
    """A server that serves whatever its role may do, so that an attack meets the database's privileges alone."""
    return await weak.without("role")


@dataclass(frozen=True)
class Exposure:
    """How an admin shows a blocked value to the role, what reads it, what the server says to that, and the way back."""

    name: str
    made: str
    attack: str
    remedies: tuple[str, ...]
    undone: str = "select 1"


SOCKETS = "{sockets}"
DEFINER = (
    "create function public.peek() returns text language sql security definer as 'select secret from public.users'"
)
EXPOSURES = [
    Exposure(
        "table",
        "grant select on public.users to reader",
        "select * from users",
        ("REVOKE SELECT ON TABLE public.users FROM reader",),
    ),
    Exposure(
        "table-of-everybody",
        "grant select on public.users to public",
        "select * from users",
        ("REVOKE SELECT ON TABLE public.users FROM PUBLIC",),
    ),
    Exposure(
        "column",
        "grant select (email) on public.users to reader",
        "select email from users",
        ("REVOKE SELECT (email) ON TABLE public.users FROM reader",),
    ),
    Exposure(
        "view",
        "create view public.people as select * from public.users; grant select on public.people to reader",
        "select * from people",
        ("REVOKE SELECT ON TABLE public.people FROM reader",),
        "drop view public.people",
    ),
    Exposure(
        "view-of-a-view",
        "create view private.people as select * from public.users;"
        " create view reporting.emails as select email from private.people; grant select on reporting.emails to reader",
        "select * from reporting.emails",
        ("REVOKE SELECT ON TABLE reporting.emails FROM reader",),
        "drop view private.people cascade",
    ),
    Exposure(
        "materialized-view",
        "create materialized view public.people as select * from public.users; grant select on public.people to reader",
        "select * from people",
        ("REVOKE SELECT ON TABLE public.people FROM reader",),
        "drop materialized view public.people",
    ),
    Exposure(
        "materialized-view-of-a-view-that-asks-for-its-readers-privileges",
        "create view private.people with (security_invoker) as select * from public.users;"
        " create materialized view public.people as table private.people; grant select on public.people to reader",
        "select * from people",
        ("REVOKE SELECT ON TABLE public.people FROM reader",),
        "drop view private.people cascade",
    ),
    Exposure(
        "partition",
        "create table public.secrets (id int, text text) partition by range (id); create table public.secrets_1"
        " partition of public.secrets for values from (1) to (9); insert into public.secrets values (1, 'nonce-1');"
        " grant select on public.secrets_1 to reader",
        "select * from secrets_1",
        ("REVOKE SELECT ON TABLE public.secrets_1 FROM reader",),
        "drop table public.secrets",
    ),
    Exposure(
        "parent",
        "create table public.things (text text); create table public.secrets () inherits (public.things);"
        " insert into public.secrets values ('nonce-1'); grant select on public.things to reader",
        "select * from things",
        ("REVOKE SELECT ON TABLE public.things FROM reader",),
        "drop table public.things cascade",
    ),
    Exposure(
        "name-in-another-case",
        """create table public."Users" (text text); insert into public."Users" values ('nonce-1');"""
        """ grant select on public."Users" to reader""",
        'select * from "Users"',
        ('REVOKE SELECT ON TABLE public."Users" FROM reader',),
        'drop table public."Users"',
    ),
    Exposure(
        "function",
        DEFINER,
        "select peek()",
        ("REVOKE EXECUTE ON ROUTINE public.peek() FROM PUBLIC",),
        "drop function public.peek()",
    ),
    Exposure(
        "view-that-calls-a-function",
        f"{DEFINER}; alter function public.peek() set schema private; create view public.people as"
        " select private.peek(); grant select on public.people to reader",
        "select * from people",
        ("REVOKE EXECUTE ON ROUTINE private.peek() FROM PUBLIC",),
        "drop function private.peek() cascade",
    ),
    Exposure(
        "aggregate",
        "create function public.peek(text, int) returns text language sql security definer as 'select secret from"
        " public.users limit 1'; revoke execute on function public.peek(text, int) from public;"
        " create aggregate public.thief (int) (sfunc = public.peek, stype = text)",
        "select thief(1)",
        ("REVOKE EXECUTE ON ROUTINE public.thief(integer) FROM PUBLIC",),
        "drop aggregate public.thief (int); drop function public.peek(text, int)",
    ),
    Exposure(
        "statistics",
        "grant select on pg_statistic to reader",
        "select stavalues1::text from pg_statistic where starelid = 'public.users'::regclass",
        ("REVOKE SELECT ON TABLE pg_statistic FROM reader",),
    ),
    Exposure(
        "statistics-by-the-view-for-everybody",
        "grant select on public.users to reader",
        "select histogram_bounds::text from pg_stats where tablename = 'users'",
        ("REVOKE SELECT ON TABLE public.users FROM reader",),
    ),
    Exposure(
        "statistics-of-expressions-as-they-once-were",  # CVE-2024-4317
        "create statistics public.of_users on lower(secret), lower(email) from public.users; analyze public.users;"
        f" {ONCE.replace('OLD', PRESENT).replace('NEW', 'WHERE (true')}; grant select on pg_stats_ext_exprs to public",
        "select histogram_bounds::text from pg_stats_ext_exprs where tablename = 'users'",
        ("REVOKE SELECT ON TABLE pg_stats_ext_exprs FROM PUBLIC",),
        f"{ONCE.replace('OLD', 'WHERE (true').replace('NEW', PRESENT)}; drop statistics public.of_users;"
        " grant select on pg_stats_ext_exprs to public",
    ),
    Exposure(
        "grant-of-another",
        "create role middle; grant usage on schema public to middle; grant select on public.users to middle"
        " with grant option; set role middle; grant select on public.users to reader; reset role",
        "select * from users",
        ("SET ROLE middle; REVOKE SELECT ON TABLE public.users FROM reader; RESET ROLE",),
        "drop owned by middle; drop role middle",
    ),
    Exposure(
        "large-object",
        "select lo_from_bytea(4711, 'nonce-lo'); grant select on large object 4711 to public",
        "select convert_from(lo_get(4711), 'UTF8')",
        ("REVOKE SELECT ON LARGE OBJECT 4711 FROM PUBLIC",),
        "select lo_unlink(4711)",
    ),
    Exposure(
        "large-objects-as-they-once-were",
        "select lo_from_bytea(4711, 'nonce-lo'); alter database shop set lo_compat_privileges = on",
        "select convert_from(lo_get(4711), 'UTF8')",
        ("ALTER DATABASE shop SET lo_compat_privileges = off",),
        "select lo_unlink(4711); alter database shop reset lo_compat_privileges",
    ),
    Exposure(
        "file",
        "copy (select 'nonce-file') to program 'cat > planted'; grant execute on function pg_read_file(text) to reader",
        "select pg_read_file('planted')",
        ("REVOKE EXECUTE ON ROUTINE pg_read_file(text) FROM reader",),
    ),
    Exposure(
        "membership",
        "grant pg_read_all_data to reader",
        "select * from users",
        ("REVOKE pg_read_all_data FROM reader GRANTED BY postgres",),
    ),
    Exposure(
        "membership-of-a-member",
        "create role middle; grant pg_read_all_data to middle; grant middle to reader with inherit true",
        "select * from users",
        ("REVOKE middle FROM reader GRANTED BY postgres",),
        "drop role middle",
    ),
    Exposure(
        "another-schema",
        "grant usage on schema private to public; grant select on private.notes to reader",
        "select * from private.notes",
        (
            "REVOKE USAGE ON SCHEMA private FROM PUBLIC",
            "REVOKE SELECT ON TABLE private.notes FROM reader",
        ),
    ),
    Exposure(
        "link-to-another-session",
        "create schema links; create extension dblink schema links; grant usage on schema links to reader",
        "select * from links.dblink('host={sockets} dbname=shop user=leaky password=leaky',"
        " 'select secret from users') as users (secret text)",
        ("REVOKE USAGE ON SCHEMA links FROM reader", "REVOKE EXECUTE ON ROUTINE links.dblink(text,text) FROM PUBLIC"),
        "drop extension dblink; drop schema links",
    ),
    Exposure(
        "foreign-table",
        "create extension postgres_fdw; create server far foreign data wrapper postgres_fdw"
        f" options (host '{SOCKETS}', dbname 'shop'); create user mapping for public server far"
        " options (user 'leaky', password 'leaky'); create foreign table public.people (secret text) server far"
        " options (schema_name 'public', table_name 'users'); grant select on public.people to reader",
        "select * from people",
        ("DROP USER MAPPING FOR PUBLIC SERVER far",),
        "drop extension postgres_fdw cascade",
    ),
]


@pytest.mark.parametrize("exposure", EXPOSURES, ids=lambda exposure: exposure.name)
async def test_no_value_of_a_blocked_table_is_read(ground: Ground, unchecked: LiveServer, exposure: Exposure) -> None:
    database = ground.database
    sockets = await database.value("show unix_socket_directories")  # as its own processes see them
    attack = exposure.attack.replace(SOCKETS, sockets)
    assert NONCE not in text_of(await query(unchecked, attack))
    try:
        await database.run(exposure.made.replace(SOCKETS, sockets))
        found = await database.findings("reader", declared())
        assert set(exposure.remedies) <= set(found)
        assert NONCE in text_of(await query(unchecked, attack)), "the attack proves nothing: privileges do not help it"
        await database.run(";".join(found))
        assert await database.findings("reader", declared()) == {}
        assert NONCE not in text_of(await query(unchecked, attack))
    finally:
        await database.run(exposure.undone)


# What an admin does, the statement that ends it, and the way back.
RIGHTS = [
    ("alter role reader createrole", "ALTER ROLE reader NOCREATEROLE", ""),
    ("alter role reader createdb", "ALTER ROLE reader NOCREATEDB", ""),
    ("alter role reader replication", "ALTER ROLE reader NOREPLICATION", ""),
    ("alter role reader bypassrls", "ALTER ROLE reader NOBYPASSRLS", ""),
    ("alter role reader superuser", "ALTER ROLE reader NOSUPERUSER", ""),
    ("alter role reader connection limit 6", "ALTER ROLE reader CONNECTION LIMIT 5", ""),
    (
        "alter role reader in database shop set temp_file_limit = -1",
        "ALTER ROLE reader IN DATABASE shop SET temp_file_limit = '1GB'",
        "",
    ),
    ("grant insert on public.scrap to reader", "REVOKE INSERT ON TABLE public.scrap FROM reader", ""),
    ("grant update (id) on public.scrap to reader", "REVOKE UPDATE (id) ON TABLE public.scrap FROM reader", ""),
    (
        "grant select on public.orders to reader with grant option",
        "REVOKE SELECT ON TABLE public.orders FROM reader",
        "grant select on public.orders to reader",
    ),
    ("grant create on schema public to public", "REVOKE CREATE ON SCHEMA public FROM PUBLIC", ""),
    ("grant temporary on database shop to public", "REVOKE TEMPORARY ON DATABASE shop FROM PUBLIC", ""),
    ("grant create on database shop to reader", "REVOKE CREATE ON DATABASE shop FROM reader", ""),
    ("grant connect on database postgres to public", "REVOKE CONNECT ON DATABASE postgres FROM PUBLIC", ""),
    (
        "create sequence public.numbers; grant usage on public.numbers to reader",
        "REVOKE USAGE ON SEQUENCE public.numbers FROM reader",
        "drop sequence public.numbers",
    ),
    (
        "create table public.own (); alter table public.own owner to reader",
        "REASSIGN OWNED BY reader TO CURRENT_USER",
        "drop table public.own",
    ),
    (
        "grant execute on function lo_from_bytea(oid, bytea) to public",
        "REVOKE EXECUTE ON ROUTINE lo_from_bytea(oid,bytea) FROM PUBLIC",
        "",
    ),
    *(
        (f"grant execute on function {function} to public", f"REVOKE EXECUTE ON ROUTINE {function} FROM PUBLIC", "")
        for function in (
            "pg_advisory_lock(bigint)",
            "pg_try_advisory_xact_lock_shared(integer,integer)",
            "pg_cancel_backend(integer)",
            "pg_terminate_backend(integer,bigint)",
        )
    ),
    (
        "grant set on parameter session_replication_role to reader",
        "REVOKE SET ON PARAMETER session_replication_role FROM reader",
        "",
    ),
    (
        FAR + "grant usage on foreign server far to public",
        "REVOKE USAGE ON FOREIGN SERVER far FROM PUBLIC",
        "drop extension postgres_fdw cascade",
    ),
    (
        "grant usage on foreign data wrapper postgres_fdw to reader",
        "REVOKE USAGE ON FOREIGN DATA WRAPPER postgres_fdw FROM reader",
        "",
    ),
    (
        f"create language unlimited handler plpgsql_call_handler; {ANY_CODE}",
        "REVOKE EXECUTE ON ROUTINE public.any_code() FROM PUBLIC",
        "drop language unlimited cascade",
    ),
    (
        "create extension pageinspect; grant execute on function get_raw_page(text, int8) to public",
        "REVOKE EXECUTE ON ROUTINE public.get_raw_page(text,bigint) FROM PUBLIC",
        "drop extension pageinspect",
    ),
]


async def test_each_right_to_more_is_found_with_the_statement_that_ends_it(ground: Ground) -> None:
    database = ground.database
    assert await database.findings("reader", declared()) == {}
    try:
        await database.run(";".join(made for made, _, _ in RIGHTS))
        found = await database.findings("reader", declared())
        assert [remedy for _, remedy, _ in RIGHTS if remedy not in found] == []
        await database.run(";".join(found))
        assert await database.findings("reader", declared()) == {}
        await database.run("alter role reader connection limit -1")
        assert set(await database.findings("reader", declared())) == {"ALTER ROLE reader CONNECTION LIMIT 5"}
    finally:
        await database.run(";".join(undone for _, _, undone in RIGHTS if undone))
        await database.run("alter role reader connection limit 5")


HARMLESS = [
    f"{INVOKER}; grant select on public.people to reader",
    "create function public.double(int) returns int language sql as 'select 2 * $1'",
    "create extension pg_trgm schema public",
    "create type public.spans as range (subtype = float8)",
    "create table public.user_ids (id int) with (fillfactor = 70); grant select on public.user_ids to reader",
    "create rule noted as on insert to public.orders do also insert into public.users values (1)",
]


async def test_what_does_no_harm_is_let_be(ground: Ground) -> None:
    try:
        await ground.database.run(";".join(HARMLESS))
        assert await ground.database.findings("reader", declared()) == {}
    finally:
        await ground.database.run(
            "drop view if exists public.people; drop function if exists public.double(int);"
            " drop extension if exists pg_trgm; drop table if exists public.user_ids;"
            " drop rule if exists noted on public.orders; drop type if exists public.spans"
        )


async def test_a_role_that_could_do_more_is_refused_with_the_statements(ground: Ground) -> None:
    made = 'create table public."a\n;drop" (); grant insert on public."a\n;drop" to reader; alter role reader createdb'
    await ground.database.run(made)
    try:
        with pytest.raises(ServerFailed) as refused:
            async with ground.started():
                pass
        assert str(refused.value) == (
            "The tool server 'reports' does not start: its role reader may do more than the policy says. An admin of"
            " the database runs:\n\n-- the role is CREATEDB\nALTER ROLE reader NOCREATEDB;\n\n"
            '-- reader has INSERT on public."a?;drop"\nREVOKE INSERT ON TABLE public."a\n;drop" FROM reader;'
        )
        await ground.database.run(str(refused.value).partition("runs:")[2])
        async with ground.started() as live:
            assert live.tools
    finally:
        await ground.database.run('drop table public."a\n;drop"')


async def test_a_name_is_blocked_in_any_case_of_any_letter(ground: Ground) -> None:
    try:
        await ground.database.run('create table public."ÜBUNGEN" (); grant select on public."ÜBUNGEN" to reader')
        for entry in ("übungen", "Public.Übungen"):
            found = await ground.database.findings("reader", declared(blocked_tables=(entry,)))
            assert 'REVOKE SELECT ON TABLE public."ÜBUNGEN" FROM reader' in found
    finally:
        await ground.database.run('drop table public."ÜBUNGEN"')


async def test_what_is_granted_meanwhile_is_seen_too(ground: Ground, weak: Weak) -> None:
    """Each minute; here before each call."""
    live = await weak.without("often")
    assert not (await query(live, "select 1")).isError
    await ground.database.run("grant select on public.users to reader")
    try:
        refused = await query(live, "select * from users")
        assert refused.isError
        assert "may do more than the policy says" in text_of(refused)
        assert NONCE in text_of(await query(await weak.without("role"), "select * from users"))
    finally:
        await ground.database.run("revoke select on public.users from reader")
    assert not (await query(await weak.without("often"), "select 1")).isError


async def test_names_stay_visible_in_the_catalogues(ground: Ground, unchecked: LiveServer) -> None:
    """As the page says."""
    names = text_of(
        await query(unchecked, "select attname from pg_attribute where attrelid = 'public.users'::regclass")
    )
    assert "secret" in names
