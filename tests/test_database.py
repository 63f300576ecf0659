"""The database alone, as each of its roles: what row-level security, grants and triggers hold without our code."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any, Final
from uuid import UUID

import pytest
from alembic import command
from alembic.util import CommandError
from sqlalchemy import text
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import AsyncConnection, create_async_engine

from app import migration
from app.db import Database, DatabaseUrls, create_engine, new_id
from app.platform_db import PlatformDatabase
from app.servers import quarantine
from app.servers.quarantine import ServerQuarantined
from app.servers.starting import Borrower
from app.tables import metadata
from tests.auth.forgery import Issuer
from tests.grants import GRANTS
from tests.runs.approvals.waiting import waiting_run
from tests.service import Databases, Service, Tenant

# The schema's own version belongs to nobody.
SHARED: Final = {"alembic_version"}
REFUSED: Final = "42501"  # insufficient_privilege: by a grant, by row-level security, or by our trigger
FOREIGN_KEY: Final = "23503"
UNIQUE: Final = "23505"
_GRANTS: Final = """
with held(grantee, object, privilege, of_column) as (
    select (aclexplode(relacl)).grantee, relname, (aclexplode(relacl)).privilege_type, null
    from pg_class where relnamespace = current_schema()::regnamespace and relacl is not null
    union all
    select (aclexplode(attacl)).grantee, relname, (aclexplode(attacl)).privilege_type, attname
    from pg_attribute join pg_class on pg_class.oid = attrelid
    where relnamespace = current_schema()::regnamespace and attacl is not null
    union all
    select (aclexplode(coalesce(proacl, acldefault('f', proowner)))).grantee, proname, 'EXECUTE', null
    from pg_proc where pronamespace = current_schema()::regnamespace and prorettype <> 'trigger'::regtype
)
select case grantee when 0 then 'public' else pg_get_userbyid(grantee)::text end as grantee, object::text,
       privilege, string_agg(of_column, ', ' order by of_column) as of_columns
from held
where grantee <> (select nspowner from pg_namespace where oid = current_schema()::regnamespace)
  and grantee <> (select relowner from pg_class where oid = 'tenants'::regclass)
