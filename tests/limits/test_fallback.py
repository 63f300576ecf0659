"""The storage of the limits hangs, dies and comes back: requests never wait for it, fail, or pass unlimited."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Iterator
from itertools import count
from typing import Final

import pytest
from structlog.testing import capture_logs

from app.limits import turns
from app.limits.rates import RateLimiter
from app.limits.shared import SharedWindows
from app.limits.turns import TIMEOUT_S
from app.limits.windows import Bound, bound
from app.telemetry.metrics import LIMITER_FALLBACKS
from tests.limits.storage import Storage, road_to

_numbers: Final = count()
# A machine that others use, too, may be late by so much.
SLACK_S: Final = 0.7


@pytest.fixture(scope="module")
def storage(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Storage]:
    with Storage(tmp_path_factory.mktemp("valkey")) as running:
        yield running


@pytest.fixture
async def two(storage: Storage) -> AsyncIterator[tuple[RateLimiter, RateLimiter]]:
    """Those of two processes, of which there are two."""
    first, second = [RateLimiter(SharedWindows(storage.url, timeout_s=1), replicas=2) for _ in range(2)]
    yield first, second
    await first.close()
    await second.close()


def fresh(rate: str) -> Bound:
    return bound("user", f"tenant/{next(_numbers)}", rate)


async def taken(limiter: RateLimiter, limit: Bound, times: int) -> int:
    """How many of so many at once are let through."""
    return sum(verdict.is_allowed for verdict in await asyncio.gather(*(limiter.hit(limit) for _ in range(times))))


async def until_back(*limiters: RateLimiter) -> None:
    until = time.monotonic() + 5
    while any(limiter.is_alone() for limiter in limiters):
        assert time.monotonic() < until, "the storage is back and nobody has noticed"
        await asyncio.sleep(0.02)


async def test_two_processes_have_one_window(two: tuple[RateLimiter, RateLimiter]) -> None:
    limit = fresh("10/hour")
    assert sum(await asyncio.gather(*(taken(limiter, limit, 40) for limiter in two))) == 10
    assert [(await limiter.peek(limit)).tightest.remaining for limiter in two] == [0, 0]


@pytest.mark.parametrize("end", ["hung", "killed"])
async def test_without_the_storage_each_process_holds_its_share_and_nobody_waits(
    storage: Storage, two: tuple[RateLimiter, RateLimiter], end: str
) -> None:
    first, second = two
    started, other = fresh("10/hour"), fresh("10/hour")
    assert await taken(first, started, 4) == 4
    slowest = 0.0

    async def timed(limiter: RateLimiter, limit: Bound) -> bool:
        nonlocal slowest
        began = time.monotonic()
        verdict = await limiter.hit(limit)
        slowest = max(slowest, time.monotonic() - began)
        return verdict.is_allowed

    async def away() -> None:
        with capture_logs() as logged:
            # Four of its five are used up: what was let through before the end counts.
            assert sum(await asyncio.gather(*(timed(first, started) for _ in range(600)))) == 1
            assert sum(await asyncio.gather(*(timed(second, other) for _ in range(600)))) == 5
        assert [line["event"] for line in logged] == ["limiter.storage_lost"] * 2  # once a process
        assert slowest < TIMEOUT_S + SLACK_S
        slowest_before, began = slowest, time.monotonic()
        for _ in range(50):
            await timed(first, started)
        assert time.monotonic() - began < 50 * TIMEOUT_S / 4  # not every request waits
        assert (first.is_alone(), second.is_alone(), slowest_before > 0) == (True, True, True)

    if end == "hung":
        with storage.hung():
            await away()
    else:
        storage.kill()
        await away()
        storage.start()
    await until_back(first, second)
    assert (
        sum(await asyncio.gather(*(taken(limiter, fresh_one, 20) for limiter in two for fresh_one in [fresh("7/day")])))
        == 14
    )
    both = fresh("7/hour")
    assert sum(await asyncio.gather(*(taken(limiter, both, 20) for limiter in two))) == 7


async def test_a_storage_that_hangs_under_traffic_confuses_no_answers(storage: Storage) -> None:
    """A request that gave up leaves no answer on its connection for the next one."""
    limiter = RateLimiter(SharedWindows(storage.url, timeout_s=1))
    limits = [fresh(f"{amount}/hour") for amount in range(1, 40)]
    await asyncio.gather(*(limiter.hit(limit) for limit in limits))
    with storage.hung():
        await asyncio.gather(*(limiter.hit(limit) for limit in limits))
    await until_back(limiter)
    for limit in limits:
        verdict = await limiter.peek(limit)
        # The storage may have counted the one that nobody waited for.
        assert verdict.tightest.bound == limit
        assert verdict.tightest.used in {1, 2}
    await limiter.close()


@pytest.mark.parametrize("url", ["async+valkey://127.0.0.1:1", "async+valkey://:wrong@{place}"])
async def test_a_storage_that_was_never_there_is_known_from_the_start(storage: Storage, url: str) -> None:
    shared = SharedWindows(url.format(place=f"127.0.0.1:{storage.port}"), timeout_s=1)
    limiter, limit = RateLimiter(shared, replicas=4), fresh("10/hour")
    with capture_logs() as logged:
        await limiter.open()
    assert [line["log_level"] for line in logged] == ["warning"]
    before = LIMITER_FALLBACKS._value.get()
    assert await taken(limiter, limit, 20) == 2  # a quarter of ten
    assert await taken(limiter, fresh("1/hour"), 5) == 1  # and at least one
    assert LIMITER_FALLBACKS._value.get() - before >= 25
    await limiter.close()


async def test_one_late_answer_does_not_make_a_process_alone(storage: Storage) -> None:
    """A loop that was busy sees a time-out that was none: that request is held to its share, and no other."""
    limiter = RateLimiter(SharedWindows(storage.url, timeout_s=1), replicas=2)
    with storage.hung():
        assert (await limiter.hit(fresh("10/hour"))).tightest.bound.amount == 5
    assert not limiter.is_alone()
    assert (await limiter.hit(fresh("10/hour"))).tightest.bound.amount == 10
    await limiter.close()


@pytest.fixture
def patient(monkeypatch: pytest.MonkeyPatch) -> float:
    """The time of a turn, longer than a busy machine keeps the storage from answering."""
    monkeypatch.setattr(turns, "TIMEOUT_S", 0.5)
    return turns.TIMEOUT_S


@pytest.mark.parametrize("crowd", [200, 600])
async def test_a_crowd_passes_no_limit_is_no_slow_storage_and_waits_in_no_queue_for_one(
    storage: Storage, patient: float, crowd: int
) -> None:
    """Each answer is in time, only so many are asked for at once, and those that wait go together."""
    async with road_to(storage) as road:
        first, second = [RateLimiter(SharedWindows(road.url, timeout_s=5), replicas=10) for _ in range(2)]
        full, half, before = fresh("60/hour"), fresh("100/hour"), LIMITER_FALLBACKS._value.get()
        assert [await taken(first, full, 70), await taken(second, half, 50)] == [60, 50]
        road.delay_s, slowest = patient / 5, 0.0

        async def stranger() -> None:
            """Whose credential turns out to be valid."""
            nonlocal slowest
            place, began = fresh("1/hour"), time.monotonic()
            assert (await second.hit(place)).is_allowed
            slowest = max(slowest, time.monotonic() - began)
            await second.give_back(place)
            assert (await second.hit(place)).is_allowed

        strangers = asyncio.gather(*(stranger() for _ in range(crowd)))
        assert [*await asyncio.gather(taken(second, full, 60), taken(second, half, 40))] == [0, 40]
        await strangers
        assert (second.is_alone(), LIMITER_FALLBACKS._value.get() - before) == (False, 0)
        assert slowest < crowd / 16 * road.delay_s / 2 + SLACK_S, "in turn they would take twice as long"
        await first.close()
        await second.close()


async def test_who_leaves_while_waiting_for_a_turn_takes_no_place(storage: Storage, patient: float) -> None:
    async with road_to(storage) as road:
        limiter, limit = RateLimiter(SharedWindows(road.url, timeout_s=5)), fresh("900/hour")
        assert await taken(limiter, limit, 16) == 16
        road.delay_s = patient / 5
        asking = [asyncio.create_task(limiter.hit(limit)) for _ in range(60)]
        await asyncio.sleep(0.001)
        for waiting in asking[16:50]:
            waiting.cancel()
        answers = await asyncio.gather(*asking, return_exceptions=True)
        assert sum(isinstance(answer, asyncio.CancelledError) for answer in answers) == 34
        assert (await limiter.peek(limit)).tightest.used == 16 + 60 - 34
        await limiter.close()


async def test_many_requests_at_once_are_no_slow_storage(storage: Storage) -> None:
    limiter, limit = RateLimiter(SharedWindows(storage.url, timeout_s=1), replicas=2), fresh("900000/hour")
    assert await taken(limiter, limit, 16) == 16  # the connections are there
    for _ in range(3):
        assert await taken(limiter, limit, 150) == 150
    assert not limiter.is_alone()
    assert (await limiter.peek(limit)).tightest.used == 466
    await limiter.close()
