"""Tables of runs: the run, its journal of tool calls, and its sealed content."""

from __future__ import annotations

from datetime import datetime
from uuid import UUID

from sqlalchemy import CheckConstraint, ForeignKeyConstraint, Index, LargeBinary, UniqueConstraint, func, text
from sqlalchemy.orm import Mapped, mapped_column

from app.db import Base


class Run(Base):
    """One query on its way. `lease_until` is by the database's clock; past it the run's process is dead.

    `role` is its user's as the run began; runs of before it was kept have none. Whoever claims a run counts `attempt`
    up, and writes no more once it has been counted up again; `deaths` are of processes that died with it.
    `unclaimed_s` is for how many seconds it was put off in all since claims of it fail; one that succeeds sets it back.
    `deferred_at` is set while a job of the queue is there for a queued run, whose `lease_until` is how long it is put
    off, and `watched_until` is how long somebody follows it.
    """

    __tablename__ = "runs"
    __table_args__ = (
        ForeignKeyConstraint(["tenant_id", "user_id"], ["users.tenant_id", "users.id"]),
        ForeignKeyConstraint(["tenant_id", "key_id"], ["api_keys.tenant_id", "api_keys.id"]),
        ForeignKeyConstraint(["tenant_id", "policy_version"], ["policy_versions.tenant_id", "policy_versions.version"]),
        CheckConstraint(
            "state in ('queued', 'running', 'waiting_approval', 'succeeded', 'failed', 'denied', 'cancelled',"
            " 'timed_out', 'interrupted')",
            name="state",
        ),
        CheckConstraint("kind in ('interactive', 'background')", name="kind"),
        CheckConstraint("role in ('platform_admin', 'tenant_admin', 'auditor', 'user')", name="role"),
        Index("ix_runs_lease_until", "lease_until", postgresql_where=text("state = 'running'")),
        Index("ix_runs_tenant_id_user_id_id", "tenant_id", "user_id", "id"),
        Index("ix_runs_tenant_id_conversation_id", "tenant_id", "conversation_id"),
        Index("ix_runs_tenant_id_state_id", "tenant_id", "state", "id"),
        Index("ix_runs_tenant_id_id_background", "tenant_id", "id", postgresql_where=text("kind = 'background'")),
    )

    tenant_id: Mapped[UUID] = mapped_column(primary_key=True)
    id: Mapped[UUID] = mapped_column(primary_key=True)
    user_id: Mapped[UUID]
    role: Mapped[str | None]
    key_id: Mapped[UUID | None]
    conversation_id: Mapped[UUID | None]
    policy_version: Mapped[int]
    kind: Mapped[str] = mapped_column(server_default="interactive")
    state: Mapped[str]
    attempt: Mapped[int] = mapped_column(server_default="1")
    deaths: Mapped[int] = mapped_column(server_default="0")
    unclaimed_s: Mapped[int] = mapped_column(server_default="0")
    code: Mapped[str | None]
    cancel_cause: Mapped[str | None]
    model: Mapped[str]
    input_tokens: Mapped[int] = mapped_column(server_default="0")
    output_tokens: Mapped[int] = mapped_column(server_default="0")
    lease_until: Mapped[datetime | None]
    deferred_at: Mapped[datetime | None]
    watched_until: Mapped[datetime | None]
    started_at: Mapped[datetime | None]
    created_at: Mapped[datetime] = mapped_column(server_default=func.now())
    finished_at: Mapped[datetime | None]


class ToolCall(Base):
    """A line of the journal: the intent is committed before the call, the outcome after it.

    `turn` and `position` are the model turn that asked for it, from 1, and its place there, from 0; calls of before
    that was kept have none. What `is_counted` is in the usage, while its run goes on.
    """

    __tablename__ = "tool_calls"
    __table_args__ = (
        ForeignKeyConstraint(["tenant_id", "run_id"], ["runs.tenant_id", "runs.id"]),
        CheckConstraint("decision in ('allowed', 'denied', 'waiting')", name="decision"),
        CheckConstraint("outcome in ('succeeded', 'failed', 'timed_out', 'denied', 'unknown')", name="outcome"),
    )

    tenant_id: Mapped[UUID] = mapped_column(primary_key=True)
    run_id: Mapped[UUID] = mapped_column(primary_key=True)
    sequence: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    turn: Mapped[int | None]
    position: Mapped[int | None]
    tool: Mapped[str]
    decision: Mapped[str]
    rule: Mapped[str]
    outcome: Mapped[str | None]
    is_counted: Mapped[bool] = mapped_column(server_default="false")
    duration_ms: Mapped[int | None]
    created_at: Mapped[datetime] = mapped_column(server_default=func.now())


class Content(Base):
    """Text of a run, sealed with its user's data key: a query, arguments, a result, an answer, a model's message."""

    __tablename__ = "contents"
    __table_args__ = (
        ForeignKeyConstraint(["tenant_id", "run_id"], ["runs.tenant_id", "runs.id"]),
        CheckConstraint(
            "kind in ('query', 'arguments', 'result', 'answer', 'turn', 'edited_arguments', 'reason')", name="kind"
        ),
    )

    tenant_id: Mapped[UUID] = mapped_column(primary_key=True)
    run_id: Mapped[UUID] = mapped_column(primary_key=True)
    kind: Mapped[str] = mapped_column(primary_key=True)
    sequence: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    sealed: Mapped[bytes] = mapped_column(LargeBinary)


class Approval(Base):
    """What a call waits for. It holds for these arguments, this definition and this version, once, until it expires.

    `arguments_mac` is keyed with the tenant's key. `user_id` is who asked.
    """

    __tablename__ = "approvals"
    __table_args__ = (
        ForeignKeyConstraint(
            ["tenant_id", "run_id", "sequence"], ["tool_calls.tenant_id", "tool_calls.run_id", "tool_calls.sequence"]
        ),
        ForeignKeyConstraint(["tenant_id", "user_id"], ["users.tenant_id", "users.id"]),
        ForeignKeyConstraint(["tenant_id", "decided_by"], ["users.tenant_id", "users.id"]),
        UniqueConstraint("tenant_id", "run_id", "sequence"),
        CheckConstraint("state in ('waiting', 'approved', 'denied', 'expired', 'voided', 'used')", name="state"),
        Index("ix_approvals_expires_at", "expires_at", postgresql_where=text("state = 'waiting'")),
    )

    tenant_id: Mapped[UUID] = mapped_column(primary_key=True)
    id: Mapped[UUID] = mapped_column(primary_key=True)
    run_id: Mapped[UUID]
    sequence: Mapped[int]
    user_id: Mapped[UUID]
    tool: Mapped[str]
    rule: Mapped[str]
    arguments_mac: Mapped[bytes] = mapped_column(LargeBinary)
    definition_hash: Mapped[str]
    policy_version: Mapped[int]
    state: Mapped[str] = mapped_column(server_default="waiting")
    is_edited: Mapped[bool] = mapped_column(server_default="false")
    expires_at: Mapped[datetime]
    created_at: Mapped[datetime] = mapped_column(server_default=func.now())
    decided_by: Mapped[UUID | None]
    decided_at: Mapped[datetime | None]
