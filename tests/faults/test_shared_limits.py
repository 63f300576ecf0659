"""Two processes are one service: what callers may do is counted over both, and never passed by one."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Iterable, Mapping, Sequence
from itertools import cycle, product
from pathlib import Path

import httpx
import pytest

from tests.faults import scripted_model as model
from tests.faults.customers import Customer, customers
from tests.faults.plant import Plant, running_plant

_ONE_CALL = (("record",),)


async def flood(plant: Plant, customer: Customer, queries: int, *, name: str) -> list[httpx.Response]:
    """So many queries at once, each of the customer's users to every process in turn.

    To each, since a user who met one process alone would find the user's own limit there, and never the tenant's.
    """
    pairs = cycle(product(customer.users.values(), plant.addresses))
    texts = [model.query(f"{name}{number}", _ONE_CALL) for number in range(queries)]
    asking = [
        user.post(f"{address}/query", json={"query": text})
        for (user, address), text in zip(pairs, texts)  # noqa: B905  the pairs come round
    ]
    return await asyncio.gather(*asking)


def codes(answers: Iterable[httpx.Response]) -> Counter[str]:
    """How often each was answered; "" is an answer."""
    return Counter(answer.json()["code"] or "" for answer in answers)


def at_once(plant: Plant, name: str) -> int:
    """How many runs of these queries the model has seen at once."""
    spans: dict[str, tuple[float, float]] = {}
    for turn in plant.model.turns:
        if turn.nonce.startswith(name) and turn.ended is not None:
            spans[turn.nonce] = spans.get(turn.nonce, (turn.came, 0))[0], turn.ended
    steps = sorted([(first, 1) for first, _ in spans.values()] + [(last, -1) for _, last in spans.values()])
    under_way = most = 0
    for _, change in steps:
        under_way += change
        most = max(most, under_way)
    return most


@pytest.fixture(scope="module")
async def made(plant: Plant) -> AsyncIterator[Sequence[Customer]]:
    """With a rate, with places, with a budget, and without any of these."""
    limits: Sequence[Mapping[str, object]] = (
        {"requests": "10/minute", "tenant_requests": "15/minute"},
        {"concurrent_runs": 2},
        {"tokens_per_day": 30_000},
        {"concurrent_runs": 100, "user_concurrent_runs": 100},
    )
    async with customers(plant, limits, users=2) as found:
        yield found


async def test_parallel_queries_to_two_processes_pass_no_limit_by_one(plant: Plant, made: Sequence[Customer]) -> None:
    rated, placed, budgeted, free = made
    assert codes(await flood(plant, rated, 40, name="rated")) == {"": 15, "rate_limited": 25}

    assert codes(await flood(plant, placed, 12, name="placed")) == {"": 12}
    assert codes(await flood(plant, free, 12, name="free")) == {"": 12}
    assert at_once(plant, "placed") == 2 < at_once(plant, "free")

    told = codes(await flood(plant, budgeted, 12, name="budgeted"))
    assert told.keys() == {"", "budget_exhausted"}
    rows = (await budgeted.auditor.get("/v1/usage", params={"group_by": "user"})).json()["items"]
    assert 0 < sum(row["input_tokens"] + row["output_tokens"] for row in rows) <= 30_000


async def test_a_flood_of_one_tenant_does_not_keep_another_waiting(plant: Plant, made: Sequence[Customer]) -> None:
    _, noisy, _, quiet = made
    flooding = asyncio.create_task(flood(plant, noisy, 40, name="noisy"))
    await asyncio.wait({flooding}, timeout=0.3)
    assert codes(await flood(plant, quiet, 4, name="quiet")) == {"": 4}
    assert not flooding.done()
    assert codes(await flooding).keys() <= {"", "too_many_runs"}
    assert at_once(plant, "noisy") <= 2


@pytest.mark.long
async def test_without_a_shared_storage_two_processes_count_by_themselves(tmp_path: Path) -> None:
    """The control of the rate above."""
    limits = [{"requests": "10/minute", "tenant_requests": "15/minute"}]
    async with (
        running_plant(tmp_path) as plant,
        customers(plant, limits, users=2) as (rated,),
    ):
        assert codes(await flood(plant, rated, 60, name="apart"))[""] == 30
