"""Exact-match redaction of what must never reach a model or a caller: our secrets, and paths of this host."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Final
from uuid import UUID

from app.secrets.known import LONGEST

_SHORTEST: Final = 6  # a shorter string would blank ordinary text


class Redactor:
    """Replaces every occurrence of the given strings; other forms of a secret (encoded, split) pass.

    `of_tenant` takes a tenant's own secrets out of a text.
    """

    def __init__(
        self, strings: Iterable[str], *, of_tenant: Callable[[UUID, str], str] = lambda _tenant_id, text: text
    ) -> None:
        self._of_tenant = of_tenant
        self._strings: list[str] = []
        self.learn(strings)

    def learn(self, strings: Iterable[str]) -> None:
        """Replace these, too, from now on: one that is no longer used may still stand in a text."""
        known = {*self._strings, *(text for text in strings if len(text) >= _SHORTEST)}
        # The longest first, so that a path inside another leaves no rest.
        self._strings = sorted(known, key=len, reverse=True)

    def __call__(self, text: str) -> str:
        for secret in self._strings:
            text = text.replace(secret, "[redacted]")
        return text

    def for_tenant(self, tenant_id: UUID, text: str) -> str:
        """What somebody of the tenant, or its model, may read."""
        return self(self._of_tenant(tenant_id, text))

    def beginning(self, tenant_id: UUID, text: str, *, most: int) -> str:
        """What of it `for_tenant` leaves, up to `most` characters: no more of a long text is searched than may be read.

        Where that ends in the middle of a secret, the rest of what was searched goes, too.
        """
        clean = self.for_tenant(tenant_id, text[: most + LONGEST])
        return (clean if len(text) <= most + LONGEST else clean[:-LONGEST])[:most]

    def __repr__(self) -> str:
        return f"Redactor({len(self._strings)} strings)"
