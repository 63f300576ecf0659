"""Places for tool servers: bounded in all and for each tenant, and when they are short the poorest is next."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from uuid import UUID


@dataclass(slots=True)
class Shares:
    """Who holds how many of `maximum` places; nobody more than `per_tenant`."""

    maximum: int
    per_tenant: int
    held: Counter[UUID] = field(default_factory=Counter)

    def fits(self, tenant: UUID) -> bool:
        """True where the tenant may take one more now."""
        return self.held.total() < self.maximum and self.held[tenant] < self.per_tenant

    def next_of(self, waiting: Iterable[UUID]) -> UUID | None:
        """Of those that fit, the tenant that holds fewest; among equals the one that waits longest."""
        return min(filter(self.fits, waiting), key=self.held.__getitem__, default=None)

    def take(self, tenant: UUID) -> None:
        """Hold one more."""
        self.held[tenant] += 1

    def give_back(self, tenant: UUID) -> None:
        """Hold one less; a tenant that holds nothing is forgotten."""
        self.held[tenant] -= 1
        self.held += Counter()

    def after(self, given_back: Iterable[UUID]) -> Shares:
        """How it would be once these tenants have given back one place each time they are named."""
        return Shares(self.maximum, self.per_tenant, self.held - Counter(given_back))


@dataclass(frozen=True, slots=True, eq=False)
class Ask:
    """One wait for a place. `granted` is done once the place is held; cancelling it ends the wait."""

    tenant: UUID
    granted: asyncio.Future[None]


class Places:
    """Grants places to those who wait for them. Nobody waits while a place is free that it may have."""

    def __init__(self, shares: Shares) -> None:
        self.shares = shares
        self._asks: list[Ask] = []

    @property
    def waiting(self) -> Sequence[UUID]:
        """The tenant of everyone who waits, longest first."""
        return [ask.tenant for ask in self._asks]

    def ask(self, tenant: UUID) -> Ask:
        """Wait for a place; granted at once where one is free. Whoever is granted one gives it back."""
        ask = Ask(tenant, asyncio.get_running_loop().create_future())
        self._asks.append(ask)
        self._grant()
        return ask

    def withdraw(self, ask: Ask) -> None:
        """Wait no longer; a place that has been granted stays granted."""
        if ask in self._asks:
            self._asks.remove(ask)
            ask.granted.cancel()

    def give_back(self, tenant: UUID) -> None:
        """Free a place for whoever is next."""
        self.shares.give_back(tenant)
        self._grant()

    def _grant(self) -> None:
        while (tenant := self.shares.next_of(self.waiting)) is not None:
            ask = next(ask for ask in self._asks if ask.tenant == tenant)
            self._asks.remove(ask)
            if not ask.granted.cancelled():
                self.shares.take(tenant)
                ask.granted.set_result(None)
