"""API keys: cheap to tell from anything else, stored as a keyed hash, shown once."""

from __future__ import annotations

import re
import secrets

from hypothesis import given
from hypothesis import strategies as st

from app.auth import keys
from app.keyring import Keyring, Mac

OLD, NEW = secrets.token_bytes(32), secrets.token_bytes(32)
RING = Keyring({"k1": OLD}, "k1")


def test_a_minted_key_is_read_back() -> None:
    key = keys.mint()
    assert keys.parse(key.text) == key


def test_the_documented_pattern_finds_keys_in_source() -> None:
    pattern = re.search(r"`(\\b.+\\b)`", keys.__doc__ or "")
    assert pattern is not None
    text = keys.mint().text
    assert re.findall(pattern[1], f'KEY = "{text}"  # and bh_{"a" * 12}_{"b" * 20}') == [text]


def test_keys_do_not_repeat_and_hold_190_bits_beside_lookup_and_checksum() -> None:
    minted = [keys.mint() for _ in range(200)]
    assert len({key.lookup for key in minted}) == len({key.secret for key in minted}) == 200
    assert {len(key.secret) for key in minted} == {40}
    assert len(set("".join(key.secret for key in minted))) == 62
    assert 62**40 > 2**190


def test_every_single_typo_is_caught_by_the_checksum() -> None:
    text = keys.mint().text
    for position, character in enumerate(text):
        typo = text[:position] + ("a" if character != "a" else "b") + text[position + 1 :]
        assert keys.parse(typo) is None


def test_swapped_neighbours_are_caught_by_the_checksum() -> None:
    text = keys.mint().text
    swaps = {text[:i] + text[i + 1] + text[i] + text[i + 2 :] for i in range(len(text) - 1)} - {text}
    assert swaps
    assert [swap for swap in swaps if keys.parse(swap)] == []


@given(st.text(max_size=200))
def test_whatever_is_presented_is_refused_and_nothing_raised(text: str) -> None:
    assert keys.parse(text) is None


def test_text_around_a_key_is_not_passed_over() -> None:
    text = keys.mint().text
    for changed in (text + "\n", " " + text, text + text, text[:-1], text + "\x00", text.upper()):
        assert keys.parse(changed) is None
    assert keys.parse("\ud800" + text) is None
    assert keys.parse(text.replace(text[20], "٣")) is None  # a digit, but not of ASCII


def test_a_fingerprint_matches_its_own_key_only() -> None:
    key, other = keys.mint(), keys.mint()
    stored = keys.fingerprint(RING, key)
    assert keys.matches(RING, key, stored=stored)
    assert not keys.matches(RING, other, stored=stored)


def test_a_secret_under_another_lookup_does_not_match() -> None:
    key = keys.mint()
    moved = keys.PlainKey(lookup=keys.mint().lookup, secret=key.secret)
    assert not keys.matches(RING, moved, stored=keys.fingerprint(RING, key))


def test_a_fingerprint_outlives_a_rotation_and_not_its_root_key() -> None:
    key = keys.mint()
    stored = keys.fingerprint(RING, key)
    assert keys.matches(Keyring({"k2": NEW, "k1": OLD}, "k2"), key, stored=stored)
    assert not keys.matches(Keyring({"k2": NEW}, "k2"), key, stored=stored)
    assert not keys.matches(RING, key, stored=Mac("unknown", stored.digest))


def test_a_stolen_table_does_not_let_its_thief_check_guesses() -> None:
    key = keys.mint()
    stored = keys.fingerprint(RING, key)
    thief = Keyring({"k1": NEW}, "k1")
    assert keys.fingerprint(thief, key).digest != stored.digest


def test_no_representation_shows_the_secret() -> None:
    key = keys.mint()
    assert key.secret not in f"{key!r} {key!s} {[key]}"
    assert key.lookup in repr(key)
