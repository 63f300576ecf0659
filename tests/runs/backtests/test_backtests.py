"""Backtests of a version over recorded calls, what a policy may ask of its successor, rolling back, and why a call
was decided so.
"""

from __future__ import annotations

import secrets
import weakref
from dataclasses import dataclass
from typing import Any, Final
from uuid import UUID, uuid4

import pytest
from sqlalchemy import text
from sqlalchemy.ext.asyncio import create_async_engine

from app.policies.arguments import MAX_BYTES, check_arguments
from app.policies.backtest import RecordedCall, Replay
from app.policies.decision import Decision
from app.runs.arguments import canonical
from app.runs.backtests import recorded
from app.runs.backtests import service as backtests
from app.runs.backtests.recorded import Head
from tests.service import POLICY, Client, Service, Tenant

_BEFORE: Final = POLICY[: POLICY.index("tools:")]
LISTING: Final = f"{_BEFORE}tools: {{allow: [docs__list_directory]}}\n"
NO_SECRETS: Final = f"""{_BEFORE}tools:
  allow: ["docs__*"]
  rules: |
    @id("secrets")
    forbid (principal, action == Action::"docs__read_file", resource)
    when {{ context.arguments.path like "secret*" }};
"""
ADMINS_ONLY: Final = f"""{_BEFORE}tools:
  rules: |
    permit (principal in Role::"tenant_admin", action, resource);
"""
DEMANDING: Final = "publishing: {require_backtest: true, max_flips: 1}\n"
# Without servers, so that nothing has to be started.
BARE: Final = "schema: bulkhead/1\nmodel: {use: rehearsal}\n"


async def store(tenant: Tenant, policy: str) -> int:
    version: int = (await tenant.admin.make("/v1/policies", content=policy.encode()))["version"]
    return version


async def draft(tenant: Tenant, policy: str) -> int:
    version = await store(tenant, policy)
    await tenant.admin.make(f"/v1/policies/{version}/check")
    return version


async def reads(client: Client, path: str) -> str:
    """A run that reads this file; give its id."""
    answer = await client.ask(f"What does {path} say?")
    assert answer.is_success, answer.text
    assert [call["tool"] for call in answer.json()["tool_calls"]] == ["docs__read_file"]
    run_id: str = answer.json()["run_id"]
    return run_id


async def backtest(tenant: Tenant, version: int, **body: Any) -> Any:
    return await tenant.admin.make(f"/v1/policies/{version}/backtest", json=body)


async def sql(service: Service, tenant: Tenant, statement: str, **values: str) -> list[Any]:
    """As the owner, under the tenant: to look at, or to change, what no route does."""
    engine = create_async_engine(service.urls.owner or "")
    async with engine.begin() as connection:
        await connection.execute(text(f"select set_config('app.tenant_id', '{tenant.id}', true)"))
        found = await connection.execute(text(statement), values)
        rows = list(found.all()) if found.returns_rows else []
    await engine.dispose()
    return rows


async def publish(tenant: Tenant, version: int) -> tuple[int, str | None]:
    answer = await tenant.admin.post(f"/v1/policies/{version}/publish", json={})
    return answer.status_code, answer.json().get("code")


@dataclass(frozen=True, slots=True)
class History:
    """A tenant that holds NO_SECRETS, and what its runs have read."""

    tenant: Tenant
    allowed: str
    denied: tuple[str, str]
    admins: str
    unknown: str


@pytest.fixture(scope="module")
async def history(service: Service) -> History:
    files = {"note.md": "a", "secret.md": "b"}
    tenant = await service.new_tenant(policy=NO_SECRETS, files=files)
    unknown = await reads(tenant.user, "note.md")
    await sql(service, tenant, "update tool_calls set tool = '(unknown)' where run_id = :run", run=unknown)
    allowed = await reads(tenant.user, "note.md")
    denied = await reads(tenant.user, "secret.md"), await reads(tenant.user, "secret.md")
    return History(tenant, allowed, denied, await reads(tenant.admin, "secret.md"), unknown)


