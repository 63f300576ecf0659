"""The table of conversations. Which runs are of one, the runs say: those of its id and its user."""

from __future__ import annotations

from datetime import datetime
from uuid import UUID

from sqlalchemy import CheckConstraint, ForeignKeyConstraint, Index, func, text
from sqlalchemy.orm import Mapped, mapped_column

from app.db import Base


class Conversation(Base):
    """A thread of one user's runs. `last_used_at` is when the last of them was taken in, or when the thread was made.

    It stays when it has been deleted, so that nobody goes on with it; `emptied_at` is when the last text was gone.
    """

    __tablename__ = "conversations"
    __table_args__ = (
        ForeignKeyConstraint(["tenant_id", "user_id"], ["users.tenant_id", "users.id"]),
        CheckConstraint("emptied_at is null or deleted_at is not null", name="deleted_first"),
        Index(
            "ix_conversations_tenant_id_user_id_created_at_id",
            "tenant_id",
            "user_id",
            "created_at",
            "id",
            postgresql_where=text("deleted_at is null"),
        ),
        Index(
            "ix_conversations_tenant_id_last_used_at",
            "tenant_id",
            "last_used_at",
            postgresql_where=text("deleted_at is null"),
        ),
        Index(
            "ix_conversations_tenant_id_deleted",
            "tenant_id",
            postgresql_where=text("deleted_at is not null and emptied_at is null"),
        ),
    )

    tenant_id: Mapped[UUID] = mapped_column(primary_key=True)
    id: Mapped[UUID] = mapped_column(primary_key=True)
    user_id: Mapped[UUID]
    created_at: Mapped[datetime] = mapped_column(server_default=func.now())
    last_used_at: Mapped[datetime] = mapped_column(server_default=func.now())
    deleted_at: Mapped[datetime | None]
    emptied_at: Mapped[datetime | None]
