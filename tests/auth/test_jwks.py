"""Key sets: read strictly, fetched seldom, and never a pass when they cannot be had."""

from __future__ import annotations

import asyncio
import json
import stat
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, Final

import pytest
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from jose import jwt

from app.auth.jwks import DevelopmentIssuer, Freshness, InvalidKeySet, JwksCache, parse_jwks
from app.auth.tokens import Algorithm, TokenRefused, TrustedIssuer, verify
from app.errors import ConfigurationError, Unavailable
from tests.auth.forgery import AUDIENCE, ISSUER, Issuer, b64, compose, ec_jwk, honest_claims, number, rs, rsa_jwk

RSA: Final = rsa.generate_private_key(65537, 2048)
EC: Final = ec.generate_private_key(ec.SECP256R1())
GOOD: Final = rsa_jwk(RSA.public_key(), kid="r1", alg="RS256", use="sig")
PRIVATE_EC: Final = number(EC.private_numbers().private_value)
URL: Final = "https://issuer.test/keys"


def test_signing_keys_are_read_with_their_algorithm() -> None:
    keys = parse_jwks(json.dumps({"keys": [GOOD, ec_jwk(EC.public_key(), kid="e1")]}).encode())
    found = [(key.kid, key.algorithm) for key in map(keys.find, keys) if key]
    assert found == [("r1", Algorithm.RS256), ("e1", Algorithm.ES256)]


@pytest.mark.parametrize(
    "other",
    [
        rsa_jwk(RSA.public_key(), kid="enc", use="enc", alg="RSA-OAEP"),
        rsa_jwk(RSA.public_key(), kid="enc-for-any", use="enc"),
        rsa_jwk(RSA.public_key(), kid="ps", alg="PS256"),
        rsa_jwk(RSA.public_key(), kid="ops", key_ops=["encrypt"]),
        ec_jwk(ec.generate_private_key(ec.SECP384R1()).public_key(), kid="e384", alg="ES384"),
        {"kty": "EC", "crv": "secp256k1", "kid": "coin", "x": "AA", "y": "AA"},
        {"kty": "OKP", "crv": "Ed25519", "kid": "ed", "x": "AA"},
    ],
    ids=lambda entry: entry["kid"],
)
def test_keys_for_something_else_are_left_out(other: dict[str, Any]) -> None:
    assert list(parse_jwks({"keys": [other, GOOD]})) == ["r1"]
    with pytest.raises(InvalidKeySet):
        parse_jwks({"keys": [other]})


@pytest.mark.parametrize(
    "bad",
    [
        {"kty": "oct", "k": b64(b"secret"), "kid": "s", "alg": "HS256"},
        ec_jwk(EC.public_key(), kid="e1", d=PRIVATE_EC),
        {**GOOD, "kid": "r2", "d": "AQAB"},
        {**GOOD, "kid": ...},
        {**GOOD, "kid": 7},
        {**GOOD, "kid": ""},
        GOOD,
        {**GOOD, "kid": "r2", "e": number(3)},
        {**GOOD, "kid": "r2", "n": GOOD["n"] + "!!!!"},
        {**GOOD, "kid": "r2", "n": None},
        {**ec_jwk(EC.public_key(), kid="e1"), "y": b64(b"\1" * 32)},
    ],
    ids=[
        "symmetric",
        "private-ec",
        "private-rsa",
        "no-kid",
        "kid-is-a-number",
        "empty-kid",
        "kid-twice",
        "exponent",
        "alphabet",
        "no-modulus",
        "off-the-curve",
    ],
)
def test_a_set_with_a_dangerous_key_is_refused_whole(bad: dict[str, Any]) -> None:
    entry = {name: value for name, value in bad.items() if value is not ...}
    with pytest.raises(InvalidKeySet) as refusal:
        parse_jwks({"keys": [GOOD, entry]})
    assert refusal.value.faults[0].path in {"/keys/1", "/keys"}
    assert PRIVATE_EC not in str(refusal.value.faults)


def test_a_weak_key_that_jose_would_use_is_refused() -> None:
    weak = rsa.generate_private_key(65537, 1024)  # noqa: S505 - the weak key is the test
    entry = rsa_jwk(weak.public_key(), kid="w1")
    token = compose({"alg": "RS256", "kid": "w1"}, honest_claims(), rs(weak))
    assert jwt.decode(token, {"keys": [entry]}, audience=AUDIENCE, issuer=ISSUER)["sub"] == "alice"
    with pytest.raises(InvalidKeySet) as refusal:
        parse_jwks({"keys": [entry]})
    assert "2048" in refusal.value.faults[0].message


