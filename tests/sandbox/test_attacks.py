"""No attack from inside succeeds but the known openings, and every one does without the sandbox, as the same user.

An opening that an attack does not find open any more must be taken off the list: it may only shrink. The page about
the sandbox holds the table of it all, and it is compared with what came of every attack here.
"""

from __future__ import annotations

from typing import Final

import pytest

from tests.sandbox.attacks import ATTACKS, DEPENDS
from tests.sandbox.configurations import CONFIGURATIONS, Configuration, bare, inside
from tests.sandbox.ground import SERVICE_IS_ROOT, Ground, Service
from tests.sandbox.programs import BACKENDS
from tests.sandbox.table import OPENINGS, bare_cell, committed, inside_cell, is_known

# Only ever to be lowered. There were 9 when the suite had 62 attacks. The sandbox closed 3 of them; then 107 attacks
# were added, and these found 15 that had been open all the time, of which 3 were closed at once.
MOST_OPENINGS = 18
LEAST_PROVEN = 75


@pytest.fixture(scope="module")
def proofs(ground: Ground) -> dict[str, str]:
    """What comes of each attack where nothing but the sandbox is missing."""
    return bare(ground)


def test_every_attack_that_counts_succeeds_bare(proofs: dict[str, str]) -> None:
    refused = {attack: outcome for attack, outcome in proofs.items() if outcome != "succeeded"}
    assert {attack: outcome for attack, outcome in refused.items() if attack not in DEPENDS} == {}
    assert len(proofs) - len(refused) >= LEAST_PROVEN


def test_the_page_says_what_succeeds_bare(proofs: dict[str, str]) -> None:
    table = committed()
    assert set(table) == set(ATTACKS) == set(proofs)
    # On what an attack depends, this machine may differ from the one that wrote the table.
    here = {attack: bare_cell(attack, outcome) for attack, outcome in proofs.items() if attack not in DEPENDS}
    assert here == {attack: table[attack]["bare"] for attack in here}


# An ordinary user has the fewest means, cgroups the most attacks, and a server with a network other mounts and calls.
_SAMPLE: Final = {
    "bubblewrap, ordinary user",
    "bubblewrap, network, ordinary user",
    "bubblewrap, cgroup",
    "landlock, cgroup",
}


@pytest.mark.parametrize(
    "configuration",
    [
        pytest.param(each, id=each.name, marks=() if each.name in _SAMPLE else pytest.mark.long)
        for each in CONFIGURATIONS
    ],
)
def test_stops_every_attack_but_the_known_openings(
    configuration: Configuration, ground: Ground, request: pytest.FixtureRequest
) -> None:
    if not SERVICE_IS_ROOT and not configuration.is_ordinary:
        pytest.skip("not proven: this takes root, and the column beside it is for an ordinary user")
    name = "service_as_ordinary_user" if configuration.is_ordinary and SERVICE_IS_ROOT else "service_as_we_are"
    service: Service = request.getfixturevalue(name)
    try:
        outcomes = inside(configuration, ground, service)
    except LookupError as reason:
        pytest.skip(f"not proven: {reason}")
    succeeded = {attack for attack, outcome in outcomes.items() if outcome == "succeeded"}
    assert succeeded == {attack for attack in ATTACKS if is_known(attack, configuration)}
    table = committed()
    assert {attack: inside_cell(outcome) for attack, outcome in outcomes.items()} == {
        attack: cells[configuration.name] for attack, cells in table.items()
    }


def test_every_known_opening_is_one_attack_with_its_severity_and_what_to_do() -> None:
    assert {opening["attack"] for opening in OPENINGS} <= set(ATTACKS)
    assert {opening["backend"] for opening in OPENINGS} <= set(BACKENDS)
    assert {opening["severity"] for opening in OPENINGS} <= {"low", "medium", "high"}
    assert {opening.get("closed_by", "cgroup") for opening in OPENINGS} == {"cgroup"}
    assert {opening.get("only_as", "ordinary user") for opening in OPENINGS} == {"ordinary user"}
    assert all(opening["mitigation"] for opening in OPENINGS)
    assert len({(opening["backend"], opening["attack"]) for opening in OPENINGS}) == len(OPENINGS) <= MOST_OPENINGS
