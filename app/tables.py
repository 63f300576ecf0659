"""Every domain's tables, for Alembic and for foreign keys that name a table of another domain."""

from __future__ import annotations

from app.audit import models as audit
from app.auth import models as auth
from app.db import Base
from app.idempotency import models as idempotency
from app.limits import models as limits
from app.model_endpoints import models as model_endpoints
from app.policies import models as policies
from app.runs import models as runs
from app.runs.conversations import models as conversations
from app.runs.events import models as run_events
from app.secrets import models as secrets
from app.servers import models as servers
from app.tenants import models as tenants

metadata = Base.metadata
__all__ = [
    "audit",
    "auth",
    "conversations",
    "idempotency",
    "limits",
    "metadata",
    "model_endpoints",
    "policies",
    "run_events",
    "runs",
    "secrets",
    "servers",
    "tenants",
]
