"""Retention: what is old goes with a signed checkpoint, what stays still verifies, and nothing else can be deleted."""

from __future__ import annotations

import asyncio
import uuid
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any, Final
from uuid import UUID

import pytest
from sqlalchemy import insert, text
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import create_async_engine

from app.audit import chain, export, receipts, retention, stored
from app.audit.events import Event, EventType, canonical
from app.audit.exported import verify_export
from app.audit.models import Checkpoint
from app.audit.retention import Retention
from app.audit.verify import Break, Held
from app.errors import NotFound
from tests.audit.chains import Ground
from tests.audit.test_commands import run

REFUSED: Final = "42501"
OLD: Final = timedelta(days=500)
_ADD: Final = text("""
insert into audit_events (tenant_id, id, at, type, run_id, body) values (:tenant_id, :id, :at, :type, :run_id, :body)
""")
_MARK: Final = """
insert into audit_checkpoints (tenant_id, seq, hash, pruned_at, key_id, signature)
select :tenant_id, :seq, hash, now() + make_interval(days => :days), 'none', ''
from audit_chain where tenant_id = :tenant_id and seq = :of
"""


def keeping(ground: Ground, days: int = 400) -> Retention:
    return Retention(sealing=ground.sealing, database=ground.app, signers=ground.signers, days=days)


_RECEIVED: Final = Event(
    EventType.QUERY_RECEIVED, data={"key_id": None, "conversation_id": None, "length": 1, "query_hmac": "0" * 64}
)
_ENDED: Final = Event(
    EventType.RUN_FINISHED, data={"state": "succeeded", "code": None, "cause": None, "policy_version": 1}
)


async def aged(
    ground: Ground,
    tenant_id: UUID,
    count: int,
    age: timedelta,
    *,
    run_id: UUID | None = None,
    event: Event = _RECEIVED,
) -> None:
    """Events as the service would have written them then."""
    event = replace(event, run_id=run_id)
    rows = []
    for number in range(count):
        at = datetime.now(UTC) - age + timedelta(milliseconds=number)
        id_ = UUID(int=int(at.timestamp() * 1000) << 80 | 7 << 76 | 2 << 62 | uuid.uuid4().int & (1 << 62) - 1)
        body = canonical(event, id=id_, tenant_id=tenant_id, at=at, version=1)
        row = {"tenant_id": tenant_id, "id": id_, "at": at, "type": event.type.value, "run_id": run_id, "body": body}
        rows.append(row)
    async with ground.app.transaction(tenant_id) as session:
        await session.execute(_ADD, rows)


async def seal(ground: Ground, batch: int = 5) -> None:
    sealer = ground.sealer(batch=batch)
    while await sealer.seal():
        pass


async def with_record(ground: Ground, *, old: int, young: int) -> UUID:
    tenant_id = await ground.tenant()
    if old:
        await aged(ground, tenant_id, old, OLD)
        await seal(ground)
        await date_back(ground, tenant_id, old, OLD)
    await ground.fill(tenant_id, young)
    await seal(ground)
    return tenant_id


async def date_back(ground: Ground, tenant_id: UUID, through: int, age: timedelta) -> None:
    """Sign the heads up to a row as the sealer would have signed them then."""
    found = "select seq, hash from audit_heads where tenant_id = :id and seq <= :through"
    for seq, hash_ in await ground.as_superuser((found, {"id": tenant_id, "through": through})):
        head = chain.Head(tenant_id, seq, hash_, datetime.now(UTC) - age, ground.signers.key_id)
        signature = ground.signers.sign(chain.canonical_document(head.document())).signature
        signed = "update audit_heads set signed_at = :at, signature = :signature where tenant_id = :id and seq = :seq"
        values = {"id": tenant_id, "seq": seq, "at": head.signed_at, "signature": signature}
        await ground.as_superuser((signed, values))


