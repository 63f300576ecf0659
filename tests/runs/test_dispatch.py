"""Which queued runs get a job, and which role may make one: the queue on a real database, with no worker."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping
from contextlib import suppress
from typing import Any, Final
from uuid import UUID, uuid4

import pytest
from sqlalchemy import text
from sqlalchemy.exc import DBAPIError

from app.limits.queue import TooManyRuns
from app.runs import repository
from app.runs.lifecycle import unclaimable
from tests.runs.queue_ground import PER_TENANT, Customer, QueueGround, queue_ground
from tests.service import Databases

REFUSED: Final = "42501"
# What the engine's worker does; it makes no job, and nobody else does anything.
GRANTS: Final = """\
platform bulkhead_jobs USAGE
platform procrastinate_events INSERT
platform procrastinate_events_id_seq USAGE
platform procrastinate_fetch_job_v2 EXECUTE
platform procrastinate_finish_job_v1 EXECUTE
platform procrastinate_jobs DELETE, SELECT, UPDATE(status, worker_id)
platform procrastinate_periodic_defers SELECT(job_id), UPDATE(job_id)
platform procrastinate_prune_stalled_workers_v1 EXECUTE
platform procrastinate_register_worker_v1 EXECUTE
platform procrastinate_unregister_worker_v1 EXECUTE
platform procrastinate_update_heartbeat_v1 EXECUTE
platform procrastinate_workers DELETE, INSERT, SELECT, UPDATE(last_heartbeat)"""
_GRANTS: Final = """
with held(grantee, object, privilege, of_column) as (
    select (aclexplode(nspacl)).grantee, nspname, (aclexplode(nspacl)).privilege_type, null
    from pg_namespace where nspname = 'bulkhead_jobs'
    union all
    select (aclexplode(relacl)).grantee, relname, (aclexplode(relacl)).privilege_type, null
    from pg_class where relnamespace = 'bulkhead_jobs'::regnamespace and relacl is not null
    union all
    select (aclexplode(attacl)).grantee, relname, (aclexplode(attacl)).privilege_type, attname
    from pg_attribute join pg_class on pg_class.oid = attrelid
    where relnamespace = 'bulkhead_jobs'::regnamespace and attacl is not null
    union all
    select (aclexplode(coalesce(proacl, acldefault('f', proowner)))).grantee, proname, 'EXECUTE', null
    from pg_proc where pronamespace = 'bulkhead_jobs'::regnamespace
)
select case grantee when 0 then 'public' else pg_get_userbyid(grantee)::text end as grantee, object::text,
       privilege || coalesce('(' || string_agg(of_column, ', ' order by of_column) || ')', '') as privilege
