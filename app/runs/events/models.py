"""The table of run events: what a client follows, for a month or two."""

from __future__ import annotations

from datetime import datetime
from uuid import UUID

from sqlalchemy import ForeignKeyConstraint, LargeBinary
from sqlalchemy.orm import Mapped, mapped_column

from app.db import Base


class RunEvent(Base):
    """One event of a run, by its number from 1. `data` is JSON; a text is sealed with the key of the run's user."""

    __tablename__ = "run_events"
    __table_args__ = (
        ForeignKeyConstraint(["tenant_id", "run_id"], ["runs.tenant_id", "runs.id"]),
        {"postgresql_partition_by": "RANGE (at)"},
    )

    tenant_id: Mapped[UUID] = mapped_column(primary_key=True)
    run_id: Mapped[UUID] = mapped_column(primary_key=True)
    sequence: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    at: Mapped[datetime] = mapped_column(primary_key=True)
    type: Mapped[str]
    version: Mapped[int]
    data: Mapped[str]
    sealed: Mapped[bytes | None] = mapped_column(LargeBinary)
