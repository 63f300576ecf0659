"""What holds a run and a query: each bound of the policy, and of an override, is met; without it nothing stops them."""

from __future__ import annotations

import re
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass

import pytest

from app.servers.filesystem import template
from tests.attacks.hijacked import POLICY, Call
from tests.restrictions import off
from tests.restrictions.conftest import Ground
from tests.servers.hostile import SCRIPT
from tests.service import Tenant

SING, HANG = (Call("docs__act", f'{{"what": "{what}"}}') for what in ("sing", "hang"))
# Until what is tested is said, nothing else is in the way.
OPEN = (
    POLICY.replace("max_tool_calls: 20", "max_tool_calls: 20, max_steps: 20, timeout_s: 60") + "input: {preset: off}\n"
)
FOR_USERS = "overrides: [{{roles: [user], {}}}]\n"
Off = Callable[[pytest.MonkeyPatch], None]


@pytest.fixture(scope="module", autouse=True)
def _acting() -> Iterator[None]:
    """The server of these tests has one tool, which hangs if it is told to."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(template, "_SERVER", SCRIPT)
        yield


async def many_turns(ground: Ground, tenant: Tenant) -> str | None:
    return await stopped(ground, tenant, [SING], [SING], [SING])


async def many_calls(ground: Ground, tenant: Tenant) -> str | None:
    return await stopped(ground, tenant, [SING, SING, SING])


async def a_long_call(ground: Ground, tenant: Tenant) -> str | None:
    return await stopped(ground, tenant, [HANG])


async def stopped(ground: Ground, tenant: Tenant, *turns: list[Call]) -> str | None:
    """The code with which the run has ended; none where nothing has stopped it."""
    answer = (await ground.model.play(tenant, *turns)).response.json()
    code: str | None = answer["code"]
    assert (code is None) == (answer.get("status") == "succeeded")
    return code


async def many_requests(ground: Ground, tenant: Tenant) -> str | None:
    answers = [await tenant.user.ask("hello") for _ in range(3)]
    assert [answer.status_code for answer in answers[:2]] == [200, 200]
    code: str | None = answers[2].json()["code"]
    return code


@dataclass(frozen=True)
class Bound:
    """A limit as the policy says it, what goes past it, the code that this ends with, and what would let it."""

    limit: str
    attack: Callable[[Ground, Tenant], Awaitable[str | None]]
    code: str
    off: Off


BOUNDS = [
    Bound("max_steps: 2", many_turns, "step_limit", off.steps),
    Bound("max_tool_calls: 2", many_calls, "tool_limit", off.tool_calls),
    Bound("timeout_s: 1", a_long_call, "run_timeout", off.time),
    Bound("requests: 2/minute", many_requests, "rate_limited", off.rate),
]


def limited(bound: Bound) -> str:
    """The open policy with this limit in the place of its own."""
    key = bound.limit.partition(":")[0]
    policy, count = re.subn(rf"\b{key}: [^,}}]+", bound.limit, OPEN)
    assert count == 1
    return policy


OF_TENANTS = Bound("tenant_requests: 2/minute", many_requests, "rate_limited", off.rate)


@pytest.mark.parametrize("bound", [*BOUNDS, OF_TENANTS], ids=lambda bound: bound.limit)
async def test_a_limit_of_the_policy_ends_what_goes_past_it(
    ground: Ground, monkeypatch: pytest.MonkeyPatch, bound: Bound
) -> None:
    await _holds(ground, monkeypatch, limited(bound), bound, bound.off)


@pytest.mark.parametrize("bound", BOUNDS, ids=lambda bound: bound.limit)
async def test_a_limit_of_an_override_ends_what_goes_past_it(
    ground: Ground, monkeypatch: pytest.MonkeyPatch, bound: Bound
) -> None:
    policy = OPEN + FOR_USERS.format(f"limits: {{{bound.limit}}}")
    await _holds(ground, monkeypatch, policy, bound, off.overridden_terms)


async def _holds(ground: Ground, patch: pytest.MonkeyPatch, policy: str, bound: Bound, without: Off) -> None:
    tenant = await ground.service.new_tenant(policy=policy)
    assert await bound.attack(ground, tenant) == bound.code
    without(patch)
    assert await bound.attack(ground, tenant) is None, "the attack proves nothing: nothing would have stopped it"


@dataclass(frozen=True)
class Screen:
    """A key of `input`, a query that it refuses, by which rule, and what would let it pass."""

    key: str
    query: str
    rule: str
    off: Off


SCREENS = [
    Screen("preset: balanced", "sudo rm -rf /", "rm_rf", off.preset),
    Screen("max_length: 20", "How tall is the tower?", "max_length", off.length),
    Screen('block: ["(?i)project x"]', "What is PROJECT X?", "block[0]", off.patterns),
]


@pytest.mark.parametrize("screen", SCREENS, ids=lambda screen: screen.rule)
async def test_a_query_that_the_policy_screens_out_begins_no_run(
    ground: Ground, monkeypatch: pytest.MonkeyPatch, screen: Screen
) -> None:
    policy = OPEN.replace("preset: off", screen.key)
    await _screens(ground, monkeypatch, policy, screen, screen.off)


@pytest.mark.parametrize("screen", SCREENS, ids=lambda screen: screen.rule)
async def test_a_query_that_an_override_screens_out_begins_no_run(
    ground: Ground, monkeypatch: pytest.MonkeyPatch, screen: Screen
) -> None:
    policy = OPEN + FOR_USERS.format(f"input: {{{screen.key}}}")
    await _screens(ground, monkeypatch, policy, screen, off.overridden_terms, prefix="overrides[0].")


async def _screens(
    ground: Ground, patch: pytest.MonkeyPatch, policy: str, screen: Screen, without: Off, *, prefix: str = ""
) -> None:
    tenant = await ground.service.new_tenant(policy=policy)
    refused = await tenant.user.ask(screen.query)
    assert (refused.status_code, refused.json()["code"]) == (422, "query_refused")
    assert f"{prefix}{screen.rule}" in refused.json()["detail"]
    assert screen.query not in ground.model.told
    without(patch)
    assert (await tenant.user.ask(screen.query)).status_code == 200
    assert ground.model.told.pop(screen.query)


@pytest.mark.parametrize("whom", ["roles: [user]", "users: [{user_id}]"])
async def test_who_is_meant_by_an_override_is_held_by_it_and_nobody_else_is(ground: Ground, whom: str) -> None:
    tenant = await ground.service.new_tenant(policy=OPEN)
    meant = whom.format(user_id=tenant.user_id)
    await tenant.admin.publish(f"{OPEN}overrides: [{{{meant}, input: {{max_length: 5}}}}]\n")
    assert (await tenant.user.ask("How are you?")).status_code == 422
    assert (await tenant.admin.ask("How are you?")).status_code == 200  # the control: whom it does not mean
