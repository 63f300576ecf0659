"""Keys rotate, are told apart by purpose, and never show."""

from __future__ import annotations

import base64
import secrets

import pytest
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from app.errors import ConfigurationError
from app.keyring import Keyring, Sealed, SecretKey, Unsealable, new_entry

OLD = secrets.token_bytes(32)
NEW = secrets.token_bytes(32)
BEFORE = Keyring({"k1": OLD}, "k1")
BOTH = Keyring({"k2": NEW, "k1": OLD}, "k2")
AFTER = Keyring({"k2": NEW}, "k2")


def test_the_first_of_the_parsed_keys_is_active() -> None:
    ring = Keyring.parse(f"{new_entry('k2')},{new_entry('k1')}")
    assert ring.active == "k2"
    assert ring.mac("p", b"data").key_id == "k2"


def test_parsing_takes_base64url_with_and_without_padding() -> None:
    padded = base64.urlsafe_b64encode(OLD).decode()
    mac = BEFORE.mac("p", b"data")
    for text in (padded, padded.rstrip("=")):
        assert Keyring.parse(f"k1:{text}").verify("p", b"data", key_id=mac.key_id, digest=mac.digest)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "k1",
        "k1:",
        "k1:not base64!",
        f"k1:{base64.urlsafe_b64encode(b'short').decode()}",
        f"k1:{base64.urlsafe_b64encode(b'k' * 32).decode()}",
        f"K 1:{base64.urlsafe_b64encode(OLD).decode()}",
        f"{new_entry('k1')},{new_entry('k1')}",
        f"{new_entry('k1')},",
    ],
    ids=["empty", "no-key", "no-bytes", "alphabet", "short", "repeated", "id", "twice", "trailing-comma"],
)
def test_a_malformed_keyring_stops_the_start_and_shows_no_key(text: str) -> None:
    with pytest.raises(ConfigurationError) as refusal:
        Keyring.parse(text, source="BULKHEAD_ROOT_KEYS")
    assert refusal.value.detail.startswith("BULKHEAD_ROOT_KEYS")
    material = text.partition(":")[2]
    assert not material or material not in refusal.value.detail


def test_a_key_without_an_id_is_not_shown_as_one() -> None:
    key = secrets.token_hex(16)
    with pytest.raises(ConfigurationError) as refusal:
        Keyring.parse(key)
    assert key not in refusal.value.detail


def test_a_keyring_without_its_active_key_is_refused() -> None:
    with pytest.raises(ValueError):
        Keyring({"k1": OLD}, "k2")
    with pytest.raises(ValueError):
        Keyring({"k1": OLD[:16]}, "k1")


def test_a_mac_outlives_a_rotation_for_as_long_as_its_key_is_kept() -> None:
    mac = BEFORE.mac("p", b"data")
    assert BOTH.verify("p", b"data", key_id=mac.key_id, digest=mac.digest)
    assert not AFTER.verify("p", b"data", key_id=mac.key_id, digest=mac.digest)


def test_a_mac_holds_for_its_data_purpose_and_key_only() -> None:
    mac = BOTH.mac("p", b"data")
    assert BOTH.verify("p", b"data", key_id="k2", digest=mac.digest)
    assert not BOTH.verify("p", b"Data", key_id="k2", digest=mac.digest)
    assert not BOTH.verify("q", b"data", key_id="k2", digest=mac.digest)
    assert not BOTH.verify("p", b"data", key_id="k1", digest=mac.digest)
    assert not BOTH.verify("p", b"data", key_id="k2", digest=mac.digest[:16])
    assert not BOTH.verify("p", b"data", key_id="k2", digest=b"")


def test_a_sealed_text_opens_after_a_rotation_and_not_once_its_key_is_gone() -> None:
    sealed = BEFORE.seal(b"content", aad=b"row 1")
    assert BOTH.unseal(sealed, aad=b"row 1") == b"content"
    with pytest.raises(Unsealable):
        AFTER.unseal(sealed, aad=b"row 1")


def test_sealing_twice_gives_different_blobs() -> None:
    assert BOTH.seal(b"content", aad=b"row 1") != BOTH.seal(b"content", aad=b"row 1")


def test_a_blob_moved_to_another_row_does_not_open() -> None:
    sealed = BOTH.seal(b"content", aad=b"tenant A, row 1")
    with pytest.raises(Unsealable):
        BOTH.unseal(sealed, aad=b"tenant B, row 1")
    # The control: without the bound place the same move succeeds.
    unbound = AESGCM(NEW)
    nonce = secrets.token_bytes(12)
    assert unbound.decrypt(nonce, unbound.encrypt(nonce, b"content", None), None) == b"content"


def test_every_changed_or_cut_byte_is_noticed() -> None:
    key_id, blob = BOTH.seal(b"content", aad=b"row")
    for position in range(len(blob)):
        changed = bytearray(blob)
        changed[position] ^= 1
        with pytest.raises(Unsealable):
            BOTH.unseal(Sealed(key_id, bytes(changed)), aad=b"row")
        with pytest.raises(Unsealable):
            BOTH.unseal(Sealed(key_id, blob[:position]), aad=b"row")


def test_data_keys_are_wrapped_under_tenant_keys_under_the_root() -> None:
    tenant, user = SecretKey.generate(), SecretKey.generate()
    wrapped_tenant = BOTH.wrap(tenant, aad=b"tenant")
    wrapped_user = tenant.wrap(user, aad=b"user")
    content = user.seal(b"question", aad=b"run")

    opened = BOTH.unwrap(wrapped_tenant, aad=b"tenant").unwrap(wrapped_user, aad=b"user")
    assert opened.unseal(content, aad=b"run") == b"question"


def test_without_its_user_key_content_stays_closed() -> None:
    tenant = SecretKey.generate()
    content = SecretKey.generate().seal(b"question", aad=b"run")
    for other in (tenant, SecretKey.generate(), tenant.derive("user")):
        with pytest.raises(Unsealable):
            other.unseal(content, aad=b"run")


def test_a_sealed_text_that_is_no_key_is_not_unwrapped_as_one() -> None:
    with pytest.raises(Unsealable):
        BOTH.unwrap(BOTH.seal(b"content", aad=b"row"), aad=b"row")


def test_derived_keys_differ_by_purpose_and_root_and_stay_the_same() -> None:
    def mark(key: SecretKey) -> bytes:
        return key.mac("p", b"")

    assert mark(BOTH.derive("cursor")) == mark(AFTER.derive("cursor"))
    assert mark(BOTH.derive("cursor", key_id="k1")) == mark(BEFORE.derive("cursor"))
    marks = {
        mark(BOTH.derive("cursor")),
        mark(BOTH.derive("export")),
        mark(BOTH.derive("cursor", key_id="k1")),
        mark(SecretKey(NEW)),
    }
    assert len(marks) == 4
    with pytest.raises(Unsealable):
        AFTER.derive("cursor", key_id="k1")


def test_no_representation_shows_a_key() -> None:
    key = SecretKey(NEW)
    shown = f"{key!r} {key!s} {BOTH!r} {BOTH!s} {[key, BOTH]}"
    for secret in (NEW, OLD):
        assert secret.hex() not in shown
        assert repr(secret)[2:-1] not in shown
    assert "k2" in shown
