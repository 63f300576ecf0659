"""Whether the database keeps what the roles and row-level security promise: by trying what must not be possible."""

from __future__ import annotations

import time
from datetime import UTC, datetime
from typing import Any, Final
from uuid import uuid4

from sqlalchemy import make_url, text
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import AsyncConnection

from app import migration, roles
from app.caller import PLATFORM_TENANT
from app.checklist.findings import Item, Verdict, counted, failed, judged, passed, warned
from app.checklist.ground import ROLES, Ground, is_local
from app.runs.dispatch import DEAD_AFTER_S

_TABLES: Final = text("""
select c.relname as name, c.relrowsecurity and c.relforcerowsecurity as is_forced,
    exists (select from pg_attribute where attrelid = c.oid and attname = 'tenant_id') as has_tenant,
    has_table_privilege(c.oid, 'select') or has_any_column_privilege(c.oid, 'select') as is_readable
from pg_class c
where c.relnamespace = (select relnamespace from pg_class where oid = 'tenants'::regclass)
    and c.relkind in ('r', 'p') and not c.relispartition and c.relname <> 'alembic_version'
order by c.relname
""")
# What must not be possible, by the role that tries; none finds a row to change.
_FORBIDDEN: Final = (
    ("app", "update audit_events set type = type where false"),
    ("app", "delete from audit_events where false"),
    ("app", "truncate audit_events"),
    ("app", "update audit_chain set seq = seq where false"),
    ("app", "delete from audit_heads where false"),
    ("platform", "update audit_events set type = type where false"),
    ("platform", "delete from audit_events where false"),
    ("sealer", "update audit_events set type = type where false"),
    ("sealer", "update audit_chain set seq = seq where false"),
    ("sealer", "update audit_heads set seq = seq where false"),
)
_VERSION: Final = text("select to_jsonb(v) from alembic_version v")  # whole, since only newer ones have `works_from`
_NOW: Final = text("select clock_timestamp()")
_TLS: Final = text("select ssl, inet_server_addr() is null as is_socket from pg_stat_ssl where pid = pg_backend_pid()")
_ARCHIVED: Final = text("select last_archived_time, last_failed_time from pg_stat_archiver")
_QUEUED: Final = text("""
select count(*) as waiting, coalesce(extract(epoch from max(now() - deferred_at)), 0)::float as wait_s,
    (select count(*) from bulkhead_jobs.procrastinate_workers
     where last_heartbeat > now() - make_interval(secs => :dead_after_s)) as workers
from runs where state = 'queued'
""")
_SET_TENANT: Final = text("select set_config('app.tenant_id', :tenant_id, true)")
_DENIED: Final = "42501"
_SKEW_S: Final = 1.0
_PATIENCE_S: Final = 60


async def _roles(ground: Ground) -> Verdict:
    faults, names = [], set()
    for role in ROLES:
        async with ground.database.as_role(role) as connection:
            found = await roles.examine(connection)
        names.add(found.name)
        faults += [f"the role {role} {fault}" for fault in found.faults]
        if found.makes_databases:
            faults.append(f"the role {role} makes databases")
    if len(names) < len(ROLES):
        faults.append("two of the roles are the same")
    return judged(faults, "Three roles, none of them a superuser, an owner, or past row-level security.")


async def _row_security(ground: Ground) -> Verdict:
    async with ground.database.as_role("app") as connection:
        tables = (await connection.execute(_TABLES)).all()
        faults = [f"row-level security is not forced on {table.name}" for table in tables if not table.is_forced]
        readable = [table for table in tables if table.is_readable]
        shown = [table.name for table in readable if await _shows_a_row(connection, table)]
        await connection.execute(_SET_TENANT, {"tenant_id": str(uuid4())})
        strange = [table.name for table in readable if await _shows_a_row(connection, table)]
    faults += [f"{name} shows rows to a connection without a tenant" for name in shown]
    faults += [f"{name} shows rows of other tenants to a tenant" for name in strange if name not in shown]
    if not readable:
        faults.append("the role app reads no table")
    shows = f"neither without a tenant nor to a new one {len(readable)} that can be read show a row"
    return judged(faults, f"{len(tables)} tables; {shows}.")


async def _shows_a_row(connection: AsyncConnection, table: Any) -> bool:
    """The platform's own rows, such as a switch that stops everything, are for everybody."""
    column = "tenant_id" if table.has_tenant else "id"
    query = text(f'select exists (select from "{table.name}" where {column} <> :platform)')  # noqa: S608  of the catalogue
    return bool(await connection.scalar(query, {"platform": PLATFORM_TENANT}))


async def _append_only(ground: Ground) -> Verdict:
    faults = []
    for role, statement in _FORBIDDEN:
        async with ground.database.as_role(role) as connection:
            try:
                await connection.execute(text(statement))
            except DBAPIError as error:
                if getattr(error.orig, "sqlstate", None) != _DENIED:
                    raise
            else:
                faults.append(f"the role {role} may {' '.join(statement.split()[:3])}")
    return judged(faults, f"{len(_FORBIDDEN)} attempts to change the record were refused by the database.")