@pytest.mark.parametrize(
    "document",
    [b"", b"[]", b"null", b"{}", b'{"keys": {}}', b'{"keys": [1]}', b'{"keys": []}', b"\xff", b"[" * 5000],
)
def test_what_is_no_key_set_is_refused(document: bytes) -> None:
    with pytest.raises(InvalidKeySet):
        parse_jwks(document)


def test_sizes_are_bounded() -> None:
    def entries(count: int) -> dict[str, Any]:
        return {"keys": [{**GOOD, "kid": f"r{index}"} for index in range(count)]}

    assert len(parse_jwks(entries(20))) == 20
    with pytest.raises(InvalidKeySet):
        parse_jwks(entries(21))
    padded = json.dumps({"keys": [GOOD], "padding": "x" * 128 * 1024}).encode()
    with pytest.raises(InvalidKeySet):
        parse_jwks(padded)


class Publisher:
    """An issuer's side of `Fetch`: what it serves can change, fail, or wait."""

    def __init__(self) -> None:
        self.document: Mapping[str, Any] | None = {"keys": [GOOD]}
        self.fetches = 0
        self.now = 1_000.0
        self.open = asyncio.Event()
        self.open.set()

    async def fetch(self, url: str) -> bytes:
        assert url == URL
        self.fetches += 1
        await self.open.wait()
        if self.document is None:
            raise Unavailable
        return json.dumps(self.document).encode()

    def cache(self) -> JwksCache:
        return JwksCache(self.fetch, freshness=Freshness(ttl_s=300, stale_s=3600), clock=lambda: self.now)


async def test_a_set_is_fetched_once_for_its_lifetime() -> None:
    publisher = Publisher()
    cache = publisher.cache()
    for _ in range(10):
        assert "r1" in await cache.key_set(URL, kid="r1")
    assert publisher.fetches == 1
    publisher.now += 300
    await cache.key_set(URL, kid="r1")
    assert publisher.fetches == 2


async def test_callers_at_once_share_one_fetch() -> None:
    publisher = Publisher()
    publisher.open.clear()
    cache = publisher.cache()
    waiting = [asyncio.create_task(cache.key_set(URL, kid="r1")) for _ in range(50)]
    await asyncio.sleep(0.01)
    publisher.open.set()
    assert all("r1" in keys for keys in await asyncio.gather(*waiting))
    assert publisher.fetches == 1


async def test_a_caller_who_leaves_does_not_take_the_others_down() -> None:
    publisher = Publisher()
    publisher.open.clear()
    cache = publisher.cache()
    first, *others = [asyncio.create_task(cache.key_set(URL, kid="r1")) for _ in range(5)]
    await asyncio.sleep(0.01)
    first.cancel()
    publisher.open.set()
    assert all("r1" in keys for keys in await asyncio.gather(*others))
    assert publisher.fetches == 2


async def test_callers_at_once_share_one_failure() -> None:
    publisher = Publisher()
    publisher.document = None
    cache = publisher.cache()
    results = await asyncio.gather(*(cache.key_set(URL, kid="r1") for _ in range(20)), return_exceptions=True)
    assert {type(result) for result in results} == {Unavailable}
    assert publisher.fetches == 1


async def test_a_rotated_key_is_found_and_a_storm_of_unknown_ones_fetches_once_a_minute() -> None:
    publisher = Publisher()
    cache = publisher.cache()
    await cache.key_set(URL, kid="r1")
    publisher.document = {"keys": [{**GOOD, "kid": "r2"}]}
    publisher.now += 60
    assert "r2" in await cache.key_set(URL, kid="r2")
    assert publisher.fetches == 2
    for second in range(60):
        publisher.now += 1
        assert f"random-{second}" not in await cache.key_set(URL, kid=f"random-{second}")
    assert publisher.fetches == 3


async def test_an_issuer_that_is_down_is_not_asked_for_an_unknown_key_more_often() -> None:
    publisher = Publisher()
    cache = publisher.cache()
    await cache.key_set(URL, kid="r1")
    publisher.document = None
    for second in range(120):
        publisher.now += 1
        await cache.key_set(URL, kid=f"random-{second}")
    assert publisher.fetches == 3


