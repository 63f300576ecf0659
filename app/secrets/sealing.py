"""How a tenant's secret is sealed: under a key of its own from the tenant's, and for one place only."""

from __future__ import annotations

from typing import Final
from uuid import UUID

from app.keyring import Sealed, SecretKey, Unsealable

# A secret is no larger, in bytes of UTF-8: what is redacted must fit into what is read of a server's stderr at once.
MAX_BYTES: Final = 8192
# Which key of the tenant's: there is one so far, derived for secrets alone.
_KEY_ID: Final = "tenant-1"
_PURPOSE: Final = "secrets"


def seal(tenant_key: SecretKey, text: str, *, tenant_id: UUID, name: str, version: int) -> Sealed:
    """Bind the text to its tenant, name and version."""
    place = _place(tenant_id, name, version)
    return Sealed(_KEY_ID, tenant_key.derive(_PURPOSE).seal(text.encode(), aad=place))


def unseal(tenant_key: SecretKey, sealed: Sealed, *, tenant_id: UUID, name: str, version: int) -> str:
    """Raise Unsealable for another key, or a blob that was put in another's place."""
    if sealed.key_id != _KEY_ID:
        raise Unsealable
    place = _place(tenant_id, name, version)
    return tenant_key.derive(_PURPOSE).unseal(sealed.blob, aad=place).decode()


def _place(tenant_id: UUID, name: str, version: int) -> bytes:
    return b"secret:" + tenant_id.bytes + f":{name}:{version}".encode()