async def _schema(ground: Ground) -> Verdict:
    (told,) = (await ground.database.rows("platform", _VERSION))[0]
    version = told.get("version_num")
    if reason := migration.refusal(version, told.get("works_from")):
        return failed(reason)
    if version != migration.head():
        return warned(f"The schema is {version}, newer than this code, which works on it.", "Upgrade what serves, too.")
    return passed(f"The schema is {version}, which this version makes.")


async def _clock(ground: Ground) -> Verdict:
    """Half of the round trip is taken off: the database may be far."""
    async with ground.database.as_role("app") as connection:
        await connection.execute(_NOW)  # so that the connection is there
        began, before = time.monotonic(), datetime.now(UTC)
        theirs: datetime = (await connection.execute(_NOW)).scalar_one()
        trip_s = time.monotonic() - began
    skew_s = abs((theirs - before).total_seconds() - trip_s / 2)
    if skew_s > _SKEW_S + trip_s:
        return failed(f"The database's clock and this host's differ by {skew_s:.1f} s.")
    return passed(f"The database's clock and this host's agree to {max(skew_s, 0.001):.3f} s.")


async def _link(ground: Ground) -> Verdict:
    """As each connection really is, and whether its URL lets it be anything less."""
    faults, plain = [], False
    urls = {"app": ground.urls.app, "platform": ground.urls.platform, "sealer": ground.urls.sealer}
    for role, url in urls.items():
        (found,) = await ground.database.rows(role, _TLS)
        if found.is_socket:
            continue
        if not found.ssl and is_local(_host(url)):
            plain = True
        elif not found.ssl or make_url(url).query.get("ssl") != "verify-full":
            faults.append(f"the role {role} connects without TLS that verifies whose certificate it is")
    if plain and not faults:
        return warned("The database is reached over loopback without TLS.", "Use its socket, or ssl=verify-full.")
    return judged(faults, "A socket, or TLS that verifies whose certificate it is.")


def _host(url: str) -> str:
    parsed = make_url(url)
    host = parsed.host or parsed.query.get("host") or ""
    return host if isinstance(host, str) else host[0]


async def _owner_apart(ground: Ground) -> Verdict:
    if ground.settings.database_owner_url is None:
        return passed("What serves does not know the owner's password.")
    told = "BULKHEAD_DATABASE_OWNER_URL is set where this runs; only migrations need it."
    return failed(told) if ground.is_open else warned(told)


async def _backups(ground: Ground) -> Verdict:
    archived, broken = (await ground.database.rows("app", _ARCHIVED))[0]
    if broken is not None and (archived is None or broken > archived):
        return failed("The database's last attempt to archive its log has failed.")
    if archived is not None:
        return passed(f"The database archives its log, the last time at {archived:%Y-%m-%d %H:%M}Z.")
    return warned("The database archives no log. Whether it is backed up otherwise cannot be known here.")


async def _workers(ground: Ground) -> Verdict:
    (found,) = await ground.database.rows("platform", _QUEUED, dead_after_s=DEAD_AFTER_S)
    waiting, alive = counted(found.waiting, "background run"), counted(found.workers, "worker")
    if found.waiting and not found.workers:
        return failed(f"Waiting: {waiting}, and no worker lives.")
    if found.wait_s > _PATIENCE_S:
        return warned(f"A background run waits for {found.wait_s:.0f} s. Alive: {alive}.")
    return passed(f"Waiting: {waiting}. Alive: {alive}.")


ITEMS: Final = (
    Item(
        "database-roles",
        (5,),
        "The service's roles can do no more than they need",
        "Make the roles as `bulkhead db roles` prints them, and run `bulkhead migrate` as the owner.",
        _roles,
    ),
    Item(
        "row-security",
        (5,),
        "No table shows a row to a connection without a tenant",
        "Stop the service and run `bulkhead migrate` as the owner role: somebody has changed the tables.",
        _row_security,
    ),
    Item(
        "record-append-only",
        (9,),
        "No role of the service can change the record",
        "Run `bulkhead migrate` as the owner role, and take away what was granted beside it.",
        _append_only,
    ),
    Item("schema-version", (16,), "The schema is this version's", "Run `bulkhead migrate` as the owner role.", _schema),
    Item("clock", (9,), "The database's clock and this host's agree", "Let both follow the same time service.", _clock),
    Item(
        "database-link",
        (5, 12),
        "The database is reached by a socket or over verified TLS",
        "Add ?ssl=verify-full to the URLs, and trust the authority of its certificate.",
        _link,
    ),
    Item(
        "owner-apart",
        (1, 5),
        "What serves does not hold the owner's password",
        "Set BULKHEAD_DATABASE_OWNER_URL for `bulkhead migrate` alone.",
        _owner_apart,
    ),
    Item(
        "backups",
        (),
        "The database is backed up",
        "Archive the database's log (archive_mode), or back it up otherwise, and try the restore: docs/operations.md.",
        _backups,
    ),
    Item("workers", (), "Where background runs wait, a worker lives", "Start `bulkhead worker`.", _workers),
)
