"""What every template's section of a policy has."""

from __future__ import annotations

from typing import ClassVar, Literal

from app.policies.sections import Section


class Server(Section):
    """`isolation` is what a live server, and what it may write to, are shared by.

    `only_reading` are the tools, without the server's name, that our own program keeps from changing anything.
    """

    only_reading: ClassVar[frozenset[str]] = frozenset()

    isolation: Literal["tenant", "user", "run"] = "tenant"
    """Who shares a live server and what it writes: all of the tenant, one user, or one run."""
    stateful: bool = False
    """Whether it keeps something of a run between two calls: a run that has called it is never taken up elsewhere."""

    @property
    def keeps_state(self) -> bool:
        """True where a run that has called it cannot go on without the very process that it has called."""
        return self.stateful
