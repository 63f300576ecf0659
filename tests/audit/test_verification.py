"""A superuser of the database against the chain: what is done to a record is found, and the row is named."""

from __future__ import annotations

import asyncio
import fcntl
import os
import sys
import time
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Final
from uuid import UUID

import pytest
from prometheus_client import REGISTRY
from sqlalchemy import text
from sqlalchemy.exc import DBAPIError

from app.audit import chain, heads, stored
from app.audit.chain import Head
from app.audit.exported import read_heads
from app.audit.heads import HeadFile
from app.audit.signing import PublicKeys, Signers
from app.audit.verify import Break, Held, Signed
from app.errors import ConfigurationError
from app.lifetime import end
from tests.audit.chains import Ground, new_signers

ROWS: Final = 30
# What a superuser does to rows 1 to 30 of a chain with a head every ten, and the row that is named.
ATTACKS: Final[Mapping[str, tuple[int | None, str]]] = {
    "the text of an event is edited": (
        17,
        """update audit_events set body = replace(body, '"length":16', '"length":17') where id = {17}""",
    ),
    "its type is, so that searches miss it": (17, "update audit_events set type = 'run.started' where id = {17}"),
    "its actor is": (17, "update audit_events set actor_id = gen_random_uuid() where id = {17}"),
    "its time is": (17, "update audit_events set at = at - interval '1 second' where id = {17}"),
    "an event is deleted": (17, "delete from audit_events where id = {17}"),
    "an event is deleted with its row": (
        17,
        """delete from audit_events where id = {17};
        delete from audit_chain where seq = 17 and tenant_id = {tenant}""",
    ),
    "the first one is": (
        1,
        """delete from audit_events where id = {1};
        delete from audit_chain where seq = 1 and tenant_id = {tenant}""",
    ),
    "two rows trade places": (
        17,
        """update audit_chain set seq = 99 where seq = 17 and tenant_id = {tenant};
        update audit_chain set seq = 17 where seq = 18 and tenant_id = {tenant};
        update audit_chain set seq = 18 where seq = 99 and tenant_id = {tenant}""",
    ),
    "two texts trade their events": (
        17,
        """update audit_events e set body = o.body from audit_events o
        where (e.id = {17} and o.id = {18}) or (e.id = {18} and o.id = {17})""",
    ),
    "the tail is cut off": (
        26,
        """delete from audit_events
        where tenant_id = {tenant} and id in (select event_id from audit_chain where seq > 25);
        delete from audit_chain where seq > 25 and tenant_id = {tenant}""",
    ),
    "the chain is cut off with its events": (
        1,
        """delete from audit_events where tenant_id = {tenant};
        delete from audit_chain where tenant_id = {tenant}""",
    ),
    "the last head is deleted": (21, "delete from audit_heads where seq > 20 and tenant_id = {tenant}"),
    "a head is edited": (20, "update audit_heads set hash = sha256('x') where seq = 20 and tenant_id = {tenant}"),
    "a head is dated back": (
        20,
        "update audit_heads set signed_at = signed_at - interval '1 day' where seq = 20 and tenant_id = {tenant}",
    ),
    "the rows are another tenant's": (
        1,
        """delete from audit_chain where tenant_id = {tenant};
        update audit_chain set tenant_id = {tenant} where tenant_id = {other}""",
    ),
    "two tenants' records trade places": (
        1,
        """update audit_chain set seq = seq + 1000 where tenant_id = {tenant};
        update audit_chain set tenant_id = {tenant} where tenant_id = {other};
        update audit_chain set tenant_id = {other}, seq = seq - 1000 where tenant_id = {tenant} and seq > 1000;
        update audit_events set tenant_id = case tenant_id when {tenant} then {other} else {tenant} end
        where tenant_id in ({tenant}, {other})""",
    ),
    "an event is put beside the chain": (
        None,
        """insert into audit_events (tenant_id, id, at, type, body)
        values ({tenant}, gen_random_uuid(), now(), 'x', '{{}}')""",
    ),
    "an event is kept from the sealer": (
        None,
        """with forged as (
            insert into audit_events (tenant_id, id, at, type, body)
            values ({tenant}, gen_random_uuid(), now() - interval '1 hour', 'x', '{{}}') returning *
        )
        insert into audit_pending select tenant_id, id, at from forged""",
    ),
    "an event is kept from the sealer by another time in its queue": (
        None,
        """with forged as (
            insert into audit_events (tenant_id, id, at, type, body)
            values ({tenant}, gen_random_uuid(), now(), 'x', '{{}}') returning *
        )
        insert into audit_pending select tenant_id, id, timestamptz '2100-01-01' from forged""",
    ),
    "an event is of a time to come, so that it never waits for long": (
        None,
        """with forged as (
            insert into audit_events (tenant_id, id, at, type, body)
            values ({tenant}, gen_random_uuid(), timestamptz '2100-01-01', 'x', '{{}}') returning *
        )
        insert into audit_pending select tenant_id, id, at from forged""",
    ),
    "the event of what waits is deleted": (
        None,
        "insert into audit_pending values ({tenant}, gen_random_uuid(), now())",
    ),
    "another event is put under a sealed one's id": (
        None,
        """insert into audit_events (tenant_id, id, at, type, body)
        select tenant_id, id, at - interval '1 second', 'run.finished', '{{}}' from audit_events where id = {17}""",
    ),
    "another event waits under a sealed one's id": (
        None,
        """with forged as (
            insert into audit_events (tenant_id, id, at, type, body)
            select tenant_id, id, at - interval '1 second', 'run.finished', '{{}}' from audit_events where id = {17}
            returning *
        )
        insert into audit_pending select tenant_id, id, at from forged""",
    ),
    "a row is put before the first": (
        0,
        """alter table audit_chain drop constraint ck_audit_chain_begins_at_one;
        with forged as (
            insert into audit_events (tenant_id, id, at, type, body)
            values ({tenant}, gen_random_uuid(), now(), 'x', '{{}}') returning *
        )
        insert into audit_chain (tenant_id, seq, event_id, event_at, body_digest, hash)
        select tenant_id, 0, id, at, sha256('x'), sha256('x') from forged""",
    ),
}