async def count(ground: Ground, table: str, tenant_id: UUID) -> int:
    statement = f"select count(*) from {table} where tenant_id = :id"  # noqa: S608  the tables are the test's
    return int((await ground.as_superuser((statement, {"id": tenant_id})))[0][0])


async def state(url: str, statement: str, tenant: UUID, /, **values: Any) -> str | None:
    """The SQLSTATE of a statement as a role, which is rolled back; None where it goes through."""
    engine = create_async_engine(url)
    try:
        async with engine.connect() as connection:
            await connection.execute(text("select set_config('app.tenant_id', :id, true)"), {"id": str(tenant)})
            await connection.execute(text(statement), values)
            return None
    except DBAPIError as error:
        return str(getattr(error.orig, "sqlstate", error))
    finally:
        await engine.dispose()


# What goes and what stays


async def test_what_is_old_goes_and_the_rest_verifies(ground: Ground) -> None:
    tenant_id = await with_record(ground, old=12, young=5)
    assert isinstance(await ground.verified(tenant_id), Held)
    assert await keeping(ground).prune() >= 12
    assert [await count(ground, table, tenant_id) for table in ("audit_chain", "audit_heads")] == [5, 1]
    assert isinstance(await ground.verified(tenant_id), Held)
    await seal(ground)
    rows = await ground.as_superuser(
        (
            "select body::jsonb, actor_id from audit_events where tenant_id = :id and type = 'audit.pruned'",
            {"id": tenant_id},
        )
    )
    ((body, actor_id),) = rows
    assert (body["data"]["seq"], body["data"]["count"], actor_id) == (12, 12, None)
    held = await ground.verified(tenant_id)
    assert isinstance(held, Held), held
    await keeping(ground).prune()
    assert await count(ground, "audit_chain", tenant_id) == 6, "and nothing more goes"


async def test_what_is_not_older_than_it_is_kept_stays(ground: Ground) -> None:
    tenant_id = await with_record(ground, old=6, young=2)
    assert await keeping(ground, days=0).prune() == 0, "0 keeps for ever"
    await keeping(ground, days=600).prune()
    assert await count(ground, "audit_events", tenant_id) == 8


async def test_an_old_event_behind_a_young_one_stays_until_that_goes(ground: Ground) -> None:
    tenant_id = await with_record(ground, old=3, young=1)
    await aged(ground, tenant_id, 2, OLD)
    await seal(ground)
    await keeping(ground).prune()
    assert await count(ground, "audit_chain", tenant_id) == 3
    assert isinstance(await ground.verified(tenant_id), Held)


async def test_the_last_batch_stays_and_the_chain_goes_on_from_it(ground: Ground) -> None:
    tenant_id = await with_record(ground, old=7, young=0)
    await keeping(ground).prune()
    assert await count(ground, "audit_chain", tenant_id) == 2
    await seal(ground)
    held = await ground.verified(tenant_id)
    assert isinstance(held, Held), held
    seqs = await ground.as_superuser(
        ("select seq from audit_chain where tenant_id = :id order by 1", {"id": tenant_id})
    )
    assert [seq for (seq,) in seqs] == [6, 7, 8]


