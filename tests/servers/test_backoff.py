"""What fails again and again waits: after two forgiven failures 1 s, 2 s ... 60 s, until a healthy minute."""

from __future__ import annotations

from app.servers.backoff import HEALTHY_S, Backoff


class Clock:
    """A time that a test moves."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def test_the_waits_double_to_a_minute_and_the_first_is_told_once() -> None:
    clock = Clock()
    backoff: Backoff[str] = Backoff(clock)
    waits, told = [], []
    for _ in range(12):
        told.append(backoff.fail("a"))
        waits.append(backoff.wait_s("a"))
        clock.now += waits[-1]
    assert waits == [0, 0, 1, 2, 4, 8, 16, 32, 60, 60, 60, 60]
    assert [turn for turn, is_told in enumerate(told) if is_told] == [2]


def test_it_may_be_tried_again_once_the_wait_is_over_and_another_is_not_concerned() -> None:
    clock = Clock()
    backoff: Backoff[str] = Backoff(clock)
    for _ in range(4):
        backoff.fail("a")
    assert (backoff.wait_s("a"), backoff.wait_s("b"), backoff.waiting()) == (2, 0, ["a"])
    clock.now += 2
    assert (backoff.wait_s("a"), backoff.waiting(), backoff.count("a")) == (0, [], 4)


def test_a_healthy_minute_makes_all_good_and_a_little_less_does_not() -> None:
    backoff: Backoff[str] = Backoff(Clock())
    for name in ("short", "long"):
        for _ in range(3):
            backoff.fail(name)
    backoff.fail("short", after_s=HEALTHY_S - 0.1)
    backoff.fail("long", after_s=HEALTHY_S)
    assert (backoff.wait_s("short"), backoff.count("short")) == (2, 4)
    assert (backoff.wait_s("long"), backoff.count("long")) == (0, 1)


def test_memory_is_bounded_and_old_failures_are_forgotten() -> None:
    clock = Clock()
    backoff: Backoff[int] = Backoff(clock)
    for number in range(10_010):
        backoff.fail(number)
    assert len(backoff._failures) == 10_000
    clock.now += HEALTHY_S + 1
    backoff.prune()
    assert not backoff._failures
