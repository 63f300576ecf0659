"""Signs what is said of the audit chain. The keys stay outside the database, so that its superuser has none of them."""

from __future__ import annotations

import base64
import binascii
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final, NamedTuple, Self

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from app.errors import ConfigurationError
from app.keyring import Keyring, SecretKey

KEYS_SCHEMA: Final = "bulkhead.audit.keys/1"
_PURPOSE: Final = "audit-signing"


class Signature(NamedTuple):
    """An Ed25519 signature (64 bytes) and the key that made it."""

    key_id: str
    signature: bytes


class PublicKeys:
    """The keys that verify, raw (32 bytes) by their id."""

    def __init__(self, keys: Mapping[str, bytes]) -> None:
        """Raise ValueError where an id is not that of its key, or a key is none."""
        if any(key_id != key_id_of(raw) for key_id, raw in keys.items()):
            raise ValueError("an id is not that of its key")
        self.raw = MappingProxyType(dict(keys))
        self._keys = {key_id: Ed25519PublicKey.from_public_bytes(raw) for key_id, raw in keys.items()}

    @classmethod
    def read(cls, document: Mapping[str, Any]) -> Self:
        """From what `document` gave. Raise KeyError, TypeError, AttributeError or ValueError for anything else."""
        if document["schema"] != KEYS_SCHEMA:
            raise ValueError(f"this is no {KEYS_SCHEMA}")
        return cls({key_id: _decoded(text) for key_id, text in document["keys"].items()})

    def document(self) -> dict[str, Any]:
        """For whoever verifies: each key as base64 of its 32 raw bytes, by its id."""
        keys = {key_id: base64.b64encode(raw).decode() for key_id, raw in self.raw.items()}
        return {"schema": KEYS_SCHEMA, "keys": keys}

    def verify(self, document: bytes, *, key_id: str, signature: bytes) -> bool:
        """False for an unknown key, too."""
        key = self._keys.get(key_id)
        if key is None:
            return False
        try:
            key.verify(signature, document)
        except InvalidSignature:
            return False
        return True

    def __contains__(self, key_id: str) -> bool:
        return key_id in self._keys


def read_keys(path: Path) -> PublicKeys:
    """From a file, as `bulkhead audit keys` prints them; raise ConfigurationError."""
    try:
        return PublicKeys.read(json.loads(path.read_bytes()))
    except OSError as error:
        raise ConfigurationError(f"{path} cannot be read ({error.strerror}).") from None
    except (ValueError, TypeError, KeyError, AttributeError):
        raise ConfigurationError(f"{path} does not hold keys as `bulkhead audit keys` prints them.") from None


class Signers:
    """One Ed25519 key follows from each key of a keyring; that of the active one signs, all of them are published.

    `retired` are keys that sign no more, of which nobody here needs the private half: what they signed still holds.
    """

    def __init__(self, keyring: Keyring, *, retired: PublicKeys | None = None) -> None:
        self._private = _private(keyring.derive(_PURPOSE))
        own = [_public(keyring.derive(_PURPOSE, key_id=name)) for name in keyring.key_ids]
        known = {key_id_of(raw): raw for raw in own}
        self.public = PublicKeys(known | dict(retired.raw if retired else {}))
        self.key_id = key_id_of(own[0])

    def sign(self, document: bytes) -> Signature:
        """Sign with the active key; a document that names its key names `key_id`."""
        return Signature(self.key_id, self._private.sign(document))

    def verify(self, document: bytes, *, key_id: str, signature: bytes) -> bool:
        """False for an unknown key, too."""
        return self.public.verify(document, key_id=key_id, signature=signature)


def follows_from(keyring: Keyring, key_id: str) -> str:
    """The id of the signing key that follows from the named key of a keyring."""
    return key_id_of(_public(keyring.derive(_PURPOSE, key_id=key_id)))


def key_id_of(raw: bytes) -> str:
    """The first 16 hex digits of the SHA-256 of the raw public key."""
    return hashlib.sha256(raw).hexdigest()[:16]


def _private(key: SecretKey) -> Ed25519PrivateKey:
    return Ed25519PrivateKey.from_private_bytes(key.mac("ed25519", b""))


def _public(key: SecretKey) -> bytes:
    return _private(key).public_key().public_bytes_raw()


def _decoded(text: str) -> bytes:
    try:
        return base64.b64decode(text, validate=True)
    except binascii.Error:
        raise ValueError("a key is not base64") from None
