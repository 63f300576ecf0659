"""Key sets of issuers: parsed strictly, cached, and, for the demo alone, made."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import os
import stat
import tempfile
import time
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any, Final

import orjson
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
    load_pem_private_key,
)

from app.auth import tokens
from app.errors import ConfigurationError, Fault, Invalid, Unavailable

Fetch = Callable[[str], Awaitable[bytes]]
"""Get a document by its URL; raises Unavailable for whatever goes wrong."""

DEVELOPMENT_ISSUER: Final = "https://development.bulkhead.invalid"
MAX_DOCUMENT_BYTES: Final = 128 * 1024
_MAX_KID: Final = 255
_MAX_ISSUERS: Final = 1_000
# Of private RSA and EC keys, and `k`, which is all of a symmetric one.
_PRIVATE_MEMBERS: Final = frozenset({"d", "p", "q", "dp", "dq", "qi", "oth", "k"})
_ALGORITHM_OF_TYPE: Final = {"RSA": tokens.Algorithm.RS256, "EC": tokens.Algorithm.ES256}


class InvalidKeySet(Invalid):
    """The key set of this issuer cannot be used."""

    code = "invalid_key_set"


def parse_jwks(document: bytes | Mapping[str, Any]) -> tokens.KeySet:
    """Read a JWK set (RFC 7517). Raise InvalidKeySet with the faults.

    What makes the issuer untrustworthy refuses the document: a symmetric or private key, a weak key, a
    key id missing or named twice, more than 20 keys. A key for something else (encryption, another
    algorithm), which ordinary providers publish beside the others, is left out.
    """
    entries = _entries(document)
    faults: list[Fault] = []
    keys: list[tokens.VerificationKey] = []
    for index, entry in enumerate(entries):
        try:
            keys.extend(_read_key(entry))
        except ValueError as fault:
            faults.append(Fault(f"/keys/{index}", str(fault)))
    if not faults and not keys:
        faults.append(Fault("/keys", "no key verifies RS256 or ES256 signatures"))
    if faults:
        raise InvalidKeySet(faults=faults)
    try:
        return tokens.KeySet(keys)
    except ValueError as fault:
        raise InvalidKeySet(faults=[Fault("/keys", str(fault))]) from None


def _entries(document: bytes | Mapping[str, Any]) -> list[dict[str, Any]]:
    if isinstance(document, bytes):
        document = _decode(document)
    entries = document.get("keys")
    if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
        raise InvalidKeySet(faults=[Fault("/keys", "not a list of keys")])
    if len(entries) > tokens.MAX_KEYS:
        raise InvalidKeySet(faults=[Fault("/keys", f"more than {tokens.MAX_KEYS} keys")])
    return entries


def _decode(document: bytes) -> dict[str, Any]:
    try:
        decoded = orjson.loads(document) if len(document) <= MAX_DOCUMENT_BYTES else None
    except orjson.JSONDecodeError:
        decoded = None
    if not isinstance(decoded, dict):
        raise InvalidKeySet(faults=[Fault("", f"not a JSON object of at most {MAX_DOCUMENT_BYTES} bytes")])
    return decoded


def _read_key(entry: Mapping[str, Any]) -> list[tokens.VerificationKey]:
    """One key, or none where the entry is for something else. Raise ValueError."""
    if _PRIVATE_MEMBERS & entry.keys():
        raise ValueError("holds a secret: only public keys belong in a key set")
    if not _is_ours(entry):
        return []
    kid = entry.get("kid")
    if not isinstance(kid, str) or not 1 <= len(kid) <= _MAX_KID:
        raise ValueError("has no key id")
    return [tokens.VerificationKey.build(kid, _public_key(entry))]


def _is_ours(entry: Mapping[str, Any]) -> bool:
    operations = entry.get("key_ops", ["verify"])
    algorithm = _ALGORITHM_OF_TYPE.get(str(entry.get("kty")))
    return (
        algorithm is not None
        and entry.get("use", "sig") == "sig"
        and isinstance(operations, list)
        and "verify" in operations
        and entry.get("alg", algorithm) == algorithm
        and entry.get("crv", "P-256") == "P-256"
    )


def _public_key(entry: Mapping[str, Any]) -> rsa.RSAPublicKey | ec.EllipticCurvePublicKey:
    if entry["kty"] == "EC":
        numbers = ec.EllipticCurvePublicNumbers(_number(entry, "x"), _number(entry, "y"), ec.SECP256R1())
        return numbers.public_key()
    exponent = _number(entry, "e")
    # A small exponent has no use today but to make a flawed verifier forgeable.
    if not 65_537 <= exponent < 2**32:
        raise ValueError("the RSA exponent is at least 65537")
    return rsa.RSAPublicNumbers(exponent, _number(entry, "n")).public_key()


def _number(entry: Mapping[str, Any], member: str) -> int:
    text = entry.get(member)
    if not isinstance(text, str) or not text.isascii():
        raise ValueError(f"{member} is not base64url")
    decoded = base64.b64decode(text + "=" * (-len(text) % 4), altchars=b"-_", validate=True)
    return int.from_bytes(decoded, "big")


@dataclass(slots=True)
class _Entry:
    """The cached keys of one URL; times are of the cache's clock."""

    keys: tokens.KeySet | None = None
    fetched_at: float = float("-inf")
    failed_at: float = float("-inf")
    lock: asyncio.Lock = field(default_factory=asyncio.Lock)


