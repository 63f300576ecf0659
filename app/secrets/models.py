"""Tables of secrets: what a tenant's admin has sealed, and what the platform has bound to a provider."""

from __future__ import annotations

from datetime import datetime
from typing import Any
from uuid import UUID

from sqlalchemy import ForeignKeyConstraint, LargeBinary, func
from sqlalchemy.dialects.postgresql import JSONB
from sqlalchemy.orm import Mapped, mapped_column

from app.db import Base


class StoredSecret(Base):
    """A text sealed under the tenant's key and bound to its place; `id` is another one with every change."""

    __tablename__ = "secrets"
    __table_args__ = (
        ForeignKeyConstraint(["tenant_id"], ["tenants.id"]),
        ForeignKeyConstraint(["tenant_id", "created_by"], ["users.tenant_id", "users.id"]),
        ForeignKeyConstraint(["tenant_id", "updated_by"], ["users.tenant_id", "users.id"]),
    )

    tenant_id: Mapped[UUID] = mapped_column(primary_key=True)
    name: Mapped[str] = mapped_column(primary_key=True)
    id: Mapped[UUID]
    version: Mapped[int]
    key_id: Mapped[str]
    sealed: Mapped[bytes] = mapped_column(LargeBinary)
    created_by: Mapped[UUID]
    created_at: Mapped[datetime] = mapped_column(server_default=func.now())
    updated_by: Mapped[UUID]
    updated_at: Mapped[datetime] = mapped_column(server_default=func.now())


class SecretBinding(Base):
    """Where the platform's admin lets a tenant's name be read from. The app role may only look."""

    __tablename__ = "secret_bindings"
    __table_args__ = (ForeignKeyConstraint(["tenant_id"], ["tenants.id"]),)

    tenant_id: Mapped[UUID] = mapped_column(primary_key=True)
    name: Mapped[str] = mapped_column(primary_key=True)
    id: Mapped[UUID]
    version: Mapped[int]
    provider: Mapped[str]
    locator: Mapped[dict[str, Any]] = mapped_column(JSONB)
    # Admins of the platform belong to its own tenant, so that no foreign key with this tenant's id can name them.
    created_by: Mapped[UUID]
    created_at: Mapped[datetime] = mapped_column(server_default=func.now())
    updated_by: Mapped[UUID]
    updated_at: Mapped[datetime] = mapped_column(server_default=func.now())
