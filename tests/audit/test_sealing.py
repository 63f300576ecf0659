"""The sealer at work: one chain a tenant, whatever else happens at the same time."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any, Final
from uuid import UUID

import pytest
from prometheus_client import REGISTRY
from sqlalchemy import text
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import AsyncConnection, create_async_engine

from app.audit import sealer as sealing
from app.audit.verify import Break, Held
from tests.audit.chains import Ground, new_signers

ROOT: Final = Path(__file__).resolve().parents[2]
REFUSED: Final = "42501"
COUNTS: Final = """
select (select count(*) from audit_events where tenant_id = :id),
       (select count(*) from audit_chain where tenant_id = :id),
       (select count(*) from audit_pending where tenant_id = :id),
       (select count(*) from audit_heads where tenant_id = :id)
"""


async def counts(ground: Ground, tenant_id: UUID) -> tuple[int, int, int, int]:
    """Events, links, what waits, heads."""
    ((events, links, waiting, heads),) = await ground.as_superuser((COUNTS, {"id": tenant_id}))
    return events, links, waiting, heads


async def test_every_event_is_chained_once_and_the_queue_is_emptied(ground: Ground) -> None:
    tenant_id = await ground.tenant(25)
    assert await counts(ground, tenant_id) == (25, 0, 25, 0)
    sealer = ground.sealer(batch=10)
    assert await sealer.seal(), "there is more"
    await sealer.finish()
    assert await counts(ground, tenant_id) == (25, 25, 0, 3)
    assert await ground.verified(tenant_id) == Held(tenant_id, 1, 25)


async def test_a_tenant_with_many_events_does_not_hold_up_one_with_few(ground: Ground) -> None:
    noisy, quiet = await ground.tenant(500), await ground.tenant(3)
    sealer = ground.sealer(batch=10)
    await sealer.seal()
    assert (await counts(ground, quiet))[1] == 3
    assert (await counts(ground, noisy))[1] == 10
    await sealer.finish()


async def test_many_tenants_are_sealed_in_one_transaction(ground: Ground) -> None:
    """One for each would cost more than what it records where each tenant has done a little."""
    tenants = [await ground.tenant(2) for _ in range(3)]
    await ground.sealer().seal()
    ((transactions, heads),) = await ground.as_superuser(
        ("select count(distinct xmin::text), count(*) from audit_heads where tenant_id = any(:ids)", {"ids": tenants})
    )
    assert (transactions, heads) == (1, 3)


async def test_what_the_database_refuses_of_one_tenant_holds_up_no_other(ground: Ground) -> None:
    refused, other = await ground.tenant(1), await ground.tenant(1)
    await ground.as_superuser((NEW_LINK.replace("99", "1"), {"id": refused}))
    await ground.sealer().seal()
    assert (await counts(ground, refused))[2:] == (1, 0)
    assert (await counts(ground, other))[1:] == (1, 0, 1)
    await ground.as_superuser(("delete from audit_chain where tenant_id = :id", {"id": refused}))
    await ground.sealer().seal()
    assert (await counts(ground, refused))[1:] == (1, 0, 1), "the control: nothing else was in its way"


async def test_what_somebody_holds_of_one_tenant_holds_up_no_other(ground: Ground) -> None:
    held, other = await ground.tenant(1), await ground.tenant(1)
    async with ground.superuser.connect() as holding:
        await holding.execute(text("select from tenants where id = :id for update"), {"id": held})
        async with asyncio.timeout(15):
            await ground.sealer().seal()
        assert (await counts(ground, held))[1:] == (0, 1, 0)
        assert (await counts(ground, other))[1:] == (1, 0, 1)
    await ground.sealer().seal()
    assert (await counts(ground, held))[1:] == (1, 0, 1), "the control: nothing else was in its way"


_TWIN: Final = """
insert into audit_events (tenant_id, id, at, type, body)
select tenant_id, id, at - interval '1 second', type, body from audit_events where tenant_id = :id
"""
_NO_EVENTS: Final = """
insert into audit_pending select :id, cast(lpad(to_hex(n), 32, '0') as uuid), now() from generate_series(1, 20) n
"""


async def test_an_event_under_a_sealed_one_s_id_waits_and_holds_up_no_other(ground: Ground) -> None:
    """The app role can add it, and the chain takes no id twice."""
    tenant_id = await ground.sealed(20)
    async with ground.app.transaction(tenant_id) as session:
        await session.execute(text(_TWIN), {"id": tenant_id})
    await ground.fill(tenant_id, 3)
    await ground.sealer(batch=10).seal()
    assert await counts(ground, tenant_id) == (43, 23, 20, 3)
    found = await ground.verified(tenant_id)
    assert isinstance(found, Break), "and it is told at once"
    assert "a second time" in found.reason
    await forget(ground, tenant_id)


async def test_what_waits_and_is_no_event_holds_up_no_other(ground: Ground) -> None:
    tenant_id = await ground.tenant()
    await ground.as_superuser((_NO_EVENTS, {"id": tenant_id}))
    await ground.fill(tenant_id, 3)
    await ground.sealer(batch=10).seal()
    assert await counts(ground, tenant_id) == (3, 3, 20, 1)
    await forget(ground, tenant_id)


class Lag:
    """What the sealer of this very task has told: one of a service in this process goes on beside it."""

    def __init__(self) -> None:
        self._told: dict[asyncio.Task[Any] | None, float] = {}

    def set(self, value: float) -> None:
        self._told[asyncio.current_task()] = value

    @property
    def told(self) -> float:
        return self._told[asyncio.current_task()]


@pytest.fixture
def lag(monkeypatch: pytest.MonkeyPatch) -> Lag:
    lag = Lag()
    monkeypatch.setattr(sealing, "SEAL_LAG", lag)
    return lag


@pytest.mark.parametrize("id_", ["00000000-0000-4000-8000-000000000000", "ffffffff-ffff-4fff-bfff-ffffffffffff"])
async def test_what_waits_and_is_no_event_is_told_by_the_lag_whatever_its_id_says_of_time(
    ground: Ground, id_: str, lag: Lag
) -> None:
    tenant_id = await ground.tenant(1)
    await ground.as_superuser(
        ("insert into audit_pending values (:id, :event, now())", {"id": tenant_id, "event": id_})
    )
    for _ in ("beside an event", "alone"):
        await ground.sealer().seal()
        assert lag.told > 1e9
    assert (await counts(ground, tenant_id))[1:3] == (1, 1), "the control"
    await forget(ground, tenant_id)
    await ground.sealer().seal()
    assert lag.told == 0, "the control"


async def test_the_lag_does_not_believe_what_the_queue_says_of_time(ground: Ground, lag: Lag) -> None:
    tenant_id = await ground.tenant(1)
    await ground.as_superuser(
        ("update audit_pending set at = timestamptz '2100-01-01' where tenant_id = :id", {"id": tenant_id})
    )
    await asyncio.sleep(0.3)
    await ground.sealer().seal()
    assert 0.3 <= lag.told < 60
    await forget(ground, tenant_id)
    await ground.sealer().seal()
    assert lag.told == 0, "the control"


async def forget(ground: Ground, tenant_id: UUID) -> None:
    """Nothing of this tenant waits any more."""
    await ground.as_superuser(("delete from audit_pending where tenant_id = :id", {"id": tenant_id}))


async def test_a_long_queue_is_read_in_its_order_and_no_further_than_a_batch(ground: Ground) -> None:
    """Whatever the planner believes of its size: it may have been empty when it was looked at last."""
    await ground.sealer().finish()
    await ground.as_superuser("analyze audit_pending")
    tenant_id = await ground.tenant(3_000)
    explained = text(f"explain (analyze, format json, timing off) {sealing._EVENTS.text}")
    async with ground.sealing.transaction(tenant_id) as session:
        bound = explained.bindparams(sealing._TENANTS)
        (plan,) = (await session.execute(bound, {"tenants": [tenant_id], "batch": 50})).scalar_one()
    assert max(loops(plan["Plan"])) <= 100, plan
    await ground.sealer().finish()


def loops(node: dict[str, Any]) -> Iterator[float]:
    """How often each part of a plan was done."""
    yield node["Actual Loops"]
    for child in node.get("Plans", ()):
        yield from loops(child)


async def test_many_sealers_at_once_make_one_chain(ground: Ground) -> None:
    tenants = [await ground.tenant(400) for _ in range(3)]
    sealers = [ground.sealer(batch=7) for _ in range(4)]

    async def fill() -> None:
        for tenant_id in tenants * 10:
            await ground.fill(tenant_id, 20)

    writing = asyncio.create_task(fill())
    while not writing.done():
        await asyncio.gather(*(sealer.seal() for sealer in sealers))
    await writing
    await sealers[0].finish()
    for tenant_id in tenants:
        assert await ground.verified(tenant_id) == Held(tenant_id, 1, 600)


async def test_a_sealer_that_loses_its_connections_goes_on(ground: Ground) -> None:
    tenant_id = await ground.tenant(300)
    end = "select count(pg_terminate_backend(pid)) from pg_stat_activity where datname = :name and usename = :role"
    whose = {"name": ground.superuser.url.database, "role": ground.urls.sealer_role}
    keeping, ended = asyncio.create_task(ground.sealer(batch=10).keep()), 0
    try:
        for _ in range(10):
            await asyncio.sleep(0.02)
            ((count,),) = await ground.as_superuser((end, whose))
            ended += count
        assert ended
        while (await counts(ground, tenant_id))[1] < 300:
            await asyncio.wait({keeping}, timeout=0.1)
            assert not keeping.done()
    finally:
        keeping.cancel()
        await asyncio.wait({keeping})
    await ground.reader.dispose()  # its connections were among them
    assert await ground.verified(tenant_id) == Held(tenant_id, 1, 300)


async def test_nothing_is_built_on_a_chain_that_was_cut_or_signed_by_another(ground: Ground) -> None:
    """Else a superuser could have the history that they wrote signed by us."""
    tenant_id = await ground.sealed(30)
    sealer = ground.sealer()
    await ground.fill(tenant_id, 1)
    await sealer.seal()
    await ground.fill(tenant_id, 1)
    cut = ("delete from {} where tenant_id = :id and seq > 20", {"id": tenant_id})
    await ground.as_superuser(*((cut[0].format(table), cut[1]) for table in ("audit_chain", "audit_heads")))
    failures = REGISTRY.get_sample_value("bulkhead_audit_seal_failures_total") or 0
    await sealer.seal()
    assert (REGISTRY.get_sample_value("bulkhead_audit_seal_failures_total") or 0) > failures
    assert (await counts(ground, tenant_id))[1] == 20
    await ground.sealer(new_signers()).seal()
    assert (await counts(ground, tenant_id))[1] == 20, "its head is none of this key's"
    await ground.sealer().seal()
    assert (await counts(ground, tenant_id))[1] == 21, "the control: one that has seen nothing builds on a head of ours"


# Forks a process for each statement of a batch, that seals and is killed once the statement is done.
_VICTIMS = """
import asyncio, os, signal, sys, time
from sqlalchemy import event
from app.audit.sealer import Sealer
from app.audit.signing import Signers
from app.db import Database, create_engine
from app.keyring import Keyring

