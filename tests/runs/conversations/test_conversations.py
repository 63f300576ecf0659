"""Conversations: one user's runs go one after the other and know the ones before, and what is deleted is gone."""

from __future__ import annotations

import asyncio
import secrets
import time
import uuid
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack
from itertools import pairwise
from typing import Any, Final
from uuid import UUID

import httpx
import pytest
from sqlalchemy.exc import DBAPIError

from app.db import new_id
from app.listening import bound, listening, url_of
from app.main import create_app
from app.runs.conversations import repository as conversations
from app.runs.service import Worked
from app.sandbox.choice import choose
from app.tenants import erasure
from tests.limits.site import pinned
from tests.openapi import crashing
from tests.runs.conversations.threads import Threads, echo, turns
from tests.runs.faults import ended_run
from tests.service import Client, Databases, Tenant, new_client, running_service


@pytest.fixture(scope="module")
async def threads(databases: Databases, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Threads]:
    async with (
        echo() as (model, endpoint),
        running_service(databases, tmp_path_factory.mktemp("threads"), model=endpoint) as service,
    ):
        yield Threads(service, model, await pinned(service))
        model.release_all()


@pytest.fixture(scope="module")
async def second(threads: Threads) -> AsyncIterator[str]:
    """The address of another process, as far as its queue goes: its own application on the same database."""
    async with AsyncExitStack() as stack:
        first, listener = threads.service.app.state, stack.enter_context(bound("127.0.0.1", 0))
        place = {"data_dir": threads.service.data_dir.parent / "second", "port": listener.getsockname()[1]}
        settings = first.settings.model_copy(update=place)
        rehearsal = first.catalogue.endpoints["rehearsal"]
        urls, sandbox = threads.service.urls, await choose(settings.sandbox)
        app = create_app(settings, urls=urls, sandbox=sandbox, rehearsal=rehearsal)
        await stack.enter_async_context(app.router.lifespan_context(app))
        await stack.enter_async_context(listening(app, listener))
        stack.push_async_callback(app.state.runs.close)
        yield url_of(listener)


def new_thread() -> str:
    return str(uuid.uuid4())


def told(response: httpx.Response) -> tuple[int, Any]:
    """Status and body, without what differs with every request."""
    return response.status_code, {k: v for k, v in response.json().items() if k not in {"request_id", "run_id"}}


# Making, listing, reading


async def test_a_conversation_is_made_once_listed_and_read_oldest_run_first(threads: Threads) -> None:
    tenant = await threads.tenant()
    user, once = tenant.user, {"Idempotency-Key": "one"}
    first, again = [await user.make("/v1/conversations", headers=once) for _ in range(2)]
    assert first == again
    own = new_thread()
    for query in ("one", "two", "three"):
        assert (await user.ask(query, conversation=first["id"])).status_code == 200
    await user.ask("by its own id", conversation=own)
    listed = (await user.get("/v1/conversations", params={"limit": 1})).json()
    assert [each["id"] for each in listed["items"]] == [own], "the newest, which the client has named"
    rest = (await user.get("/v1/conversations", params={"limit": 2, "cursor": listed["next_cursor"]})).json()
    assert [each["id"] for each in rest["items"]] == [first["id"]]
    assert rest["next_cursor"] is None
    path, found = f"/v1/conversations/{first['id']}", []
    page = (await user.get(path, params={"limit": 2})).json()
    assert page["last_used_at"] > page["created_at"]
    found += page["items"]
    found += (await user.get(path, params={"limit": 2, "cursor": page["next_cursor"]})).json()["items"]
    assert [said for each in found for said in (each["query"], each["answer"])] == turns("one", "two", "three")
    made = [event for event in await tenant.admin.events() if event["type"] == "conversation.created"]
    assert [event["data"]["conversation_id"] for event in made] == [first["id"], own]
    assert [event["run_id"] is None for event in made] == [True, False]


