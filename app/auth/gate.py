"""What stands before and behind the look at a credential. app/limits holds it; here is what auth asks of it."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, field
from typing import Protocol

from app.caller import Caller


@dataclass(frozen=True, slots=True)
class Attempt:
    """A credential that somebody presents, from an address.

    `name` is what it is counted by: the lookup of a key, or nothing for the credential itself.
    """

    credential: str = field(repr=False)
    name: str
    address: str


class Gate(Protocol):
    """Each of them gives the headers that tell the caller where it stands, or raises slowapi's RateLimitExceeded."""

    async def count(self, address: str) -> Mapping[str, str]:
        """Count a request that shows no credential."""

    def looking(self, attempt: Attempt) -> AbstractAsyncContextManager[Mapping[str, str]]:
        """Around the look at a credential, which raises Unauthenticated where it is not valid."""


class Admission(Protocol):
    """The limit that holds for callers on every route."""

    async def general(self, caller: Caller, route: str) -> Mapping[str, str]:
        """Count a request, and give the headers; raise slowapi's RateLimitExceeded."""
