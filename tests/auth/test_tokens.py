"""What a good token gives, and what may be read of one before it is known to be good."""

from __future__ import annotations

from collections.abc import MutableMapping
from datetime import UTC, datetime, timedelta
from typing import cast

import pytest
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from hypothesis import given
from hypothesis import strategies as st

from app.auth.tokens import (
    Algorithm,
    KeySet,
    TokenFault,
    TokenRefused,
    TrustedIssuer,
    VerificationKey,
    peek,
    verify,
)
from tests.auth.forgery import AUDIENCE, ISSUER, Issuer, compose, es, honest_claims


def test_rs256_and_es256_tokens_are_verified(issuer: Issuer, trusted: TrustedIssuer) -> None:
    tokens = [
        issuer.token(),
        compose({"alg": "ES256", "kid": "e1", "typ": "at+jwt"}, honest_claims(), es(issuer.ec)),
        issuer.token({"typ": ..., "x5t": "thumbprint"}),
    ]
    for token in tokens:
        claims = verify(token, trusted, now=datetime.now(UTC))
        assert (claims.issuer, claims.subject, claims.audience) == (ISSUER, "alice", AUDIENCE)


def test_claims_carry_the_expiry_and_the_rest_of_the_payload_read_only(issuer: Issuer, trusted: TrustedIssuer) -> None:
    now = datetime.now(UTC).replace(microsecond=0)
    token = issuer.token(exp=now.timestamp() + 90, groups=["ops"])
    claims = verify(token, trusted, now=now)
    assert claims.expires_at == now + timedelta(seconds=90)
    assert claims.claims["groups"] == ["ops"]
    with pytest.raises(TypeError):
        cast("MutableMapping[str, object]", claims.claims)["groups"] = ["admin"]
    assert "ops" not in repr(claims)


def test_ours_among_several_audiences_is_taken(issuer: Issuer, trusted: TrustedIssuer) -> None:
    token = issuer.token(aud=["https://issuer.test/userinfo", AUDIENCE])
    assert verify(token, trusted, now=datetime.now(UTC)).audience == AUDIENCE


def test_the_clock_may_be_off_by_the_leeway_and_no_more(issuer: Issuer, trusted: TrustedIssuer) -> None:
    now = datetime.now(UTC).replace(microsecond=0)
    moment = int(now.timestamp())
    expired = issuer.token(iat=moment - 100, exp=moment)
    early = issuer.token(nbf=moment + 100, iat=moment + 100)

    def at(offset: int, token: str) -> TokenFault | None:
        try:
            verify(token, trusted, now=now + timedelta(seconds=offset), leeway_s=30)
        except TokenRefused as refusal:
            return refusal.reason
        return None

    assert at(29, expired) is None
    assert at(30, expired) is TokenFault.EXPIRED
    assert at(70, early) is None
    assert at(69, early) is TokenFault.NOT_YET_VALID


def test_a_lifetime_is_bounded_by_the_callers_limit(issuer: Issuer, trusted: TrustedIssuer) -> None:
    now = datetime.now(UTC)
    token = issuer.token(exp=int(now.timestamp()) + 3_600)
    verify(token, trusted, now=now, max_lifetime_s=3_600)
    with pytest.raises(TokenRefused) as refusal:
        verify(token, trusted, now=now, max_lifetime_s=3_500)
    assert refusal.value.reason is TokenFault.EXPIRY


def test_peeking_names_issuer_audiences_and_key(issuer: Issuer) -> None:
    seen = peek(issuer.token(aud=["a", "b"]))
    assert (seen.issuer, seen.audiences, seen.kid) == (ISSUER, ("a", "b"), "r1")


def test_peeking_refuses_a_token_that_brings_its_own_key(issuer: Issuer) -> None:
    with pytest.raises(TokenRefused):
        peek(issuer.token({"jku": "https://a.test"}))


@given(st.one_of(st.text(), st.from_regex(r"[A-Za-z0-9_-]{1,40}(\.[A-Za-z0-9_-]{1,40}){2}", fullmatch=True)))
def test_whatever_is_presented_peeking_raises_nothing_else(text: str) -> None:
    with pytest.raises(TokenRefused):
        peek(text)


@given(
    claim=st.sampled_from(["iss", "aud", "sub", "exp", "nbf", "iat"]),
    value=st.recursive(
        st.none()
        | st.booleans()
        | st.integers(-(2**63), 2**63)
        | st.floats(allow_nan=False, allow_infinity=False)
        | st.text(max_size=20),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
        max_leaves=5,
    ),
)
def test_a_claim_of_any_type_is_accepted_or_refused_and_nothing_else(
    issuer: Issuer, trusted: TrustedIssuer, claim: str, value: object
) -> None:
    token = compose({"alg": "ES256", "kid": "e1"}, honest_claims(**{claim: value}), es(issuer.ec))
    try:
        claims = verify(token, trusted, now=datetime.now(UTC))
    except TokenRefused:
        return
    assert claims.issuer == ISSUER
    assert claims.subject


def test_weak_keys_are_not_built() -> None:
    with pytest.raises(ValueError, match="2048"):
        VerificationKey.build("k", rsa.generate_private_key(65537, 1024).public_key())  # noqa: S505 - the weak key is the test
    with pytest.raises(ValueError, match="P-256"):
        VerificationKey.build("k", ec.generate_private_key(ec.SECP384R1()).public_key())


def test_a_key_verifies_one_algorithm_and_a_set_finds_it_by_id() -> None:
    key = VerificationKey.build("k", ec.generate_private_key(ec.SECP256R1()).public_key())
    keys = KeySet([key])
    assert key.algorithm is Algorithm.ES256
    assert keys.find("k") is key
    assert keys.find("K") is None
    assert ("k" in keys, "K" in keys, list(keys), len(keys)) == (True, False, ["k"], 1)
    with pytest.raises(ValueError):
        KeySet([key, key])
