"""The whole way of a call that waits: nothing is called before the word, what was approved is called once, and a run
that waits holds nothing.
"""

from __future__ import annotations

import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, replace
from typing import Any, Final

import pytest
from llmock.scenarios import Reply, ToolCall
from sqlalchemy import make_url, text
from sqlalchemy.ext.asyncio import create_async_engine

from app.embedded.postgres import EmbeddedPostgres
from tests.runs.approvals.waiting import APPROVING, TOOL
from tests.runs.faults import TERMINAL, ScriptedModel, journal
from tests.service import Databases, Service, Tenant, running_service

POLICY: Final = APPROVING.replace("rehearsal", "default").replace("limits: {", "limits: {concurrent_runs: 1, ")
HASHED: Final = ("tool.decided", "approval.requested", "approval.decided")
WORD: Final = "The word is heron."


@dataclass(slots=True)
class House:
    """A tenant that may have one run at once, on a service that has a worker, and a model that does as it is told."""

    service: Service
    tenant: Tenant
    model: ScriptedModel
    superuser: str

    async def waits(self) -> tuple[str, list[str]]:
        """Ask, so that the model's calls wait; the run's place, and their approvals."""
        answer = await self.tenant.user.ask("What does the note say?")
        assert answer.status_code == 202, answer.text
        run = (await self.tenant.user.get(answer.headers["Location"])).json()
        assert run["status"] == "waiting_approval"
        return answer.headers["Location"], run["approvals"]

    async def ended(self, location: str) -> Any:
        """The run, once it has ended."""
        deadline = time.monotonic() + 20
        while (run := (await self.tenant.user.get(location)).json())["status"] not in TERMINAL:
            assert time.monotonic() < deadline, run
        return run

    async def reads(self) -> list[str]:
        """What the tool server was asked to read, in its own words."""
        return [line for line in await journal(self.service, self.tenant) if "read_file" in line]

    def results(self) -> list[str]:
        """What the model was told of its calls, in its last request."""
        return [each["content"] for each in self.model.bodies[-1]["messages"] if each["role"] == "tool"]

    async def sql(self, statement: str, **values: Any) -> list[Any]:
        """As the database's superuser."""
        engine = create_async_engine(self.superuser)
        async with engine.begin() as connection:
            result = await connection.execute(text(statement), values)
            rows = list(result.all()) if result.returns_rows else []
        await engine.dispose()
        return rows


@pytest.fixture(scope="module")
async def built(
    databases: Databases,
    postgres: EmbeddedPostgres,
    scripted: ScriptedModel,
    tmp_path_factory: pytest.TempPathFactory,
) -> AsyncIterator[House]:
    folder = tmp_path_factory.mktemp("approvals")
    async with running_service(databases, folder, model=scripted.endpoint, works=True) as service:
        files = {"note.md": WORD, "other.md": "The other word is tern."}
        tenant = await service.new_tenant(policy=POLICY, files=files)
        superuser = postgres.url("postgres", make_url(service.urls.app).database or "")
        yield House(service, tenant, scripted, superuser)


@pytest.fixture
async def house(built: House, model: ScriptedModel) -> House:
    assert model is built.model
    return built


async def test_nothing_is_called_before_the_word_and_then_once(house: House) -> None:
    before = await house.reads()
    house.model.calls(TOOL, path="note.md")
    house.model.says("Heron.")
    location, (approval,) = await house.waits()
    assert await house.reads() == before
    answer = await house.tenant.user.post(f"/v1/approvals/{approval}/approve")
    assert (answer.status_code, answer.headers["location"]) == (202, location)
    run = await house.ended(location)
    assert (run["status"], run["answer"], run["kind"]) == ("succeeded", "Heron.", "background")
    assert len(await house.reads()) == len(before) + 1
    assert house.results() == [WORD]
    assert [(call["decision"], call["rule"]) for call in run["tool_calls"]] == [("allowed", f"approve:{TOOL}")]
    events = [event["type"] for event in await house.tenant.admin.events(run_id=run["run_id"])]
    assert [kind for kind in events if kind.startswith(("approval", "tool", "run.finished"))] == [
        "tool.decided",
        "approval.requested",
        "approval.decided",
        "approval.used",
        "tool.decided",
        "tool.finished",
        "run.finished",
    ]