group by grantee, object, privilege order by object, privilege
"""


@dataclass(frozen=True, slots=True)
class Inhabited:
    """A database in which two tenants have one of each thing."""

    service: Service
    a: Tenant
    b: Tenant
    run_of_b: str

    async def as_role(self, role: str, statement: str, *, tenant: Tenant | None = None, **values: Any) -> list[Any]:
        """What a role is given, with this tenant set; the statement is rolled back."""
        async with connected(getattr(self.service.urls, role)) as connection:
            if tenant is not None:
                await connection.execute(text("select set_config('app.tenant_id', :id, true)"), {"id": tenant.id})
            result = await connection.execute(text(statement), values)
            return list(result.all()) if result.returns_rows else [result.rowcount]

    async def sqlstate(self, role: str, statement: str, *, tenant: Tenant | None = None, **values: Any) -> str:
        """The error that a statement ends in."""
        with pytest.raises(DBAPIError) as raised:
            await self.as_role(role, statement, tenant=tenant, **values)
        return str(getattr(raised.value.orig, "sqlstate", None))


@asynccontextmanager
async def connected(url: str) -> AsyncIterator[AsyncConnection]:
    """A connection as one role; all that it does is rolled back."""
    engine = create_async_engine(url)
    try:
        async with engine.connect() as connection:
            yield connection
            await connection.rollback()
    finally:
        await engine.dispose()


@pytest.fixture(scope="module")
async def db(service: Service) -> Inhabited:
    tenants = [await service.new_tenant(files={"note.md": "hello"}) for _ in range(2)]
    for tenant in tenants:
        issuer, once = {"issuer": "https://issuer.test", "jwks": Issuer().jwks}, {"Idempotency-Key": "once"}
        await tenant.admin.make("/v1/issuers", json=issuer, headers=once)
        await tenant.admin.make("/v1/switches", json={"scope": "server", "target": "other", "reason": "test"})
        await tenant.admin.make("/v1/policies/1/backtest", json={})
        await tenant.user.make("/v1/conversations")
        assert (await tenant.admin.put("/v1/secrets/key", json={"value": "some-text"})).is_success
        locator = {"locator": {"provider": "environment", "variable": "BULKHEAD_SECRET_A"}}
        bound = await service.platform.put(f"/v1/tenants/{tenant.id}/secret-bindings/bound", json=locator)
        assert bound.is_success
        run = (await tenant.user.ask("What does note.md say?")).json()
        assert run["tool_calls"]
        await waiting_run(service, tenant)
        async with service.app.state.database.transaction(UUID(tenant.id)) as session:
            for statement in UNDER_WAY:
                await session.execute(text(statement))
        whom = Borrower(UUID(tenant.id), new_id())
        with pytest.raises(ServerQuarantined):  # a server that lists nothing any more
            await quarantine.enforce(service.app.state.database, whom, "docs", version=1, found=[])
    return Inhabited(service, tenants[0], tenants[1], run["run_id"])


# A run that has ended has no reservation, and one that is running has a lease.
UNDER_WAY: Final = (
    (
        "insert into runs (tenant_id, id, user_id, policy_version, state, model, lease_until)"
        " select tenant_id, gen_random_uuid(), user_id, policy_version, 'running', model, now() + interval '1 hour'"
        " from runs limit 1"
    ),
    (
        "insert into budget_reservations (tenant_id, run_id, user_id, day, model, input_tokens, output_tokens, cost)"
        " select tenant_id, id, user_id, current_date, model, 1, 1, 1 from runs where state = 'running'"
    ),
)
PLATFORMS: Final = {"model_endpoints"}
# The sealer writes these; tests/audit/test_sealing.py tries what others can do to them.
SEALERS: Final = {"audit_pending", "audit_chain", "audit_heads", "audit_checkpoints"}
TABLES: Final = sorted(set(metadata.tables) - PLATFORMS - SEALERS)
KEYED: Final = {"tenants": "id"}
ROW: Final = "select to_jsonb(t)::text from {} t"
COUNT: Final = "select count(*) from {}"
OWNERS: Final = "select distinct {}::text from {}"
READ: Final = "select body from {}"


def owned(table: str) -> str:
    """The column that says whose row it is."""
    return KEYED.get(table, "tenant_id")


def inserting(table: str) -> str:
    """A statement that inserts the whole `row`, but for what the database computes."""
    columns = ", ".join(f'"{column.name}"' for column in metadata.tables[table].columns if column.computed is None)
    record = f"jsonb_populate_record(null::{table}, cast(:row as jsonb))"
    return f"insert into {table} ({columns}) overriding system value select {columns} from {record}"  # noqa: S608  ours


# Rows


@pytest.mark.parametrize("table", TABLES)
async def test_without_a_tenant_the_app_sees_no_row_and_adds_none(db: Inhabited, table: str) -> None:
    ((row,), *_) = await db.as_role("owner", ROW.format(table), tenant=db.a)
    assert await db.as_role("app", COUNT.format(table)) == [(0,)]
    assert await db.sqlstate("app", inserting(table), row=row) == REFUSED


@pytest.mark.parametrize("table", TABLES)
async def test_with_one_tenant_set_the_rows_of_another_are_not_there(db: Inhabited, table: str) -> None:
    seen = await db.as_role("app", OWNERS.format(owned(table), table), tenant=db.a)
    assert seen == [(db.a.id,)]
    ((row,), *_) = await db.as_role("owner", ROW.format(table), tenant=db.b)
    assert await db.sqlstate("app", inserting(table), tenant=db.a, row=row) == REFUSED


# The app role makes neither tenants nor bindings of secrets, not even its own.
@pytest.mark.parametrize("table", sorted(set(TABLES) - {"tenants", "secret_bindings"}))
async def test_it_is_the_tenant_that_was_refused_and_not_the_row(db: Inhabited, table: str) -> None:
    """The control of the two above: under its own tenant the same row is only there already."""
    ((row,), *_) = await db.as_role("owner", ROW.format(table), tenant=db.a)
    assert await db.sqlstate("app", inserting(table), tenant=db.a, row=row) == UNIQUE


@pytest.mark.parametrize("table", TABLES)
async def test_without_row_level_security_there_are_rows_of_both(db: Inhabited, table: str) -> None:
    """The control: the rows are there, and it is the policy that hides them."""
    async with connected(db.service.urls.owner or "") as connection:
        await connection.execute(text(f"alter table {table} no force row level security"))
        found = await connection.scalars(text(OWNERS.format(owned(table), table)))
        assert {db.a.id, db.b.id} <= set(found.all())


@pytest.mark.parametrize("table", sorted(PLATFORMS))
async def test_the_app_reaches_nothing_of_the_platforms_own(db: Inhabited, table: str) -> None:
    assert await db.sqlstate("app", COUNT.format(table), tenant=db.a) == REFUSED
    assert len(await db.as_role("platform", COUNT.format(table))) == 1, "the control"


@pytest.mark.parametrize("table", ["audit_chain", "audit_heads"])
async def test_the_app_reads_of_the_chain_what_is_its_tenants(db: Inhabited, table: str) -> None:
    await db.service.app.state.sealer.seal()
    owners = OWNERS.format("tenant_id", table)
    assert {(db.a.id,), (db.b.id,)} <= set(await db.as_role("sealer", owners)), "the control"
    assert await db.as_role("app", owners) == []
    assert await db.as_role("app", owners, tenant=db.a) == [(db.a.id,)]


async def test_updates_and_deletes_find_no_row_of_another_tenant(db: Inhabited) -> None:
    changes = {
        "update users set disabled_at = now() where id = :id": db.b.user_id,
        "update api_keys set revoked_at = now() where id = :id": db.b.user_key_id,
        "update runs set cancel_cause = 'user' where id = :id": db.run_of_b,
        "update tenants set generation = 0 where id = :id": db.b.id,
        "delete from issuers where tenant_id = :id": db.b.id,
    }
    for statement, id_ in changes.items():
        assert await db.as_role("app", statement, tenant=db.a, id=uuid.UUID(id_)) == [0], statement
        assert await db.as_role("app", statement, tenant=db.b, id=uuid.UUID(id_)) == [1], "the control"


async def test_no_row_of_one_tenant_refers_to_another(db: Inhabited) -> None:
    """Foreign-key checks see every row, whatever the policies say: so the keys name the tenant too."""
    key = "insert into api_keys (tenant_id, id, user_id, name, lookup, mac_key_id, mac)"
    key += " values (:a, :new, :user, 'x', 'lookup', 'k1', '')"
    run = "insert into runs (tenant_id, id, user_id, key_id, policy_version, state, model)"
    run += " values (:a, :new, :user, :key, :version, 'running', 'x')"
    call = "insert into tool_calls (tenant_id, run_id, sequence, tool, decision, rule)"
    call += " values (:a, :run, 1, 'x', 'denied', 'x')"
    content = "insert into contents (tenant_id, run_id, kind, sequence, sealed) values (:a, :run, 'query', 9, '')"
    new, own = uuid.uuid4(), {"user": uuid.UUID(db.a.user_id), "key": uuid.UUID(db.a.user_key_id), "version": 1}
    attempts: list[tuple[str, dict[str, Any]]] = [
        (key, {"new": new, "user": uuid.UUID(db.b.user_id)}),
        (run, own | {"new": new, "user": uuid.UUID(db.b.user_id)}),
        (run, own | {"new": new, "key": uuid.UUID(db.b.user_key_id)}),
        (run, own | {"new": new, "version": 99}),
        (call, {"run": uuid.UUID(db.run_of_b)}),
        (content, {"run": uuid.UUID(db.run_of_b)}),
    ]
    for statement, values in attempts:
        state = await db.sqlstate("app", statement, tenant=db.a, a=uuid.UUID(db.a.id), **values)
        assert state == FOREIGN_KEY, statement
    assert await db.as_role("app", run, tenant=db.a, a=uuid.UUID(db.a.id), new=new, **own) == [1], "the control"


async def test_transactions_of_many_tenants_share_connections_and_nothing_else(db: Inhabited) -> None:
    engine = create_engine(db.service.urls.app, pool_size=2)
    database = Database(engine)

    async def seen(tenant: Tenant) -> tuple[str, set[str]]:
        async with database.transaction(uuid.UUID(tenant.id)) as session:
            await asyncio.sleep(0)
            return tenant.id, {str(found) for found in await session.scalars(text("select tenant_id from users"))}

    found = await asyncio.gather(*(seen(tenant) for tenant in [db.a, db.b] * 50))
    assert all(tenants == {tenant} for tenant, tenants in found)
    async with engine.connect() as connection:
        assert await connection.scalar(text("select count(*) from users")) == 0, "a setting outlived its transaction"
    await database.dispose()


async def test_a_process_that_stalls_in_a_transaction_keeps_its_locks_for_no_longer_than_a_statement_may_take(
    db: Inhabited,
) -> None:
    engine = create_engine(db.service.urls.app, pool_size=1)
    setting = text("select current_setting('idle_in_transaction_session_timeout')")
    async with Database(engine).transaction(uuid.UUID(db.a.id)) as session:
        assert await session.scalar(setting) == "30s"
    async with engine.connect() as connection:
        assert await connection.scalar(setting) == "0", "the control"
    await engine.dispose()
    platform = PlatformDatabase(create_engine(db.service.urls.platform, pool_size=1))
    for _ in range(2):
        async with platform.transaction() as session:
            assert await session.scalar(setting) == "30s"
    await platform.dispose()


# Roles


async def test_the_services_roles_can_do_nothing_but_what_they_were_granted(db: Inhabited) -> None:
    rows = await db.as_role("owner", _GRANTS)
    urls = db.service.urls
    names = {urls.app_role: "app", urls.platform_role: "platform", urls.sealer_role: "sealer"}
    held: dict[tuple[str, str], list[str]] = {}
    for grantee, name, privilege, of_columns in rows:
        what = f"{privilege}({of_columns})" if of_columns else privilege
        held.setdefault((names.get(grantee, grantee), name), []).append(what)
    assert "\n".join(f"{role} {name} {', '.join(what)}" for (role, name), what in sorted(held.items())) == GRANTS


@pytest.mark.parametrize("role", ["app", "platform", "sealer", "owner"])
async def test_no_role_of_ours_is_more_than_a_role(db: Inhabited, role: str) -> None:
    rows = await db.as_role(
        role,
        "select rolsuper, rolbypassrls, rolcreaterole, rolcreatedb, rolreplication,"
        " exists (select from pg_auth_members m where m.member = r.oid),"
        " has_parameter_privilege(r.oid, 'session_replication_role', 'set')"
        " from pg_roles r where rolname = current_user",
    )
    assert rows == [(False,) * 7]


@pytest.mark.parametrize("role", ["app", "platform", "sealer"])
async def test_the_services_roles_own_nothing_and_make_nothing(db: Inhabited, role: str) -> None:
    owning = "select objid from pg_shdepend where refobjid = current_user::regrole and deptype = 'o'"
    assert await db.as_role(role, owning) == []
    attempts = (
        "create table own (id integer)",
        "create function own() returns integer language sql as 'select 1'",
        "create schema own",
        "alter table users disable row level security",
        "alter table audit_events disable trigger append_only",
        "drop policy one_tenant on users",
        "set session_replication_role = replica",
        f"set role {db.service.urls.sealer_role if role == 'app' else db.service.urls.app_role}",
    )
    for statement in attempts:
        assert await db.sqlstate(role, statement) == REFUSED, statement


# Every table


_UNFORCED: Final = """
select relname::text from pg_class
where relnamespace = current_schema()::regnamespace and relkind in ('r', 'p') and not relispartition
  and not (relrowsecurity and relforcerowsecurity)
