"""Label values that come from tenants, bounded in number: a series costs memory here and in every Prometheus."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final
from uuid import UUID

OTHER: Final = "other"
# So many names of one kind get series of their own in one process; the bound of docs/observability.md.
MAX_NAMES: Final = 200


class Names:
    """The first names that come, as they are; all later ones are `other`."""

    def __init__(self, most: int = MAX_NAMES) -> None:
        self._most = most
        self._known: set[str] = set()

    def __call__(self, name: str) -> str:
        if name in self._known:
            return name
        if len(self._known) >= self._most:
            return OTHER
        self._known.add(name)
        return name


tool: Final = Names()
model: Final = Names(50)  # of the platform's catalogue, so few
user: Final = Names(1_000)  # only where BULKHEAD_METRICS_USER_LABELS asks for them
_shown: Final[set[UUID]] = set()


def show_tenants(tenants: Iterable[UUID]) -> None:
    """Give these tenants series of their own: BULKHEAD_METRICS_TENANTS, in this process from now on."""
    _shown.update(tenants)


def shown() -> frozenset[UUID]:
    """The tenants that have series of their own."""
    return frozenset(_shown)


def tenant(tenant_id: UUID) -> str:
    """The id of a tenant that the operator has named, else `other`."""
    return str(tenant_id) if tenant_id in _shown else OTHER