async def test_every_flip_is_told_by_user_tool_and_rule(service: Service, history: History) -> None:
    tenant = history.tenant
    journal = service.server_journal(tenant)
    found = await backtest(tenant, await draft(tenant, POLICY))
    assert all(flip["tool"] == "docs__read_file" for flip in found["flips"])
    assert {
        (flip["user_id"] == tenant.user_id, flip["role"], flip["count"], flip["example"]["run_id"])
        for flip in found["flips"]
    } == {(True, "user", 2, history.denied[1]), (False, "tenant_admin", 1, history.admins)}
    for flip in found["flips"]:
        assert (flip["decision_before"], flip["rule_before"]) == ("denied", "secrets")
        assert (flip["decision_after"], flip["rule_after"]) == ("allowed", "allow:docs__*")
    counts = (found["against"], found["calls"], found["flipped"], found["is_full"], found["skipped"])
    assert counts == (1, 4, 3, True, {"unknown_tool": 1})
    assert service.server_journal(tenant) == journal, "nothing was called"


async def test_what_would_be_denied_flips_and_what_stays_does_not(history: History) -> None:
    tenant = history.tenant
    (flip,) = (await backtest(tenant, await draft(tenant, LISTING)))["flips"]
    assert (flip["decision_after"], flip["rule_after"], flip["count"]) == ("denied", "default_deny", 1)
    assert flip["example"] == {"run_id": history.allowed, "sequence": 1}
    same = await backtest(tenant, await draft(tenant, f"# the same\n{NO_SECRETS}"))
    assert (same["calls"], same["flipped"], same["flips"]) == (4, 0, [])
    part = await backtest(tenant, 1, limit=2)
    assert (part["calls"], part["is_full"]) == (2, False)
    assert (await backtest(tenant, 1, since="2100-01-01T00:00:00Z"))["calls"] == 0


async def test_a_denied_call_is_explained_by_its_rule_and_by_all_that_hold(history: History) -> None:
    path = f"/v1/runs/{history.denied[0]}/tool_calls"
    found = (await history.tenant.admin.get(f"{path}/1/explain")).json()
    assert (found["recorded"]["decision"], found["recorded"]["rule"]) == ("denied", "secrets")
    assert 'like "secret*"' in found["recorded"]["text"]
    assert [(each["rule"], each["effect"]) for each in found["now"]["firing"]] == [
        ("allow:docs__*", "permit"),
        ("secrets", "forbid"),
    ]
    assert (await history.tenant.admin.get(f"{path}/2/explain")).status_code == 404


async def test_a_call_is_replayed_for_the_role_that_its_user_had_until_the_user_is_erased(service: Service) -> None:
    """The control: without the kept role the user's present one is taken, as for runs of before it was kept."""
    nonce = f"{secrets.token_hex(16)}.md"
    tenant = await service.new_tenant(policy=POLICY, files={nonce: "a"})
    run_id = await reads(tenant.user, nonce)
    version = await draft(tenant, ADMINS_ONLY)
    await sql(service, tenant, "update users set role = 'tenant_admin' where id = :id", id=tenant.user_id)
    found = await backtest(tenant, version)
    assert (found["flipped"], found["flips"][0]["role"]) == (1, "user")
    await sql(service, tenant, "update runs set role = null where id = :id", id=run_id)
    assert (await backtest(tenant, version))["flipped"] == 0
    rows = await sql(service, tenant, "select result::text from policy_backtests")
    kept = " ".join(row[0] for row in rows)
    assert tenant.user_id in kept
    assert nonce not in kept + str(found) + str(await tenant.admin.events())
    await sql(service, tenant, "update users set wrapped_key = null where id = :id", id=tenant.user_id)
    found = await backtest(tenant, version)
    assert (found["calls"], found["flipped"], found["skipped"]) == (0, 0, {"erased": 1})
    why = (await tenant.admin.get(f"/v1/runs/{run_id}/tool_calls/1/explain")).json()
    assert (why["now"], why["unreadable"], why["recorded"]["text"]) == (None, "erased", "tools.allow: docs__*")


# What a replay may take, and what it may not leave out

_NO_CALL: Final = uuid4()


def head(size: int) -> Head:
    return Head(_NO_CALL, 1, "docs__read_file", _NO_CALL, "user", None, size, None)


