"""The table of audit events."""

from __future__ import annotations

from datetime import datetime
from uuid import UUID

from sqlalchemy import ForeignKey, Index
from sqlalchemy.orm import Mapped, mapped_column

from app.db import Base


class AuditEvent(Base):
    """What happened, as canonical JSON text in `body`; the other columns repeat parts of it to search by."""

    __tablename__ = "audit_events"
    __table_args__ = (
        Index("ix_audit_events_tenant_id_run_id", "tenant_id", "run_id"),
        {"postgresql_partition_by": "RANGE (at)"},
    )

    tenant_id: Mapped[UUID] = mapped_column(ForeignKey("tenants.id"), primary_key=True)
    id: Mapped[UUID] = mapped_column(primary_key=True)
    at: Mapped[datetime] = mapped_column(primary_key=True)
    type: Mapped[str]
    actor_id: Mapped[UUID | None]
    run_id: Mapped[UUID | None]
    body: Mapped[str]