async def attack(ground: Ground, statements: str, tenant_id: UUID, other: UUID) -> None:
    """As whoever owns the cluster, past all triggers."""
    rows = await ground.as_superuser(("select seq, event_id from audit_chain where tenant_id = :id", {"id": tenant_id}))
    for seq, event_id in rows:
        statements = statements.replace(f"{{{seq}}}", f"'{event_id}'")
    names = {"tenant": f"cast('{tenant_id}' as uuid)", "other": f"cast('{other}' as uuid)"}
    await ground.as_superuser(*statements.format(**names).replace(":", r"\:").split(";"))


@pytest.mark.parametrize("what", ATTACKS)
async def test_what_a_superuser_does_to_a_record_is_found_at_its_row(
    ground: Ground, what: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stored, "_ROWS_AT_ONCE", 7)  # over the pages' ends, too
    tenant_id, other = await ground.sealed(ROWS), await ground.sealed(ROWS)
    assert await ground.verified(tenant_id) == Held(tenant_id, 1, ROWS), "the control"
    seq, statements = ATTACKS[what]
    await attack(ground, statements, tenant_id, other)
    found = await ground.verified(tenant_id)
    assert isinstance(found, Break), found
    assert (found.tenant_id, found.seq) == (tenant_id, seq), str(found)


async def rechain(ground: Ground, tenant_id: UUID, first: int, *, signers: Signers | None = None) -> None:
    """Edit the event of row `first` and make all hashes that follow anew; with keys, sign what then stands there."""
    query = """
    select c.seq, c.event_id, c.hash, e.body from audit_chain c join audit_events e on e.id = c.event_id
    where c.tenant_id = :id order by c.seq
    """
    rows = await ground.as_superuser((query, {"id": tenant_id}))
    previous = rows[first - 2].hash if first > 1 else chain.GENESIS
    for row in rows[first - 1 :]:
        body = row.body.replace('"length":', '"length":1') if row.seq == first else row.body
        digest = chain.digest(body)
        previous = chain.link(tenant_id, row.seq, previous=previous, body_digest=digest)
        link = {"id": row.event_id, "digest": digest, "hash": previous}
        await ground.as_superuser(
            ("update audit_events set body = :body where id = :id", {"id": row.event_id, "body": body}),
            ("update audit_chain set body_digest = :digest, hash = :hash where event_id = :id", link),
        )
    if signers is not None:
        head = Head(tenant_id, rows[-1].seq, previous, datetime.now(UTC), signers.key_id)
        forged = {"id": tenant_id, "seq": head.seq, "hash": previous, "at": head.signed_at, "key": head.key_id}
        signature = signers.sign(chain.canonical_document(head.document())).signature
        insert = """
        insert into audit_heads (tenant_id, seq, hash, signed_at, key_id, signature)
        values (:id, :seq, :hash, :at, :key, :signature)
        """
        await ground.as_superuser(
            ("delete from audit_heads where tenant_id = :id and seq >= :first", {"id": tenant_id, "first": first}),
            (insert, forged | {"signature": signature}),
        )