from held
where grantee <> (select nspowner from pg_namespace where nspname = 'bulkhead_jobs')
group by grantee, object, held.privilege order by object, held.privilege
"""


@pytest.fixture(scope="module")
async def ground(databases: Databases) -> AsyncIterator[QueueGround]:
    made = queue_ground(await asyncio.to_thread(databases))
    yield made
    await made.close()


async def queued(ground: QueueGround, customer: Customer, runs: int, *, user: int = 0) -> list[UUID]:
    """So many, each deferred as it came."""
    made = [await ground.add(customer, user=user) for _ in range(runs)]
    for run_id in made:
        await ground.defer(customer, run_id)
    return made


async def has_job(ground: QueueGround, *run_ids: UUID) -> list[bool]:
    jobs = await ground.jobs()
    return [run_id in jobs for run_id in run_ids]


async def test_a_job_is_there_with_its_run_or_not_at_all(ground: QueueGround) -> None:
    customer = await ground.customer()
    run_id = await ground.add(customer)
    async with ground.app.transaction(customer.id) as session:
        assert await ground.dispatch.defer(session, customer.id, run_id)
        await session.rollback()
    assert await has_job(ground, run_id) == [False]
    assert await ground.defer(customer, run_id)
    assert await has_job(ground, run_id) == [True], "the control: where the transaction is not rolled back it is there"


async def test_a_tenant_has_so_many_jobs_and_the_next_when_a_run_ends(ground: QueueGround) -> None:
    customer = await ground.customer()
    runs = await queued(ground, customer, PER_TENANT + 2)
    assert await has_job(ground, *runs) == [True] * PER_TENANT + [False] * 2
    await ground.lose(runs[0])
    await ground.change(customer, "update runs set state = 'running', lease_until = now() where id = :id", id=runs[0])
    assert await ground.promote(customer) == 0, "one that is under way counts, its job or no job"
    await ground.change(customer, "update runs set state = 'succeeded' where id = :id", id=runs[0])
    assert await ground.promote(customer) == 1
    assert await has_job(ground, *runs) == [False] + [True] * PER_TENANT + [False]


async def test_what_ends_at_once_lets_as_many_begin(ground: QueueGround) -> None:
    customer = await ground.customer()
    runs = await queued(ground, customer, 3 * PER_TENANT)
    ended = runs[:PER_TENANT]

    async def end(run_id: UUID) -> None:
        async with ground.app.transaction(customer.id) as session:
            await session.execute(text("update runs set state = 'succeeded' where id = :id"), {"id": run_id})
            await ground.dispatch.promote(session, customer.id)

    await asyncio.gather(*map(end, ended))
    await ground.lose(*ended)
    assert sum(await has_job(ground, *runs)) in range(1, PER_TENANT + 1)
    await ground.sweep()
    assert sum(await has_job(ground, *runs)) == PER_TENANT


async def test_one_tenants_queue_takes_nothing_from_anothers(ground: QueueGround) -> None:
    many, one = await ground.customer(), await ground.customer()
    await queued(ground, many, 2 * PER_TENANT)
    run_id = await ground.add(one)
    assert await ground.defer(one, run_id)


async def test_users_of_a_tenant_take_turns(ground: QueueGround) -> None:
    customer = await ground.customer(users=2)
    first = await queued(ground, customer, 2 * PER_TENANT)
    second = await queued(ground, customer, 2, user=1)
    await ground.change(customer, "update runs set state = 'succeeded' where id = any(:ids)", ids=first[:2])
    assert await ground.promote(customer) == 2
    assert await has_job(ground, *second) == [True, True], "who has less under way comes first"


async def test_runs_of_one_conversation_go_one_after_the_other(ground: QueueGround) -> None:
    customer, thread = await ground.customer(), uuid4()
    runs = [await ground.add(customer, conversation=thread) for _ in range(3)]
    other = await ground.add(customer)
    assert await ground.promote(customer) == 2
    assert await has_job(ground, *runs, other) == [True, False, False, True]
    await ground.lose(runs[0])
    await ground.change(customer, "update runs set state = 'waiting_approval' where id = :id", id=runs[0])
    assert await ground.promote(customer) == 0
    await ground.change(customer, "update runs set state = 'succeeded' where id = :id", id=runs[0])
    assert await ground.promote(customer) == 1


async def test_a_run_that_has_begun_goes_on_before_one_of_its_conversation_that_has_not(ground: QueueGround) -> None:
    """Its query came later and was taken in sooner; who takes up the other one is told to wait for it."""
    customer, thread = await ground.customer(), uuid4()
    older, begun = [await ground.add(customer, conversation=thread) for _ in range(2)]
    begin = "update runs set started_at = now() where id = :id"
    await ground.change(customer, begin, id=begun)
    assert await ground.promote(customer) == 1
    assert await has_job(ground, older, begun) == [False, True]
    await ground.lose(begun)
    await ground.change(customer, "update runs set deferred_at = null where id = :id", id=begun)
    assert await ground.defer(customer, begun), "also of itself"


async def test_a_run_that_was_put_off_comes_again_when_another_ends_or_after_a_while(ground: QueueGround) -> None:
    customer = await ground.customer()
    (run_id,) = await queued(ground, customer, 1)
    await ground.lose(run_id)
    async with ground.app.transaction(customer.id) as session:
        await ground.dispatch.put_off(session, customer.id, run_id)
    await ground.sweep()
    assert await has_job(ground, run_id) == [False]
    await ground.change(customer, "update runs set lease_until = now() where id = :id", id=run_id)
    await ground.sweep()
    assert await has_job(ground, run_id) == [True]


@pytest.mark.parametrize("of", [{}, {"state": "running", "lease_s": -1}], ids=["queued", "dead"])
async def test_a_run_that_nobody_could_take_up_waits_twice_as_long_each_time_whatever_ends_meanwhile(
    ground: QueueGround, of: Mapping[str, Any]
) -> None:
    """The control is one that was put off since others were at work: it has its turn as soon as one ends."""
    customer = await ground.customer()
    run_id, waits = await ground.add(customer, **of), []
    busy = await ground.add(customer)
    for _ in range(6):
        await ground.sweep()
        assert await has_job(ground, run_id, busy) == [True, True]
        await ground.lose(run_id, busy)
        async with ground.app.transaction(customer.id) as session:
            await ground.dispatch.put_off(session, customer.id, busy)
        assert not await failed(ground, customer, run_id)
        assert not await failed(ground, customer, run_id), "a job too many shortens no wait"
        waits.append(await read(ground, customer, _WAITS, id=run_id))
        await ground.sweep()
        assert await has_job(ground, run_id, busy) == [False, False]
        assert await ground.promote(customer) == 1
        assert await has_job(ground, run_id, busy) == [False, True]
        await ground.change(customer, _LAPSE, id=run_id)
    assert waits == [4, 8, 16, 32, 64, 64]
    assert await read(ground, customer, "select deaths from runs where id = :id", id=run_id) == 0


_WAITS: Final = "select cast(ceil(extract(epoch from lease_until - now())) as integer) from runs where id = :id"
_LAPSE: Final = "update runs set lease_until = now() - interval '1 second' where id = :id"


async def failed(ground: QueueGround, customer: Customer, run_id: UUID, *, claim_s: int = 3600) -> bool:
    """As a worker tells that it could not take the run up; whether that has ended it."""
    async with ground.app.transaction(customer.id) as session:
        return await unclaimable.count(session, ground.dispatch, run_id, claim_s=claim_s)


async def read(ground: QueueGround, customer: Customer, query: str, **values: object) -> object:
    async with ground.app.transaction(customer.id) as session:
        found: object = await session.scalar(text(query), values)
        return found


async def test_what_is_put_off_keeps_no_other_run_of_its_tenant_from_a_turn(ground: QueueGround) -> None:
    customer = await ground.customer()
    await ground.add(customer)
    await ground.change(customer, _MANY, runs=600)
    ready = await ground.add(customer)
    assert await ground.promote(customer) == 2
    assert await has_job(ground, ready) == [True]


# Older than all others, by their ids.
_MANY: Final = """
insert into runs (tenant_id, id, user_id, policy_version, model, kind, state, unclaimed_s, lease_until)
select tenant_id, overlay(gen_random_uuid()::text placing '00' from 1 for 2)::uuid, user_id, policy_version, 'm',
       'background', 'queued', 4, now() + interval '1 minute'