async def test_a_run_that_waits_holds_nothing_and_its_tenant_goes_on(house: House) -> None:
    house.model.calls(TOOL, path="note.md")
    location, (approval,) = await house.waits()
    run_id = location.rpartition("/")[2]
    assert house.service.app.state.executor.in_flight() == {}
    held = await house.sql("select 1 from budget_reservations where run_id = cast(:id as uuid)", id=run_id)
    leased = await house.sql("select lease_until, deferred_at from runs where id = cast(:id as uuid)", id=run_id)
    assert (held, leased) == ([], [(None, None)])
    house.model.says("I am well.")
    other = await house.tenant.user.ask("Are you well?")
    assert (other.status_code, other.json()["answer"]) == (200, "I am well.")
    house.model.says("Never mind.")
    await house.tenant.user.post(f"/v1/approvals/{approval}/deny")
    assert (await house.ended(location))["status"] == "succeeded"


async def test_a_denied_call_is_not_made_and_the_model_is_told_why(house: House) -> None:
    before = await house.reads()
    house.model.calls(TOOL, path="note.md")
    house.model.says("I may not.")
    location, (approval,) = await house.waits()
    await house.tenant.admin.make(f"/v1/approvals/{approval}/deny", json={"reason": "It is a draft."})
    run = await house.ended(location)
    assert (run["status"], run["tool_calls"][0]["rule"]) == ("succeeded", "approval_denied")
    assert await house.reads() == before
    assert "It is a draft." in house.results()[0]


async def test_the_call_is_made_with_the_arguments_that_were_approved(house: House) -> None:
    house.model.calls(TOOL, path="note.md")
    house.model.says("Tern.")
    location, (approval,) = await house.waits()
    await house.tenant.user.make(f"/v1/approvals/{approval}/approve", json={"arguments": {"path": "other.md"}})
    assert (await house.ended(location))["status"] == "succeeded"
    assert house.results() == ["The other word is tern."]
    assert "other.md" in (await house.reads())[-1]
    events = await house.tenant.admin.events(run_id=location.rpartition("/")[2])
    hashes = {kind: [event["data"]["arguments_hmac"] for event in events if event["type"] == kind] for kind in HASHED}
    asked, made = hashes["tool.decided"]
    assert hashes["approval.requested"] == [asked]
    assert hashes["approval.decided"] == [made]
    assert asked != made


async def test_a_server_that_is_the_runs_alone_is_there_again_once_the_run_goes_on(house: House) -> None:
    """In the process that has let the run wait, and ended its server of before."""
    alone = POLICY.replace("root: docs", "root: docs, isolation: run")
    tenant = await house.service.new_tenant(policy=alone, files={"note.md": WORD})
    asked = ToolCall("docs__list_directory", {}), ToolCall(TOOL, {"path": "note.md"})
    house.model.state.scenarios.add(Reply(tool_calls=asked))
    house.model.says("Heron.")
    own = replace(house, tenant=tenant)
    location, (approval,) = await own.waits()
    await tenant.user.make(f"/v1/approvals/{approval}/approve")
    run = await own.ended(location)
    assert (run["status"], run["code"]) == ("succeeded", None)
    assert own.results()[-1] == WORD


async def test_what_nobody_decides_on_in_time_is_denied_and_the_run_goes_on(house: House) -> None:
    before = await house.reads()
    house.model.calls(TOOL, path="note.md")
    house.model.says("Nobody answers.")
    location, (approval,) = await house.waits()
    await house.sql("update approvals set expires_at = now() where id = cast(:id as uuid)", id=approval)
    await house.service.app.state.expire_approvals()
    run = await house.ended(location)
    assert (run["status"], run["tool_calls"][0]["rule"]) == ("succeeded", "approval_expired")
    assert await house.reads() == before


