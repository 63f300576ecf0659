"""Tenants by the thousand: sealed, hashed and written down as the service does it, copied into its database at once."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final
from uuid import UUID

import asyncpg
from sqlalchemy import make_url

from app.auth import keys as api_keys
from app.db import new_id
from app.embedded.demo import read_env
from app.embedded.machine import OWN_FILE
from app.embedded.postgres import EmbeddedPostgres
from app.keyring import Keyring, SecretKey
from app.policies import document as documents
from app.tenants import keys

_DATABASE: Final = "bulkhead"
_VERSION: Final = 1
# Two lines are each tenant's own, so that no two of them share a policy.
_OWN: Final = {"the tenant's documents": "the documents of tenant NUMBER", "drafts": "drafts-NUMBER"}
_COLUMNS: Final = {
    "tenants": ("id", "slug", "key_id", "wrapped_key"),
    "users": ("tenant_id", "id", "name", "role", "wrapped_key"),
    "api_keys": ("tenant_id", "id", "user_id", "name", "lookup", "mac_key_id", "mac"),
    "policy_versions": ("tenant_id", "version", "document", "digest", "created_by"),
    "published_policies": ("tenant_id", "version", "pinned_tools", "published_by"),
    "policy_publications": ("tenant_id", "id", "version", "published_by"),
}
_DEMO_TOOLS: Final = "select pinned_tools from published_policies where tenant_id = $1"

Rows = dict[str, list[tuple[Any, ...]]]


@dataclass(frozen=True, slots=True)
class Inhabitant:
    """A tenant, and the keys of its admin and of its user."""

    id: UUID
    admin_key: str = field(repr=False)
    user_key: str = field(repr=False)


class Population:
    """The database of a service that `bulkhead up` runs on `data`, and that has published this policy."""

    def __init__(self, data: Path, tenant_id: str, policy: str) -> None:
        self._url = make_url(EmbeddedPostgres(data / "postgres").url("postgres", _DATABASE))
        self._keyring = Keyring.parse(read_env(data / OWN_FILE)["ROOT_KEYS"])
        self._model = UUID(tenant_id)
        self._policy = policy

    async def settle(self, count: int) -> Sequence[Inhabitant]:
        """Make so many tenants, each with two users, two keys and a policy of its own, whose tools are the demo's."""
        connection = await self.connect()
        try:
            tools = await connection.fetchval(_DEMO_TOOLS, self._model)
            made, rows = await asyncio.to_thread(self._make, count, tools)
            async with connection.transaction():
                for table, columns in _COLUMNS.items():
                    await connection.copy_records_to_table(table, records=rows[table], columns=columns)
            await connection.execute("analyze")
        finally:
            await connection.close()
        return made

    async def connect(self) -> asyncpg.Connection:
        """As Postgres' superuser: for what no role that serves may see."""
        user, password, host = self._url.username, self._url.password, str(self._url.query["host"])
        return await asyncpg.connect(user=user, password=password, database=_DATABASE, host=host, port=5432, ssl=False)

    def _make(self, count: int, tools: str) -> tuple[list[Inhabitant], Rows]:
        rows: Rows = {table: [] for table in _COLUMNS}
        return [self._one(number, tools, rows) for number in range(count)], rows

    def _one(self, number: int, tools: str, rows: Rows) -> Inhabitant:
        tenant_id, key = new_id(), SecretKey.generate()
        sealed = keys.wrap_tenant_key(self._keyring, key, tenant_id=tenant_id)
        rows["tenants"].append((tenant_id, f"tenant-{number}", sealed.key_id, sealed.blob))
        admin_id, admin_key = self._user(tenant_id, key, "tenant_admin", rows)
        _, user_key = self._user(tenant_id, key, "user", rows)
        text = self._policy
        for told, own in _OWN.items():
            text = text.replace(told, own.replace("NUMBER", str(number)))
        rows["policy_versions"].append((tenant_id, _VERSION, text, documents.digest(text), admin_id))
        rows["published_policies"].append((tenant_id, _VERSION, tools, admin_id))
        rows["policy_publications"].append((tenant_id, new_id(), _VERSION, admin_id))
        return Inhabitant(tenant_id, admin_key, user_key)

    def _user(self, tenant_id: UUID, key: SecretKey, role: str, rows: Rows) -> tuple[UUID, str]:
        user_id, plain = new_id(), api_keys.mint()
        wrapped = keys.wrap_user_key(key, SecretKey.generate(), user_id=user_id)
        mac = api_keys.fingerprint(self._keyring, plain)
        rows["users"].append((tenant_id, user_id, role, role, wrapped))
        rows["api_keys"].append((tenant_id, new_id(), user_id, role, plain.lookup, mac.key_id, mac.digest))
        return user_id, plain.text

    async def sizes(self) -> dict[str, int]:
        """Bytes of each table with its indexes, and of all that was ever written ahead."""
        connection = await self.connect()
        try:
            found = await connection.fetch(_SIZES)
        finally:
            await connection.close()
        return {row["name"]: row["bytes"] for row in found}

    async def connections(self) -> dict[str, int]:
        """Of each role, ours left out."""
        connection = await self.connect()
        try:
            found = await connection.fetch(_CONNECTIONS)
        finally:
            await connection.close()
        return {row["name"]: row["number"] for row in found}


_CONNECTIONS: Final = """
select usename::text as name, count(*)::int as number from pg_stat_activity
where usename is not null and backend_type = 'client backend' and pid <> pg_backend_pid() group by 1 order by 1
"""
# Partitions in the sum of their table.
_SIZES: Final = """
select coalesce(parent.relname, c.relname)::text as name, sum(pg_total_relation_size(c.oid))::bigint as bytes
from pg_class c join pg_namespace n on n.oid = c.relnamespace
left join pg_inherits i on i.inhrelid = c.oid
left join pg_class parent on parent.oid = i.inhparent
where n.nspname in ('public', 'bulkhead_jobs') and c.relkind = 'r'
group by 1
union all select 'WAL', pg_wal_lsn_diff(pg_current_wal_lsn(), '0/0')::bigint
order by 1
"""
