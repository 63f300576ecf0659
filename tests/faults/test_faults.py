"""Kills and stalls of everything around runs, at every moment of theirs: nothing answered is lost, nothing done twice.

A history is made of a seed, which a failure prints: TEST_SEED=n makes the same one again.
"""

from __future__ import annotations

import asyncio
import os
import random
from collections import Counter
from collections.abc import Sequence
from itertools import product
from typing import Final

import pytest

from tests.faults.customers import BUDGETS
from tests.faults.evidence import Evidence, gathered, no_run_is_left
from tests.faults.injections import SERVICE, Injection, Target, history, injected
from tests.faults.ledger import Asked
from tests.faults.load import Load, load
from tests.faults.phases import Phase
from tests.faults.plant import Plant
from tests.faults.pretending import break_ledger
from tests.faults.run_claims import violations
from tests.faults.tampering import break_journal, break_record, unseen, untried

SEED: Final = os.environ.get("TEST_SEED", "20261123")
_PIECES: Final = 8
_OF_A_PIECE: Final = 126
_LONG: Final = _PIECES * _OF_A_PIECE
_SHORT: Final = 25
# A connection that died with Postgres is found dead by the first who uses it.
_TRIES: Final = 8
_AT_ONCE: Final = 8
# Times that everybody asks beforehand: amid the faults too few may be answered for every break to have its own.
_TO_BREAK: Final = 4
# The most that a whole budget has room for.
_TO_USE_UP: Final = 80


async def survives(plant: Plant, work: Load, injections: Sequence[Injection], *, seed: str) -> Evidence:
    """Do them all under load, then hold all claims against what is there."""
    rng = _random(seed)
    async with work.going(rng.random()):
        missed = await injected(plant, work, injections, seed=seed)
        await plant.ready()
        await asyncio.sleep(0.5)
    await no_run_is_left(work.customers)
    await _assert_nothing_is_held(work, rng)
    await work.use_up(rng, times=_TO_USE_UP)
    await _ask_all_again(work, rng)
    evidence = await gathered(work)
    story = f"TEST_SEED={SEED} repeats it: " + "; ".join(map(str, injections))
    found = violations(evidence)
    against = "\n".join(f"{name}, {len(cases)} times: {cases[0]}" for name, cases in found.items())
    assert found == {}, f"{against}\n{story}"
    assert missed == [], story
    _assert_enough(evidence, len(injections))
    return evidence


def _random(seed: str) -> random.Random:
    return random.Random(seed)  # noqa: S311  a history to repeat, no secret


async def _assert_nothing_is_held(work: Load, rng: random.Random) -> None:
    """A place or a token that a dead run held is free again: everybody is served, if there is a budget left."""
    answers: Sequence[Asked] = ()
    for _ in range(_TRIES):
        answers = await work.ask_once_more(rng.random())
        if all(asked.status is not None for asked in answers):
            break
    for asked in answers:
        assert asked.status == 200 or asked.body.get("code") == "budget_exhausted", asked


async def _ask_all_again(work: Load, rng: random.Random) -> None:
    """Whatever has a run is answered again."""
    places = asyncio.Semaphore(_AT_ONCE)
    clients = {user_id: client for customer in work.customers for user_id, client in customer.users.items()}

    async def again(asked: Asked) -> None:
        async with places:
            await work.asker.ask_again(asked, clients[asked.user_id], rng)

    async with asyncio.TaskGroup() as group:
        for asked in work.ledger.asked:
            if asked.run_id:
                group.create_task(again(asked))


def _assert_enough(evidence: Evidence, injections: int) -> None:
    """There was work, and it was met: what nobody does is never lost."""
    statuses = Counter(asked.status for asked in evidence.asked)
    kinds = Counter(asked.kind for asked in evidence.asked)
    states = Counter(evidence.states.values())
    assert len({asked.nonce for asked in evidence.asked}) == len(evidence.asked)
    assert min(kinds.values()) >= injections // 3, kinds
    assert states["succeeded"] >= injections, states
    assert min(states["interrupted"], statuses[422]) >= injections // 25, (states, statuses)
    assert sum(asked.sent > 1 for asked in evidence.asked) >= injections // 10
    events = (event for events in evidence.events.values() for event in events)
    assert {event["data"]["limit"] for event in events if event["type"] == "limit.exceeded"} == set(BUDGETS)


@pytest.mark.parametrize(("count", "kills"), [(_SHORT, 10), (_LONG, 150)])
def test_a_history_has_everything_and_mostly_kills_the_service_and_its_postgres(count: int, kills: int) -> None:
    """Of any seed."""
    for seed in (SEED, *map(str, range(20))):
        injections = history(_random(seed), count)
        assert len(injections) == count
        assert {injection.phase for injection in injections} == set(Phase)
        assert {(one.target, one.is_kill) for one in injections} == set(product(Target, (True, False)))
        assert sum(one.is_kill and one.target in SERVICE for one in injections) >= kills, seed


@pytest.mark.timeout(300)  # a start takes seconds, and five times as many on a busy machine
async def test_twenty_five_faults_lose_nothing_and_each_claim_sees_what_is_broken_on_purpose(plant: Plant) -> None:
    injections = history(_random(SEED), _SHORT)
    async with load(plant, tenants=5, users=1) as work:
        rng = _random(f"{SEED}-before")  # of its own: a nonce that comes again is an answer of before
        for _ in range(_TO_BREAK):
            await work.ask_once_more(rng.random())
        evidence = await survives(plant, work, injections, seed=SEED)
        breaks = [*await break_record(plant, evidence), *await break_journal(work, evidence)]
        assert unseen(breaks, violations(await gathered(work, sealed_within_s=0))) == []
        for made, broken in break_ledger(evidence):
            breaks.append(made)
            assert unseen([made], violations(broken)) == []
        assert untried(breaks) == set()


@pytest.mark.long
@pytest.mark.timeout(590)
@pytest.mark.parametrize("piece", range(_PIECES))
async def test_a_thousand_faults_lose_nothing(piece: int, plant: Plant) -> None:
    all_of_them = history(_random(SEED), _LONG)
    injections = all_of_them[piece * _OF_A_PIECE : (piece + 1) * _OF_A_PIECE]
    async with load(plant, tenants=6, users=2) as work:
        await survives(plant, work, injections, seed=f"{SEED}-{piece}")
    print(f"{len(injections)} faults, seed {SEED}-{piece}")  # noqa: T201  the count of a long run is asked for
