"""What a tenant may use up with all its servers, one after the other or at once, and that it costs itself alone."""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path

import pytest

from app.outbound.allowances import Allowance, Places, Tenants
from app.outbound.destinations import Refused
from app.outbound.grants import EgressLimits, Proxy
from app.servers.relay import EgressRelay
from tests.egress.stage import HERE, Doors, command, doors
from tests.egress.test_limits import taking
from tests.outbound.origin import NAME, Origin

SLOW = Proxy((("a.slow.test", 443),))


class Hours:
    """A clock under the test's hand."""

    def __init__(self) -> None:
        self.now = 10_000.0

    def __call__(self) -> float:
        return self.now


async def test_names_that_nobody_answers_hold_up_no_other_tenant(plain: Origin) -> None:
    async def hammer(opened: Doors) -> None:
        for _ in range(15):
            assert await opened.status("a.slow.test", 443) == 502

    slow = (sys.executable, "-E", "-s", "-m", "tests.egress.slow_relay")
    async with (
        EgressRelay(command=slow) as relay,
        doors(relay, SLOW, tenant="hostile") as first,
        doors(relay, SLOW, tenant="hostile") as second,
        doors(relay, SLOW, tenant="hostile") as third,
        doors(relay, Proxy(((NAME, plain.port),))) as other,
    ):
        await asyncio.gather(*(hammer(each) for each in (first, second, third) for _ in range(4)))
        assert await other.status(NAME, plain.port) == 200


async def test_a_new_server_is_no_new_allowance(relay: EgressRelay, plain: Origin) -> None:
    async def served(tenant: str) -> list[int]:
        door, limits = Proxy(((NAME, plain.port),)), EgressLimits(connections_per_minute=3)
        async with doors(relay, door, tenant=tenant, tenant_limits=limits) as opened:
            return [await opened.status(NAME, plain.port) for _ in range(2)]

    assert [await served("restarting") for _ in range(3)] == [[200, 200], [200, 429], [429, 429]]
    assert await served("another") == [200, 200]


async def test_servers_of_a_tenant_share_its_places(relay: EgressRelay) -> None:
    limits = EgressLimits(connections=2)
    async with taking() as (port, _):
        door = Proxy(((NAME, port),))
        async with (
            doors(relay, door, tenant="wide", tenant_limits=limits) as first,
            doors(relay, door, tenant="wide", tenant_limits=limits) as second,
            doors(relay, door, tenant="another", tenant_limits=limits) as other,
        ):
            held = [await opened.tunnelled(NAME, port) for opened in (first, second)]
            assert [await opened.is_served(NAME, port) for opened in (first, second, other)] == [False, False, True]
            for _, _, writer in held:
                writer.close()


async def test_all_connections_together_leave_files_for_new_servers(tmp_path: Path) -> None:
    order = ("prlimit", "--nofile=128:128", *command(HERE, tmp_path))
    async with taking() as (port, _), EgressRelay(command=order) as relay:
        door = Proxy(((NAME, port),))
        async with doors(relay, door) as honest, doors(relay, door) as first, doors(relay, door) as second:
            status, _, writer = await honest.tunnelled(NAME, port)
            taken = [await opened.is_held(NAME, port) for opened in (first, second) for _ in range(32)]
            assert 20 < sum(taken) < 64
            async with doors(relay, door):  # one more is granted
                assert (status, honest.losses) == (200, [])
            writer.close()


def test_bytes_come_back_with_the_hours() -> None:
    clock = Hours()
    allowance = Allowance(EgressLimits(bytes_up=100, bytes_down=100), Places(1), clock=clock)
    allowance.transfer(down=60)
    clock.now += 1800
    allowance.transfer(down=40)
    with pytest.raises(Refused, match="bytes"):
        allowance.spend()
    clock.now += 1500
    with pytest.raises(Refused, match="bytes"):
        allowance.spend()
    clock.now += 600
    allowance.spend()
    allowance.transfer(down=60)
    with pytest.raises(Refused, match="bytes"):
        allowance.transfer(down=1)


def test_a_tenant_is_forgotten_an_hour_after_its_last_server_and_not_while_it_has_one() -> None:
    clock, limits = Hours(), EgressLimits()
    tenants = Tenants(100, clock=clock)
    with tenants.one("staying", limits) as staying:
        with tenants.one("leaving", limits) as before:
            pass
        clock.now += 3000
        with tenants.one("leaving", limits) as soon:
            assert soon is before
        clock.now += 3700
        with tenants.one("staying", limits) as again, tenants.one("third", limits):
            assert again is staying
        with tenants.one("leaving", limits) as late:
            assert late is not before


def test_tenants_that_left_take_bounded_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("app.outbound.allowances._REMEMBERED", 10)
    tenants, limits = Tenants(100), EgressLimits()
    for number in range(50):
        with tenants.one(str(number), limits):
            pass
    assert len(tenants._known) == 10
