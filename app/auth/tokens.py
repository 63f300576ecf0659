"""Bearer tokens (JWT) of registered issuers. The only module that imports jose.

Of jose only the keys are used. Its `jwt.decode` takes the algorithm from the token, passes over an
unknown `kid` and `crit`, and accepts a token without `aud`, `exp` or `sub`; so here a token's parts are
taken apart strictly, the key and its algorithm come from the issuer's key set, and each claim is typed.
"""

from __future__ import annotations

import base64
import math
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from enum import StrEnum
from types import MappingProxyType
from typing import Any, Final, Self

import orjson
from cryptography.hazmat.primitives.asymmetric.ec import SECP256R1, EllipticCurvePublicKey
from cryptography.hazmat.primitives.asymmetric.rsa import RSAPublicKey
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from jose import jwk, jws
from jose.backends.base import Key

from app.errors import Unauthenticated

MAX_TOKEN_BYTES: Final = 8 * 1024
MAX_KEYS: Final = 20
_MAX_AUDIENCES: Final = 16
_MAX_NAME: Final = 255  # OpenID Connect Core, 2: `sub` is at most 255 characters
_LAST_MOMENT: Final = 253_402_300_799  # the year 9999, the last one that a datetime can hold
_SEGMENT: Final = re.compile(r"[A-Za-z0-9_-]+")
# Each would let the token bring its own key, its own encoding or rules that we do not know.
_REFUSED_HEADERS: Final = frozenset({"crit", "jku", "jwk", "x5u", "x5c", "b64", "zip", "enc"})
# RFC 8725, 3.11: a logout token or a security event is not an access token, though the signature is good.
_TYPES: Final = frozenset({"jwt", "at+jwt", "application/at+jwt"})


class Algorithm(StrEnum):
    """What a key verifies. jose has no PS256 and no EdDSA; symmetric ones have no place in a key set."""

    RS256 = "RS256"
    ES256 = "ES256"


class TokenFault(StrEnum):
    """Why a token was refused: for the audit event and the metric, never for the caller."""

    TOO_LARGE = "too_large"
    ENCRYPTED = "encrypted"
    MALFORMED = "malformed"
    HEADER = "header"
    KEY = "key"
    ALGORITHM = "algorithm"
    SIGNATURE = "signature"
    ISSUER = "issuer"
    AUDIENCE = "audience"
    SUBJECT = "subject"
    EXPIRY = "expiry"
    EXPIRED = "expired"
    NOT_YET_VALID = "not_yet_valid"


class TokenRefused(Unauthenticated):
    """The request carries no valid credential."""

    def __init__(self, reason: TokenFault) -> None:
        super().__init__()
        self.reason = reason


@dataclass(frozen=True, slots=True)
class VerificationKey:
    """One public key of an issuer, prebuilt, with the only algorithm that it verifies."""

    kid: str
    algorithm: Algorithm
    _key: Key = field(repr=False)

    @classmethod
    def build(cls, kid: str, public: RSAPublicKey | EllipticCurvePublicKey) -> Self:
        """Raise ValueError for RSA below 2048 or above 8192 bits, and for a curve other than P-256."""
        algorithm = _algorithm_for(public)
        pem = public.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
        return cls(kid, algorithm, jwk.construct(pem, algorithm.value))

    def verifies(self, signed: bytes, signature: bytes) -> bool:
        return self._key.verify(signed, signature)


class KeySet:
    """The public keys of an issuer by key id."""

    __slots__ = ("_keys",)

    def __init__(self, keys: Iterable[VerificationKey]) -> None:
        """Raise ValueError for a key id named twice, and for more than 20 keys."""
        listed = list(keys)
        self._keys = {key.kid: key for key in listed}
        if len(self._keys) != len(listed) or len(listed) > MAX_KEYS:
            raise ValueError(f"a key set has at most {MAX_KEYS} keys, each with an id of its own")

    def __len__(self) -> int:
        return len(self._keys)

    def __iter__(self) -> Iterator[str]:
        return iter(self._keys)

    def __contains__(self, kid: object) -> bool:
        return kid in self._keys

    def find(self, kid: str) -> VerificationKey | None:
        return self._keys.get(kid)


@dataclass(frozen=True, slots=True)
class TrustedIssuer:
    """Whose tokens are taken, for which audience, under which keys."""

    issuer: str
    audience: str
    keys: KeySet


@dataclass(frozen=True, slots=True)
class Claims:
    """What a verified token says. `claims` is the whole payload, untyped beyond the named fields."""

    issuer: str
    subject: str
    audience: str
    expires_at: datetime
    claims: Mapping[str, Any] = field(repr=False)


@dataclass(frozen=True, slots=True)
class Unverified:
    """What a token claims before any check: good for finding its issuer's row and for nothing else."""

    issuer: str
    audiences: tuple[str, ...]
    kid: str


def peek(token: str) -> Unverified:
    """Read who a token says it is from. Bounded; raise TokenRefused for what is not one of our tokens."""
    header, payload, _, _ = _take_apart(token)
    return Unverified(_issuer(payload), _audiences(payload), _kid(header))


