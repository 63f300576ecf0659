"""The tables of audit events and of the chain over them."""

from __future__ import annotations

from datetime import datetime
from uuid import UUID

from sqlalchemy import BigInteger, CheckConstraint, Computed, ForeignKey, Index, UniqueConstraint, func, text
from sqlalchemy.orm import Mapped, mapped_column

from app.db import Base


class AuditEvent(Base):
    """What happened, as canonical JSON text in `body`; the other columns repeat parts of it to search by."""

    __tablename__ = "audit_events"
    __table_args__ = (
        Index("ix_audit_events_tenant_id_run_id_id", "tenant_id", "run_id", "id"),
        Index("ix_audit_events_tenant_id_actor_id_id", "tenant_id", "actor_id", "id"),
        Index("ix_audit_events_tenant_id_type_id", "tenant_id", "type", "id"),
        Index(
            "ix_audit_events_tenant_id_tool_id", "tenant_id", "tool", "id", postgresql_where=text("tool is not null")
        ),
        Index(
            "ix_audit_events_tenant_id_decision_id",
            "tenant_id",
            "decision",
            "id",
            postgresql_where=text("decision <> 'allowed'"),
        ),
        {"postgresql_partition_by": "RANGE (at)"},
    )

    tenant_id: Mapped[UUID] = mapped_column(ForeignKey("tenants.id"), primary_key=True)
    id: Mapped[UUID] = mapped_column(primary_key=True)
    at: Mapped[datetime] = mapped_column(primary_key=True)
    type: Mapped[str]
    actor_id: Mapped[UUID | None]
    run_id: Mapped[UUID | None]
    body: Mapped[str]
    tool: Mapped[str | None] = mapped_column(Computed("body::jsonb -> 'data' ->> 'tool'", persisted=True))
    decision: Mapped[str | None] = mapped_column(Computed("body::jsonb -> 'data' ->> 'decision'", persisted=True))


class PendingEvent(Base):
    """An event that is not chained yet: a trigger adds it with the event, the sealer takes it away."""

    __tablename__ = "audit_pending"

    tenant_id: Mapped[UUID] = mapped_column(primary_key=True)
    event_id: Mapped[UUID] = mapped_column(primary_key=True)
    at: Mapped[datetime]


class Link(Base):
    """A link of a tenant's chain. It outlives its event, and names it without a foreign key."""

    __tablename__ = "audit_chain"
    __table_args__ = (UniqueConstraint("tenant_id", "event_id"), CheckConstraint("seq >= 1", name="begins_at_one"))

    tenant_id: Mapped[UUID] = mapped_column(primary_key=True)
    seq: Mapped[int] = mapped_column(BigInteger, primary_key=True, autoincrement=False)
    event_id: Mapped[UUID]
    event_at: Mapped[datetime]
    body_digest: Mapped[bytes]
    hash: Mapped[bytes]
    sealed_at: Mapped[datetime] = mapped_column(server_default=func.now())


class SignedHead(Base):
    """What the sealer signed at the end of a batch: the chain up to `seq`."""

    __tablename__ = "audit_heads"

    tenant_id: Mapped[UUID] = mapped_column(ForeignKey("tenants.id"), primary_key=True)
    seq: Mapped[int] = mapped_column(BigInteger, primary_key=True, autoincrement=False)
    hash: Mapped[bytes]
    signed_at: Mapped[datetime]
    key_id: Mapped[str]
    signature: Mapped[bytes]


class Checkpoint(Base):
    """Where a pruned chain begins: after the link `seq`, which is deleted with all before it once this is there."""

    __tablename__ = "audit_checkpoints"

    tenant_id: Mapped[UUID] = mapped_column(ForeignKey("tenants.id"), primary_key=True)
    seq: Mapped[int] = mapped_column(BigInteger, primary_key=True, autoincrement=False)
    hash: Mapped[bytes]
    pruned_at: Mapped[datetime]
    key_id: Mapped[str]
    signature: Mapped[bytes]
