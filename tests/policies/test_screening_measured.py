"""What screening refuses of queries that people asked, and of the list of attacks beside this file."""

from __future__ import annotations

from typing import Final

import pytest

from app.policies import screening
from app.policies.screening import screen
from app.policies.terms import InputRules
from benchmarks.screening import PRESETS, ROOT, Preset, attack_list, measured, ordinary_queries, row

ATTACKS: Final = attack_list()
UNSEEN: Final = {"unseen", "bidi", "control_characters"}
PAGE: Final = ROOT / "docs" / "policies.md"


@pytest.fixture(scope="module")
def queries() -> list[str]:
    return ordinary_queries()


@pytest.mark.parametrize("preset", PRESETS)
def test_the_figures_of_the_page_are_those_of_the_code(queries: list[str], preset: Preset) -> None:
    found = measured(queries, preset)
    assert found["all"].asked > 6_000
    for name, refusals in found.items():
        assert row(preset, name, refusals) in PAGE.read_text().splitlines()
        assert preset == "strict" or refusals.share <= 0.001, name


def passing(group: str, preset: Preset) -> list[str]:
    rules = InputRules(preset=preset)
    return [text for text in ATTACKS[group] if screen(text, rules)]


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("group", ATTACKS)
def test_every_attack_of_the_list_is_refused(group: str, preset: Preset) -> None:
    assert passing(group, preset) == []


def test_the_list_is_as_long_as_it_says() -> None:
    texts = [text for group in ATTACKS.values() for text in group]
    assert len(texts) == len(set(texts)) >= 150
    assert {"look_alikes", "rm_rf", "sudo", "chmod_777", "path_traversal", "script_tag", "drop_table"} | UNSEEN <= set(
        ATTACKS
    )


# The controls: with one enforcement off, the same strings pass.


def test_without_the_plain_form_look_alikes_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(screening, "plain", lambda text: text)
    assert passing("look_alikes", "balanced") == ATTACKS["look_alikes"]


@pytest.mark.parametrize("group", sorted(UNSEEN))
def test_without_the_rules_for_what_is_not_seen_it_passes(monkeypatch: pytest.MonkeyPatch, group: str) -> None:
    monkeypatch.setitem(screening._REFUSED, "balanced", screening._NARROW)
    monkeypatch.setattr(screening, "plain", lambda text: text)
    assert passing(group, "balanced") == ATTACKS[group]


@pytest.mark.parametrize("group", sorted(set(ATTACKS) - UNSEEN - {"look_alikes"}))
def test_without_the_narrow_rules_commands_pass(monkeypatch: pytest.MonkeyPatch, group: str) -> None:
    monkeypatch.setitem(screening._REFUSED, "balanced", screening._INVISIBLE)
    assert passing(group, "balanced") == ATTACKS[group]
