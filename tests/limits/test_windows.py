"""Moving windows, in the process and in Valkey alike: one suite for both."""

from __future__ import annotations

import asyncio
import ssl
import time
from collections.abc import AsyncIterator, Iterator
from itertools import count
from typing import Final

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from app.errors import ConfigurationError
from app.limits import admission
from app.limits import windows as windows_module
from app.limits.shared import SharedWindows
from app.limits.windows import CELLS, Bound, Standing, Verdict, Windows, bound
from tests.limits.storage import Storage

_numbers: Final = count()


class Local:
    """The windows of one process, asked as the shared ones are."""

    def __init__(self) -> None:
        self._windows = Windows()

    async def take(self, bounds: list[Bound]) -> Verdict:
        return self._windows.take(bounds)

    async def peek(self, bounds: list[Bound]) -> Verdict:
        return self._windows.peek(bounds)

    async def give_back(self, bounds: list[Bound]) -> None:
        self._windows.give_back(bounds)


Both = Local | SharedWindows


@pytest.fixture(scope="module")
def storage(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Storage]:
    with Storage(tmp_path_factory.mktemp("valkey")) as running:
        yield running


@pytest.fixture(params=["process", "valkey"])
async def both(request: pytest.FixtureRequest, storage: Storage) -> AsyncIterator[Both]:
    if request.param == "process":
        yield Local()
        return
    shared = SharedWindows(storage.url, timeout_s=5)
    yield shared
    await shared.close()


def fresh(rate: str, kind: str = "user") -> Bound:
    """Of a subject that nobody has counted yet."""
    return bound(kind, f"tenant/{next(_numbers)}", rate)


async def taken(windows: Both, bounds: list[Bound], times: int) -> list[bool]:
    return [(await windows.take(bounds)).is_allowed for _ in range(times)]


async def test_a_window_lets_through_its_amount_and_no_more(both: Both) -> None:
    limit = fresh("3/hour")
    assert await taken(both, [limit], 5) == [True, True, True, False, False]
    (standing,) = (await both.peek([limit])).standings
    assert (standing.used, standing.remaining) == (3, 0)
    assert 3_590 < standing.reset_s <= 3_600


async def test_it_moves_and_each_place_returns_by_itself(both: Both) -> None:
    """Taken at 0 s and 0.6 s of a second: at 1.1 s one is free, where a fixed window would have two."""
    for _ in range(10):
        limit = fresh("2/second")
        started = time.monotonic()
        found = await taken(both, [limit], 1)
        await asyncio.sleep(0.6)
        found += await taken(both, [limit], 2)
        is_early = time.monotonic() - started < 1
        await asyncio.sleep(max(0.0, started + 1.1 - time.monotonic()))
        found += await taken(both, [limit], 2)
        if is_early and time.monotonic() - started < 1.6:  # else the machine was too busy to be asked in time
            break
    assert found == [True, True, False, True, False]


async def test_what_one_window_refuses_takes_no_place_in_another(both: Both) -> None:
    wide, narrow = fresh("5/hour", "tenant"), fresh("2/hour")
    assert await taken(both, [wide, narrow], 4) == [True, True, False, False]
    verdict = await both.peek([wide, narrow])
    assert [standing.used for standing in verdict.standings] == [2, 2]
    assert verdict.tightest.bound == narrow


async def test_many_at_once_get_no_more_than_each_limit_has(both: Both) -> None:
    tenant, users = fresh("30/hour", "tenant"), [fresh("12/hour") for _ in range(4)]
    verdicts = await asyncio.gather(*(both.take([tenant, users[number % 4]]) for number in range(200)))
    assert sum(verdict.is_allowed for verdict in verdicts) == 30
    used = [(await both.peek([user])).standings[0].used for user in users]
    assert (sum(used), max(used) <= 12) == (30, True)


async def test_a_new_amount_gives_nobody_a_fresh_window(both: Both) -> None:
    limit = fresh("2/hour")
    assert await taken(both, [limit], 3) == [True, True, False]
    raised = bound(limit.kind, limit.subject, "3/hour")
    assert await taken(both, [raised], 2) == [True, False]
    lowered = bound(limit.kind, limit.subject, "1/hour")
    assert (await both.take([lowered])).standings[0].remaining == 0


async def test_a_lowered_limit_is_free_again_only_when_enough_places_are(both: Both) -> None:
    limit = fresh("2/minute")
    assert (await both.take([limit])).is_allowed
    await asyncio.sleep(0.7)
    assert (await both.take([limit])).is_allowed
    lowered = bound(limit.kind, limit.subject, "1/minute")
    standings = (await both.peek([limit])).standings + (await both.peek([lowered])).standings
    first, second = [standing.reset_s for standing in standings]
    assert second - first > 0.3  # when the second goes, not the first


async def test_a_place_that_is_given_back_is_free(both: Both) -> None:
    limit = fresh("1/hour")
    for _ in range(3):
        assert await taken(both, [limit], 2) == [True, False]
        await both.give_back([limit])
    assert (await both.peek([limit])).standings == (Standing(limit, 0, 3600),)
    await both.give_back([limit])  # of nothing
    assert await taken(both, [limit], 2) == [True, False]


