"""The table of the platform's model endpoints."""

from __future__ import annotations

from datetime import datetime
from uuid import UUID

from sqlalchemy import CheckConstraint, ForeignKey, LargeBinary, UniqueConstraint, func
from sqlalchemy.dialects.postgresql import JSONB
from sqlalchemy.orm import Mapped, mapped_column

from app.db import Base


class StoredEndpoint(Base):
    """An entry of the catalogue beside those of the settings. `credential` is sealed with the platform's own key."""

    __tablename__ = "model_endpoints"
    __table_args__ = (
        UniqueConstraint("tenant_id", "name"),
        CheckConstraint("tenant_id = '00000000-0000-7000-8000-000000000000'", name="are_the_platforms"),
    )

    tenant_id: Mapped[UUID] = mapped_column(ForeignKey("tenants.id"), primary_key=True)
    id: Mapped[UUID] = mapped_column(primary_key=True)
    name: Mapped[str]
    base_url: Mapped[str]
    models: Mapped[list[str]] = mapped_column(JSONB)
    prices: Mapped[dict[str, list[dict[str, str]]]] = mapped_column(JSONB, server_default="{}")
    is_enabled: Mapped[bool]
    credential: Mapped[bytes] = mapped_column(LargeBinary)
    created_at: Mapped[datetime] = mapped_column(server_default=func.now())
    updated_at: Mapped[datetime] = mapped_column(server_default=func.now())