async def test_a_chain_that_was_made_anew_is_not_the_one_that_was_signed(ground: Ground) -> None:
    tenant_id = await ground.sealed(ROWS)
    await rechain(ground, tenant_id, 17)
    found = await ground.verified(tenant_id)
    assert isinstance(found, Break)
    assert (found.seq, "11 to 20" in found.reason) == (11, True), "as near as the heads are to each other"


async def test_heads_that_another_key_has_signed_are_no_heads(ground: Ground) -> None:
    tenant_id, stranger = await ground.sealed(ROWS), new_signers()
    await rechain(ground, tenant_id, 17, signers=stranger)
    found = await ground.verified(tenant_id)
    assert isinstance(found, Break)
    assert "unknown key" in found.reason
    both = PublicKeys({**ground.signers.public.raw, **stranger.public.raw})
    async with stored.reading(ground.reader) as connection:
        assert await stored.verify_tenant(connection, tenant_id, keys=both) == Held(tenant_id, 1, ROWS), "the control"


def exporting(ground: Ground, path: Path) -> HeadFile:
    return HeadFile(ground.sealing, path, keys=ground.signers.public, every_s=60)


CUT: Final = """
delete from audit_events where tenant_id = {tenant} and id in (select event_id from audit_chain where seq > 20);
delete from audit_chain where seq > 20 and tenant_id = {tenant};
delete from audit_heads where seq > 20 and tenant_id = {tenant}
"""


async def test_heads_that_were_kept_elsewhere_outlast_a_stolen_key_and_a_cut_with_its_heads(
    ground: Ground, tmp_path: Path
) -> None:
    cut, stolen = await ground.sealed(ROWS), await ground.sealed(ROWS)
    file = exporting(ground, tmp_path / "heads")
    await file.export()
    heads = read(tmp_path / "heads")
    for tenant_id in (cut, stolen):
        assert await ground.verified(tenant_id, exported=heads[tenant_id]) == Held(tenant_id, 1, ROWS), "the control"
    await attack(ground, CUT, cut, cut)
    await rechain(ground, stolen, 1, signers=ground.signers)
    for tenant_id, last, seq in ((cut, 20, 21), (stolen, ROWS, 1)):
        assert await ground.verified(tenant_id) == Held(tenant_id, 1, last), "what the database alone cannot tell"
        found = await ground.verified(tenant_id, exported=heads[tenant_id])
        assert isinstance(found, Break)
        assert found.seq == seq


LEFTOVERS: Final = (
    "delete from audit_chain where tenant_id = {tenant}; delete from audit_heads where tenant_id = {tenant}",
    "delete from audit_events where tenant_id = {tenant}; delete from audit_heads where tenant_id = {tenant}",
    "delete from audit_events where tenant_id = {tenant}; delete from audit_chain where tenant_id = {tenant}",
)


async def test_every_tenant_is_verified_that_anything_is_left_of(ground: Ground) -> None:
    tenants = [await ground.sealed(3) for _ in LEFTOVERS]
    for tenant_id, statements in zip(tenants, LEFTOVERS, strict=True):
        await attack(ground, statements, tenant_id, tenant_id)
    async with stored.reading(ground.reader) as connection:
        assert set(tenants) <= await stored.tenants(connection)
    for tenant_id in tenants:
        assert isinstance(await ground.verified(tenant_id), Break)


async def test_two_events_under_one_key_are_found(ground: Ground) -> None:
    """Whoever owns the cluster may drop the key; the transaction is rolled back."""
    tenant_id = await ground.sealed(3)
    twin = "insert into audit_events (tenant_id, id, at, type, body) select tenant_id, id, at, type, '{}'"
    async with ground.superuser.connect() as connection:
        found = await stored.verify_tenant(connection, tenant_id, keys=ground.signers.public)
        assert found == Held(tenant_id, 1, 3), "the control"
        await connection.execute(text("set local session_replication_role = replica"))
        await connection.execute(text("alter table audit_events drop constraint pk_audit_events"))
        of_second = (
            "where tenant_id = :id and id = (select event_id from audit_chain where tenant_id = :id and seq = 2)"
        )
        await connection.execute(text(f"{twin} from audit_events {of_second}"), {"id": tenant_id})
        found = await stored.verify_tenant(connection, tenant_id, keys=ground.signers.public)
        await connection.rollback()
    assert isinstance(found, Break)
    assert found.seq in {2, 3}