"""


async def test_row_level_security_is_forced_on_every_table(db: Inhabited) -> None:
    assert {name for (name,) in await db.as_role("owner", _UNFORCED)} == SHARED
    async with connected(db.service.urls.owner or "") as connection:
        await connection.execute(text("create table planted (tenant_id uuid)"))
        found = (await connection.scalars(text(_UNFORCED))).all()
    assert set(found) == SHARED | {"planted"}, "the control: a table that forgets it is found"


async def test_every_table_is_bound_to_the_tenant_that_is_set(db: Inhabited) -> None:
    rows = await db.as_role(
        "owner", "select tablename::text, qual, with_check from pg_policies where policyname = 'one_tenant'"
    )
    assert sorted(table for table, _, _ in rows) == sorted(metadata.tables)
    for table, seen, written in rows:
        assert seen == written
        assert seen.startswith(f"({owned(table)} = ")
        assert "app.tenant_id" in seen


async def test_what_runs_as_the_owner_looks_nowhere_else(db: Inhabited) -> None:
    rows = await db.as_role("owner", "select proname::text, proconfig::text from pg_proc where prosecdef")
    assert sorted(name for name, _ in rows) == [
        "bulkhead_defer_run",
        "bulkhead_delete_erased",
        "bulkhead_drop_empty_partitions",
        "bulkhead_drop_run_events",
        "bulkhead_empty_conversation",
        "bulkhead_enqueue_events",
        "bulkhead_ensure_partitions",
        "bulkhead_erase_tenant",
        "bulkhead_erase_user",
        "bulkhead_prune_audit",
        "bulkhead_refuse_erased",
        "bulkhead_refuse_erased_user",
    ]
    assert all("search_path=pg_catalog" in settings for _, settings in rows)


# Audit events


@pytest.fixture(scope="module")
async def partitions(db: Inhabited) -> list[str]:
    rows = await db.as_role(
        "owner", "select inhrelid::regclass::text from pg_inherits where inhparent = 'audit_events'::regclass"
    )
    return sorted(name for (name,) in rows)


CHANGES: Final = ["update {} set body = '{{}}'", "delete from {}", "truncate {}"]


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("role", ["app", "platform", "sealer", "owner"])
async def test_audit_events_are_append_only_for_every_role(
    db: Inhabited, partitions: list[str], role: str, change: str
) -> None:
    assert await db.sqlstate(role, change.format("audit_events"), tenant=db.a) == REFUSED
    this_month = f"audit_events_{datetime.now(UTC):%Y_%m}"
    assert await db.sqlstate(role, change.format(this_month), tenant=db.a) == REFUSED
    for partition in partitions:
        assert await db.sqlstate(role, f"truncate {partition}") == REFUSED


async def test_no_cascade_empties_the_audit_record(db: Inhabited) -> None:
    assert await db.sqlstate("owner", "truncate tenants cascade") == REFUSED
    assert await db.sqlstate("owner", "delete from tenants where id = :id", tenant=db.a, id=uuid.UUID(db.a.id)) in {
        FOREIGN_KEY,
        REFUSED,
    }


@pytest.mark.parametrize("change", CHANGES)
async def test_it_is_the_trigger_that_keeps_the_owner_from_changing_events(db: Inhabited, change: str) -> None:
    """The control: without it the owner's statement goes through."""
    async with connected(db.service.urls.owner or "") as connection:
        await connection.execute(text("select set_config('app.tenant_id', :id, true)"), {"id": db.a.id})
        await connection.execute(text("alter table audit_events disable trigger user"))
        names = "select inhrelid::regclass::text from pg_inherits where inhparent = 'audit_events'::regclass"
        for name in (await connection.scalars(text(names))).all():
            await connection.execute(text(f"alter table {name} disable trigger user"))
        await connection.execute(text(change.format("audit_events")))


