"""The table of quarantined servers."""

from __future__ import annotations

from datetime import datetime
from typing import Any
from uuid import UUID

from sqlalchemy import CheckConstraint, ForeignKeyConstraint, Index, func, text
from sqlalchemy.dialects.postgresql import JSONB
from sqlalchemy.orm import Mapped, mapped_column

from app.db import Base


class Quarantine(Base):
    """A server that declares other tools than were pinned, from when it was found until an admin has decided.

    `found` is what it declared when it was last looked at, `digest` the digest of that.
    """

    __tablename__ = "quarantines"
    __table_args__ = (
        ForeignKeyConstraint(["tenant_id"], ["tenants.id"]),
        ForeignKeyConstraint(["tenant_id", "resolved_by"], ["users.tenant_id", "users.id"]),
        CheckConstraint("resolution in ('accepted', 'dismissed', 'superseded')", name="resolution"),
        CheckConstraint("(resolution is null) = (resolved_at is null)", name="resolved"),
        Index(
            "uq_quarantines_tenant_id_server",
            "tenant_id",
            "server",
            unique=True,
            postgresql_where=text("resolution is null"),
        ),
    )

    tenant_id: Mapped[UUID] = mapped_column(primary_key=True)
    id: Mapped[UUID] = mapped_column(primary_key=True)
    server: Mapped[str]
    policy_version: Mapped[int]
    found: Mapped[list[dict[str, Any]]] = mapped_column(JSONB)
    digest: Mapped[str]
    found_at: Mapped[datetime] = mapped_column(server_default=func.now())
    resolution: Mapped[str | None]
    resolved_by: Mapped[UUID | None]
    resolved_at: Mapped[datetime | None]