async def test_a_cancelled_run_has_no_approval_left(house: House) -> None:
    house.model.calls(TOOL, path="note.md")
    location, (approval,) = await house.waits()
    assert (await house.tenant.user.post(f"{location}/cancel")).status_code == 202
    assert (await house.tenant.user.get(location)).json()["status"] == "cancelled"
    late = await house.tenant.user.post(f"/v1/approvals/{approval}/approve")
    assert (late.status_code, late.json()["code"]) == (409, "approval_decided")
    assert (await house.tenant.user.get(f"/v1/approvals/{approval}")).json()["state"] == "voided"


async def test_each_call_of_a_turn_gets_its_own_word_and_what_needs_none_is_made_once(house: House) -> None:
    before = len(await house.reads())
    asked = (
        ToolCall(TOOL, {"path": "note.md"}),
        ToolCall("docs__list_directory", {}),
        ToolCall(TOOL, {"path": "other.md"}),
    )
    house.model.state.scenarios.add(Reply(tool_calls=asked))
    house.model.says("One of them.")
    location, waiting = await house.waits()
    listed = len(await journal(house.service, house.tenant))
    paths = {
        each: (await house.tenant.user.get(f"/v1/approvals/{each}")).json()["arguments"]["path"] for each in waiting
    }
    assert sorted(paths.values()) == ["note.md", "other.md"]
    for each, path in paths.items():
        word = "approve" if path == "note.md" else "deny"
        await house.tenant.user.make(f"/v1/approvals/{each}/{word}")
    run = await house.ended(location)
    assert (run["status"], len(await house.reads())) == ("succeeded", before + 1)
    assert len(await journal(house.service, house.tenant)) == listed + 1, "what needed no word was made before, once"
    names, note, other = house.results()  # each under the id of its call
    assert (note, "other.md" in names) == (WORD, True)
    assert "has denied it" in other


async def test_who_follows_is_told_what_waits_and_that_it_goes_on(house: House) -> None:
    house.model.calls(TOOL, path="note.md")
    house.model.says("Heron.")
    location, (approval,) = await house.waits()
    await house.tenant.user.make(f"/v1/approvals/{approval}/approve")
    await house.ended(location)
    told = (await house.tenant.user.get(f"{location}/events")).json()["items"]
    kinds = [event["type"] for event in told]
    required = told[kinds.index("approval.required")]["data"]
    assert (required["approval_id"], required["tool"], required["sequence"]) == (approval, TOOL, 1)
    assert kinds.index("approval.required") < kinds.index("run.queued") < kinds.index("run.resumed")
    assert kinds[-1] == "run.finished"


async def test_a_run_that_waits_for_a_user_who_was_disabled_ends(house: House) -> None:
    client, row, _ = await house.service.new_user(house.tenant.id)
    house.model.calls(TOOL, path="note.md")
    answer = await client.ask("What does the note say?")
    assert answer.status_code == 202, answer.text
    assert (await house.tenant.admin.post(f"/v1/users/{row['id']}/disable")).is_success
    await house.service.app.state.expire_approvals()
    deadline = time.monotonic() + 20
    while (run := (await house.tenant.admin.get(answer.headers["Location"])).json())["status"] not in TERMINAL:
        assert time.monotonic() < deadline, run
    assert (run["status"], run["cancel_cause"]) == ("cancelled", "user_disabled")
    assert (await house.tenant.admin.post(f"/v1/users/{row['id']}/erase")).is_success


async def test_what_was_approved_before_its_run_could_go_on_does_not_outlive_its_policy(house: House) -> None:
    before = await house.reads()
    house.model.calls(TOOL, path="note.md")
    house.model.says("Then not.")
    location, (approval,) = await house.waits()
    await house.tenant.admin.publish(POLICY + "instructions: Be brief.\n")
    late = await house.tenant.user.post(f"/v1/approvals/{approval}/approve")
    assert (late.status_code, late.json()["code"]) == (409, "approval_outdated")
    run = await house.ended(location)
    assert (run["status"], run["tool_calls"][0]["decision"]) == ("succeeded", "denied")
    assert await house.reads() == before
