"""Attacks on bearer tokens, each beside plain `jose.jwt.decode`, which is the control.

`naive` says whether jose, called as its examples call it, lets the attack in. Where it does not, the
attack is here to stay refused when jose changes. The honest twin of every token is accepted by both.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from typing import Any, Final

import pytest
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from jose import jwe, jwt
from jose.exceptions import JOSEError

from app.auth.tokens import MAX_TOKEN_BYTES, TokenFault, TokenRefused, TrustedIssuer, peek, verify
from app.errors import Unauthenticated
from tests.auth.forgery import AUDIENCE, ISSUER, Issuer, b64, compose, der, es, honest_claims, hs, pem, rs, rsa_jwk

ATTACKER: Final = rsa.generate_private_key(65537, 2048)
ATTACKER_JWK: Final = rsa_jwk(ATTACKER.public_key(), kid="r1")


@dataclass(frozen=True)
class Attack:
    name: str
    forge: Callable[[Issuer], str]
    fault: TokenFault
    naive: bool
    key: Callable[[Issuer], Any] = lambda issuer: issuer.jwks
    """What the naive service verifies with."""


def _confused(secret: Callable[[Issuer], bytes], **header: Any) -> Callable[[Issuer], str]:
    """HS256 with a secret that the attacker knows."""
    return lambda issuer: compose(
        {"alg": "HS256", "kid": "r1", "typ": "JWT", **header}, honest_claims(), hs(secret(issuer))
    )


def _attackers_own(**header: Any) -> Callable[[Issuer], str]:
    return lambda _: compose({"alg": "RS256", "kid": "r1", **header}, honest_claims(), rs(ATTACKER))


def _signed(header: dict[str, Any] | None = None, **claims: Any) -> Callable[[Issuer], str]:
    return lambda issuer: issuer.token(header, **claims)


def _unsigned(alg: str, signature: bytes) -> Callable[[Issuer], str]:
    return lambda _: compose({"alg": alg, "kid": "r1"}, honest_claims(), lambda _: signature)


def _nested(issuer: Issuer) -> str:
    signed = f"{b64(json.dumps({'alg': 'RS256', 'kid': 'r1'}).encode())}.{b64(b'[' * 3000)}"
    return f"{signed}.{b64(rs(issuer.rsa)(signed.encode()))}"


def _rs512(issuer: Issuer) -> str:
    return compose({"alg": "RS512", "kid": "r1"}, honest_claims(), rs(issuer.rsa, hashes.SHA512()))


def _as_es256(issuer: Issuer) -> str:
    """An honest RS256 token under the id of the EC key."""
    return issuer.token({"kid": "e1"})


def _split(issuer: Issuer, *, at: int, change: Callable[[str], str]) -> str:
    segments = issuer.token().split(".")
    segments[at] = change(segments[at])
    return ".".join(segments)


def _swapped_payload(issuer: Issuer) -> str:
    payload = b64(json.dumps(honest_claims(sub="admin")).encode())
    return _split(issuer, at=1, change=lambda _: payload)


SIGNATURES = [
    Attack("none-empty-signature", _unsigned("none", b""), TokenFault.MALFORMED, naive=False),
    Attack("none-with-signature", _unsigned("none", b"x"), TokenFault.ALGORITHM, naive=False),
    Attack("none-in-odd-case", _unsigned("nOnE", b"x"), TokenFault.ALGORITHM, naive=False),
    Attack(
        "hs256-with-the-pem",
        _confused(lambda issuer: pem(issuer.rsa.public_key())),
        TokenFault.ALGORITHM,
        naive=False,
        key=lambda issuer: pem(issuer.rsa.public_key()),
    ),
    Attack(
        "hs256-with-the-der",
        _confused(lambda issuer: der(issuer.rsa.public_key())),
        TokenFault.ALGORITHM,
        naive=True,
        key=lambda issuer: der(issuer.rsa.public_key()),
    ),
    Attack("hs256-weak-secret", _confused(lambda _: b"secret"), TokenFault.ALGORITHM, True, lambda _: "secret"),
    Attack("rs512-of-the-same-key", _rs512, TokenFault.ALGORITHM, naive=True),
    Attack("rs256-under-the-ec-key", _as_es256, TokenFault.ALGORITHM, naive=True),
    Attack("another-key", _attackers_own(), TokenFault.SIGNATURE, naive=False),
    Attack("swapped-payload", _swapped_payload, TokenFault.SIGNATURE, naive=False),
    Attack("stripped-signature", lambda i: _split(i, at=2, change=lambda _: ""), TokenFault.MALFORMED, naive=False),
    Attack("junk-in-signature", lambda i: _split(i, at=2, change=lambda s: f"!{s}***"), TokenFault.MALFORMED, True),
    Attack("newlines-after", lambda i: i.token() + "\n" * 4, TokenFault.MALFORMED, naive=True),
]

HEADERS = [
    Attack("unknown-kid", _signed({"kid": "r2"}), TokenFault.KEY, naive=True),
    Attack("missing-kid", _signed({"kid": ...}), TokenFault.KEY, naive=True),
    Attack("kid-is-a-list", _signed({"kid": ["r1"]}), TokenFault.KEY, naive=True),
    Attack("kid-is-sql", _signed({"kid": "r1' or '1'='1"}), TokenFault.KEY, naive=True),
    # A service that reads the key from the file that the kid names reads nothing from this one.
    Attack("kid-is-a-path", _confused(lambda _: b"", kid="../../../dev/null"), TokenFault.KEY, True, lambda _: b""),
    # Services that take the key that the token brings or names, and one that only passes over it.
    Attack("own-jwk", _attackers_own(jwk=ATTACKER_JWK), TokenFault.HEADER, True, lambda _: ATTACKER_JWK),
    Attack("own-jku", _attackers_own(jku="https://a.test"), TokenFault.HEADER, True, lambda _: ATTACKER_JWK),
    Attack("own-x5u", _attackers_own(x5u="https://a.test"), TokenFault.HEADER, True, lambda _: ATTACKER_JWK),
    Attack("jku", _signed({"jku": "https://a.test/keys"}), TokenFault.HEADER, naive=True),
    Attack("crit", _signed({"crit": ["x-must-understand"]}), TokenFault.HEADER, naive=True),
    Attack("crit-b64", _signed({"crit": ["b64"], "b64": False}), TokenFault.HEADER, naive=True),
    Attack("logout-token", _signed({"typ": "logout+jwt"}), TokenFault.HEADER, naive=True),
    Attack("typ-is-a-list", _signed({"typ": ["JWT"]}), TokenFault.HEADER, naive=True),
]

# Of when the tests were collected, which may be many minutes before they run.
NOW = int(time.time())
CLAIMS = [
    Attack("missing-iss", _signed(iss=...), TokenFault.ISSUER, naive=False),
    Attack("other-iss", _signed(iss="https://issuer.test/"), TokenFault.ISSUER, naive=False),
    Attack("missing-aud", _signed(aud=...), TokenFault.AUDIENCE, naive=True),
    Attack("other-aud", _signed(aud="bulkhead:other"), TokenFault.AUDIENCE, naive=False),
    Attack("other-aud-in-a-list", _signed(aud=["bulkhead:other", "web"]), TokenFault.AUDIENCE, naive=False),
    Attack("aud-prefix", _signed(aud=AUDIENCE[:-1]), TokenFault.AUDIENCE, naive=False),
    Attack("aud-empty-list", _signed(aud=[]), TokenFault.AUDIENCE, naive=False),
    Attack("aud-of-lists", _signed(aud=[[AUDIENCE]]), TokenFault.AUDIENCE, naive=False),
    Attack("aud-for-everyone", _signed(aud=[AUDIENCE, *map(str, range(50))]), TokenFault.AUDIENCE, naive=True),
    Attack("missing-sub", _signed(sub=...), TokenFault.SUBJECT, naive=True),
    Attack("empty-sub", _signed(sub=""), TokenFault.SUBJECT, naive=True),
    Attack("sub-is-a-number", _signed(sub=7), TokenFault.SUBJECT, naive=False),
    Attack("sub-with-nul", _signed(sub="alice\x00"), TokenFault.SUBJECT, naive=True),
    Attack("sub-too-long", _signed(sub="a" * 256), TokenFault.SUBJECT, naive=True),
    Attack("missing-exp", _signed(exp=...), TokenFault.EXPIRY, naive=True),
    Attack("exp-is-a-string", _signed(exp=str(NOW + 7_200)), TokenFault.EXPIRY, naive=True),
    Attack("exp-in-ten-years", _signed(exp=NOW + 315_360_000), TokenFault.EXPIRY, naive=True),
    Attack("exp-beyond-dates", _signed(exp=10**17), TokenFault.EXPIRY, naive=True),
    Attack("exp-is-true", _signed(exp=True), TokenFault.EXPIRY, naive=False),
    Attack("expired", _signed(exp=NOW - 31), TokenFault.EXPIRED, naive=False),
    Attack("nbf-ahead", _signed(nbf=NOW + 7_200), TokenFault.NOT_YET_VALID, naive=False),
    Attack("nbf-is-null", _signed(nbf=None), TokenFault.NOT_YET_VALID, naive=False),
    Attack("iat-ahead", _signed(iat=NOW + 7_200), TokenFault.NOT_YET_VALID, naive=True),
]


def _encrypted(_: Issuer) -> str:
    sealed: bytes = jwe.encrypt(json.dumps(honest_claims()), b"k" * 32, encryption="A256GCM", algorithm="dir")
    return sealed.decode()


SHAPES = [
    Attack("jwe", _encrypted, TokenFault.ENCRYPTED, naive=False),
    Attack("one-megabyte", _signed(padding="x" * 2**20), TokenFault.TOO_LARGE, naive=True),
    Attack("deeply-nested", _nested, TokenFault.MALFORMED, naive=False),
    Attack(
        "payload-is-a-list",
        lambda i: compose({"alg": "RS256", "kid": "r1"}, [1], rs(i.rsa)),
        TokenFault.MALFORMED,
        False,
    ),
    Attack("header-is-a-list", lambda i: compose(["RS256"], honest_claims(), rs(i.rsa)), TokenFault.MALFORMED, False),
    Attack("empty", lambda _: "", TokenFault.MALFORMED, naive=False),
    Attack("two-dots", lambda _: "..", TokenFault.MALFORMED, naive=False),
    Attack("four-parts", lambda i: i.token() + ".x", TokenFault.MALFORMED, naive=False),
    Attack("one-letter-segments", lambda _: "a.b.c", TokenFault.MALFORMED, naive=False),
    Attack("other-digits", lambda _: "٣.٣.٣", TokenFault.MALFORMED, naive=False),
]
ATTACKS = [*SIGNATURES, *HEADERS, *CLAIMS, *SHAPES]


def _naively_accepted(token: str, key: Any) -> bool:
    try:
        jwt.decode(token, key, audience=AUDIENCE, issuer=ISSUER)
    except (JOSEError, TypeError, ValueError, RecursionError):
        return False
    return True


@pytest.mark.parametrize("attack", ATTACKS, ids=lambda attack: attack.name)
def test_the_attack_is_refused_with_its_reason(attack: Attack, issuer: Issuer, trusted: TrustedIssuer) -> None:
    with pytest.raises(TokenRefused) as refusal:
        verify(attack.forge(issuer), trusted, now=datetime.now(UTC))
    assert refusal.value.reason is attack.fault


@pytest.mark.parametrize("attack", ATTACKS, ids=lambda attack: attack.name)
def test_jose_alone_lets_in_what_we_say_it_does(attack: Attack, issuer: Issuer) -> None:
    assert _naively_accepted(attack.forge(issuer), attack.key(issuer)) is attack.naive


def test_the_honest_twin_is_accepted_by_both(issuer: Issuer, trusted: TrustedIssuer) -> None:
    token = issuer.token()
    assert verify(token, trusted, now=datetime.now(UTC)).subject == "alice"
    assert _naively_accepted(token, issuer.jwks)


def test_a_caller_learns_nothing_from_which_check_refused(issuer: Issuer, trusted: TrustedIssuer) -> None:
    answers = set()
    for attack in ATTACKS:
        with pytest.raises(TokenRefused) as refusal:
            verify(attack.forge(issuer), trusted, now=datetime.now(UTC))
        error = refusal.value
        answers.add((error.status, error.code, error.detail, str(error), str(error.headers), str(error.extra)))
        assert error.__cause__ is None
    plain = Unauthenticated()
    assert answers == {(401, plain.code, plain.detail, str(plain), str(plain.headers), "{}")}


def test_twenty_megabytes_cost_nothing(trusted: TrustedIssuer) -> None:
    token = ".".join(["A" * (4 * 2**20)] * 5)
    started = time.thread_time()
    for read in (peek, lambda text: verify(text, trusted, now=datetime.now(UTC))):
        with pytest.raises(TokenRefused) as refusal:
            read(token)
        assert refusal.value.reason is TokenFault.TOO_LARGE
    assert time.thread_time() - started < 0.1


def test_the_size_limit_is_exact(issuer: Issuer, trusted: TrustedIssuer) -> None:
    largest = max(
        (issuer.token(padding="x" * length) for length in range(5_600, 5_700)),
        key=lambda token: (len(token) <= MAX_TOKEN_BYTES, len(token)),
    )
    assert MAX_TOKEN_BYTES - 2 <= len(largest) <= MAX_TOKEN_BYTES
    assert verify(largest, trusted, now=datetime.now(UTC)).subject == "alice"


def test_a_key_of_another_issuer_under_the_same_id_does_not_verify(trusted: TrustedIssuer) -> None:
    other = Issuer()
    with pytest.raises(TokenRefused) as refusal:
        verify(other.token(), trusted, now=datetime.now(UTC))
    assert refusal.value.reason is TokenFault.SIGNATURE
    assert _naively_accepted(other.token(), other.jwks)


def _always(signature: bytes, _: bytes) -> bytes:
    return signature


def test_an_es256_signature_of_zeros_does_not_verify(trusted: TrustedIssuer) -> None:
    for forged in (b"\0" * 64, b"\xff" * 64, b"\0" * 63):
        token = compose({"alg": "ES256", "kid": "e1"}, honest_claims(), partial(_always, forged))
        with pytest.raises(TokenRefused):
            verify(token, trusted, now=datetime.now(UTC))


def test_an_es256_token_of_another_curve_does_not_verify(trusted: TrustedIssuer) -> None:
    token = compose({"alg": "ES256", "kid": "e1"}, honest_claims(), es(ec.generate_private_key(ec.SECP384R1())))
    with pytest.raises(TokenRefused):
        verify(token, trusted, now=datetime.now(UTC))