async def test_a_large_limit_is_exact_and_kept_in_few_cells(both: Both, storage: Storage) -> None:
    limit = fresh(f"{CELLS * 3}/day")
    assert sum(await taken(both, [limit], CELLS * 3 + 20)) == CELLS * 3
    await both.give_back([limit])
    assert await taken(both, [limit], 2) == [True, False]
    assert await _kept(both, limit) <= 2


async def _kept(both: Both, limit: Bound) -> int:
    """Entries, of which another may begin while the test runs."""
    if isinstance(both, Local):
        return len(both._windows._windows[limit.kind][limit.key].entries)
    kept: int = await both._client.llen(f"bulkhead:limits:{limit.key}")
    return kept


async def test_a_key_of_the_storage_ends_with_its_window(storage: Storage) -> None:
    shared, limit = SharedWindows(storage.url, timeout_s=5), fresh("500/minute")
    await shared.take([limit])
    assert 60 <= await shared._client.ttl(f"bulkhead:limits:{limit.key}") <= 63
    await shared.close()


def test_only_so_many_windows_are_kept_and_a_flood_of_one_kind_forgets_none_of_another(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(windows_module, "_MAX_WINDOWS", 50)
    windows, user = Windows(), bound("user", "t/u", "1/hour")
    assert windows.take([user]).is_allowed
    for number in range(500):
        assert windows.take([bound("address", f"10.0.{number // 256}.{number % 256}", "1/hour")]).is_allowed
    assert len(windows._windows["address"]) == 50
    assert not windows.take([user]).is_allowed


@pytest.mark.parametrize("url", ["async+memory://", "http://127.0.0.1", "nonsense", "async+memcached://127.0.0.1"])
def test_an_address_of_nothing_that_can_count_is_refused_without_being_told(url: str) -> None:
    with pytest.raises(ConfigurationError, match="BULKHEAD_LIMITS_URL") as refused:
        SharedWindows(url, timeout_s=1)
    assert url not in refused.value.detail


@pytest.mark.parametrize("scheme", ["async+valkeys", "async+rediss"])
def test_a_storage_over_tls_must_show_a_certificate_of_its_own_name(scheme: str) -> None:
    pool = SharedWindows(f"{scheme}://user:password@valkey.example:6380/1", timeout_s=1)._client.connection_pool
    context = pool.connection_class(**pool.connection_kwargs).ssl_context.get()
    assert (context.verify_mode, context.check_hostname) == (ssl.CERT_REQUIRED, True)


RATES: Final = st.sampled_from(["1/second", "2/minute", "7/minute", "250/minute", "300/hour", "3/hour"])
STEPS: Final = st.lists(st.tuples(st.sets(st.integers(0, 3), min_size=1), st.floats(0, 40)), max_size=120)


@settings(max_examples=60, deadline=None)
@given(rates=st.lists(RATES, min_size=4, max_size=4), steps=STEPS)
def test_whatever_the_order_no_span_holds_more_than_its_limit_and_none_is_refused_without_cause(
    rates: list[str], steps: list[tuple[set[int], float]]
) -> None:
    now = 0.0
    windows = Windows(clock=lambda: now)
    bounds = [bound(f"kind{place}", "t/u", rate) for place, rate in enumerate(rates)]
    taken: list[list[float]] = [[] for _ in bounds]
    for places, wait_s in steps:
        now += wait_s
        chosen = sorted(places)
        # What the definition says, cell by cell; the window itself knows only its list.
        counts = [sum(at > now - bounds[place].span_s for at in taken[place]) for place in chosen]
        kept = [
            sum(windows_module._moment(bounds[place], at) > now - bounds[place].span_s for at in taken[place])
            for place in chosen
        ]
        verdict = windows.take([bounds[place] for place in chosen])
        assert verdict.is_allowed is all(used < bounds[place].amount for used, place in zip(kept, chosen, strict=True))
        if verdict.is_allowed:
            assert all(count < bounds[place].amount for count, place in zip(counts, chosen, strict=True))
            for place in chosen:
                taken[place].append(now)


SIZES: Final = st.builds("{}/{}".format, st.integers(1, 40), st.sampled_from(["second", "minute", "hour"]))


@settings(max_examples=60, deadline=None)
@given(most=SIZES, steps=st.lists(st.tuples(st.lists(SIZES, max_size=2), st.floats(0, 20)), max_size=120))
def test_whatever_rates_are_published_in_turn_no_more_than_the_platforms_passes_and_each_window_is_taken_once(
    most: str, steps: list[tuple[list[str], float]]
) -> None:
    now, taken = 0.0, list[float]()
    windows, cap = Windows(clock=lambda: now), bound("user", "t/u", most)
    for rates, wait_s in steps:
        now += wait_s
        bounds = admission._within(most, "user", "t/u", rates)
        keys = {each.key for each in bounds}
        assert len(keys) == len(bounds)
        assert keys == {cap.key} | {bound("user", "t/u", rate).key for rate in rates}
        while windows.take(bounds).is_allowed:
            taken.append(now)
        assert sum(at > now - cap.span_s for at in taken) <= cap.amount
