"""Tables of runs: the run, its journal of tool calls, and its sealed content."""

from __future__ import annotations

from datetime import datetime
from uuid import UUID

from sqlalchemy import CheckConstraint, ForeignKeyConstraint, Index, LargeBinary, func, text
from sqlalchemy.orm import Mapped, mapped_column

from app.db import Base


class Run(Base):
    """One query on its way. `lease_until` is by the database's clock; past it the run's process is dead.

    `role` is its user's as the run began; runs of before it was kept have none.
    """

    __tablename__ = "runs"
    __table_args__ = (
        ForeignKeyConstraint(["tenant_id", "user_id"], ["users.tenant_id", "users.id"]),
        ForeignKeyConstraint(["tenant_id", "key_id"], ["api_keys.tenant_id", "api_keys.id"]),
        ForeignKeyConstraint(["tenant_id", "policy_version"], ["policy_versions.tenant_id", "policy_versions.version"]),
        CheckConstraint(
            "state in ('running', 'waiting_approval', 'succeeded', 'failed', 'denied', 'cancelled',"
            " 'timed_out', 'interrupted')",
            name="state",
        ),
        CheckConstraint("role in ('platform_admin', 'tenant_admin', 'auditor', 'user')", name="role"),
        Index("ix_runs_lease_until", "lease_until", postgresql_where=text("state = 'running'")),
        Index("ix_runs_tenant_id_user_id_id", "tenant_id", "user_id", "id"),
        Index("ix_runs_tenant_id_conversation_id", "tenant_id", "conversation_id"),
    )

    tenant_id: Mapped[UUID] = mapped_column(primary_key=True)
    id: Mapped[UUID] = mapped_column(primary_key=True)
    user_id: Mapped[UUID]
    role: Mapped[str | None]
    key_id: Mapped[UUID | None]
    conversation_id: Mapped[UUID | None]
    policy_version: Mapped[int]
    state: Mapped[str]
    code: Mapped[str | None]
    cancel_cause: Mapped[str | None]
    model: Mapped[str]
    input_tokens: Mapped[int] = mapped_column(server_default="0")
    output_tokens: Mapped[int] = mapped_column(server_default="0")
    lease_until: Mapped[datetime | None]
    created_at: Mapped[datetime] = mapped_column(server_default=func.now())
    finished_at: Mapped[datetime | None]


class ToolCall(Base):
    """A line of the journal: the intent is committed before the call, the outcome after it."""

    __tablename__ = "tool_calls"
    __table_args__ = (
        ForeignKeyConstraint(["tenant_id", "run_id"], ["runs.tenant_id", "runs.id"]),
        CheckConstraint("decision in ('allowed', 'denied')", name="decision"),
        CheckConstraint("outcome in ('succeeded', 'failed', 'timed_out', 'denied', 'unknown')", name="outcome"),
    )

    tenant_id: Mapped[UUID] = mapped_column(primary_key=True)
    run_id: Mapped[UUID] = mapped_column(primary_key=True)
    sequence: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    tool: Mapped[str]
    decision: Mapped[str]
    rule: Mapped[str]
    outcome: Mapped[str | None]
    duration_ms: Mapped[int | None]
    created_at: Mapped[datetime] = mapped_column(server_default=func.now())


class Content(Base):
    """Text of a run, sealed with its user's data key: a query, arguments, a result, an answer."""

    __tablename__ = "contents"
    __table_args__ = (
        ForeignKeyConstraint(["tenant_id", "run_id"], ["runs.tenant_id", "runs.id"]),
        CheckConstraint("kind in ('query', 'arguments', 'result', 'answer')", name="kind"),
    )

    tenant_id: Mapped[UUID] = mapped_column(primary_key=True)
    run_id: Mapped[UUID] = mapped_column(primary_key=True)
    kind: Mapped[str] = mapped_column(primary_key=True)
    sequence: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    sealed: Mapped[bytes] = mapped_column(LargeBinary)