def test_calls_are_read_by_their_size_and_none_is_left_out() -> None:
    sizes = [1] * 250 + [6_000_000, 6_000_000, 1]
    batches = [[each.size for each in batch] for batch in backtests._batches([head(size) for size in sizes])]
    assert batches == [[1] * 200, [1] * 50 + [6_000_000], [6_000_000, 1]]


def test_a_flip_is_kept_without_its_arguments() -> None:
    class Arguments(dict[str, str]):
        """A dict that a weak reference can be had of."""

    yes, no = Decision(allowed=True, rule="a", reason=""), Decision.deny("b", "")
    replay = Replay(lambda _: yes, lambda _: no)
    arguments = Arguments(path="x" * 1_000)
    seen = weakref.ref(arguments)
    replay.judge(RecordedCall(_NO_CALL, 3, _NO_CALL, "user", "docs__read_file", arguments))
    del arguments
    assert (seen(), replay.flipped, replay.listed()[0][2]) == (None, 1, (_NO_CALL, 3))


@pytest.mark.parametrize("character", ["\x01", '"', "\U0001f600"])
def test_whatever_a_gate_lets_through_is_replayed(character: str) -> None:
    arguments = {"a": character * ((MAX_BYTES - 1) // len(character.encode()))}
    assert check_arguments(arguments) is None
    assert len(canonical(arguments).encode()) + 28 <= recorded._MAX_SEALED


async def test_a_replay_that_has_no_time_or_misses_calls_is_not_full(
    service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    tenant = await service.new_tenant(policy=POLICY, files={"note.md": "a"})
    runs = [await reads(tenant.user, "note.md") for _ in range(3)]
    full = await backtest(tenant, 1)
    assert (full["calls"], full["is_full"]) == (3, True), "the control"
    with monkeypatch.context() as patched:
        patched.setattr(backtests, "_TIME_S", -1)
        late = await backtest(tenant, 1)
    assert (late["calls"], late["is_full"], late["skipped"]) == (0, False, {"no_time": 3})
    await sql(service, tenant, "update tool_calls set tool = 'search_tools' where run_id = :run", run=runs[0])
    found = await backtest(tenant, 1)
    assert (found["calls"], found["is_full"], found["skipped"]) == (2, True, {"tool_search": 1})
    why = (await tenant.admin.get(f"/v1/runs/{runs[0]}/tool_calls/1/explain")).json()
    assert (why["now"], why["unreadable"]) == (None, "tool_search")
    damage = "update contents set sealed = substr(sealed, 2) where kind = 'arguments' and run_id = :run"
    await sql(service, tenant, damage, run=runs[1])
    await sql(service, tenant, "delete from contents where kind = 'arguments' and run_id = :run", run=runs[2])
    damaged = await backtest(tenant, 1)
    assert (damaged["calls"], damaged["is_full"]) == (0, False)
    assert damaged["skipped"] == {"tool_search": 1, "unreadable": 2}


@pytest.mark.parametrize("since", ["0001-01-01T00:00:00+14:00", "9999-12-31T23:59:59-14:00"])
async def test_a_time_that_no_database_knows_is_a_fault_of_the_request(history: History, since: str) -> None:
    answer = await history.tenant.admin.post("/v1/policies/1/backtest", json={"since": since})
    assert (answer.status_code, answer.json()["errors"][0]["path"]) == (422, "/body/since")


async def test_a_tenant_has_one_backtest_under_way(service: Service, history: History) -> None:
    turns = service.app.state.backtests._turns
    async with turns.turn(UUID(history.tenant.id)):
        answer = await history.tenant.admin.post("/v1/policies/1/backtest", json={})
        assert (answer.status_code, answer.json()["code"]) == (409, "backtest_under_way")
    assert (await backtest(history.tenant, 1))["is_full"]


# What the version that holds asks of its successor


async def test_a_policy_that_asks_for_a_backtest_is_not_replaced_without_one(service: Service) -> None:
    tenant = await service.new_tenant(policy=f"{POLICY}{DEMANDING}", files={"note.md": "a", "secret.md": "b"})
    run_id = await reads(tenant.user, "note.md")
    await reads(tenant.user, "secret.md")
    narrow, closed = await draft(tenant, NO_SECRETS), await draft(tenant, LISTING)
    # Of a part of the record, or of another version: neither is a backtest of this one.
    await backtest(tenant, narrow, limit=1)
    await backtest(tenant, narrow, since="2020-01-01T00:00:00Z")
    assert (await backtest(tenant, closed))["flipped"] == 2
    assert await publish(tenant, narrow) == (409, "backtest_required")
    assert await publish(tenant, closed) == (409, "too_many_flips")
    assert (await tenant.admin.get("/v1/me")).json()["policy_version"] == 1
    assert (await backtest(tenant, narrow))["flipped"] == 1
    assert await publish(tenant, narrow) == (200, None)
    # The control: what holds now asks for nothing, and the version that was refused is published.
    assert await publish(tenant, closed) == (200, None)
    why = (await tenant.admin.get(f"/v1/runs/{run_id}/tool_calls/1/explain")).json()
    assert (why["recorded"]["policy_version"], why["recorded"]["rule"]) == (1, "allow:docs__*")
    assert (why["now"]["policy_version"], why["now"]["rule"]) == (closed, "default_deny")


async def test_a_backtest_is_worth_nothing_once_it_is_old_or_of_something_else(service: Service) -> None:
    tenant = await service.new_tenant(policy=f"{BARE}{DEMANDING}")
    version = await draft(tenant, BARE)
    await backtest(tenant, version)
    for change, undo in (
        (
            "update policy_backtests set created_at = created_at - interval '25 hours'",
            "update policy_backtests set created_at = created_at + interval '25 hours'",
        ),
        (
            "update policy_backtests set tools_digest = tools_digest || 'x'",
            "update policy_backtests set tools_digest = rtrim(tools_digest, 'x')",
        ),
        ("update policy_backtests set against = 2", "update policy_backtests set against = 1"),
    ):
        await sql(service, tenant, change)
        obstacles = (await tenant.admin.make(f"/v1/policies/{version}/check"))["obstacles"]
        assert [each["code"] for each in obstacles] == ["backtest_required"]
        assert await publish(tenant, version) == (409, "backtest_required")
        await sql(service, tenant, undo)
    assert await publish(tenant, 1) == (200, None), "the version that holds replaces itself"
    assert await publish(tenant, version) == (200, None)


async def test_a_backtest_is_never_changed_by_the_service(service: Service) -> None:
    tenant = await service.new_tenant(policy=BARE)
    await backtest(tenant, 1)
    with pytest.raises(Exception, match="permission denied"):
        await service.sql("update policy_backtests set flipped = 0", role="app")


# Rolling back


async def test_rolling_back_publishes_what_held_before_on_the_record(service: Service) -> None:
    tenant = await service.new_tenant(policy=BARE)
    for policy in (f"# 2\n{BARE}", f"# 3\n{BARE}"):
        await tenant.admin.publish(policy)
    never = await draft(tenant, f"# 4\n{BARE}")

    async def roll_back(**body: Any) -> int:
        version: int = (await tenant.admin.make("/v1/policies/rollback", json=body))["version"]
        assert (await tenant.admin.get("/v1/me")).json()["policy_version"] == version
        return version

    assert [await roll_back(), await roll_back(), await roll_back(to=1)] == [2, 3, 1]
    answer = await tenant.admin.post("/v1/policies/rollback", json={"to": never})
    assert (answer.status_code, answer.json()["code"]) == (404, "not_found")
    events = [event["data"] for event in await tenant.admin.events() if event["type"] == "policy.rolled_back"]
    assert [(each["before"], each["after"]) for each in events] == [(3, 2), (2, 3), (3, 1)]


async def test_there_is_nothing_to_go_back_to_at_first(service: Service) -> None:
    tenant = await service.new_tenant(policy=BARE)
    await tenant.admin.make("/v1/policies/1/publish", json={})
    assert (await tenant.admin.post("/v1/policies/rollback", json={})).status_code == 404


async def test_rolling_back_is_no_way_around_what_is_asked_of_a_successor(service: Service) -> None:
    tenant = await service.new_tenant(policy=BARE)
    await tenant.admin.publish(f"{BARE}{DEMANDING}")
    answer = await tenant.admin.post("/v1/policies/rollback", json={})
    assert (answer.status_code, answer.json()["code"]) == (409, "backtest_required")
    await backtest(tenant, 1)
    assert (await tenant.admin.make("/v1/policies/rollback", json={}))["version"] == 1