from (select * from runs limit 1) one, generate_series(1, :runs)
"""


async def test_a_dead_run_that_nobody_takes_up_is_given_up_after_a_time_or_once_it_is_cancelled(
    ground: QueueGround,
) -> None:
    given_up, cancelled, alone = [await ground.customer() for _ in range(3)]
    runs = {each.id: await ground.add(each, state="running", lease_s=-1) for each in (given_up, cancelled, alone)}
    for customer, claim_s in ((given_up, 4), (cancelled, 5)):
        assert not await failed(ground, customer, runs[customer.id], claim_s=claim_s)
    await ground.change(cancelled, "update runs set cancel_cause = 'user' where id = :id", id=runs[cancelled.id])
    assert not await left(ground, claim_s=4) & set(runs), "they are put off"
    for customer in (given_up, cancelled):
        await ground.change(customer, _LAPSE, id=runs[customer.id])
    assert await left(ground, claim_s=4) & set(runs) == {given_up.id, cancelled.id}
    assert await left(ground, claim_s=5) & set(runs) == {cancelled.id}


async def left(ground: QueueGround, *, claim_s: int) -> set[UUID]:
    """The tenants whose runs are to be ended."""
    async with ground.platform.transaction() as session:
        return await repository.tenants_left(session, attempts=5, claim_s=claim_s)


async def test_a_run_is_put_off_for_a_minute_at_most(ground: QueueGround) -> None:
    customer = await ground.customer()
    run_id = await ground.add(customer)
    async with ground.app.transaction(customer.id) as session:
        await ground.dispatch.put_off(session, customer.id, run_id, times=2**70)
    assert await read(ground, customer, _WAITS, id=run_id) == 64


async def test_a_run_has_one_job_that_waits(ground: QueueGround) -> None:
    customer = await ground.customer()
    run_id = await ground.add(customer)
    assert await ground.defer(customer, run_id)
    assert await ground.defer(customer, run_id)
    assert (await ground.jobs()).count(run_id) == 1


async def test_as_many_as_may_be_are_queued(ground: QueueGround) -> None:
    customer = await ground.customer()
    for number in range(50):
        async with ground.app.transaction(customer.id) as session:
            await ground.dispatch.admit(session, customer.id)
        await ground.add(customer, state="queued" if number else "succeeded")
    await ground.add(customer)
    async with ground.app.transaction(customer.id) as session:
        with pytest.raises(TooManyRuns):
            await ground.dispatch.admit(session, customer.id)


# Sweeps


async def test_a_lost_job_is_made_again(ground: QueueGround) -> None:
    customer = await ground.customer()
    (run_id,) = await queued(ground, customer, 1)
    await ground.lose(run_id)
    assert await has_job(ground, run_id) == [False]
    await ground.sweep()
    assert await has_job(ground, run_id) == [True]


async def test_a_background_run_of_a_dead_process_gets_a_job_whatever_else_its_tenant_has(ground: QueueGround) -> None:
    customer = await ground.customer()
    alive = await ground.add(customer, state="running", lease_s=60)
    interactive = await ground.add(customer, kind="interactive", state="running", lease_s=-1)
    dead = [await ground.add(customer, state="running", lease_s=-1) for _ in range(PER_TENANT + 1)]
    await ground.sweep()
    assert await has_job(ground, alive, interactive) == [False, False]
    assert await has_job(ground, *dead) == [True] * len(dead)
    before = await ground.jobs()
    await ground.sweep()
    assert await ground.jobs() == before, "and only one"


async def test_a_queued_run_that_somebody_holds_keeps_no_other_from_its_job(ground: QueueGround) -> None:
    """As a process that has stalled in the middle does."""
    customer, other = await ground.customer(), await ground.customer()
    (held,), waits = await queued(ground, customer, 1), await ground.add(other)
    await ground.lose(held)
    async with ground.app.transaction(customer.id) as session:
        await session.execute(text("select from runs where id = :id for update"), {"id": held})
        await asyncio.wait_for(ground.sweep(), 5)
        assert await has_job(ground, held, waits) == [False, True]
    await ground.sweep()
    assert await has_job(ground, held) == [True]


async def test_every_tenant_is_swept(ground: QueueGround) -> None:
    runs = [await ground.add(await ground.customer()) for _ in range(5)]
    await ground.sweep()
    assert await has_job(ground, *runs) == [True] * 5


# Roles


async def test_the_app_makes_jobs_for_its_own_tenant_and_reads_none(ground: QueueGround) -> None:
    """An attack: with another tenant set, or none, the same call is refused."""
    customer, other = await ground.customer(), await ground.customer()
    run_id = await ground.add(customer)
    call, values = "select bulkhead_defer_run(:t, :run, null)", {"t": customer.id, "run": run_id}
    assert await refused(ground, other.id, call, **values) == REFUSED
    assert await refused(ground, None, call, **values) == REFUSED
    for forbidden in (
        "select * from bulkhead_jobs.procrastinate_jobs",
        "insert into bulkhead_jobs.procrastinate_jobs (queue_name, task_name) values ('runs', 'run')",
        "select bulkhead_jobs.procrastinate_fetch_job_v2(null, null)",
        "select bulkhead_put_job(:t, :run, null)",
    ):
        taken = values if ":t" in forbidden else {}
        assert await refused(ground, customer.id, forbidden, **taken) == REFUSED, forbidden
    async with ground.app.transaction(other.id) as session:
        unknown = {"t": other.id, "run": run_id}
        assert not await session.scalar(text(call), unknown), "a run of another tenant is not there"
    assert await has_job(ground, run_id) == [False]
    async with ground.app.transaction(customer.id) as session:
        assert await session.scalar(text(call), values), "the control"
    assert await has_job(ground, run_id) == [True]


async def refused(ground: QueueGround, tenant_id: UUID | None, statement: str, **values: object) -> str:
    """The error that a statement of the app role ends in."""
    with suppress(DBAPIError):
        async with ground.app.transaction(tenant_id or UUID(int=0)) as session:
            if tenant_id is None:
                await session.execute(text("select set_config('app.tenant_id', '', true)"))
            with pytest.raises(DBAPIError) as raised:
                await session.execute(text(statement), values)
    return str(getattr(raised.value.orig, "sqlstate", None))


async def test_the_platform_may_do_there_what_the_engine_does(ground: QueueGround) -> None:
    held: dict[tuple[str, str], list[str]] = {}
    async with ground.owner.transaction(UUID(int=0)) as session:
        for grantee, name, privilege in (await session.execute(text(_GRANTS))).all():
            role = "platform" if grantee == ground.urls.platform_role else grantee
            held.setdefault((role, name), []).append(privilege)
    assert "\n".join(f"{role} {name} {', '.join(what)}" for (role, name), what in sorted(held.items())) == GRANTS


async def test_a_run_that_has_ended_gets_no_job(ground: QueueGround) -> None:
    customer = await ground.customer()
    for state in ("succeeded", "cancelled", "waiting_approval", "running"):
        run_id = await ground.add(customer, state=state, lease_s=60)
        assert not await ground.defer(customer, run_id), state


async def test_for_the_platform_the_tenant_is_set_for_the_call_alone(ground: QueueGround) -> None:
    customer = await ground.customer()
    run_id = await ground.add(customer)
    async with ground.platform.transaction() as session:
        assert await ground.dispatch.defer(session, customer.id, run_id)
        assert await session.scalar(text("select current_setting('app.tenant_id', true)")) == ""