async def seal(statement):
    engine, done = create_engine(os.environ["SEALER_URL"], pool_size=4), 0

    @event.listens_for(engine.sync_engine, "after_cursor_execute")
    def count(*_):
        nonlocal done
        done += 1
        if done == statement:
            os.kill(os.getpid(), signal.SIGKILL)

    sealer = Sealer(Database(engine), Signers(Keyring.parse(os.environ["KEYS"])), every_s=1)
    while True:  # the one that was killed before may hold its lock for a moment
        done = 0
        await sealer.seal()
        time.sleep(0.02)

for statement in range(1, int(sys.argv[1]) + 1):
    child = os.fork()
    if child == 0:
        asyncio.run(seal(statement))
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    print(statement)
"""
# Of the round: tenant, whose events wait. Of the batch: tenant, locks, heads, events; then the tenant's, what it adds.
_STATEMENTS = 8


async def test_a_sealer_that_is_killed_between_its_statements_loses_and_forks_nothing(ground: Ground) -> None:
    tenant_id = await ground.tenant(5)
    environment = {"SEALER_URL": ground.urls.sealer, "KEYS": ground.keys}
    command = [sys.executable, "-c", _VICTIMS, str(_STATEMENTS)]
    run = partial(subprocess.run, command, env=environment, cwd=ROOT, timeout=60, capture_output=True, check=True)
    killed = (await asyncio.to_thread(run)).stdout.split()
    assert [int(number) for number in killed] == [*range(1, _STATEMENTS + 1)]
    assert await counts(ground, tenant_id) == (5, 0, 5, 0)
    await ground.sealer().finish()
    assert await counts(ground, tenant_id) == (5, 5, 0, 1), "the control: these statements were all of a batch"
    assert await ground.verified(tenant_id) == Held(tenant_id, 1, 5)


# Who may do what


NEW_LINK = """
insert into audit_chain (tenant_id, seq, event_id, event_at, body_digest, hash)
values (:id, 99, gen_random_uuid(), now(), '', '')
"""
NEW_HEAD = (
    "insert into audit_heads (tenant_id, seq, hash, signed_at, key_id, signature) values (:id, 99, '', now(), '', '')"
)
WAITS = "insert into audit_pending (tenant_id, event_id, at) values (:id, gen_random_uuid(), now())"
CHANGES = [
    f"{change} {table}{where}"
    for table, column in (("audit_chain", "seq"), ("audit_heads", "seq"))
    for change, where in (
        ("update", f" set {column} = 98 where tenant_id = :id"),
        ("delete from", " where tenant_id = :id and seq = 2"),
        ("truncate", ""),
    )
]
# Deleting what a checkpoint covers is another matter: tests of retention.
FORBIDDEN = {
    "app": [NEW_LINK, NEW_HEAD, WAITS, "delete from audit_pending", "select from audit_pending", *CHANGES],
    "platform": [
        *(NEW_LINK, NEW_HEAD, WAITS, "delete from audit_pending", "select from audit_pending"),
        *("select from audit_chain", "select from audit_heads"),
        *CHANGES,
    ],
    "sealer": [
        *CHANGES,
        *(WAITS, "update audit_pending set at = now()", "truncate audit_pending"),
        "insert into audit_events (tenant_id, id, at, type, body) values (:id, gen_random_uuid(), now(), 'x', '{}')",
        *("update audit_events set body = ''", "delete from audit_events", "truncate audit_events"),
        *(
            "select from tenants",
            "select from users",
            "select from contents",
            "select from runs",
            "select from api_keys",
        ),
        *("create table own (id integer)", "alter table audit_chain disable trigger append_only"),
        "set session_replication_role = replica",
    ],
    "owner": [*CHANGES, "delete from audit_events where tenant_id = :id"],
}


@pytest.mark.parametrize("role", FORBIDDEN)
async def test_no_role_can_do_more_to_the_chain_than_it_must(ground: Ground, role: str) -> None:
    tenant_id = await ground.sealed(2)
    await ground.fill(tenant_id, 1)
    engine = create_async_engine(getattr(ground.urls, role))
    async with engine.connect() as connection:
        await connection.execute(text("select set_config('app.tenant_id', :id, true)"), {"id": str(tenant_id)})
        for statement in FORBIDDEN[role]:
            assert await refusal(connection, statement, tenant_id) == REFUSED, statement
        await connection.rollback()
    await engine.dispose()
    await ground.sealer().finish()


async def refusal(connection: AsyncConnection, statement: str, tenant_id: UUID) -> object:
    """The error that a statement ends in, or how many rows it has met."""
    try:
        async with connection.begin_nested():
            found = await connection.execute(text(statement), {"id": tenant_id} if ":id" in statement else {})
            return found.rowcount
    except DBAPIError as error:
        return getattr(error.orig, "sqlstate", None)


async def test_the_sealer_writes_for_the_one_tenant_that_it_has_set(ground: Ground) -> None:
    tenant_id, other = await ground.tenant(1), await ground.tenant(1)
    engine = create_async_engine(ground.urls.sealer)
    async with engine.connect() as connection:
        for set_to, met in ((other, [REFUSED, REFUSED, 0]), (tenant_id, [1, 1, 1])):
            await connection.execute(text("select set_config('app.tenant_id', :id, true)"), {"id": str(set_to)})
            statements = (NEW_LINK, NEW_HEAD, "delete from audit_pending where tenant_id = :id")
            assert [await refusal(connection, statement, tenant_id) for statement in statements] == met
        await connection.rollback()
    await engine.dispose()
    await ground.sealer().finish()


async def test_only_the_database_takes_events_into_the_queue_and_all_of_them(ground: Ground) -> None:
    """The platform's role records for many tenants in a transaction that is of none."""
    tenants = [await ground.tenant() for _ in range(2)]
    engine = create_async_engine(ground.urls.platform)
    event = "insert into audit_events (tenant_id, id, at, type, body) values (:id, gen_random_uuid(), now(), 'x', '{}')"
    async with engine.begin() as connection:
        for tenant_id in tenants:
            await connection.execute(text(event), {"id": tenant_id})
    await engine.dispose()
    assert [(await counts(ground, tenant_id))[2] for tenant_id in tenants] == [1, 1]
    await ground.sealer().finish()