def verify(
    token: str,
    issuer: TrustedIssuer,
    *,
    now: datetime,
    leeway_s: float = 30,
    max_lifetime_s: float = 86_400,
) -> Claims:
    """Check signature, issuer, audience, subject and times. Raise TokenRefused.

    `exp` may lie at most `max_lifetime_s` ahead. A token for several audiences is taken if ours is one.
    """
    header, payload, signed, signature = _take_apart(token)
    _check_signature(header, issuer.keys, signed=signed, signature=signature)
    if _issuer(payload) != issuer.issuer:
        raise TokenRefused(TokenFault.ISSUER)
    if issuer.audience not in _audiences(payload):
        raise TokenRefused(TokenFault.AUDIENCE)
    moment = now.timestamp()
    _check_begun(payload, by=moment + leeway_s)
    expires = _expiry(payload, after=moment - leeway_s, until=moment + max_lifetime_s + leeway_s)
    return Claims(
        issuer=issuer.issuer,
        subject=_name(payload, "sub", TokenFault.SUBJECT),
        audience=issuer.audience,
        expires_at=datetime.fromtimestamp(expires, UTC),
        claims=MappingProxyType(payload),
    )


def sign(claims: Mapping[str, Any], *, kid: str, private_pem: str) -> str:
    """Sign with ES256, for the two issuers that we are: the demo's, and that of identities for remote servers."""
    return jws.sign(dict(claims), private_pem, headers={"kid": kid}, algorithm=Algorithm.ES256.value)


def _algorithm_for(public: RSAPublicKey | EllipticCurvePublicKey) -> Algorithm:
    if isinstance(public, RSAPublicKey):
        # Above 8192 bits one verification costs milliseconds.
        if 2048 <= public.key_size <= 8192:
            return Algorithm.RS256
        raise ValueError("an RSA key has 2048 to 8192 bits")
    if isinstance(public.curve, SECP256R1):
        return Algorithm.ES256
    raise ValueError("the curve is P-256")


def _take_apart(token: str) -> tuple[dict[str, Any], dict[str, Any], bytes, bytes]:
    """Header, payload, signed bytes and signature; nothing is believed yet."""
    if len(token) > MAX_TOKEN_BYTES:
        raise TokenRefused(TokenFault.TOO_LARGE)
    segments = token.split(".")
    if len(segments) == 5:
        raise TokenRefused(TokenFault.ENCRYPTED)
    # jose's decoder skips what is not base64url, so that many texts would be one token.
    if len(segments) != 3 or not all(_SEGMENT.fullmatch(segment) for segment in segments):
        raise TokenRefused(TokenFault.MALFORMED)
    header, payload, signature = (_decode(segment) for segment in segments)
    return _json(header), _json(payload), ".".join(segments[:2]).encode(), signature


def _decode(segment: str) -> bytes:
    try:
        return base64.urlsafe_b64decode(segment + "=" * (-len(segment) % 4))
    except ValueError:
        raise TokenRefused(TokenFault.MALFORMED) from None


def _json(text: bytes) -> dict[str, Any]:
    try:
        document = orjson.loads(text)
    except orjson.JSONDecodeError:
        document = None
    if not isinstance(document, dict):
        raise TokenRefused(TokenFault.MALFORMED)
    return document


def _check_signature(header: Mapping[str, Any], keys: KeySet, *, signed: bytes, signature: bytes) -> None:
    key = keys.find(_kid(header))
    if key is None:
        raise TokenRefused(TokenFault.KEY)
    if header.get("alg") != key.algorithm.value:
        raise TokenRefused(TokenFault.ALGORITHM)
    if not key.verifies(signed, signature):
        raise TokenRefused(TokenFault.SIGNATURE)


def _kid(header: Mapping[str, Any]) -> str:
    """The key id of a header that asks for nothing else."""
    kind = header.get("typ", "JWT")
    if _REFUSED_HEADERS & header.keys() or not isinstance(kind, str) or kind.lower() not in _TYPES:
        raise TokenRefused(TokenFault.HEADER)
    return _name(header, "kid", TokenFault.KEY)


def _issuer(payload: Mapping[str, Any]) -> str:
    return _name(payload, "iss", TokenFault.ISSUER)


def _audiences(payload: Mapping[str, Any]) -> tuple[str, ...]:
    listed = payload.get("aud")
    audiences = listed if isinstance(listed, list) else [listed]
    if not 1 <= len(audiences) <= _MAX_AUDIENCES or not all(_is_name(one) for one in audiences):
        raise TokenRefused(TokenFault.AUDIENCE)
    return tuple(audiences)


def _name(source: Mapping[str, Any], member: str, fault: TokenFault) -> str:
    value = source.get(member)
    if not isinstance(value, str) or not _is_name(value):
        raise TokenRefused(fault)
    return value


def _is_name(value: object) -> bool:
    """Printable: a NUL would break the statement that looks it up."""
    return isinstance(value, str) and 1 <= len(value) <= _MAX_NAME and value.isprintable()


def _expiry(payload: Mapping[str, Any], *, after: float, until: float) -> float:
    expires = _moment(payload, "exp")
    if expires is None or expires > until:
        raise TokenRefused(TokenFault.EXPIRY)
    if expires <= after:
        raise TokenRefused(TokenFault.EXPIRED)
    return expires


def _check_begun(payload: Mapping[str, Any], *, by: float) -> None:
    for member in {"nbf", "iat"} & payload.keys():
        begins = _moment(payload, member)
        if begins is None or begins > by:
            raise TokenRefused(TokenFault.NOT_YET_VALID)


def _moment(payload: Mapping[str, Any], member: str) -> float | None:
    """Seconds since 1970, or None for what is not a moment (a bool is an int, to Python)."""
    value = payload.get(member)
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return float(value) if math.isfinite(value) and 0 <= value <= _LAST_MOMENT else None
