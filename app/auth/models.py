"""Tables of credentials: API keys and the issuers whose tokens a tenant trusts."""

from __future__ import annotations

from datetime import datetime
from typing import Any
from uuid import UUID

from sqlalchemy import CheckConstraint, ForeignKeyConstraint, LargeBinary, UniqueConstraint, func
from sqlalchemy.dialects.postgresql import JSONB
from sqlalchemy.orm import Mapped, mapped_column

from app.db import Base


class ApiKey(Base):
    """A key of one user. Its text is never stored; `mac` is HMAC-SHA256 under root key `mac_key_id`."""

    __tablename__ = "api_keys"
    __table_args__ = (
        ForeignKeyConstraint(["tenant_id", "user_id"], ["users.tenant_id", "users.id"]),
        UniqueConstraint("lookup"),
    )

    tenant_id: Mapped[UUID] = mapped_column(primary_key=True)
    id: Mapped[UUID] = mapped_column(primary_key=True)
    user_id: Mapped[UUID]
    name: Mapped[str]
    lookup: Mapped[str]
    mac_key_id: Mapped[str]
    mac: Mapped[bytes] = mapped_column(LargeBinary)
    expires_at: Mapped[datetime | None]
    revoked_at: Mapped[datetime | None]
    last_used_at: Mapped[datetime | None]
    rate: Mapped[str | None]
    created_at: Mapped[datetime] = mapped_column(server_default=func.now())

    @property
    def prefix(self) -> str:
        """How its owner tells it from others: the beginning of its text."""
        return f"bh_{self.lookup}"


class Issuer(Base):
    """An OIDC issuer: (issuer, audience) belongs to one tenant in the whole platform."""

    __tablename__ = "issuers"
    __table_args__ = (
        ForeignKeyConstraint(["tenant_id"], ["tenants.id"]),
        UniqueConstraint("issuer", "audience"),
        CheckConstraint("(jwks is null) <> (jwks_uri is null)", name="one_source_of_keys"),
    )

    tenant_id: Mapped[UUID] = mapped_column(primary_key=True)
    id: Mapped[UUID] = mapped_column(primary_key=True)
    issuer: Mapped[str]
    audience: Mapped[str]
    jwks: Mapped[dict[str, Any] | None] = mapped_column(JSONB(none_as_null=True))
    jwks_uri: Mapped[str | None]
    role_claim: Mapped[str | None]
    created_at: Mapped[datetime] = mapped_column(server_default=func.now())
