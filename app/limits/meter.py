"""Counts what a run uses of its reservation. A turn is charged at its most before it is sent, and corrected after."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field

from app.limits.budgets import NONE, Tokens, amount
from app.outbound.prices import Price

# Sets aside so many tokens more in a transaction of its own and gives all there are; raises what ends the run.
Extend = Callable[[Tokens], Awaitable[Tokens]]


@dataclass(slots=True)
class Meter:
    """Of one run. Without `extend` no budget holds, and it only counts; `charged` is the last turn's of it."""

    price: Price | None = None
    reserved: Tokens = NONE
    spent: Tokens = NONE
    charged: Tokens = NONE
    extend: Extend | None = field(default=None, repr=False)

    @property
    def is_bounded(self) -> bool:
        """True where a turn may use no more than it has been charged."""
        return self.extend is not None

    @property
    def cost(self) -> int:
        """What has been charged, in micro-USD."""
        return amount(self.spent, self.price).cost

    async def charge(self, most: Tokens) -> None:
        """Before a turn is sent: charge the most that it may use, which the reservation then covers."""
        if self.extend is not None:
            missing = (self.spent + most).missing(self.reserved)
            if missing.total:
                self.reserved = await self.extend(missing)
        self.spent += most
        self.charged = most

    def correct(self, used: Tokens) -> bool:
        """After a turn: charge what it has used instead; False where that is more than the most that it could."""
        within = used.input <= self.charged.input and used.output <= self.charged.output
        self.spent = self.spent - self.charged + used
        self.charged = used
        return within
