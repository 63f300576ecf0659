"""Keys: named, rotated, and used without ever being shown.

Every use goes through a subkey of its own (HKDF-SHA256), so that a value made for one purpose means
nothing for another. Everything that leaves a `Keyring` carries the id of the key that made it.
"""

from __future__ import annotations

import base64
import binascii
import hmac
import re
import secrets
from collections.abc import Mapping
from typing import Final, NamedTuple, Self

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from app.errors import AppError, ConfigurationError

KEY_BYTES: Final = 32
# With random nonces one AES-GCM key is good for 2**32 messages (NIST SP 800-38D, 8.3).
_NONCE_BYTES: Final = 12
_DIGEST_BYTES: Final = 32
_KEY_ID: Final = re.compile(r"[a-z0-9][a-z0-9_-]{0,31}")
_ID_FORM: Final = "it has at most 32 lower-case letters, digits, - and _, the first a letter or a digit"
# 32 random bytes hold fewer distinct values than this once in 10**30: a typed or repeated key.
_MIN_DISTINCT_BYTES: Final = 12


class Unsealable(AppError):
    """Something stored under a key cannot be opened."""

    code = "unsealable"


class Mac(NamedTuple):
    """An HMAC-SHA256 and the key that made it: two columns of a row. `Keyring.take_over` makes a longer one."""

    key_id: str
    digest: bytes


class Sealed(NamedTuple):
    """A ciphertext and the key that made it: two columns of a row."""

    key_id: str
    blob: bytes


class SecretKey:
    """A 256-bit key: a root key, or a tenant's or user's data key that a key above it wraps."""

    __slots__ = ("_material",)

    def __init__(self, material: bytes) -> None:
        if len(material) != KEY_BYTES:
            raise ValueError(f"a key has {KEY_BYTES} bytes")
        self._material = material

    @classmethod
    def generate(cls) -> Self:
        return cls(secrets.token_bytes(KEY_BYTES))

    def __repr__(self) -> str:
        return "SecretKey(***)"

    def derive(self, purpose: str) -> SecretKey:
        """Another key, bound to its purpose; this one does not follow from it."""
        return SecretKey(self._subkey(f"derive:{purpose}"))

    def mac(self, purpose: str, data: bytes) -> bytes:
        return hmac.digest(self.verifier(purpose), data, "sha256")

    def verifier(self, purpose: str) -> bytes:
        """What makes and verifies HMACs for one purpose, and nothing else."""
        return self._subkey(f"mac:{purpose}")

    def seal(self, plaintext: bytes, *, aad: bytes) -> bytes:
        """AES-256-GCM: nonce, ciphertext, tag. `aad` says where the blob belongs, and binds it there."""
        nonce = secrets.token_bytes(_NONCE_BYTES)
        return nonce + AESGCM(self._subkey("seal")).encrypt(nonce, plaintext, aad)

    def unseal(self, blob: bytes, *, aad: bytes) -> bytes:
        """Raise Unsealable for another key, another `aad` or a changed blob; which one is not told."""
        nonce, ciphertext = blob[:_NONCE_BYTES], blob[_NONCE_BYTES:]
        try:
            return AESGCM(self._subkey("seal")).decrypt(nonce, ciphertext, aad)
        except (InvalidTag, ValueError):
            raise Unsealable from None

    def wrap(self, key: SecretKey, *, aad: bytes) -> bytes:
        return self.seal(key._material, aad=aad)

    def unwrap(self, blob: bytes, *, aad: bytes) -> SecretKey:
        try:
            return SecretKey(self.unseal(blob, aad=aad))
        except ValueError:
            raise Unsealable from None

    def _subkey(self, info: str) -> bytes:
        hkdf = HKDF(hashes.SHA256(), length=KEY_BYTES, salt=None, info=b"bulkhead/1/" + info.encode())
        return hkdf.derive(self._material)


