r"""API keys: `bh_<lookup>_<secret><checksum>`, shown once, stored as a keyed hash.

The lookup finds the row and is public. The secret is 40 characters of 62, 238 bits. The checksum tells
a typo, or a scanner's false find, from a key without asking the database; it protects nothing.
For secret scanners: `\bbh_[0-9A-Za-z]{12}_[0-9A-Za-z]{46}\b`.
"""

from __future__ import annotations

import re
import secrets
import string
import zlib
from dataclasses import dataclass, field
from typing import Final

from app.keyring import Keyring, Mac

_ALPHABET: Final = string.digits + string.ascii_letters
_LOOKUP: Final = 12
_SECRET: Final = 40
_CHECKSUM: Final = 6
_SHAPE: Final = re.compile(rf"bh_([0-9A-Za-z]{{{_LOOKUP}}})_([0-9A-Za-z]{{{_SECRET}}})([0-9A-Za-z]{{{_CHECKSUM}}})")
_PURPOSE: Final = "api-key"


@dataclass(frozen=True, slots=True)
class PlainKey:
    """A key in the clear: just minted, or as a caller presented it."""

    lookup: str
    secret: str = field(repr=False)

    @property
    def text(self) -> str:
        """What its owner is shown, once."""
        body = f"bh_{self.lookup}_{self.secret}"
        return body + _checksum(body)


def mint() -> PlainKey:
    return PlainKey(lookup=_random(_LOOKUP), secret=_random(_SECRET))


def parse(text: str) -> PlainKey | None:
    """Read a key, or None for whatever is not one; never raises, whatever the text."""
    match = _SHAPE.fullmatch(text)
    if match is None:
        return None
    key = PlainKey(lookup=match[1], secret=match[2])
    return key if key.text == text else None


def fingerprint(keyring: Keyring, key: PlainKey) -> Mac:
    """What is stored of a key. The lookup is part of it, so that rows cannot trade fingerprints."""
    return keyring.mac(_PURPOSE, key.text.encode())


def matches(keyring: Keyring, key: PlainKey, *, stored: Mac) -> bool:
    """Compare in constant time; a fingerprint of an unknown key id never matches."""
    place = _place(key.lookup)
    return keyring.verify(_PURPOSE, key.text.encode(), key_id=stored.key_id, digest=stored.digest, aad=place)


def under_active(keyring: Keyring, stored: Mac, *, lookup: str) -> Mac:
    """The fingerprint for the active root key, without the key's text; raise Unsealable for an unknown root key."""
    return keyring.take_over(_PURPOSE, stored, aad=_place(lookup))


def _place(lookup: str) -> bytes:
    return b"api-key:" + lookup.encode()


def _random(length: int) -> str:
    return "".join(secrets.choice(_ALPHABET) for _ in range(length))


def _checksum(body: str) -> str:
    number, digits = zlib.crc32(body.encode()), []
    for _ in range(_CHECKSUM):
        number, digit = divmod(number, len(_ALPHABET))
        digits.append(_ALPHABET[digit])
    return "".join(digits)
