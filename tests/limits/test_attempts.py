"""Failed credentials: what is counted and for how long, with a clock of the test's own."""

from __future__ import annotations

import asyncio
import time
from typing import Final

import pytest
from slowapi.errors import RateLimitExceeded
from sqlalchemy.exc import TimeoutError as PoolTimeout

from app.auth.gate import Attempt
from app.errors import Unauthenticated, Unavailable
from app.limits import attempts as module
from app.limits.attempts import DELAYED, FREE, MAX_PAUSE_S, Attempts
from app.limits.rates import RateLimiter
from tests.service import Service

HERE: Final = "198.51.100.1"


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def gate(service: Service, clock: Clock, monkeypatch: pytest.MonkeyPatch) -> Attempts:
    """Of a platform with a record, and of answers that wait a thousandth of what they would."""
    monkeypatch.setattr(module, "_FIRST_DELAY_S", 0.0001)
    return Attempts(RateLimiter(), service.app.state.platform, address_rate="30/hour", clock=clock)


def attempt(credential: str, *, name: str = "", address: str = HERE) -> Attempt:
    return Attempt(credential, name, address)


async def fails(gate: Attempts, tried: Attempt) -> int | None:
    """Seconds to wait before it is looked at; None where it was looked at, and refused."""
    try:
        async with gate.looking(tried):
            raise Unauthenticated  # noqa: TRY301  as the look at it does
    except RateLimitExceeded as refused:
        return int((refused.headers or {})["Retry-After"])
    except Unauthenticated:
        return None


async def passes(gate: Attempts, tried: Attempt) -> None:
    async with gate.looking(tried):
        await asyncio.sleep(0)


async def test_a_key_that_fails_again_and_again_is_looked_at_less_and_less(gate: Attempts, clock: Clock) -> None:
    assert [await fails(gate, attempt(f"guess {number}", name="lookup")) for number in range(FREE + DELAYED)] == [
        None
    ] * (FREE + DELAYED)
    pauses = []
    for number in range(8):
        assert await fails(gate, attempt(f"more {number}", name="lookup")) is None
        pause_s = await fails(gate, attempt("and more", name="lookup"))
        assert pause_s is not None
        pauses.append(pause_s)
        clock.now += pause_s
    assert pauses == [2, 4, 8, 16, 32, MAX_PAUSE_S, MAX_PAUSE_S, MAX_PAUSE_S]
    clock.now += 601  # then it is forgotten
    assert [await fails(gate, attempt("x", name="lookup")) for _ in range(2)] == [None, None]


async def test_what_is_not_looked_at_takes_no_place_among_those_of_its_address(gate: Attempts) -> None:
    for number in range(FREE + DELAYED + 1):
        assert await fails(gate, attempt(f"guess {number}", name="lookup")) is None
    for number in range(200):
        assert await fails(gate, attempt(f"guess {number}", name="lookup")) == 2
    assert await fails(gate, attempt("somebody else's", name="other")) is None


async def test_an_address_has_its_places_however_many_keys_it_tries(gate: Attempts) -> None:
    tried = [await fails(gate, attempt(f"guess {number}", name=f"lookup {number}")) for number in range(40)]
    assert tried.count(None) == 30
    assert await fails(gate, attempt("another's", address="198.51.100.2")) is None


async def test_side_by_side_they_get_no_more_places(gate: Attempts) -> None:
    tried = await asyncio.gather(*(fails(gate, attempt(f"guess {number}")) for number in range(100)))
    assert tried.count(None) == 30


async def test_a_valid_credential_takes_no_place_and_once_known_passes_a_flood(gate: Attempts) -> None:
    for number in range(100):
        await passes(gate, attempt(f"token {number}"))
    for number in range(40):
        await fails(gate, attempt(f"guess {number}"))
    assert await fails(gate, attempt("unknown")) is not None
    await passes(gate, attempt("token 7"))
    assert await fails(gate, attempt("unknown")) is not None  # it has given back nothing that it had not taken


