"""Places are bounded, go to the poorest, and no one waits while one is free: by exhaustion of random histories."""

from __future__ import annotations

import asyncio
from uuid import UUID

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from app.servers.places import Ask, Places, Shares

TENANTS = [UUID(int=number) for number in range(1, 6)]
A, B, C = TENANTS[:3]
steps = st.lists(st.tuples(st.sampled_from(["ask", "ask", "withdraw", "give back"]), st.integers(0, 99)), max_size=80)


def check(places: Places, held: list[Ask]) -> None:
    shares = places.shares
    assert shares.held.total() == len(held) <= shares.maximum
    assert all(shares.held[tenant] <= shares.per_tenant for tenant in TENANTS)
    assert shares.next_of(places.waiting) is None, "somebody waits for a place that is free"


async def replay(history: list[tuple[str, int]], maximum: int, per_tenant: int) -> None:
    places, asks = Places(Shares(maximum, per_tenant)), list[Ask]()
    for step, number in history:
        held = [ask for ask in asks if ask.granted.done()]
        waiting = [ask for ask in asks if not ask.granted.done()]
        if step == "ask":
            asks.append(places.ask(TENANTS[number % len(TENANTS)]))
        elif step == "withdraw" and waiting:
            places.withdraw(gone := waiting[number % len(waiting)])
            asks.remove(gone)
        elif step == "give back" and held:
            asks.remove(back := held[number % len(held)])
            places.give_back(back.tenant)
        check(places, [ask for ask in asks if ask.granted.done()])
    for _ in range(len(asks)):  # everybody who waits gets a place once the others give theirs back
        back = next(ask for ask in asks if ask.granted.done())
        asks.remove(back)
        places.give_back(back.tenant)
    assert not places.waiting
    assert not places.shares.held


@settings(max_examples=200, deadline=None)
@given(steps, st.integers(1, 6), st.integers(1, 4))
def test_no_history_passes_a_bound_or_leaves_a_place_free_beside_a_waiter(
    history: list[tuple[str, int]], maximum: int, per_tenant: int
) -> None:
    asyncio.run(replay(history, maximum, per_tenant))


async def test_the_next_place_goes_to_who_has_fewest_however_often_another_asks() -> None:
    places = Places(Shares(3, 3))
    for _ in range(3):
        places.ask(A)
    greedy = [places.ask(A) for _ in range(50)]
    late = places.ask(B)
    places.give_back(A)
    assert late.granted.done()
    assert not any(ask.granted.done() for ask in greedy)


async def test_the_bound_of_one_tenant_leaves_places_to_the_others() -> None:
    places = Places(Shares(4, 2))
    greedy = [places.ask(A) for _ in range(10)]
    assert sum(ask.granted.done() for ask in greedy) == 2
    assert places.ask(B).granted.done()


async def test_a_wait_that_is_cancelled_from_below_takes_no_place() -> None:
    places = Places(Shares(1, 1))
    places.ask(A)
    gone, next_one = places.ask(B), places.ask(C)
    gone.granted.cancel()
    places.give_back(A)
    assert next_one.granted.done()
    assert places.shares.held.total() == 1


@pytest.mark.parametrize("order", [(A, B), (B, A)])
async def test_among_equals_who_waits_longest_is_next(order: tuple[UUID, UUID]) -> None:
    places = Places(Shares(1, 1))
    places.ask(C)
    first, second = (places.ask(tenant) for tenant in order)
    places.give_back(C)
    assert first.granted.done()
    assert not second.granted.done()