async def test_a_thread_is_its_users_alone(threads: Threads) -> None:
    tenant, stranger = await threads.tenant(), await threads.tenant()
    colleague, _, _ = await threads.service.new_user(tenant.id)
    theirs, nobodys, nonce = new_thread(), new_thread(), secrets.token_hex(8)
    assert (await tenant.user.ask(nonce, conversation=theirs)).status_code == 200
    for client in (colleague, stranger.user, stranger.admin):
        for method in ("GET", "DELETE"):
            answers = [await client.request(method, f"/v1/conversations/{each}") for each in (theirs, nobodys)]
            assert told(answers[0]) == told(answers[1])
            assert answers[0].status_code == 404
        assert theirs not in (await client.get("/v1/conversations")).text
    assert (await colleague.ask(f"What was said? {nonce}1", conversation=theirs)).status_code == 404
    assert (await colleague.get("/v1/runs")).json()["items"] == []
    # To another tenant it is an id that nobody has.
    assert (await stranger.user.ask(f"What was said? {nonce}2", conversation=theirs)).status_code == 200
    assert threads.model.told(f"What was said? {nonce}2") == []
    assert (await tenant.user.ask(f"What was said? {nonce}3", conversation=theirs)).status_code == 200
    assert threads.model.told(f"What was said? {nonce}3") == turns(nonce), "the control"


async def test_an_admin_reads_a_users_thread_on_the_record_and_does_not_delete_it(threads: Threads) -> None:
    tenant, thread, query = await threads.tenant(), new_thread(), secrets.token_hex(8)
    await tenant.user.ask(query, conversation=thread)
    path = f"/v1/conversations/{thread}"
    assert thread in (await tenant.admin.get("/v1/conversations")).text
    assert (await tenant.user.get(path)).json()["items"][0]["query"] == query
    assert [event for event in await tenant.admin.events() if event["type"] == "conversation.read"] == []
    assert (await tenant.admin.get(path)).json()["items"][0]["query"] == query
    (read,) = [event for event in await tenant.admin.events() if event["type"] == "conversation.read"]
    assert read["data"] == {"conversation_id": thread, "user_id": tenant.user_id}
    assert (await tenant.admin.delete(path)).status_code == 404
    assert (await tenant.admin.ask("and I?", conversation=thread)).status_code == 404


# What a run is told


# A short turn takes 3 tokens, 6 and 8, the long one 167, 170 and 8.
_LONG: Final = "long " * 100


@pytest.mark.parametrize(
    ("window", "known"),
    [
        (0, ()),
        (16, ()),
        (361, ("short 2",)),
        (362, (_LONG, "short 2")),
        (379, ("short 1", _LONG, "short 2")),
    ],
)
async def test_a_run_is_told_whole_turns_newest_first_as_far_as_the_window_goes(
    threads: Threads, window: int, known: tuple[str, ...]
) -> None:
    tenant, thread, asked = await threads.tenant(window_tokens=window), new_thread(), f"well, within {window}?"
    for query in ("short 1", _LONG, "short 2", asked):
        assert (await tenant.user.ask(query, conversation=thread)).status_code == 200
    assert threads.model.told(asked) == turns(*known)


async def test_what_lies_outside_of_the_window_is_not_opened(threads: Threads) -> None:
    """A turn that nothing can open tells whether somebody has tried to."""
    statuses = {}
    for window in (20, 2_000):
        tenant, thread = await threads.tenant(window_tokens=window), new_thread()
        for query in ("old", "new"):
            await tenant.user.ask(f"{query} {window}", conversation=thread)
        oldest = "select id from runs where conversation_id = :id order by id limit 1"
        ((run_id,),) = await threads.rows(tenant, oldest, id=UUID(thread))
        await threads.spoil(tenant, run_id)
        with crashing():
            statuses[window] = (await tenant.user.ask("and now?", conversation=thread)).status_code
    assert statuses == {20: 200, 2_000: 500}


async def test_only_runs_that_succeeded_are_told(threads: Threads) -> None:
    tenant, thread = await threads.tenant(), new_thread()
    await tenant.user.ask("first of all", conversation=thread)
    assert (await tenant.user.ask("sudo rm -rf /", conversation=thread)).status_code == 422
    asking = await threads.hold(tenant.user, "never answered", thread)
    (run,) = [each for each in (await tenant.user.get("/v1/runs")).json()["items"] if each["status"] == "running"]
    assert (await tenant.user.post(f"/v1/runs/{run['run_id']}/cancel")).status_code == 202
    assert (await asking).json()["code"] == "cancelled"
    await tenant.user.ask("what of all that?", conversation=thread)
    assert threads.model.told("what of all that?") == turns("first of all")


