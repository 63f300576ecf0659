"""What policies keep of their callers: in all no more than the bound says, and never another's decision."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Final
from uuid import UUID, uuid4

import pytest

from app.policies import callers
from app.policies.callers import Kept
from app.policies.engine import CompiledPolicy
from tests.policies.samples import ALICE, BOB, PATH, SCHEMAS, ask, policy, visible

NO_DELETE: Final = {"users": [ALICE], "tools": {"deny": ["docs__delete_file"]}}
# Tools and overrides of a policy, and how many callers ask it: 10 MB or more of each.
SHAPES: Final = {
    "few tools": (4, 0, 5_000),
    "overrides": (4, 15, 2_000),
    "a hundred tools": (100, 0, 1_000),
    "four hundred tools": (400, 0, 200),
}
IN_ALL: Final = "in all"
ROLLUP: Final = Path("/proc/self/smaps_rollup")


def of(tools: int, *, overrides: int = 0) -> CompiledPolicy:
    """A policy with so many tools."""
    schemas = {f"docs__t{number}": {"properties": {"path": PATH}} for number in range(tools)}
    narrowed = {"roles": ["user"], "tools": {"deny": ["docs__none"]}}
    return policy(allow=["docs__*"], schemas=schemas, overrides=[narrowed] * overrides)


def users(count: int) -> Iterator[str]:
    return (str(uuid4()) for _ in range(count))


def fill(compiled: CompiledPolicy, count: int) -> None:
    for user in users(count):
        visible(compiled, user=user)


# By bytes


def measure() -> None:
    """Print what is counted, and what callers take of a process that does nothing else: as JSON, by shape.

    The shapes fit all together, so that none is measured in memory that another left.
    """
    kept, rows = callers._KEPT, {}
    policies = {name: of(tools, overrides=overrides) for name, (tools, overrides, _) in SHAPES.items()}
    others = [of(tools) for tools in (4, 100) * 6]
    for each in policies.values():
        fill(each, 20)
    before = own_memory()
    for name, (_, _, count) in SHAPES.items():
        counted, taken = kept.weight, own_memory()
        fill(policies[name], count)
        rows[name] = kept.weight - counted, own_memory() - taken
    for _ in range(8):
        for each in others:
            fill(each, 100)
    rows[IN_ALL] = kept.weight, own_memory() - before
    json.dump(rows, sys.stdout)


def own_memory() -> int:
    """Bytes that are no file's: Python's, and those that Cedar takes without telling it."""
    return next(int(line.split()[1]) << 10 for line in ROLLUP.read_text().splitlines() if line.startswith("Anonymous:"))


@pytest.fixture(scope="module")
def measured() -> dict[str, tuple[int, int]]:
    command = [sys.executable, "-m", "tests.policies.test_callers"]
    ran = subprocess.run(command, capture_output=True, check=True, timeout=60)
    return {name: (counted, taken) for name, (counted, taken) in json.loads(ran.stdout).items()}


def test_many_callers_of_many_policies_take_no_more_than_the_bound(measured: dict[str, tuple[int, int]]) -> None:
    counted, taken = measured[IN_ALL]
    assert callers._MAX_KEPT * 0.99 < counted <= callers._MAX_KEPT, "the control: it is full"
    assert taken < callers._MAX_KEPT * 1.5, "where small ones were, not all of the memory fits large ones"


@pytest.mark.parametrize("shape", SHAPES)
def test_a_caller_weighs_what_it_takes(measured: dict[str, tuple[int, int]], shape: str) -> None:
    counted, taken = measured[shape]
    assert 0.8 * taken < counted < 1.25 * taken


# What is decided


@pytest.fixture
def kept(monkeypatch: pytest.MonkeyPatch) -> Kept:
    """Room for some fifty callers of the policies that a test makes."""
    few = Kept(150_000)
    monkeypatch.setattr(callers, "_KEPT", few)
    return few


def held(kept: Kept) -> set[str]:
    return {user for _, user, _ in kept._callers}


def test_a_caller_that_was_pushed_out_is_decided_the_same(kept: Kept) -> None:
    compiled = policy(allow=["docs__*"], overrides=[NO_DELETE])
    before = [visible(compiled, user=user) for user in (ALICE, BOB)]
    assert before == [set(SCHEMAS) - {"docs__delete_file", "bank__pay"}, set(SCHEMAS) - {"bank__pay"}]
    bob = compiled._caller(BOB, "user")
    for user in users(200):
        assert ask(compiled, "docs__delete_file", user=user, path="a").allowed
        assert compiled._caller(BOB, "user") is bob, "he asks often, so that he stays"
    assert ALICE not in held(kept)
    assert 0 < kept.weight <= 150_000
    assert [visible(compiled, user=user) for user in (ALICE, BOB)] == before
    denied = ask(compiled, "docs__delete_file", user=ALICE, path="a")
    assert (denied.allowed, denied.rule) == (False, "overrides[0].deny:docs__delete_file")


def test_a_caller_is_decided_by_the_policy_that_is_asked_whatever_another_knew_of_it(kept: Kept) -> None:
    for _ in range(5):  # each made where the one before has just gone
        narrowed, wide = policy(allow=["docs__*"], overrides=[NO_DELETE]), policy(allow=["docs__*"])
        assert [ask(each, "docs__delete_file", user=ALICE, path="a").allowed for each in (narrowed, wide)] == [0, 1]
        assert len(kept._callers) == 2
        del narrowed, wide
        assert (len(kept._callers), kept.weight) == (0, 0)


def test_where_nothing_fits_each_call_is_decided_all_the_same(kept: Kept) -> None:
    kept._bound = 0
    compiled = policy(allow=["docs__*"], overrides=[NO_DELETE])
    assert [ask(compiled, "docs__delete_file", user=user, path="a").allowed for user in (ALICE, BOB)] == [False, True]
    assert (len(kept._callers), kept.weight) == (0, 0)


# A policy that goes


def test_a_policy_takes_its_callers_along_and_leaves_the_others(kept: Kept) -> None:
    stays, goes = policy(allow=["docs__read_file"]), policy(allow=["docs__*"])
    visible(stays, user=BOB)
    weight = kept.weight
    fill(goes, 40)
    assert len(kept._callers) == 41
    del goes
    assert (held(kept), kept.weight) == ({BOB}, weight)


def test_many_callers_of_a_policy_go_little_by_little(kept: Kept) -> None:
    kept._bound = 10_000_000
    stays, goes = policy(allow=["docs__read_file"]), policy(allow=["docs__*"])
    fill(goes, callers._AT_ONCE * 5 // 2)
    del goes
    assert len(kept._callers) == callers._AT_ONCE * 3 // 2
    fill(stays, 2)
    assert len(kept._callers) == 2
    assert not kept._gone


def test_a_policy_that_goes_while_another_thread_is_adding_waits_for_nothing(kept: Kept) -> None:
    goes = policy(allow=["docs__*"])
    visible(goes, user=BOB)
    with kept._lock:
        del goes
    assert held(kept) == {BOB}
    stays = policy(allow=["docs__*"])
    visible(stays, user=ALICE)
    assert held(kept) == {ALICE}


def test_threads_that_push_out_each_others_callers_count_them_rightly(kept: Kept) -> None:
    compiled = policy(allow=["docs__*"], overrides=[NO_DELETE])
    known, failed = [ALICE, BOB, *(str(UUID(int=number)) for number in range(78))], []

    def run() -> None:
        for place in range(1_500):
            user = known[place * 7 % len(known)]
            if ("docs__delete_file" in visible(compiled, user=user)) is (user == ALICE):
                failed.append(user)
            if place % 100 == 0:
                fill(policy(allow=["docs__*"]), 3)

    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        threads = [threading.Thread(target=run) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(before)
    visible(compiled, user=BOB)
    assert failed == []
    assert kept.weight == sum(caller.weight for caller in kept._callers.values()) <= 150_000
    assert {owner for owner, _, _ in kept._callers} == {compiled._caller._owner}
    assert compiled._caller._owner.keys == set(kept._callers)


if __name__ == "__main__":
    measure()
