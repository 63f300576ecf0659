"""Tables of budgets: the account that is locked to decide, what is reserved, and what has been used by day."""

from __future__ import annotations

from datetime import date, datetime
from uuid import UUID

from sqlalchemy import BigInteger, CheckConstraint, ForeignKey, ForeignKeyConstraint, func
from sqlalchemy.orm import Mapped, mapped_column

from app.db import Base


class BudgetAccount(Base):
    """One row a tenant, which whoever reserves, extends or settles holds locked until the commit."""

    __tablename__ = "budget_accounts"

    tenant_id: Mapped[UUID] = mapped_column(ForeignKey("tenants.id"), primary_key=True)


class Reservation(Base):
    """What a run under way may use, in tokens and micro-USD, and the tool calls that it was allowed by a budget.

    It counts on `day`, whenever the run ends.
    """

    __tablename__ = "budget_reservations"
    __table_args__ = (
        ForeignKeyConstraint(["tenant_id", "run_id"], ["runs.tenant_id", "runs.id"]),
        CheckConstraint(
            "input_tokens >= 0 and output_tokens >= 0 and cost >= 0 and tool_calls >= 0", name="not_negative"
        ),
    )

    tenant_id: Mapped[UUID] = mapped_column(primary_key=True)
    run_id: Mapped[UUID] = mapped_column(primary_key=True)
    user_id: Mapped[UUID]
    day: Mapped[date]
    model: Mapped[str]
    input_tokens: Mapped[int] = mapped_column(BigInteger)
    output_tokens: Mapped[int] = mapped_column(BigInteger)
    cost: Mapped[int] = mapped_column(BigInteger)
    tool_calls: Mapped[int] = mapped_column(BigInteger, server_default="0")
    created_at: Mapped[datetime] = mapped_column(server_default=func.now())


class BudgetDay(Base):
    """What a tenant's ended runs have used on a day: the sum of its rows in usage_models, for one look."""

    __tablename__ = "budget_days"

    tenant_id: Mapped[UUID] = mapped_column(ForeignKey("tenants.id"), primary_key=True)
    day: Mapped[date] = mapped_column(primary_key=True)
    tokens: Mapped[int] = mapped_column(BigInteger)
    cost: Mapped[int] = mapped_column(BigInteger)
    tool_calls: Mapped[int] = mapped_column(BigInteger, server_default="0")


class ModelUsage(Base):
    """What a user's ended runs have used of a model, by the day (UTC) on which they began."""

    __tablename__ = "usage_models"
    __table_args__ = (ForeignKeyConstraint(["tenant_id", "user_id"], ["users.tenant_id", "users.id"]),)

    tenant_id: Mapped[UUID] = mapped_column(primary_key=True)
    day: Mapped[date] = mapped_column(primary_key=True)
    user_id: Mapped[UUID] = mapped_column(primary_key=True)
    model: Mapped[str] = mapped_column(primary_key=True)
    runs: Mapped[int] = mapped_column(BigInteger)
    turns: Mapped[int] = mapped_column(BigInteger)
    input_tokens: Mapped[int] = mapped_column(BigInteger)
    output_tokens: Mapped[int] = mapped_column(BigInteger)
    cost: Mapped[int] = mapped_column(BigInteger)
    tool_calls: Mapped[int] = mapped_column(BigInteger, server_default="0")


class ToolUsage(Base):
    """What became of the calls of a tool by a user's ended runs, and the milliseconds that they took."""

    __tablename__ = "usage_tools"
    __table_args__ = (ForeignKeyConstraint(["tenant_id", "user_id"], ["users.tenant_id", "users.id"]),)

    tenant_id: Mapped[UUID] = mapped_column(primary_key=True)
    day: Mapped[date] = mapped_column(primary_key=True)
    user_id: Mapped[UUID] = mapped_column(primary_key=True)
    tool: Mapped[str] = mapped_column(primary_key=True)
    allowed: Mapped[int] = mapped_column(BigInteger)
    denied: Mapped[int] = mapped_column(BigInteger)
    failed: Mapped[int] = mapped_column(BigInteger)
    duration_ms: Mapped[int] = mapped_column(BigInteger)