# One after the other


async def test_runs_of_a_thread_wait_for_each_other_and_for_no_other_thread(threads: Threads) -> None:
    tenant, thread = await threads.tenant(), new_thread()
    first = await threads.hold(tenant.user, "takes long", thread)
    waiting = [asyncio.create_task(tenant.user.ask(f"waits {n}", conversation=thread)) for n in range(3)]
    await asyncio.sleep(0.1)
    elsewhere = asyncio.create_task(tenant.user.ask("elsewhere", conversation=new_thread()))
    assert (await asyncio.wait_for(elsewhere, 5)).status_code == 200
    assert not [task for task in (first, *waiting) if task.done()]
    threads.model.turns["takes long"].released.set()
    assert [(await task).status_code for task in (first, *waiting)] == [200] * 4
    found = [threads.model.told(query) for query in ("takes long", *(f"waits {n}" for n in range(3)))]
    assert is_strict_order(sorted(found, key=len))


async def test_who_waits_in_vain_is_told_for_which_run(threads: Threads, monkeypatch: pytest.MonkeyPatch) -> None:
    tenant, thread = await threads.tenant(), new_thread()
    first = await threads.hold(tenant.user, "takes longer", thread)
    (run,) = (await tenant.user.get("/v1/runs")).json()["items"]
    threads.impatient(monkeypatch)
    refused = await tenant.user.ask("in vain", conversation=thread)
    assert (refused.status_code, refused.json()["code"]) == (409, "conversation_busy")
    assert refused.json()["run_id"] == run["run_id"]
    assert int(refused.headers["Retry-After"]) >= 1
    threads.model.turns["takes longer"].released.set()
    assert (await first).status_code == 200
    assert len((await tenant.user.get("/v1/runs")).json()["items"]) == 1, "what is refused leaves no run"
    reasons = [event["data"]["reason"] for event in await tenant.admin.events() if event["type"] == "query.refused"]
    assert reasons == ["conversation_busy"]


async def test_behind_a_run_that_waits_for_a_person_nobody_waits(threads: Threads) -> None:
    tenant, run_id = await threads.tenant(), new_id()
    thread = (await tenant.user.make("/v1/conversations"))["id"]
    await threads.queued(tenant, thread, run_id=run_id, has_begun=True)
    await threads.rows(tenant, "update runs set state = 'waiting_approval' where id = :id", id=run_id)
    began = time.monotonic()
    refused = await tenant.user.ask("now?", conversation=thread)
    assert (refused.status_code, refused.json()["code"]) == (409, "conversation_busy")
    assert refused.json()["run_id"] == str(run_id)
    assert time.monotonic() - began < 5, "it does not wait for 30 s"
    assert (await tenant.user.ask("elsewhere?", conversation=new_thread())).status_code == 200


@pytest.mark.parametrize(
    ("is_older", "has_begun", "status"),
    [(True, False, 409), (True, True, 409), (False, True, 409), (False, False, 200)],
)
async def test_of_queued_runs_the_older_is_ahead_and_one_that_has_begun_of_all(
    threads: Threads, monkeypatch: pytest.MonkeyPatch, *, is_older: bool, has_begun: bool, status: int
) -> None:
    tenant, own = await threads.tenant(), new_id()
    thread = (await tenant.user.make("/v1/conversations"))["id"]
    other = own if is_older else UUID(int=own.int + (1 << 100))
    await threads.queued(tenant, thread, run_id=other, has_begun=has_begun)
    threads.impatient(monkeypatch)
    assert (await tenant.user.ask("may I?", conversation=thread)).status_code == status


async def histories(threads: Threads, second: str, number: int) -> list[list[str]]:
    """What so many runs of one thread, half of them of another process, were told; the shortest first."""
    tenant, thread, nonce = await threads.tenant(), new_thread(), secrets.token_hex(4)
    async with new_client(second, tenant.user_key) as there:
        asking = [(tenant.user, there)[n % 2].ask(f"{nonce} {n}", conversation=thread) for n in range(number)]
        assert [answer.status_code for answer in await asyncio.gather(*asking)] == [200] * number
    return sorted((threads.model.told(f"{nonce} {n}") for n in range(number)), key=len)


