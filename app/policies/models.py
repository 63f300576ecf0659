"""Tables of policies: versions, what was found out about them, the published pointer, and the kill switches."""

from __future__ import annotations

from datetime import datetime
from typing import Any
from uuid import UUID

from sqlalchemy import CheckConstraint, ForeignKeyConstraint, Index, func
from sqlalchemy.dialects.postgresql import JSONB
from sqlalchemy.orm import Mapped, mapped_column

from app.db import Base


class PolicyVersion(Base):
    """A document as its author wrote it; never changed."""

    __tablename__ = "policy_versions"
    __table_args__ = (
        ForeignKeyConstraint(["tenant_id"], ["tenants.id"]),
        ForeignKeyConstraint(["tenant_id", "created_by"], ["users.tenant_id", "users.id"]),
    )

    tenant_id: Mapped[UUID] = mapped_column(primary_key=True)
    version: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    document: Mapped[str]
    digest: Mapped[str]
    created_by: Mapped[UUID]
    created_at: Mapped[datetime] = mapped_column(server_default=func.now())


class PublishedPolicy(Base):
    """Which version holds, and the tool definitions that its servers had when it was published."""

    __tablename__ = "published_policies"
    __table_args__ = (
        ForeignKeyConstraint(["tenant_id", "version"], ["policy_versions.tenant_id", "policy_versions.version"]),
        ForeignKeyConstraint(["tenant_id", "published_by"], ["users.tenant_id", "users.id"]),
    )

    tenant_id: Mapped[UUID] = mapped_column(primary_key=True)
    version: Mapped[int]
    pinned_tools: Mapped[list[dict[str, Any]]] = mapped_column(JSONB)
    pinned_at: Mapped[datetime] = mapped_column(server_default=func.now())
    published_by: Mapped[UUID]
    published_at: Mapped[datetime] = mapped_column(server_default=func.now())


class PolicyCheck(Base):
    """The tools that a version's servers had when it was last checked; what it would be compiled against."""

    __tablename__ = "policy_checks"
    __table_args__ = (
        ForeignKeyConstraint(["tenant_id", "version"], ["policy_versions.tenant_id", "policy_versions.version"]),
        ForeignKeyConstraint(["tenant_id", "checked_by"], ["users.tenant_id", "users.id"]),
    )

    tenant_id: Mapped[UUID] = mapped_column(primary_key=True)
    version: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    tools: Mapped[list[dict[str, Any]]] = mapped_column(JSONB)
    checked_by: Mapped[UUID]
    checked_at: Mapped[datetime] = mapped_column(server_default=func.now())


class PolicyPublication(Base):
    """A line of the log of what has held: `replaced` is the version that held before, None the first time."""

    __tablename__ = "policy_publications"
    __table_args__ = (
        ForeignKeyConstraint(["tenant_id", "version"], ["policy_versions.tenant_id", "policy_versions.version"]),
        ForeignKeyConstraint(["tenant_id", "replaced"], ["policy_versions.tenant_id", "policy_versions.version"]),
        ForeignKeyConstraint(["tenant_id", "published_by"], ["users.tenant_id", "users.id"]),
    )

    tenant_id: Mapped[UUID] = mapped_column(primary_key=True)
    id: Mapped[UUID] = mapped_column(primary_key=True)
    version: Mapped[int]
    replaced: Mapped[int | None]
    published_by: Mapped[UUID]
    published_at: Mapped[datetime] = mapped_column(server_default=func.now())


class PolicyBacktest(Base):
    """A replay of recorded calls: `version` with the tools of `tools_digest`, instead of `against`, which held then.

    `is_full` says that nothing of the record was left out by choice or for want of time; `flipped` counts calls.
    `result` holds ids and names of ours.
    """

    __tablename__ = "policy_backtests"
    __table_args__ = (
        ForeignKeyConstraint(["tenant_id", "version"], ["policy_versions.tenant_id", "policy_versions.version"]),
        ForeignKeyConstraint(["tenant_id", "against"], ["policy_versions.tenant_id", "policy_versions.version"]),
        ForeignKeyConstraint(["tenant_id", "created_by"], ["users.tenant_id", "users.id"]),
        Index("ix_policy_backtests_tenant_id_version", "tenant_id", "version", "id"),
    )

    tenant_id: Mapped[UUID] = mapped_column(primary_key=True)
    id: Mapped[UUID] = mapped_column(primary_key=True)
    version: Mapped[int]
    against: Mapped[int]
    tools_digest: Mapped[str]
    is_full: Mapped[bool]
    flipped: Mapped[int]
    result: Mapped[dict[str, Any]] = mapped_column(JSONB)
    created_by: Mapped[UUID]
    created_at: Mapped[datetime] = mapped_column(server_default=func.now())


class KillSwitch(Base):
    """Stops a tool, a server, a tenant or, as a row of the platform's tenant, everything, until lifted."""

    __tablename__ = "kill_switches"
    __table_args__ = (
        ForeignKeyConstraint(["tenant_id"], ["tenants.id"]),
        CheckConstraint("scope in ('all', 'tenant', 'server', 'tool')", name="scope"),
        CheckConstraint("(scope in ('server', 'tool')) = (target is not null)", name="target"),
        CheckConstraint(
            "(scope = 'all') = (tenant_id = '00000000-0000-7000-8000-000000000000')",
            name="only_the_platform_stops_all",
        ),
    )

    tenant_id: Mapped[UUID] = mapped_column(primary_key=True)
    id: Mapped[UUID] = mapped_column(primary_key=True)
    scope: Mapped[str]
    target: Mapped[str | None]
    reason: Mapped[str]
    engaged_by: Mapped[UUID]
    engaged_at: Mapped[datetime] = mapped_column(server_default=func.now())
    lifted_at: Mapped[datetime | None]
