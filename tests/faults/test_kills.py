"""kill -9 of the service and of Postgres at random moments under load: nothing that was answered is lost.

A history is made of a seed, which a failure prints: TEST_SEED=n makes the same kills at the same moments again.
"""

from __future__ import annotations

import asyncio
import os
import random
from collections import Counter
from collections.abc import Sequence
from typing import Final

import pytest

from tests.faults.claims import violations
from tests.faults.evidence import Evidence, gathered, no_run_is_left
from tests.faults.ledger import Asked, Load, load
from tests.faults.plant import Plant
from tests.faults.tampering import break_journal, break_ledger, break_record, unseen, untried

SEED: Final = os.environ.get("TEST_SEED", "20261122")
# Of each ten kills; a service takes seconds to start again, Postgres less, and a backend is not even missed.
_TEN: Final = ("kill_service",) * 2 + ("kill_postgres",) * 4 + ("kill_backend",) * 3 + ("kill_all",)


def history(rng: random.Random, kills: int) -> list[str]:
    """Which kills, in which order."""
    kinds = [_TEN[number % len(_TEN)] for number in range(kills)]
    rng.shuffle(kinds)
    return kinds


async def killed(plant: Plant, work: Load, kinds: Sequence[str], *, rng: random.Random) -> None:
    """Kill under load, each time as soon as all is up again and has worked for a moment."""
    async with work.going(rng.random()):
        for kind in kinds:
            await plant.ready()
            await asyncio.sleep(rng.uniform(0.1, 0.7))
            await getattr(plant, kind)(rng)
        await plant.ready()
        await asyncio.sleep(0.5)


async def survives(plant: Plant, work: Load, kills: int, *, seed: str) -> Evidence:
    """Kill so often, then hold all claims against what is there."""
    rng = random.Random(seed)  # noqa: S311  a history to repeat, no secret
    kinds = history(rng, kills)
    await killed(plant, work, kinds, rng=rng)
    await no_run_is_left(work.customers)
    await _assert_nothing_is_held(work, rng)
    evidence = await gathered(work, plant.model.spans)
    found = violations(evidence)
    assert found == {}, f"TEST_SEED={seed} repeats it: {kinds}"
    _assert_enough(evidence, kills)
    return evidence


# A connection that died with Postgres is found dead by the first who uses it.
_TRIES: Final = 8


async def _assert_nothing_is_held(work: Load, rng: random.Random) -> None:
    """A place or a token that a dead run held is free again: everybody is served, if there is a budget left."""
    answers: Sequence[Asked] = ()
    for _ in range(_TRIES):
        answers = await work.ask_once_more(rng.random())
        if not any(asked.body.get("code") == "unavailable" for asked in answers):
            break
        await asyncio.sleep(0.5)
    for asked in answers:
        assert asked.status == 200 or asked.body.get("code") == "budget_exhausted", asked


def _assert_enough(evidence: Evidence, kills: int) -> None:
    """There was work, and the kills met it: what nobody does is never lost."""
    statuses = Counter(asked.status for asked in evidence.asked)
    states = Counter(evidence.states.values())
    assert min(statuses[200], statuses[422], statuses[None]) >= kills // 2, statuses
    assert states["interrupted"] >= kills // 10, states


@pytest.mark.timeout(300)  # a start takes seconds, and five times as many on a busy machine
async def test_ten_kills_lose_nothing_and_each_claim_sees_what_is_broken_on_purpose(plant: Plant) -> None:
    async with load(plant.addresses, plant.platform_key, tenants=3, users=2) as work:
        evidence = await survives(plant, work, 10, seed=SEED)
        breaks = [*await break_record(plant, evidence), *await break_journal(work, evidence)]
        assert unseen(breaks, violations(await gathered(work, plant.model.spans, sealed_within_s=0))) == []
        for made, broken in break_ledger(evidence):
            breaks.append(made)
            assert unseen([made], violations(broken)) == []
        assert untried(breaks) == set()


@pytest.mark.long
@pytest.mark.timeout(560)
@pytest.mark.parametrize("piece", range(4))
async def test_a_hundred_kills_lose_nothing(piece: int, plant: Plant) -> None:
    async with load(plant.addresses, plant.platform_key, tenants=4, users=3) as work:
        await survives(plant, work, 25, seed=f"{SEED}-{piece}")