def is_strict_order(found: Sequence[Sequence[str]]) -> bool:
    """Each is told all that the one before was told, and that one's own turn."""
    grows = all(later[: len(earlier)] == earlier for earlier, later in pairwise(found))
    whole = all(said == turns(*said[::2]) for said in found)
    return grows and whole and [len(said) for said in found] == list(range(0, 2 * len(found), 2))


@pytest.mark.parametrize("number", [6, pytest.param(20, marks=pytest.mark.long)])
async def test_runs_at_once_over_two_processes_are_in_a_strict_order(
    threads: Threads, second: str, number: int
) -> None:
    assert is_strict_order(await histories(threads, second, number))


async def test_without_their_place_in_it_they_are_in_none(
    threads: Threads, second: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The control."""

    async def nobody_is_ahead(*_arguments: object) -> None:
        pass

    monkeypatch.setattr(conversations, "join", nobody_is_ahead)
    assert not is_strict_order(await histories(threads, second, 6))


# In the background


async def submitted(client: Client, thread: str, *queries: str) -> list[UUID]:
    """Runs that nobody takes up here but `worked`."""
    made = [await client.make("/v1/runs", json={"query": query, "conversation": thread}) for query in queries]
    return [UUID(each["run_id"]) for each in made]


async def worked(threads: Threads, tenant: Tenant, run_ids: Sequence[UUID]) -> set[Worked]:
    """All at once, as many workers would, until none is left; give what they were told."""
    runs, left, told = threads.service.app.state.runs, list(run_ids), set[Worked]()
    async with asyncio.timeout(20):
        while left:
            said = await asyncio.gather(*(runs.work(UUID(tenant.id), run_id) for run_id in left))
            left = [run_id for run_id, each in zip(left, said, strict=True) if each is not Worked.DONE]
            told |= set(said)
    return told


async def test_runs_in_the_background_go_one_after_the_other_the_oldest_first(threads: Threads) -> None:
    tenant, thread, queries = await threads.tenant(), new_thread(), [f"in the background {n}" for n in range(5)]
    run_ids = await submitted(tenant.user, thread, *queries)
    assert await worked(threads, tenant, run_ids[::-1]) == {Worked.DONE, Worked.BUSY}
    found = [threads.model.told(query) for query in queries]
    assert is_strict_order(found)
    assert found[-1] == turns(*queries[:-1])


async def test_a_run_that_was_approved_knows_what_it_knew_and_keeps_its_place(threads: Threads) -> None:
    tenant, thread = await threads.tenant(approve="docs__list_directory"), new_thread()
    await tenant.user.ask("before", conversation=thread)
    waits = await tenant.user.ask("call for it", conversation=thread)
    assert waits.status_code == 202, waits.text
    refused = await tenant.user.ask("now?", conversation=thread)
    assert (refused.json()["code"], refused.json()["run_id"]) == ("conversation_busy", waits.json()["run_id"])
    (approval,) = (await tenant.admin.get("/v1/approvals")).json()["items"]
    assert (await tenant.admin.post(f"/v1/approvals/{approval['id']}/approve")).status_code == 202
    run_id = UUID(waits.json()["run_id"])
    (later,) = await submitted(tenant.user, thread, "after that")
    assert await worked(threads, tenant, [later, run_id]) == {Worked.DONE, Worked.BUSY}
    told = [threads.model.told(query) for query in ("call for it", "after that")]
    assert told == [turns("before"), turns("before", "call for it")]


async def test_nothing_is_put_into_the_queue_of_another_users_thread(threads: Threads) -> None:
    tenant, thread = await threads.tenant(), new_thread()
    colleague, _, _ = await threads.service.new_user(tenant.id)
    await tenant.user.ask("what was said", conversation=thread)
    refused = await colleague.post("/v1/runs", json={"query": "what was it?", "conversation": thread})
    assert refused.status_code == 404
    assert (await colleague.get("/v1/runs")).json()["items"] == []


async def test_what_is_queued_in_a_deleted_thread_is_never_asked(threads: Threads) -> None:
    tenant, thread = await threads.tenant(), new_thread()
    run_ids = await submitted(tenant.user, thread, *(f"never asked {n}" for n in range(3)))
    assert (await tenant.user.delete(f"/v1/conversations/{thread}")).status_code == 204
    assert await worked(threads, tenant, run_ids) == {Worked.DONE}
    assert await threads.texts(tenant, thread) == 0
    assert [(await ended_run(tenant, str(run_id)))["status"] for run_id in run_ids] == ["cancelled"] * 3
    assert not [prompt for prompt in threads.model.prompts if "never asked" in prompt[-1]["content"]]


# Deleting


async def test_a_deleted_thread_is_gone_with_what_is_under_way_in_it(threads: Threads) -> None:
    tenant, thread, other = await threads.tenant(), new_thread(), new_thread()
    for conversation in (thread, other):
        await tenant.user.ask("what was said", conversation=conversation)
    asking = await threads.hold(tenant.user, "while it is deleted", thread)
    assert await threads.texts(tenant, thread) >= 3, "the control"
    path = f"/v1/conversations/{thread}"
    assert (await tenant.user.delete(path)).status_code == 204
    ended = (await asyncio.wait_for(asking, 5)).json()
    assert ended["code"] == "cancelled"
    assert await threads.texts(tenant, thread) == 0
    assert await threads.texts(tenant, other) == 2
    run = await ended_run(tenant, ended["run_id"])
    assert (run["status"], run["query"], run["answer"], run["conversation"]) == ("cancelled", None, None, thread)
    for answer in (
        await tenant.user.get(path),
        await tenant.user.delete(path),
        await tenant.user.ask("what was said?", conversation=thread),
    ):
        assert answer.status_code == 404
    assert thread not in (await tenant.user.get("/v1/conversations")).text
    kinds = [event["type"] for event in await tenant.admin.events()]
    assert kinds.count("conversation.deleted") == 1
    assert kinds.count("run.finished") == 3, "the record stays"


@pytest.mark.parametrize("after_s", [0, 0.05, pytest.param(0.15, marks=pytest.mark.long)])
async def test_whenever_a_thread_is_deleted_no_text_of_it_is_left(threads: Threads, after_s: float) -> None:
    tenant, thread = await threads.tenant(), new_thread()
    await tenant.user.ask("the first of all", conversation=thread)
    asking = [asyncio.create_task(tenant.user.ask(f"q{n} {thread}", conversation=thread)) for n in range(4)]
    await asyncio.sleep(after_s)
    assert (await tenant.user.delete(f"/v1/conversations/{thread}")).status_code == 204
    at_once = await threads.texts(tenant, thread)
    answers = {(await task).status_code for task in asking}
    assert (at_once, await threads.texts(tenant, thread)) == (0, 0)
    assert answers <= {200, 404, 409}


async def test_an_idempotency_key_brings_no_deleted_answer_back(threads: Threads) -> None:
    tenant, thread, query = await threads.tenant(), new_thread(), secrets.token_hex(8)
    again: dict[str, Any] = {"json": {"query": query, "conversation": thread}, "headers": {"Idempotency-Key": "one"}}
    first, second = [await tenant.user.post("/query", **again) for _ in range(2)]
    assert first.json()["answer"] == second.json()["answer"] == f"answer to {query}", "the control"
    assert (await tenant.user.delete(f"/v1/conversations/{thread}")).status_code == 204
    third = await tenant.user.post("/query", **again)
    assert third.status_code < 500, third.text
    assert query not in third.text


async def test_no_text_is_taken_of_what_is_not_deleted_or_is_another_tenants(threads: Threads) -> None:
    tenant, other, thread = await threads.tenant(), await threads.tenant(), new_thread()
    await tenant.user.ask("what was said", conversation=thread)
    taken = "select bulkhead_empty_conversation(:id, 100)"
    assert await threads.rows(tenant, taken, id=UUID(thread)) == [(0,)]
    await threads.rows(tenant, "update conversations set deleted_at = now() where id = :id", id=UUID(thread))
    assert await threads.rows(other, taken, id=UUID(thread)) == [(0,)]
    assert await threads.texts(tenant, thread) == 2
    assert await threads.rows(tenant, taken, id=UUID(thread)) == [(2,)], "the control"


async def test_what_nobody_has_gone_on_with_is_forgotten_as_the_policy_says(threads: Threads) -> None:
    brief, long = await threads.tenant(retention_days=1), await threads.tenant()
    old, busy, fresh = new_thread(), new_thread(), new_thread()
    kept = new_thread()
    for tenant, thread in ((brief, old), (brief, busy), (brief, fresh), (long, kept)):
        await tenant.user.ask("what was said", conversation=thread)
    await threads.queued(brief, busy, run_id=new_id())
    age = "update conversations set last_used_at = now() - interval '25 hours' where id = any(:ids)"
    await threads.rows(brief, age, ids=[UUID(old), UUID(busy)])
    await threads.rows(long, age, ids=[UUID(kept)])
    retention = threads.service.app.state.conversations
    assert [await retention.forget(), await retention.forget()] == [1, 0]
    left = [await threads.texts(brief, thread) for thread in (old, busy, fresh)]
    assert (left, await threads.texts(long, kept)) == ([0, 2, 2], 2)
    assert (await brief.user.get(f"/v1/conversations/{old}")).status_code == 404
    events = [event["data"] for event in await brief.admin.events() if event["type"] == "conversation.expired"]
    assert events == [{"count": 1, "retention_days": 1}]


async def left_behind(threads: Threads) -> tuple[Tenant, str, list[UUID]]:
    """A thread with a run that waits for an approval, and one in the queue behind it."""
    tenant, thread = await threads.tenant(), new_thread()
    run_ids = await submitted(tenant.user, thread, "waits for a person", "waits for that")
    waits = "update runs set state = 'waiting_approval', started_at = now() where id = :id"
    await threads.rows(tenant, waits, id=run_ids[0])
    assert await threads.texts(tenant, thread) == 2, "the control"
    return tenant, thread, run_ids


async def test_what_an_erased_user_has_left_waiting_ends_and_leaves_no_text(threads: Threads) -> None:
    tenant, thread, run_ids = await left_behind(threads)
    assert (await tenant.admin.post(f"/v1/users/{tenant.user_id}/erase")).status_code == 204
    runs = [(await tenant.admin.get(f"/v1/runs/{run_id}")).json() for run_id in run_ids]
    assert [(run["status"], run["cancel_cause"]) for run in runs] == [("cancelled", "user_disabled")] * 2
    assert await threads.texts(tenant, thread) == 0
    ends = [event["run_id"] for event in await tenant.admin.events() if event["type"] == "run.finished"]
    assert ends == [str(run_id) for run_id in run_ids]
    shown = (await tenant.admin.get(f"/v1/conversations/{thread}")).json()["items"]
    assert [(turn["query"], turn["answer"]) for turn in shown] == [(None, None)] * 2


async def test_an_erasure_that_left_them_waiting_would_not_say_that_it_is_done(
    threads: Threads, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The control."""

    async def end_nothing(_tenant_id: UUID) -> None:
        pass

    tenant, _, _ = await left_behind(threads)
    monkeypatch.setitem(threads.service.app.state._state, "end_erased", end_nothing)
    monkeypatch.setattr(erasure, "_PATIENCE_S", 0.2)
    assert (await tenant.admin.post(f"/v1/users/{tenant.user_id}/erase")).status_code == 503


async def test_a_run_that_is_about_to_begin_while_its_user_is_erased_ends_or_never_begins(threads: Threads) -> None:
    tenant, thread, run_id = await threads.tenant(), new_thread(), new_id()
    async with threads.queueing(tenant, thread, run_id=run_id):
        erasing = asyncio.create_task(tenant.admin.post(f"/v1/users/{tenant.user_id}/erase"))
        await asyncio.sleep(0.3)
        assert not erasing.done(), "it waits for what has begun before it"
    assert (await erasing).status_code == 204
    assert (await tenant.admin.get(f"/v1/runs/{run_id}")).json()["status"] == "cancelled"
    with pytest.raises(DBAPIError, match="the user has been erased"):
        await threads.queued(tenant, thread, run_id=new_id())
    switch = "alter table runs {} trigger refuse_erased_user"
    await threads.service.sql(switch.format("disable"))
    await threads.queued(tenant, thread, run_id=new_id())  # the control
    await threads.service.sql(switch.format("enable"))
