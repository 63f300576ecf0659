"""What a role of the database may do that no row-level security holds, itself or by a role that it may become."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncConnection

# A role that makes roles may make itself a member of the owner.
_RIGHTS: Final = text("""
select current_user as name,
    bool_or(r.rolsuper) as is_superuser,
    bool_or(r.rolbypassrls) as bypasses,
    bool_or(r.rolcreaterole) as makes_roles,
    bool_or(r.rolcreatedb) as makes_databases,
    bool_or(r.rolreplication) as copies,
    bool_or(r.rolname in ('pg_execute_server_program', 'pg_read_server_files', 'pg_write_server_files')) as has_files,
    exists (
        select from pg_class c join pg_namespace n on n.oid = c.relnamespace
        where c.relkind in ('r', 'p') and n.nspname <> 'information_schema' and n.nspname not like 'pg\\_%'
            and pg_has_role(current_user, c.relowner, 'member')
    ) as is_owner
from pg_roles r where pg_has_role(current_user, r.oid, 'member')
""")


@dataclass(frozen=True, slots=True)
class Role:
    """`faults` are what it is or does, as the end of a sentence about it, for each way past row-level security."""

    name: str
    faults: tuple[str, ...]
    makes_databases: bool


async def examine(connection: AsyncConnection) -> Role:
    """The role that the connection has."""
    found = (await connection.execute(_RIGHTS)).one()
    faults = {
        "is a superuser, or may become one": found.is_superuser,
        "has BYPASSRLS, or may become a role that has": found.bypasses,
        "owns tables, or may become their owner": found.is_owner,
        "makes roles, so it may become their owner": found.makes_roles,
        "has REPLICATION, so it may copy the whole of the server": found.copies,
        "reaches the files or programs of the database's server": found.has_files,
    }
    return Role(found.name, tuple(words for words, holds in faults.items() if holds), found.makes_databases)