@dataclass(frozen=True, slots=True)
class Freshness:
    """How long keys are believed, in seconds.

    A key that an issuer withdraws is refused after `ttl_s`; while the issuer cannot be reached, after
    `ttl_s + stale_s`.
    """

    ttl_s: float = 300
    stale_s: float = 3_600
    unknown_kid_s: float = 60
    retry_s: float = 5


class JwksCache:
    """Key sets by URL: one fetch at a time a URL, and no more of them than `Freshness` allows."""

    def __init__(
        self,
        fetch: Fetch,
        *,
        freshness: Freshness | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._fetch = fetch
        self._freshness = freshness or Freshness()
        self._clock = clock
        self._entries: OrderedDict[str, _Entry] = OrderedDict()

    async def key_set(self, url: str, *, kid: str) -> tokens.KeySet:
        """The keys at a URL, fetched anew if they are old or lack `kid`. Raise Unavailable if there are none.

        Whether `kid` is among them is for `tokens.verify` to say.
        """
        entry = self._entry(url)
        if self._is_due(entry, kid):
            async with entry.lock:
                if self._is_due(entry, kid):  # whoever held the lock has not fetched it for us
                    await self._refresh(entry, url)
        return self._usable(entry)

    def _entry(self, url: str) -> _Entry:
        entry = self._entries.setdefault(url, _Entry())
        self._entries.move_to_end(url)
        if len(self._entries) > _MAX_ISSUERS:
            self._entries.popitem(last=False)
        return entry

    def _is_due(self, entry: _Entry, kid: str) -> bool:
        now, rules = self._clock(), self._freshness
        since_attempt = now - max(entry.fetched_at, entry.failed_at)
        if entry.keys is not None and kid not in entry.keys and since_attempt >= rules.unknown_kid_s:
            return True
        return now - entry.fetched_at >= rules.ttl_s and now - entry.failed_at >= rules.retry_s

    async def _refresh(self, entry: _Entry, url: str) -> None:
        try:
            entry.keys = parse_jwks(await self._fetch(url))
        except (Unavailable, InvalidKeySet):
            entry.failed_at = self._clock()
        else:
            entry.fetched_at = self._clock()

    def _usable(self, entry: _Entry) -> tokens.KeySet:
        age = self._clock() - entry.fetched_at
        if entry.keys is None or age >= self._freshness.ttl_s + self._freshness.stale_s:
            raise Unavailable("The keys of this token's issuer are not available now.")
        return entry.keys


class DevelopmentIssuer:
    """An issuer of our own for the demo: an ES256 key in a file that only its owner can read."""

    def __init__(self, key_path: Path, *, issuer: str = DEVELOPMENT_ISSUER) -> None:
        """Load the key, making it first if there is none. Raise ConfigurationError if others can read it."""
        self.issuer = issuer
        self._key = _load_key(key_path)
        spki = self._key.public_key().public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
        self.kid = hashlib.sha256(spki).hexdigest()[:16]

    def public_jwks(self) -> dict[str, Any]:
        point = self._key.public_key().public_numbers()
        entry = {"kty": "EC", "crv": "P-256", "x": _coordinate(point.x), "y": _coordinate(point.y)}
        return {"keys": [{**entry, "alg": "ES256", "use": "sig", "kid": self.kid}]}

    def mint(
        self,
        subject: str,
        *,
        audience: str,
        now: datetime,
        ttl: timedelta = timedelta(hours=1),
        claims: Mapping[str, Any] | None = None,
    ) -> str:
        """Sign a token; `claims` cannot replace the registered ones."""
        issued = int(now.timestamp())
        registered = {"iss": self.issuer, "sub": subject, "aud": audience}
        times = {"iat": issued, "exp": issued + int(ttl.total_seconds())}
        return tokens.sign(
            {**(claims or {}), **registered, **times}, kid=self.kid, private_pem=_pem(self._key).decode()
        )


def _coordinate(number: int) -> str:
    return base64.urlsafe_b64encode(number.to_bytes(32, "big")).decode().rstrip("=")


def _pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())


def _load_key(path: Path) -> ec.EllipticCurvePrivateKey:
    if not path.exists():
        _make_key(path)
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    with os.fdopen(descriptor, "rb") as file:
        if stat.S_IMODE(os.fstat(descriptor).st_mode) & 0o077:
            raise ConfigurationError("The development issuer's key can be read by others; it must be 0600.")
        key = load_pem_private_key(file.read(), password=None)
    if not isinstance(key, ec.EllipticCurvePrivateKey) or not isinstance(key.curve, ec.SECP256R1):
        raise ConfigurationError("The development issuer's key is not an ES256 key.")
    return key


def _make_key(path: Path) -> None:
    """Write beside and link: of two processes one wins, and neither reads half a key."""
    descriptor, beside = tempfile.mkstemp(dir=path.parent, prefix=".issuer-")
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(_pem(ec.generate_private_key(ec.SECP256R1())))
        path.hardlink_to(beside)
    except FileExistsError:
        pass
    finally:
        Path(beside).unlink()
