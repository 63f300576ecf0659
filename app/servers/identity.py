"""Who a call is made for, told to a remote server: a short-lived token, signed by a key of the platform.

The keys follow from the root keys, so that they rotate with them: the active one signs, and every one is published.
"""

from __future__ import annotations

import base64
import hashlib
import json
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import count
from typing import Any, Final, Self
from uuid import UUID

from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from mcp.types import CallToolResult, TextContent

from app.auth import tokens
from app.db import new_id
from app.keyring import Keyring, SecretKey
from app.policies.document import DeclaredServer
from app.policies.servers.http import HttpServer
from app.scopes import Role
from app.servers.errors import ServerUnavailable

# Where the bridge finds the token: beside the arguments of a call, where no model writes.
META_KEY: Final = "bulkhead/identity"
LIFETIME_S: Final = 60
_PURPOSE: Final = "identity"
# The order of P-256's group (SEC 2, 2.4.2): a private key is a number from 1 to one less.
_ORDER: Final = 0xFFFFFFFF00000000FFFFFFFFFFFFFFFFBCE6FAADA7179E84F3B9CAC2FC632551


@dataclass(frozen=True, slots=True)
class OnBehalf:
    """Whom a call is made for."""

    tenant_id: UUID
    user_id: UUID
    role: Role
    run_id: UUID


Identify = Callable[[OnBehalf, str], str]
"""The token for one call of a tool."""


@dataclass(frozen=True, slots=True)
class _SigningKey:
    jwk: dict[str, str]
    pem: str = field(repr=False)

    @classmethod
    def derive(cls, key: SecretKey) -> Self:
        private = ec.derive_private_key(_scalar(key), ec.SECP256R1())
        pem = private.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()).decode()
        point = private.public_key().public_numbers()
        named = {"crv": "P-256", "kty": "EC", "x": _coordinate(point.x), "y": _coordinate(point.y)}
        thumbprint = hashlib.sha256(json.dumps(named, sort_keys=True, separators=(",", ":")).encode()).digest()
        return cls({**named, "alg": "ES256", "use": "sig", "kid": _base64url(thumbprint)}, pem)


class Identities:
    """Signs identities in the name of `issuer`, the URL that the service is known by; without one it signs none."""

    def __init__(self, keyring: Keyring, issuer: str | None) -> None:
        self._issuer = issuer
        self._keys = [_SigningKey.derive(keyring.derive(_PURPOSE, key_id=key_id)) for key_id in keyring.key_ids]

    def public_jwks(self) -> dict[str, Any]:
        """The key set (RFC 7517) by which remote servers verify; the key that signs is the first."""
        return {"keys": [key.jwk for key in self._keys]}

    def signer(self, name: str, declared: DeclaredServer) -> Identify | None:
        """What signs for a server; None where its policy does not ask for that.

        Raises ServerUnavailable where it does and nobody could verify.
        """
        if not isinstance(declared, HttpServer) or not declared.identity:
            return None
        if self._issuer is None:
            raise ServerUnavailable(
                f"The tool server {name!r} is to be told who calls, and for that BULKHEAD_PUBLIC_URL must be set."
            )
        audience, issuer = declared.origin, self._issuer
        return lambda whom, tool: self._sign(_claims(whom, tool) | {"iss": issuer, "aud": audience})

    def _sign(self, claims: dict[str, Any]) -> str:
        key = self._keys[0]
        return tokens.sign(claims, kid=key.jwk["kid"], private_pem=key.pem)


def concealed(result: CallToolResult, token: str) -> CallToolResult:
    """The result without the token that the server was given, whole or its signature, without which it is none."""
    for block in result.content:
        if isinstance(block, TextContent):
            for known in (token, token.rpartition(".")[2]):
                block.text = block.text.replace(known, "[redacted]")
    return result


def _claims(whom: OnBehalf, tool: str) -> dict[str, Any]:
    now = int(time.time())
    return {
        "sub": str(whom.user_id),
        "tenant": str(whom.tenant_id),
        "role": whom.role.value,
        "run_id": str(whom.run_id),
        "tool": tool,
        "iat": now,
        "exp": now + LIFETIME_S,
        "jti": str(new_id()),
    }


def _scalar(key: SecretKey) -> int:
    """A private key that follows from this one. The first try misses once in 2**32."""
    tries = (int.from_bytes(key.mac("p256", bytes([number]))) for number in count())
    return next(number for number in tries if 0 < number < _ORDER)


def _coordinate(number: int) -> str:
    return _base64url(number.to_bytes(32, "big"))


def _base64url(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).decode().rstrip("=")
