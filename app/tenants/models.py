"""Tables of tenants and their users."""

from __future__ import annotations

from datetime import datetime
from typing import Final
from uuid import UUID

from sqlalchemy import CheckConstraint, ForeignKey, Identity, Index, LargeBinary, UniqueConstraint, func, text
from sqlalchemy.orm import Mapped, mapped_column

from app.db import Base

_FIRST_SANDBOX_UID: Final = 2_000_000


class Tenant(Base):
    """A customer: the unit that nothing crosses.

    `generation` grows with every change that a cache must not outlive. `sandbox_uid` is the host user that
    its tool servers run as where the service runs as root; it comes from a sequence and is never reused.
    Of an erased one `wrapped_key` is empty, and nothing that was sealed under it can be opened.
    """

    __tablename__ = "tenants"
    __table_args__ = (CheckConstraint("status in ('active', 'disabled', 'erased')", name="status"),)

    id: Mapped[UUID] = mapped_column(primary_key=True)
    slug: Mapped[str] = mapped_column(unique=True)
    status: Mapped[str] = mapped_column(server_default="active")
    generation: Mapped[int] = mapped_column(server_default="1")
    sandbox_uid: Mapped[int] = mapped_column(Identity(always=True, start=_FIRST_SANDBOX_UID), unique=True)
    key_id: Mapped[str]
    wrapped_key: Mapped[bytes] = mapped_column(LargeBinary)
    created_at: Mapped[datetime] = mapped_column(server_default=func.now())


class User(Base):
    """Somebody who calls. Destroying `wrapped_key` makes all content of this user unreadable for ever."""

    __tablename__ = "users"
    __table_args__ = (
        UniqueConstraint("tenant_id", "name"),
        Index(
            "uq_users_tenant_id_issuer_subject",
            "tenant_id",
            "issuer",
            "subject",
            unique=True,
            postgresql_where=text("subject is not null"),
        ),
        CheckConstraint("role in ('platform_admin', 'tenant_admin', 'auditor', 'user')", name="role"),
        CheckConstraint(
            "(role = 'platform_admin') = (tenant_id = '00000000-0000-7000-8000-000000000000')",
            name="platform_admins_belong_to_no_tenant",
        ),
        CheckConstraint(
            "erased_at is null or (wrapped_key is null and subject is null and disabled_at is not null)", name="erased"
        ),
    )

    tenant_id: Mapped[UUID] = mapped_column(ForeignKey("tenants.id"), primary_key=True)
    id: Mapped[UUID] = mapped_column(primary_key=True)
    name: Mapped[str]
    role: Mapped[str]
    issuer: Mapped[str | None]
    subject: Mapped[str | None]
    wrapped_key: Mapped[bytes | None] = mapped_column(LargeBinary)
    disabled_at: Mapped[datetime | None]
    erased_at: Mapped[datetime | None]
    created_at: Mapped[datetime] = mapped_column(server_default=func.now())
