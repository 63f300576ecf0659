"""Tables of policies: immutable versions, the published pointer, and the kill switches."""

from __future__ import annotations

from datetime import datetime
from typing import Any
from uuid import UUID

from sqlalchemy import CheckConstraint, ForeignKeyConstraint, func
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
    published_by: Mapped[UUID]
    published_at: Mapped[datetime] = mapped_column(server_default=func.now())


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