class Keyring:
    """The platform's root keys. The active one makes, each of them verifies and opens."""

    __slots__ = ("_keys", "active")

    def __init__(self, keys: Mapping[str, bytes], active: str) -> None:
        """Take keys of 32 bytes by id; raise ValueError for a malformed id or key, or no such active key."""
        if active not in keys or not all(_KEY_ID.fullmatch(key_id) for key_id in keys):
            raise ValueError("key ids are lower case, at most 32 characters, and name the active key")
        self._keys = {key_id: SecretKey(material) for key_id, material in keys.items()}
        self.active = active

    @classmethod
    def parse(cls, text: str, *, source: str = "The keyring") -> Self:
        """Read "id:base64url,id2:base64url"; the first is active.

        Raise ConfigurationError, which names the source and no key.
        """
        try:
            entries = [_parse_entry(entry) for entry in text.split(",")]
        except ValueError as error:
            raise ConfigurationError(f"{source}: {error}.") from None
        keys = dict(entries)
        if len(keys) != len(entries):
            raise ConfigurationError(f"{source} names a key id twice.")
        return cls(keys, entries[0][0])

    def __repr__(self) -> str:
        return f"Keyring(active={self.active!r}, keys={sorted(self._keys)})"

    @property
    def key_ids(self) -> tuple[str, ...]:
        """All of them, the active one first."""
        return (self.active, *(key_id for key_id in self._keys if key_id != self.active))

    def derive(self, purpose: str, *, key_id: str | None = None) -> SecretKey:
        """A key for one purpose, of the active or the named root key. Raise Unsealable for an unknown id."""
        return self._find(key_id or self.active).derive(purpose)

    def mac(self, purpose: str, data: bytes) -> Mac:
        return Mac(self.active, self._keys[self.active].mac(purpose, data))

    def verify(self, purpose: str, data: bytes, *, key_id: str, digest: bytes, aad: bytes = b"") -> bool:
        """Compare in constant time; an unknown key id is False. `aad` is that of `take_over`."""
        try:
            verifier, expected = self._opened(purpose, Mac(key_id, digest), aad=aad)
        except Unsealable:
            return False
        return hmac.compare_digest(hmac.digest(verifier, data, "sha256"), expected)

    def take_over(self, purpose: str, stored: Mac, *, aad: bytes) -> Mac:
        """The active key's, of another's HMAC. Nobody has the data to make it anew: what verifies it is sealed with it.

        Whoever has the old key can then neither make nor change one. `aad` says where it belongs. Raise Unsealable.
        """
        return Mac(*self.seal(b"".join(self._opened(purpose, stored, aad=aad)), aad=_taken_over(purpose, aad)))

    def _opened(self, purpose: str, stored: Mac, *, aad: bytes) -> tuple[bytes, bytes]:
        """The HMAC's key and what it must give."""
        key = self._find(stored.key_id)
        if len(stored.digest) <= _DIGEST_BYTES:
            return key.verifier(purpose), stored.digest
        opened = key.unseal(stored.digest, aad=_taken_over(purpose, aad))
        return opened[:KEY_BYTES], opened[KEY_BYTES:]

    def seal(self, plaintext: bytes, *, aad: bytes) -> Sealed:
        return Sealed(self.active, self._keys[self.active].seal(plaintext, aad=aad))

    def unseal(self, sealed: Sealed, *, aad: bytes) -> bytes:
        return self._find(sealed.key_id).unseal(sealed.blob, aad=aad)

    def wrap(self, key: SecretKey, *, aad: bytes) -> Sealed:
        return Sealed(self.active, self._keys[self.active].wrap(key, aad=aad))

    def unwrap(self, sealed: Sealed, *, aad: bytes) -> SecretKey:
        return self._find(sealed.key_id).unwrap(sealed.blob, aad=aad)

    def _find(self, key_id: str) -> SecretKey:
        try:
            return self._keys[key_id]
        except KeyError:
            raise Unsealable from None


def _taken_over(purpose: str, aad: bytes) -> bytes:
    return b"taken-over:" + purpose.encode() + b":" + aad


def new_entry(key_id: str) -> str:
    """Make a random key in the form that `Keyring.parse` reads; raise ConfigurationError for what is no id."""
    if not _KEY_ID.fullmatch(key_id):
        raise ConfigurationError(f"{key_id!r} is no key id: {_ID_FORM}.")
    return f"{key_id}:{base64.urlsafe_b64encode(secrets.token_bytes(KEY_BYTES)).decode().rstrip('=')}"


def _parse_entry(entry: str) -> tuple[str, bytes]:
    """Raise ValueError, which shows no text that could be a key: what has no colon may be one."""
    key_id, colon, encoded = entry.strip().partition(":")
    if not colon or not _KEY_ID.fullmatch(key_id):
        raise ValueError(f"an entry is id:key, and of an id {_ID_FORM}")
    try:
        material = base64.b64decode(encoded + "=" * (-len(encoded) % 4), altchars=b"-_", validate=True)
    except (binascii.Error, ValueError):
        material = b""
    if len(material) != KEY_BYTES or len(set(material)) < _MIN_DISTINCT_BYTES:
        raise ValueError(f"key {key_id!r} is not {KEY_BYTES} random bytes in base64url")
    return key_id, material
