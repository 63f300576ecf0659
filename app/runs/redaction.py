"""Exact-match redaction of what must never reach a model or a caller: our secrets, and paths of this host."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Final
from uuid import UUID

from app.secrets.known import LONGEST, Beginnings

_SHORTEST: Final = 6  # a shorter string would blank ordinary text


class Redactor:
    """Replaces every occurrence of the given strings; other forms of a secret (encoded, split) pass.

    `of_tenant` takes a tenant's own secrets out of a text, and `open_from` says where in one that goes on a secret may
    begin that is not whole yet.
    """

    def __init__(
        self,
        strings: Iterable[str],
        *,
        of_tenant: Callable[[UUID, str], str] = lambda _tenant_id, text: text,
        open_from: Callable[[UUID, str], int] = lambda _tenant_id, text: len(text),
    ) -> None:
        self._of_tenant = of_tenant
        self._open_from = open_from
        self._strings: list[str] = []
        self._beginnings = Beginnings(())
        self.learn(strings)

    def learn(self, strings: Iterable[str]) -> None:
        """Replace these, too, from now on: one that is no longer used may still stand in a text."""
        known = {*self._strings, *(text for text in strings if len(text) >= _SHORTEST)}
        # The longest first, so that a path inside another leaves no rest.
        self._strings = sorted(known, key=len, reverse=True)
        self._beginnings = Beginnings(self._strings)

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

    def whole(self, tenant_id: UUID, text: str) -> int:
        """How much of a text that goes on may be told now: whatever comes, no secret lies across that place."""
        end = min(self._open_from(tenant_id, text), self._beginnings.open_from(text))
        if end < len(text):
            parts = self.for_tenant(tenant_id, text[:end]) + self.for_tenant(tenant_id, text[end:])
            if parts != self.for_tenant(tenant_id, text):  # one that is whole lies across it
                return 0
        return end

    def __repr__(self) -> str:
        return f"Redactor({len(self._strings)} strings)"