async def test_a_failure_is_unavailable_and_asked_again_after_a_pause() -> None:
    publisher = Publisher()
    publisher.document = None
    cache = publisher.cache()
    for _ in range(10):
        with pytest.raises(Unavailable):
            await cache.key_set(URL, kid="r1")
    assert publisher.fetches == 1
    publisher.document = {"keys": [GOOD]}
    publisher.now += 5
    assert "r1" in await cache.key_set(URL, kid="r1")


@pytest.mark.parametrize("broken", [None, {"keys": [{"kty": "oct", "k": "AA", "kid": "r1"}]}])
async def test_old_keys_serve_while_the_issuer_is_broken_but_not_for_ever(
    broken: Mapping[str, Any] | None,
) -> None:
    publisher = Publisher()
    cache = publisher.cache()
    await cache.key_set(URL, kid="r1")
    publisher.document = broken
    publisher.now += 3_899
    assert "r1" in await cache.key_set(URL, kid="r1")
    publisher.now += 1
    with pytest.raises(Unavailable):
        await cache.key_set(URL, kid="r1")


async def test_a_withdrawn_key_is_refused_once_the_set_is_old() -> None:
    publisher = Publisher()
    cache = publisher.cache()
    token = compose({"alg": "RS256", "kid": "r1"}, honest_claims(), rs(RSA))

    async def check() -> str:
        trusted = TrustedIssuer(ISSUER, AUDIENCE, await cache.key_set(URL, kid="r1"))
        return verify(token, trusted, now=datetime.now(UTC)).subject

    assert await check() == "alice"
    publisher.document = {"keys": [{**GOOD, "kid": "r2"}]}
    publisher.now += 300
    with pytest.raises(TokenRefused):
        await check()


async def test_an_endless_row_of_issuers_does_not_fill_the_memory() -> None:
    async def fetch(_: str) -> bytes:
        raise Unavailable

    cache = JwksCache(fetch)
    for index in range(1_100):
        with pytest.raises(Unavailable):
            await cache.key_set(f"https://{index}.test", kid="k")
    assert len(cache._entries) == 1_000


def test_a_development_token_is_verified_by_the_published_key(tmp_path: Path) -> None:
    ours = DevelopmentIssuer(tmp_path / "issuer.pem")
    now = datetime.now(UTC)
    token = ours.mint("alice", audience=AUDIENCE, now=now, ttl=timedelta(minutes=5), claims={"groups": ["ops"]})
    claims = verify(token, TrustedIssuer(ours.issuer, AUDIENCE, parse_jwks(ours.public_jwks())), now=now)
    assert (claims.subject, claims.claims["groups"]) == ("alice", ["ops"])
    assert claims.expires_at == now.replace(microsecond=0) + timedelta(minutes=5)


def test_further_claims_do_not_replace_the_registered_ones(tmp_path: Path) -> None:
    ours = DevelopmentIssuer(tmp_path / "issuer.pem")
    now = datetime.now(UTC)
    token = ours.mint("alice", audience=AUDIENCE, now=now, claims={"sub": "admin", "iss": ISSUER, "exp": 1})
    claims = verify(token, TrustedIssuer(ours.issuer, AUDIENCE, parse_jwks(ours.public_jwks())), now=now)
    assert (claims.subject, claims.issuer) == ("alice", ours.issuer)


def test_the_development_key_is_made_once_private_and_by_one_process(tmp_path: Path) -> None:
    path = tmp_path / "issuer.pem"
    with ThreadPoolExecutor(8) as pool:
        made = list(pool.map(DevelopmentIssuer, [path] * 8))
    assert {ours.kid for ours in made} == {DevelopmentIssuer(path).kid}
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert [entry.name for entry in tmp_path.iterdir()] == ["issuer.pem"]
    assert "PRIVATE" not in str(made[0].public_jwks())
    assert "d" not in made[0].public_jwks()["keys"][0]


def test_a_development_key_that_others_can_read_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "issuer.pem"
    DevelopmentIssuer(path)
    path.chmod(0o640)
    with pytest.raises(ConfigurationError):
        DevelopmentIssuer(path)


def test_a_development_key_of_another_kind_is_refused(tmp_path: Path, issuer: Issuer) -> None:
    path = tmp_path / "issuer.pem"
    path.write_bytes(issuer.rsa.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
    path.chmod(0o600)
    with pytest.raises(ConfigurationError):
        DevelopmentIssuer(path)
