"""What a secret is to those who use it: texts by name, for as long as they are current."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Protocol
from uuid import UUID

from app.errors import Unavailable


class SecretUnavailable(Unavailable):
    """A secret that the policy names is not there, or its provider does not give it."""

    code = "secret_unavailable"


@dataclass(frozen=True, slots=True)
class Secrets:
    """Texts by name. Once `is_current` says no, one of them has been rotated or removed, or is no longer known."""

    texts: Mapping[str, str] = field(default_factory=dict, repr=False)
    is_current: Callable[[], bool] = lambda: True


class SecretStore(Protocol):
    async def resolve(self, tenant_id: UUID, names: frozenset[str]) -> Secrets:
        """The tenant's secrets of these names; raise SecretUnavailable, which names the first that is missing."""

    def redact(self, tenant_id: UUID, text: str) -> str:
        """The text without any secret of the tenant that this process has resolved, matched exactly."""
