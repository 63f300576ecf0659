"""Makes tokens, honest and not, by hand: no library stands between an attack and its bytes."""

from __future__ import annotations

import base64
import hmac
import json
import time
from collections.abc import Callable, Mapping
from typing import Any, Final

from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, padding, rsa
from cryptography.hazmat.primitives.asymmetric.utils import decode_dss_signature
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

ISSUER: Final = "https://issuer.test"
AUDIENCE: Final = "bulkhead:0198c0de-0000-7000-8000-000000000001"
Sign = Callable[[bytes], bytes]


def b64(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).decode().rstrip("=")


def number(value: int) -> str:
    return b64(value.to_bytes((value.bit_length() + 7) // 8, "big"))


def rsa_jwk(key: rsa.RSAPublicKey, **members: Any) -> dict[str, Any]:
    numbers = key.public_numbers()
    return {"kty": "RSA", "n": number(numbers.n), "e": number(numbers.e), **members}


def ec_jwk(key: ec.EllipticCurvePublicKey, **members: Any) -> dict[str, Any]:
    numbers, size = key.public_numbers(), (key.key_size + 7) // 8
    x, y = (b64(value.to_bytes(size, "big")) for value in (numbers.x, numbers.y))
    return {"kty": "EC", "crv": f"P-{key.key_size}", "x": x, "y": y, **members}


def rs(key: rsa.RSAPrivateKey, algorithm: hashes.HashAlgorithm | None = None) -> Sign:
    return lambda data: key.sign(data, padding.PKCS1v15(), algorithm or hashes.SHA256())


def es(key: ec.EllipticCurvePrivateKey) -> Sign:
    def sign(data: bytes) -> bytes:
        size = (key.key_size + 7) // 8
        r, s = decode_dss_signature(key.sign(data, ec.ECDSA(hashes.SHA256())))
        return r.to_bytes(size, "big") + s.to_bytes(size, "big")

    return sign


def hs(secret: bytes) -> Sign:
    return lambda data: hmac.digest(secret, data, "sha256")


def der(key: rsa.RSAPublicKey) -> bytes:
    return key.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)


def pem(key: rsa.RSAPublicKey) -> bytes:
    return key.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)


def compose(header: Any, payload: Any, sign: Sign) -> str:
    signed = f"{b64(json.dumps(header).encode())}.{b64(json.dumps(payload).encode())}"
    return f"{signed}.{b64(sign(signed.encode()))}"


def honest_claims(**changed: Any) -> dict[str, Any]:
    """Good claims of now, changed; a claim changed to `...` is left out."""
    now = int(time.time())
    claims: Mapping[str, Any] = {
        "iss": ISSUER,
        "aud": AUDIENCE,
        "sub": "alice",
        "iat": now,
        "exp": now + 600,
        **changed,
    }
    return {name: value for name, value in claims.items() if value is not ...}


class Issuer:
    """An OIDC issuer with one RSA and one EC key, and the attacker's view of it."""

    def __init__(self) -> None:
        self.rsa = rsa.generate_private_key(65537, 2048)
        self.ec = ec.generate_private_key(ec.SECP256R1())
        self.jwks = {
            "keys": [
                rsa_jwk(self.rsa.public_key(), kid="r1", use="sig"),
                ec_jwk(self.ec.public_key(), kid="e1", use="sig"),
            ]
        }

    def token(self, header: Mapping[str, Any] | None = None, **claims: Any) -> str:
        """An RS256 token, honestly signed; members of header and claims changed, or left out by `...`."""
        members = {"alg": "RS256", "kid": "r1", "typ": "JWT", **(header or {})}
        kept = {name: value for name, value in members.items() if value is not ...}
        return compose(kept, honest_claims(**claims), rs(self.rsa))
