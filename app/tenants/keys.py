"""Where a tenant's and a user's data keys are made and opened: root key > tenant key > user key.

What a user wrote or read is sealed with the user key, so that destroying one row's key erases all of it but in copies
of the database that still hold the key. The tenant key also makes the keyed hashes of the audit record.
"""

from __future__ import annotations

from uuid import UUID

from app.errors import NotFound
from app.keyring import Keyring, Sealed, SecretKey


def wrap_tenant_key(keyring: Keyring, key: SecretKey, *, tenant_id: UUID) -> Sealed:
    """Bind the key to its tenant."""
    return keyring.wrap(key, aad=b"tenant:" + tenant_id.bytes)


def open_tenant_key(keyring: Keyring, sealed: Sealed, *, tenant_id: UUID) -> SecretKey:
    """Raise Unsealable where the root key is unknown or the row is another tenant's."""
    return keyring.unwrap(sealed, aad=b"tenant:" + tenant_id.bytes)


def wrap_user_key(tenant_key: SecretKey, key: SecretKey, *, user_id: UUID) -> bytes:
    """Bind the key to its user."""
    return tenant_key.wrap(key, aad=b"user:" + user_id.bytes)


def open_user_key(tenant_key: SecretKey, wrapped: bytes | None, *, user_id: UUID) -> SecretKey:
    """Raise NotFound for an erased user, Unsealable for a row that is another user's."""
    if wrapped is None:
        raise NotFound
    return tenant_key.unwrap(wrapped, aad=b"user:" + user_id.bytes)