async def test_a_client_that_begins_with_many_requests_at_once_takes_one_place(gate: Attempts) -> None:
    await asyncio.gather(*(passes(gate, attempt("token")) for _ in range(200)))
    for _ in range(30):  # none of which it has kept
        await passes(gate, attempt(f"token {_}"))


@pytest.mark.parametrize("failure", [ConnectionError, PoolTimeout])
async def test_what_cannot_be_looked_at_takes_no_place(gate: Attempts, failure: type[Exception]) -> None:
    for number in range(100):
        with pytest.raises(failure):
            async with gate.looking(attempt(f"token {number}")):
                raise failure
    assert await fails(gate, attempt("guess")) is None


async def test_what_its_issuer_keeps_from_being_looked_at_takes_its_place(gate: Attempts) -> None:
    """Whoever may name an issuer whose keys nobody can have could otherwise ask for ever."""
    for number in range(30):
        with pytest.raises(Unavailable):
            async with gate.looking(attempt(f"token {number}")):
                raise Unavailable
    assert await fails(gate, attempt("guess")) is not None


async def test_the_same_key_from_its_own_address_is_not_slowed_by_who_guesses_at_it(gate: Attempts) -> None:
    for number in range(FREE + DELAYED + 1):
        await fails(gate, attempt(f"guess {number}", name="lookup"))
    assert await fails(gate, attempt("guess", name="lookup")) is not None
    await passes(gate, attempt("the key", name="lookup", address="198.51.100.2"))


async def test_a_known_credential_that_has_ended_is_known_no_more(gate: Attempts) -> None:
    await passes(gate, attempt("the key", name="lookup"))
    tried = [await fails(gate, attempt("the key", name="lookup")) for _ in range(FREE + DELAYED + 2)]
    assert tried == [None] * (FREE + DELAYED + 1) + [2]


async def test_answers_take_twice_as_long_each_time_up_to_a_bound(
    gate: Attempts, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_FIRST_DELAY_S", 0.01)
    took = []
    for _ in range(FREE + 4):
        began = time.monotonic()
        await fails(gate, attempt("guess", name="lookup"))
        took.append(time.monotonic() - began)
    assert min(took[:FREE]) < 0.01  # a busy machine is late itself
    assert [seconds >= 0.01 * 2**place for place, seconds in enumerate(took[FREE:])] == [True] * 4


async def test_no_more_answers_wait_than_are_kept_open_for_it(gate: Attempts, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_FIRST_DELAY_S", 30)
    monkeypatch.setattr(module, "_MAX_WAITING", 3)
    for _ in range(FREE):
        await fails(gate, attempt("guess", name="lookup"))
    waiting = [asyncio.create_task(gate._refuse(attempt("guess", name="lookup"))) for _ in range(20)]
    done, pending = await asyncio.wait(waiting, timeout=0.2)
    assert (len(done), len(pending)) == (17, 3)
    for task in pending:
        task.cancel()
    await asyncio.wait(pending)
    assert gate._waiting == 0


async def test_memory_is_bounded_and_holds_no_credential(gate: Attempts, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_MAX_KEPT", 10)
    for number in range(29):
        await fails(gate, attempt(f"secret-text {number}"))
        await passes(gate, attempt(f"secret-text {number + 1000}"))
    assert (len(gate._failed), len(gate._accepted), len(gate._turns)) == (10, 10, 0)
    assert "secret-text" not in str((gate._failed, gate._accepted, attempt("secret-text")))


async def test_the_first_in_a_minute_is_on_the_platforms_record(service: Service, gate: Attempts) -> None:
    address = "198.51.100.77"
    for number in range(60):
        await fails(gate, attempt(f"guess {number}", address=address))
    for _ in range(FREE + DELAYED + 20):
        await gate._refuse(attempt("one", name="lookup", address=address))
        await fails(gate, attempt("one", name="lookup", address=address))
    events = await service.platform.events(type="auth.slowed")
    mine = [event["data"] for event in events if event["data"]["address"] == address]
    assert {data["reason"] for data in mine} == {"address", "credential"}
    assert len(mine) <= 4  # two where the minute changed in between