async def test_no_partition_can_be_reached_past_the_table(db: Inhabited, partitions: list[str]) -> None:
    for partition in partitions:
        for role in ("app", "platform", "sealer"):
            assert await db.sqlstate(role, READ.format(partition), tenant=db.a) == REFUSED


async def test_the_partitions_of_this_month_and_the_next_are_there_and_used(
    db: Inhabited, partitions: list[str]
) -> None:
    today = datetime.now(UTC)
    following = (today.replace(day=1) + timedelta(days=32)).strftime("%Y_%m")
    assert {f"audit_events_{today:%Y_%m}", f"audit_events_{following}"} <= set(partitions)
    used = await db.as_role("owner", "select distinct tableoid::regclass::text from audit_events", tenant=db.a)
    assert used == [(f"audit_events_{today:%Y_%m}",)]


async def test_partitions_are_made_for_the_platform_alone(db: Inhabited) -> None:
    assert await db.sqlstate("app", "select bulkhead_ensure_partitions(30)") == REFUSED
    async with connected(db.service.urls.platform) as connection:
        for _ in range(2):  # what is there stays as it is
            await connection.execute(text("select bulkhead_ensure_partitions(30)"))
        made = "select count(*) from pg_inherits where inhparent = 'audit_events'::regclass"
        assert (await connection.scalar(text(made)) or 0) >= 31
        named = "select relname::text from pg_class where relname like 'audit_events%' and relkind = 'r' order by 1"
        newest = (await connection.scalars(text(named))).all()[-2]  # the last is audit_events_rest
        triggers = text("select count(*) from pg_trigger where tgrelid = cast(:name as regclass) and not tgisinternal")
        # No update, no deletion but by pruning, no truncation.
        assert await connection.scalar(triggers, {"name": newest}) == 3


# Migrations


def test_the_models_and_the_migrations_agree_and_both_ways_work(databases: Databases) -> None:
    urls = databases()
    migration.check(urls)
    command.downgrade(migration._config(urls), "base")
    left = "select tablename::text from pg_tables where schemaname = current_schema()"
    assert asyncio.run(_names(urls, left)) == {"alembic_version"}
    ours = "select proname::text from pg_proc where pronamespace = current_schema()::regnamespace"
    assert asyncio.run(_names(urls, ours)) == set()
    with pytest.raises(CommandError):
        migration.check(urls)
    migration.upgrade(urls)
    migration.check(urls)
    assert set(TABLES) <= asyncio.run(_names(urls, left))


async def _names(urls: DatabaseUrls, query: str) -> set[str]:
    async with connected(urls.owner or "") as connection:
        return set((await connection.scalars(text(query))).all())