_TWINS: Final = {
    "event": (
        "alter table audit_events drop constraint pk_audit_events",
        """insert into audit_events (tenant_id, id, at, type, body) select tenant_id, id, at, type, '{}'
        from audit_events where id = (select event_id from audit_chain where tenant_id = :id and seq = 7)""",
    ),
    "row": (
        """alter table audit_chain drop constraint pk_audit_chain,
        drop constraint uq_audit_chain_tenant_id_event_id""",
        "insert into audit_chain select * from audit_chain where tenant_id = :id and seq = 7",
    ),
}


@pytest.mark.parametrize("what", _TWINS)
async def test_what_is_there_twice_is_found_at_the_end_of_a_page_too(
    ground: Ground, what: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    tenant_id = await ground.sealed(20)
    drop, double = _TWINS[what]
    async with ground.superuser.connect() as connection:
        await connection.execute(text("set local session_replication_role = replica"))
        await connection.execute(text(drop))
        await connection.execute(text(double), {"id": tenant_id})
        for rows in (6, 7, 8):
            monkeypatch.setattr(stored, "_ROWS_AT_ONCE", rows)
            found = await stored.verify_tenant(connection, tenant_id, keys=ground.signers.public)
            assert isinstance(found, Break), rows
            assert found.seq in {7, 8}
        await connection.rollback()


async def test_verifying_writes_nothing(ground: Ground) -> None:
    async with stored.reading(ground.reader) as connection:
        with pytest.raises(DBAPIError, match="read-only"):
            await connection.execute(text("delete from audit_pending"))


async def _verify_many(ground: Ground, rows: int) -> float:
    """Seconds that it takes."""
    tenant_id = await ground.sealed(rows, batch=2_000)
    began = time.perf_counter()
    assert await ground.verified(tenant_id) == Held(tenant_id, 1, rows)
    return time.perf_counter() - began


async def test_fifty_thousand_rows_are_verified_in_seconds(ground: Ground) -> None:
    assert await _verify_many(ground, 50_000) < 20


@pytest.mark.long
async def test_a_million_rows_are_verified_within_a_minute(ground: Ground, capsys: pytest.CaptureFixture[str]) -> None:
    took = await _verify_many(ground, 1_000_000)
    with capsys.disabled():
        sys.stdout.write(f"\n1,000,000 rows verified in {took:.1f} s\n")
    assert took < 60, f"{took:.1f} s"


# The file of heads


def read(path: Path) -> Mapping[UUID, Sequence[Signed]]:
    with path.open("rb") as file:
        return read_heads(file, source=str(path))


async def test_heads_are_appended_where_there_are_new_ones_and_for_us_alone(ground: Ground, tmp_path: Path) -> None:
    path, quiet, busy = tmp_path / "heads", await ground.sealed(10), await ground.sealed(10)
    file = exporting(ground, path)
    file.check()
    await file.export()
    await ground.fill(busy, 5)
    await ground.sealer().finish()
    await file.export()
    assert path.stat().st_mode & 0o777 == 0o600
    found = read(path)
    assert [signed.head.seq for signed in found[quiet]] == [10]
    assert [signed.head.seq for signed in found[busy]] == [10, 15]


async def test_a_head_that_no_key_of_ours_has_signed_is_not_exported(ground: Ground, tmp_path: Path) -> None:
    """Else the file would say for ever that the chain is broken, whatever is mended in the database."""
    path, tenant_id, other = tmp_path / "heads", await ground.sealed(10), await ground.sealed(10)
    forge = """
    insert into audit_heads (tenant_id, seq, hash, signed_at, key_id, signature)
    select tenant_id, 1000, hash, signed_at, key_id, signature from audit_heads where tenant_id = :id
    """
    await ground.as_superuser((forge, {"id": tenant_id}))
    await exporting(ground, path).export()
    assert tenant_id not in (found := read(path))
    assert [signed.head.seq for signed in found[other]] == [10]
    await ground.as_superuser(("delete from audit_heads where seq = 1000 and tenant_id = :id", {"id": tenant_id}))
    await exporting(ground, path).export()
    assert [signed.head.seq for signed in read(path)[tenant_id]] == [10], "the control"


async def test_a_line_that_a_crash_has_torn_is_dropped_before_the_next(ground: Ground, tmp_path: Path) -> None:
    path, tenant_id = tmp_path / "heads", await ground.sealed(10)
    await exporting(ground, path).export()
    whole = path.read_bytes()
    path.write_bytes(whole + whole[:100])
    await ground.fill(tenant_id, 1)
    await ground.sealer().finish()
    await exporting(ground, path).export()
    assert path.read_bytes().startswith(whole)
    assert [signed.head.seq for signed in read(path)[tenant_id]] == [10, 11]


async def test_processes_that_share_a_file_write_each_head_once_and_leave_none_out(
    ground: Ground, tmp_path: Path
) -> None:
    path, tenants = tmp_path / "heads", [await ground.sealed(1) for _ in range(2)]
    files = [exporting(ground, path) for _ in range(3)]
    for _ in range(2):
        await asyncio.gather(*(file.export() for file in files))
        await ground.fill(tenants[0], 1)
        await ground.sealer().finish()
    await exporting(ground, path).export()  # one that has just started
    await files[0].export()
    lines = path.read_bytes().splitlines()
    assert len(lines) == len(set(lines))
    found = read(path)
    assert [[signed.head.seq for signed in found[each]] for each in tenants] == [[1, 2, 3], [1]]


async def test_one_of_them_writes_in_each_round_and_another_once_it_is_gone(ground: Ground, tmp_path: Path) -> None:
    path, tenant_id, every_s = tmp_path / "heads", await ground.sealed(1), 0.2
    files = [HeadFile(ground.sealing, path, keys=ground.signers.public, every_s=every_s) for _ in range(4)]
    began, sealer = time.monotonic(), ground.sealer()
    keeping = [asyncio.create_task(file.keep()) for file in files]

    async def written(more_than: int) -> int:
        async with asyncio.timeout(15):
            while (count := len(read(path)[tenant_id]) if path.exists() else 0) <= more_than:
                await ground.fill(tenant_id, 1)
                await sealer.seal()
        return count

    try:
        assert await written(more_than=3) <= (time.monotonic() - began) / every_s + 1
        for task in keeping[:3]:
            await end(task)
        assert await written(more_than=len(read(path)[tenant_id])), "the last one goes on"
    finally:
        for task in keeping:
            await end(task)


async def test_who_finds_the_file_locked_gives_the_round_up_as_failed(
    ground: Ground, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, tenant_id = tmp_path / "heads", await ground.sealed(1)
    monkeypatch.setattr(heads, "_PATIENCE_S", 0.2)
    file, before = exporting(ground, path), _failed()
    file.check()
    with path.open() as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        task = asyncio.create_task(file.export())
        has_ended = bool((await asyncio.wait({task}, timeout=5))[0])
        if has_ended:
            with pytest.raises(ConfigurationError, match="another process has locked it"):
                file.check()
    await task
    assert (has_ended, _failed() - before, tenant_id in read(path)) == (True, 1, False)
    await file.export()
    assert tenant_id in read(path), "the control"


def _failed() -> float:
    return REGISTRY.get_sample_value("bulkhead_audit_heads_exported_total", {"result": "failed"}) or 0


async def test_a_file_that_was_moved_away_is_begun_anew_with_the_newest_head_of_all(
    ground: Ground, tmp_path: Path
) -> None:
    path, quiet, busy = tmp_path / "heads", await ground.sealed(1), await ground.sealed(1)
    file = exporting(ground, path)
    for _ in range(2):
        await file.export()
        await ground.fill(busy, 1)
        await ground.sealer().finish()
    path.rename(tmp_path / "heads.1")
    await file.export()
    for name, of_quiet, of_busy in (("heads.1", [1], [1, 2]), ("heads", [1], [3])):
        found = read(tmp_path / name)
        assert [signed.head.seq for signed in found[quiet]] == of_quiet
        assert [signed.head.seq for signed in found[busy]] == of_busy


async def test_the_file_is_our_own_and_no_other_name_of_anothers(ground: Ground, tmp_path: Path) -> None:
    await ground.sealed(1)
    target = tmp_path / "target"
    target.write_text("precious")
    (tmp_path / "link").symlink_to(target)
    (tmp_path / "hard").hardlink_to(target)
    os.mkfifo(tmp_path / "fifo")
    for name in ("link", "hard", "fifo", "no/such/folder"):
        file = exporting(ground, tmp_path / name)
        with pytest.raises(ConfigurationError, match="BULKHEAD_AUDIT_HEADS_FILE"):
            file.check()
        await file.export()  # says so in the log, and ends nobody
    assert target.read_text() == "precious"
