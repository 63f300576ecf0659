"""Opaque cursors of lists: signed, so that nobody steers a query with one, and bound to their list and tenant."""

from __future__ import annotations

import base64
import hmac
from typing import Final
from uuid import UUID

from app.errors import Invalid
from app.keyring import Keyring, SecretKey

_DIGEST: Final = 16


class InvalidCursor(Invalid):
    """This cursor is not one that this list gave."""

    code = "invalid_cursor"


class Cursors:
    """Writes and reads cursors; a rotation of the root key ends the cursors under way, no more."""

    def __init__(self, keyring: Keyring) -> None:
        self._key: SecretKey = keyring.derive("cursors")

    def write(self, position: str, *, listing: str, tenant_id: UUID) -> str:
        """The cursor that continues after `position`."""
        data = position.encode()
        return base64.urlsafe_b64encode(self._sign(data, listing, tenant_id) + data).decode().rstrip("=")

    def read(self, cursor: str, *, listing: str, tenant_id: UUID) -> str:
        """The position in it; raise InvalidCursor."""
        try:
            raw = base64.b64decode(cursor + "=" * (-len(cursor) % 4), altchars=b"-_", validate=True)
            digest, data = raw[:_DIGEST], raw[_DIGEST:]
            position = data.decode()
        except ValueError:  # not base64, not ASCII, not UTF-8
            raise InvalidCursor from None
        if not hmac.compare_digest(digest, self._sign(data, listing, tenant_id)):
            raise InvalidCursor
        return position

    def _sign(self, data: bytes, listing: str, tenant_id: UUID) -> bytes:
        return self._key.mac("cursor", _bound(data, listing, tenant_id))[:_DIGEST]


def _bound(data: bytes, listing: str, tenant_id: UUID) -> bytes:
    return tenant_id.bytes + listing.encode() + b"\0" + data
