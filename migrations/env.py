"""Runs migrations as the owner role, on a connection given by the caller or on the owner's URL."""

from __future__ import annotations

import asyncio
from typing import Any

from alembic import context
from sqlalchemy import Connection, inspect, pool, text
from sqlalchemy.ext.asyncio import create_async_engine

from app.db import DatabaseUrls, database_urls
from app.settings import Settings
from app.tables import metadata


def _is_ours(_object: object, name: str | None, kind: str, *_rest: object) -> bool:
    # Partitions are made by bulkhead_ensure_partitions(), not by the models.
    return not (kind == "table" and name is not None and name.startswith(("audit_events_", "run_events_")))


def _say_what_works(*, heads: set[str], **_rest: Any) -> None:
    """After each migration, in its transaction. One that does not say so works with its own code alone."""
    connection = context.get_bind()
    if not any(column["name"] == "works_from" for column in inspect(connection).get_columns("alembic_version")):
        return
    for revision in heads:
        works_from = getattr(context.script.get_revision(revision).module, "works_from", revision)
        connection.execute(
            text("update alembic_version set works_from = :works_from where version_num = :revision"),
            {"works_from": works_from, "revision": revision},
        )


def _migrate(connection: Connection) -> None:
    context.configure(
        connection=connection,
        target_metadata=metadata,
        include_object=_is_ours,
        compare_server_default=False,
        transaction_per_migration=True,
        on_version_apply=_say_what_works,  # type: ignore[arg-type]  # it is called by keywords alone
    )
    with context.begin_transaction():
        context.run_migrations()


async def _migrate_by_url(url: str) -> None:
    engine = create_async_engine(url, poolclass=pool.NullPool)
    async with engine.connect() as connection:
        await connection.run_sync(_migrate)
    await engine.dispose()


def _owner_url() -> str:
    """Take the URLs that the caller gave, else the settings'; the roles' names come from the URLs."""
    urls: DatabaseUrls | None = context.config.attributes.get("urls") or database_urls(Settings())
    if urls is None or urls.owner is None:
        names = ", ".join(f"BULKHEAD_DATABASE_{role}_URL" for role in ("OWNER", "APP", "PLATFORM", "SEALER"))
        raise SystemExit(f"Set {names}: migrations run as the owner.")
    roles = {"app_role": urls.app_role, "platform_role": urls.platform_role, "sealer_role": urls.sealer_role}
    context.config.attributes |= roles
    return urls.owner


asyncio.run(_migrate_by_url(_owner_url()))
