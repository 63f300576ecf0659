"""Servers that were started to list the tools of a version: they serve it once it holds, or end."""

from __future__ import annotations

from app.policies.document import DeclaredServer
from app.servers.entries import Entry, ServerKey
from app.servers.live import LiveServer
from app.servers.pool import ServerPool
from app.servers.starting import Borrower


class Trial:
    """What a publish has started for its version, each in a place of the tenant's that was free.

    Only what the whole tenant shares is kept: no other is the publisher's to start for the next who asks.
    """

    def __init__(self, pool: ServerPool, publisher: Borrower, version: int) -> None:
        self._pool = pool
        self._publisher = publisher
        self._version = version
        self._kept: list[Entry] = []

    def keep(self, name: str, declared: DeclaredServer, live: LiveServer) -> bool:
        """Take the server over; False where it is its starter's to end."""
        if declared.isolation != "tenant":
            return False
        key = ServerKey(self._publisher.tenant_id, self._version, name, declared.template)
        entry = self._pool.keep(key, live, generation=self._publisher.generation)
        if entry is not None:
            self._kept.append(entry)
        return entry is not None

    def will_hold(self, generation: int) -> None:
        """With this transaction the version holds, from this generation of its tenant on. End all if more than that has
        changed since the publisher was let in: what they were started by may have been withdrawn.
        """
        if generation != self._publisher.generation + 1:
            return self.end()
        for entry in self._kept:
            entry.generation = generation
        return None

    def holds(self) -> None:
        """Let the version's servers be lent, and be asked for their tools again before the first call."""
        for entry in self._kept:
            if entry.server is not None:
                entry.server.doubt()
            self._pool.lend_kept(entry)

    def end(self) -> None:
        """End what is not lent."""
        for entry in self._kept:
            self._pool.end_kept(entry)
