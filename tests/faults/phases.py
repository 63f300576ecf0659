"""The moments of a run at which something is done to it, and the traps that hold it there."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Final


class Phase(StrEnum):
    """As far as they can be seen from outside."""

    ACCEPTED = "accepted"  # 202 was given, or the first event
    CLAIMED = "claimed"  # the model is asked for the first time
    BEFORE_MODEL = "before a model turn"  # the model is asked for a further turn
    AFTER_MODEL = "after a model turn"  # its answer, which calls a tool, was sent this instant
    BEFORE_TOOL = "before a tool"  # the tool server has the call and has done nothing yet
    AFTER_EFFECT = "after its effect"  # and now it has, but has not answered
    WAITING = "waiting for approval"
    LAST_COMMIT = "before the last commit"  # the model's last answer was sent this instant


# What the model is to do so that there is such a moment, and the number of the call that is held.
Plan = tuple[tuple[str, ...], ...]
PLANS: Final[Mapping[Phase, Plan]] = {
    Phase.ACCEPTED: (("record",), ("keep",)),
    Phase.CLAIMED: (("record",),),
    Phase.BEFORE_MODEL: (("record", "keep"), ("record",)),
    Phase.AFTER_MODEL: (("record",), ("keep",)),
    Phase.BEFORE_TOOL: (("record",),),
    Phase.AFTER_EFFECT: (("record",), ("record",)),
    Phase.WAITING: (("record",), ("sign",)),
    Phase.LAST_COMMIT: (("record",),),
}
IN_TOOL: Final[Mapping[Phase, str]] = {Phase.BEFORE_TOOL: "called", Phase.AFTER_EFFECT: "acted"}
HELD_S: Final = 15


@dataclass(slots=True)
class Trap:
    """Holds the run of that nonce when it first comes to the phase, until it is released."""

    nonce: str
    phase: Phase
    is_sprung: asyncio.Event = field(default_factory=asyncio.Event)
    is_released: asyncio.Event = field(default_factory=asyncio.Event)

    async def hold(self) -> None:
        """Tell that the run is there, and keep it for a bounded time."""
        self.is_sprung.set()
        try:
            await asyncio.wait_for(self.is_released.wait(), HELD_S)
        except TimeoutError:
            return


@dataclass(slots=True)
class Traps:
    """Those that are set; each springs once."""

    _set: dict[tuple[str, Phase], Trap] = field(default_factory=dict)

    def set(self, nonce: str, phase: Phase) -> Trap:
        """Before the query is sent."""
        trap = Trap(nonce, phase)
        self._set[nonce, phase] = trap
        return trap

    async def holding(self, nonce: str, phase: Phase) -> None:
        """The run is there: hold it, if a trap was set for it."""
        if trap := self._set.pop((nonce, phase), None):
            await trap.hold()

    def passing(self, nonce: str, phase: Phase) -> None:
        """The run is there, and nobody can hold it."""
        if trap := self._set.pop((nonce, phase), None):
            trap.is_sprung.set()