async def test_a_record_that_is_pruned_by_half_verifies_and_is_pruned_on(
    ground: Ground, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each checkpoint goes as a whole: wherever the process dies, what is left follows one that is signed."""
    monkeypatch.setattr(retention, "_BATCH", 5)
    tenant_id = await with_record(ground, old=10, young=3)
    cutoff = datetime.now(UTC) - timedelta(days=400)
    for left in (8, 3):
        await keeping(ground)._mark(tenant_id, cutoff)  # and here the process dies
        assert isinstance(await ground.verified(tenant_id), Held)
        async with ground.sealing.transaction(tenant_id) as session:
            await session.execute(text("select bulkhead_prune_audit(5)"))  # or here
        assert await count(ground, "audit_chain", tenant_id) == left
        assert isinstance(await ground.verified(tenant_id), Held)
    await keeping(ground).prune()
    assert await count(ground, "audit_chain", tenant_id) == 3
    assert await count(ground, "audit_checkpoints", tenant_id) == 2
    await seal(ground)
    pruned = "select count(*) from audit_events where tenant_id = :id and type = 'audit.pruned'"
    assert (await ground.as_superuser((pruned, {"id": tenant_id})))[0][0] == 2
    assert isinstance(await ground.verified(tenant_id), Held)


@pytest.mark.parametrize("pruned_before", [0, 5])
async def test_what_the_release_before_left_half_pruned_is_not_proven_until_it_is_pruned_on(
    ground: Ground, pruned_before: int
) -> None:
    """It made one checkpoint for all that was old, and deleted up to that in several transactions."""
    tenant_id = await with_record(ground, old=20, young=3)
    for through, most in ((pruned_before, 100), (20, 7)) if pruned_before else ((20, 7),):
        await checkpointed(ground, tenant_id, through)
        assert isinstance(await ground.verified(tenant_id), Held), "the control"
        async with ground.sealing.transaction(tenant_id) as session:
            await session.execute(text("select bulkhead_prune_audit(:most)"), {"most": most})
    found = await ground.verified(tenant_id)
    assert isinstance(found, Break)
    assert (found.seq, "`bulkhead audit prune`" in found.reason) == (pruned_before + 1, True), found
    await keeping(ground).prune()
    assert await ground.verified(tenant_id) == Held(tenant_id, 21, 23), "and it is pruned on"


async def checkpointed(ground: Ground, tenant_id: UUID, through: int) -> None:
    """As retention marks what goes."""
    query = text("select hash from audit_chain where tenant_id = :id and seq = :seq")
    async with ground.sealing.transaction(tenant_id) as session:
        hash_ = await session.scalar(query, {"id": tenant_id, "seq": through})
        marked = keeping(ground)._checkpoint(tenant_id, retention._Old(1, through, hash_))
        await session.execute(insert(Checkpoint).values(**marked))


async def test_what_is_more_than_a_checkpoint_takes_goes_in_several(
    ground: Ground, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(retention, "_BATCH", 5)
    tenant_id = await with_record(ground, old=20, young=3)
    assert await keeping(ground).prune() >= 20
    assert await count(ground, "audit_checkpoints", tenant_id) == 4
    assert await count(ground, "audit_chain", tenant_id) == 3
    await seal(ground)
    assert isinstance(await ground.verified(tenant_id), Held)


# Under a checkpoint, where the rows have gone: an event, and a row of the chain that says that it was sealed.
_UNDER: Final = """
with forged as (
    insert into audit_events (tenant_id, id, at, type, body)
    values (:id, gen_random_uuid(), now() - interval '450 days', 'x', '{{}}') returning *
)
insert into audit_chain (tenant_id, seq, event_id, event_at, body_digest, hash)
select tenant_id, :seq, id, at, sha256(convert_to(body, 'utf8')), {hash} from forged
"""


@pytest.mark.parametrize("hash_", ["sha256('x')", "(select hash from audit_checkpoints where tenant_id = :id)"])
@pytest.mark.parametrize("seq", [1, 7, 10])
async def test_what_is_forged_where_rows_have_gone_is_found(ground: Ground, seq: int, hash_: str) -> None:
    tenant_id = await with_record(ground, old=10, young=3)
    await keeping(ground).prune()
    await seal(ground)
    assert isinstance(await ground.verified(tenant_id), Held), "the control"
    await ground.as_superuser((_UNDER.format(hash=hash_), {"id": tenant_id, "seq": seq}))
    assert isinstance(await ground.verified(tenant_id), Break)


async def test_an_event_before_a_true_row_that_was_kept_and_put_back_is_found(ground: Ground) -> None:
    """Under the hash that its row had, so that all after it leads to the checkpoint."""
    tenant_id = await with_record(ground, old=10, young=3)
    kept = "create table kept as select * from audit_chain where tenant_id = :id and seq in (9, 10)"
    events = "create table kept_events as select e.* from audit_events e join kept on event_id = e.id and seq = 10"
    await ground.as_superuser((kept, {"id": tenant_id}), events)
    await keeping(ground).prune()
    assert isinstance(await ground.verified(tenant_id), Held), "the control"
    columns = "tenant_id, id, at, type, actor_id, run_id, body"
    await ground.as_superuser(
        f"insert into audit_events ({columns}) select {columns} from kept_events",  # noqa: S608  texts of our own
        "insert into audit_chain select * from kept where seq = 10",
        (_UNDER.format(hash="(select hash from kept where seq = 9)"), {"id": tenant_id, "seq": 9}),
        "drop table kept, kept_events",
    )
    found = await ground.verified(tenant_id)
    assert isinstance(found, Break), found
    assert found.seq == 1


@pytest.mark.parametrize("edit", ["body = body || ' '", "at = at - interval '1 second'"])
async def test_what_a_checkpoint_covers_and_is_still_there_is_verified_as_well(ground: Ground, edit: str) -> None:
    tenant_id = await with_record(ground, old=10, young=3)
    await keeping(ground)._mark(tenant_id, datetime.now(UTC) - timedelta(days=400))
    assert isinstance(await ground.verified(tenant_id), Held), "the control"
    third = "id = (select event_id from audit_chain where tenant_id = :id and seq = 3)"
    await ground.as_superuser((f"update audit_events set {edit} where tenant_id = :id and {third}", {"id": tenant_id}))  # noqa: S608  texts of our own
    found = await ground.verified(tenant_id)
    assert isinstance(found, Break)
    assert found.seq == 3


async def test_a_checkpoint_that_all_rows_are_gone_after_is_found(ground: Ground) -> None:
    tenant_id = await with_record(ground, old=10, young=3)
    await keeping(ground).prune()
    for table in ("audit_events", "audit_pending", "audit_chain", "audit_heads"):
        await ground.as_superuser((f"delete from {table} where tenant_id = :id", {"id": tenant_id}))  # noqa: S608  the tables are the test's
    async with stored.reading(ground.reader) as connection:
        assert tenant_id in await stored.tenants(connection)
    found = await ground.verified(tenant_id)
    assert isinstance(found, Break)
    assert "no row comes after the checkpoint" in found.reason


async def test_two_that_prune_at_once_leave_one_checkpoint(ground: Ground) -> None:
    tenant_id = await with_record(ground, old=20, young=3)
    await asyncio.gather(*(keeping(ground).prune() for _ in range(3)))
    assert await count(ground, "audit_chain", tenant_id) == 3
    assert await count(ground, "audit_checkpoints", tenant_id) == 1
    assert isinstance(await ground.verified(tenant_id), Held)


@pytest.mark.parametrize("with_heads", [False, True])
async def test_a_superuser_who_dates_rows_back_does_not_make_us_sign_them_away(
    ground: Ground, *, with_heads: bool
) -> None:
    """Columns of the database may say anything of a row's age; when a head was signed, it cannot say."""
    tenant_id = await with_record(ground, old=0, young=8)
    heads = [("audit_heads", "signed_at")] if with_heads else []
    for table, column in (("audit_events", "at"), ("audit_chain", "event_at"), *heads):
        back = f"update {table} set {column} = {column} - interval '500 days' where tenant_id = :id"  # noqa: S608  names of our own
        await ground.as_superuser((back, {"id": tenant_id}))
    await keeping(ground).prune()
    assert await count(ground, "audit_chain", tenant_id) == 8
    assert await count(ground, "audit_checkpoints", tenant_id) == 0
    assert isinstance(await ground.verified(tenant_id), Break), "and it is found"


async def test_what_the_database_refuses_to_forget_is_not_told_as_pruned(ground: Ground) -> None:
    tenant_id = await with_record(ground, old=4, young=2)
    await date_back(ground, tenant_id, 4, timedelta(days=20))
    for table, column in (("audit_events", "at"), ("audit_chain", "event_at")):
        young = f"update {table} set {column} = now() - interval '20 days' where tenant_id = :id"  # noqa: S608  names of our own
        await ground.as_superuser((young, {"id": tenant_id}))
    await keeping(ground, days=10).prune()
    assert await count(ground, "audit_chain", tenant_id) == 6
    told = "select count(*) from audit_events where tenant_id = :id and type = 'audit.pruned'"
    assert (await ground.as_superuser((told, {"id": tenant_id})))[0][0] == 0


async def test_an_export_of_what_is_left_verifies_and_one_without_its_checkpoint_does_not(ground: Ground) -> None:
    tenant_id = await with_record(ground, old=8, young=4)
    await keeping(ground).prune()
    await seal(ground)
    async with ground.app.transaction(tenant_id) as session:
        span = await export.span(session, from_seq=1, to_seq=None)
    assert (span.first, span.last) == (9, 13)
    lines = b"".join([piece async for piece in export.chained(ground.app, tenant_id, span)]).splitlines(keepends=True)
    assert isinstance(verify_export(lines, keys=ground.signers.public, heads={}, is_part=False), Held)
    assert b'"checkpoint"' in lines[0]
    assert isinstance(verify_export(lines[1:], keys=ground.signers.public, heads={}, is_part=False), Break)


async def test_a_run_that_is_pruned_has_no_receipt_any_more(ground: Ground) -> None:
    tenant_id, run_id = await ground.tenant(), uuid.uuid4()
    await aged(ground, tenant_id, 1, OLD, run_id=run_id)
    await aged(ground, tenant_id, 1, OLD, run_id=run_id, event=_ENDED)
    await seal(ground)
    await date_back(ground, tenant_id, 2, OLD)
    await ground.fill(tenant_id, 1)
    await seal(ground)
    of = {"tenant_id": tenant_id, "run_id": run_id}
    async with ground.app.transaction(tenant_id) as session:
        assert len((await receipts.receipt(session, ground.signers, **of))["rows"]) == 2
    await keeping(ground).prune()
    async with ground.app.transaction(tenant_id) as session:
        with pytest.raises(NotFound):
            await receipts.receipt(session, ground.signers, **of)


async def test_the_command_prunes_as_the_service_does(ground: Ground) -> None:
    tenant_id = await with_record(ground, old=6, young=2)
    done = await run(ground, "prune")
    assert (done.exit_code, "events are gone" in done.output) == (0, True), done.output
    assert await count(ground, "audit_chain", tenant_id) == 2
    assert isinstance(await ground.verified(tenant_id), Held)


# What cannot be deleted


async def test_nobody_deletes_what_no_checkpoint_covers(ground: Ground) -> None:
    tenant_id, urls = await with_record(ground, old=3, young=3), ground.urls
    for table in ("audit_events", "audit_chain", "audit_heads", "audit_checkpoints"):
        delete = f"delete from {table} where tenant_id = :id"  # noqa: S608  the tables are the test's
        for url in (
            urls.app,
            urls.platform,
            urls.sealer,
            *([] if table == "audit_checkpoints" else [urls.owner or ""]),
        ):
            assert await state(url, delete, tenant_id, id=tenant_id) == REFUSED, (table, url.partition(":")[0])
    assert await state(urls.sealer, "select bulkhead_prune_audit(1000)", tenant_id) is None
    async with ground.sealing.transaction(tenant_id) as session:
        assert await session.scalar(text("select bulkhead_prune_audit(1000)")) == 0, "nothing without a checkpoint"
    for call in ("bulkhead_prune_audit(1)", "bulkhead_drop_empty_partitions()"):
        for url in (urls.app, urls.platform):
            assert await state(url, f"select {call}", tenant_id) == REFUSED


@pytest.mark.parametrize(
    ("seq", "of", "days"),
    [
        pytest.param(3, 2, 0, id="another row's hash"),
        pytest.param(3, 3, 1, id="made tomorrow"),
        pytest.param(3, 3, -1, id="made yesterday"),
        pytest.param(4, 4, 0, id="over a young event"),
        pytest.param(6, 6, 0, id="over the last row"),
        pytest.param(9, 6, 0, id="of no row"),
    ],
)
async def test_a_checkpoint_that_is_not_true_is_not_stored(ground: Ground, seq: int, of: int, days: int) -> None:
    tenant_id = await with_record(ground, old=3, young=3)
    values = {"tenant_id": tenant_id, "seq": seq, "of": of, "days": days}
    assert await state(ground.urls.sealer, _MARK, tenant_id, **values) == REFUSED
    true = {"tenant_id": tenant_id, "seq": 3, "of": 3, "days": 0}
    assert await state(ground.urls.sealer, _MARK, tenant_id, **true) is None, "the control"
    for url in (ground.urls.app, ground.urls.platform):
        assert await state(url, _MARK, tenant_id, **true) == REFUSED


async def test_a_checkpoint_of_who_lacks_the_key_is_found(ground: Ground) -> None:
    """Who has taken over the sealer's role in the database has not got its key, which is not there."""
    tenant_id = await with_record(ground, old=3, young=3)
    async with ground.sealing.transaction(tenant_id) as session:
        await session.execute(text(_MARK), {"tenant_id": tenant_id, "seq": 3, "of": 3, "days": 0})
    async with ground.sealing.transaction(tenant_id) as session:
        assert await session.scalar(text("select bulkhead_prune_audit(1000)")) == 3
    broken = await ground.verified(tenant_id)
    assert isinstance(broken, Break)
    assert "checkpoint" in broken.reason


async def test_what_is_young_stays_under_whatever_checkpoint(ground: Ground) -> None:
    """A superuser has planted a checkpoint over all; the trigger still looks at each row."""
    tenant_id = await with_record(ground, old=3, young=3)
    await ground.as_superuser((_MARK, {"tenant_id": tenant_id, "seq": 5, "of": 5, "days": 0}))
    assert await state(ground.urls.sealer, "select bulkhead_prune_audit(1000)", tenant_id) == REFUSED
    young = "delete from audit_events where tenant_id = :id and at > now() - interval '30 days'"
    old = "delete from audit_events where tenant_id = :id and at < now() - interval '30 days'"
    assert await state(ground.urls.owner or "", young, tenant_id, id=tenant_id) == REFUSED
    assert await state(ground.urls.owner or "", old, tenant_id, id=tenant_id) is None, "the control"


# Months


async def test_a_month_that_is_over_and_empty_is_dropped(ground: Ground) -> None:
    month = "create table audit_events_{0} partition of audit_events for values from ('{1}-01') to ('{2}-01')"
    engine = create_async_engine(ground.urls.owner or "")
    async with engine.begin() as connection:
        for name, begin, end in (("2019_01", "2019-01", "2019-02"), ("2019_02", "2019-02", "2019-03")):
            await connection.execute(text(month.format(name, begin, end)))
    await engine.dispose()
    tenant_id = await ground.tenant()
    await aged(ground, tenant_id, 1, datetime.now(UTC) - datetime(2019, 2, 3, tzinfo=UTC))
    await keeping(ground).prune()
    listed = "select inhrelid::regclass::text from pg_inherits where inhparent = 'audit_events'::regclass"
    names = {name for (name,) in await ground.as_superuser(listed)}
    assert "audit_events_2019_01" not in names
    assert {"audit_events_2019_02", "audit_events_rest", f"audit_events_{datetime.now(UTC):%Y_%m}"} <= names
