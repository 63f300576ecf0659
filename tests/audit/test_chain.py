"""The chain alone: whatever single thing is changed in it, verification tells, and names the row."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any, Final
from uuid import UUID

import pytest
from hypothesis import given
from hypothesis import strategies as st

from app.audit import chain
from app.audit.chain import Checkpoint, Head
from app.audit.events import Event, EventType, canonical
from app.audit.exported import Unreadable, read_heads, verify_export
from app.audit.signing import PublicKeys, Signers
from app.audit.verify import Break, Held, Row, Signed, Verifier
from app.keyring import Keyring
from tests.audit.chains import new_signers

TENANT, OTHER = (UUID(int=number) for number in (1, 2))
AT: Final = datetime(2026, 11, 22, 12, tzinfo=UTC)
SIGNERS: Final = new_signers()
LENGTH: Final = 12
BATCH: Final = 4


def made(tenant_id: UUID = TENANT, *, rows: int = LENGTH, salt: str = "") -> tuple[list[Row], list[Signed]]:
    """A chain with a head after every fourth row."""
    found, heads, previous = [], [], chain.GENESIS
    for seq in range(1, rows + 1):
        event_id, event = UUID(int=(seq << 8) + tenant_id.int), Event(EventType.QUERY_RECEIVED, data={"salt": salt})
        body = canonical(event, id=event_id, tenant_id=tenant_id, at=AT + timedelta(seconds=seq), version=1)
        previous = chain.link(tenant_id, seq, previous=previous, body_digest=chain.digest(body))
        found.append(Row(seq, event_id, body, previous))
        if seq % BATCH == 0 or seq == rows:
            heads.append(signed(Head(tenant_id, seq, previous, AT, SIGNERS.key_id)))
    return found, heads


def signed(head: Head, signers: Signers = SIGNERS) -> Signed:
    head = replace(head, key_id=signers.key_id)
    return Signed(head, signers.sign(chain.canonical_document(head.document())).signature)


def verified(
    rows: Sequence[Row], heads: Sequence[Signed], *, tenant_id: UUID = TENANT, keys: PublicKeys = SIGNERS.public
) -> Break | Held:
    verifier = Verifier(tenant_id, keys)
    broken = verifier.expect(heads)
    for row in rows:
        broken = broken or verifier.take(row)
    return broken or verifier.finish()


def broken_at(found: Break | Held) -> int | None:
    assert isinstance(found, Break), found
    assert found.tenant_id == TENANT
    return found.seq


ROWS, HEADS = made()
OTHERS, OTHER_HEADS = made(OTHER)


def test_a_chain_as_it_was_sealed_holds() -> None:
    assert verified(ROWS, HEADS) == Held(TENANT, 1, LENGTH)
    assert verified(OTHERS, OTHER_HEADS, tenant_id=OTHER) == Held(OTHER, 1, LENGTH)


def test_the_format_is_the_one_that_is_written_down() -> None:
    """Known answers: who keeps heads today must be able to use them in years."""
    body_digest = bytes.fromhex("ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad")
    assert chain.digest("abc") == body_digest
    hashed = chain.link(TENANT, 1, previous=chain.GENESIS, body_digest=body_digest)
    assert hashed.hex() == "7001b81c5f432ccef04ce7b8e453badb1945012247eacf583eceda46d67437e4"
    signers = Signers(Keyring({"k1": bytes(range(32))}, "k1"))
    assert (
        signers.public.raw[signers.key_id].hex() == "79186c4d04c5bd116f8da5b18bac848a22ccd1b257806cf02ffbdd3eea42e838"
    )
    head = Head(TENANT, 1, hashed, AT, signers.key_id)
    assert chain.canonical_document(head.document()) == (
        b'{"hash":"7001b81c5f432ccef04ce7b8e453badb1945012247eacf583eceda46d67437e4","key_id":"6de642853347940d","schema":"bulkhead.audit.head/1","seq":1,'
        b'"signed_at":"2026-11-22T12:00:00.000000Z","tenant_id":"00000000-0000-0000-0000-000000000001"}'
    )


changes = st.sampled_from(["seq", "event_id", "body", "hash", "body_digest", "columns", "body is gone"])


@given(index=st.integers(0, LENGTH - 1), what=changes, data=st.data())
def test_any_single_change_of_a_row_is_found_at_that_row(index: int, what: str, data: st.DataObject) -> None:
    row = ROWS[index]
    rows = [*ROWS[:index], changed(row, what, data), *ROWS[index + 1 :]]
    assert broken_at(verified(rows, HEADS)) == row.seq


def changed(row: Row, what: str, data: st.DataObject) -> Row:
    if what == "seq":
        return replace(row, seq=data.draw(st.integers(0, 2**63 - 1).filter(lambda seq: seq != row.seq)))
    if what == "event_id":
        return replace(row, event_id=data.draw(st.uuids().filter(lambda found: found != row.event_id)))
    if what == "body":
        return replace(row, body=data.draw(edits(row.body or "")))
    if what in {"hash", "body_digest"}:
        right = row.hash if what == "hash" else chain.digest(row.body or "")
        wrong = data.draw(st.binary(min_size=32, max_size=32).filter(lambda found: found != right))
        return replace(row, hash=wrong) if what == "hash" else replace(row, body_digest=wrong)
    if what == "columns":
        columns = {name: json.loads(row.body or "")[name] for name in ("id", "tenant_id", "at", "type")}
        columns |= {"actor_id": None, "run_id": None}
        name = data.draw(st.sampled_from(sorted(columns)))
        return replace(row, columns=columns | {name: "other"})
    return replace(row, body=None)


@st.composite
def edits(draw: st.DrawFn, body: str) -> str:
    """Another text: a character more, fewer, or otherwise."""
    place = draw(st.integers(0, len(body) - 1))
    put = draw(st.text(max_size=2).filter(lambda put: put != body[place] and max(put, default="") < "\ud800"))
    return body[:place] + put + body[place + 1 :]


@given(st.permutations(range(LENGTH)).filter(lambda order: list(order) != list(range(LENGTH))))
def test_no_other_order_of_the_rows_holds(order: list[int]) -> None:
    first = next(place for place, index in enumerate(order) if place != index)
    assert broken_at(verified([ROWS[index] for index in order], HEADS)) == first + 1


@given(st.sets(st.integers(0, LENGTH - 1), min_size=1))
def test_no_row_can_be_left_out(gone: set[int]) -> None:
    rows = [row for index, row in enumerate(ROWS) if index not in gone]
    assert broken_at(verified(rows, HEADS)) == min(gone) + 1


@given(st.integers(1, LENGTH), st.integers(1, LENGTH))
def test_rows_that_were_chained_anew_are_not_those_that_were_signed(first: int, end: int) -> None:
    """Whoever edits a row and mends all hashes that follow is found at the next head."""
    edited, previous = list(ROWS[: first - 1]), ROWS[first - 2].hash if first > 1 else chain.GENESIS
    for row in ROWS[first - 1 :]:
        body = (row.body or "").replace('"salt":""', '"salt":"x"') if row.seq <= max(first, end) else row.body or ""
        previous = chain.link(TENANT, row.seq, previous=previous, body_digest=chain.digest(body))
        edited.append(replace(row, body=body, hash=previous))
    assert verified(edited, [signed(Head(TENANT, LENGTH, previous, AT, ""))]) == Held(TENANT, 1, LENGTH), "the control"
    assert broken_at(verified(edited, HEADS)) == (first - 1) // BATCH * BATCH + 1


@pytest.mark.parametrize("kept", range(LENGTH))
def test_a_tail_that_was_cut_off_is_missed_by_the_newest_head(kept: int) -> None:
    assert broken_at(verified(ROWS[:kept], HEADS)) == kept + 1
    heads = [each for each in HEADS if each.head.seq <= kept]
    if kept % BATCH:
        assert broken_at(verified(ROWS[:kept], heads)) == kept // BATCH * BATCH + 1
    else:  # with the heads gone as well, only one that was kept elsewhere tells
        assert verified(ROWS[:kept], heads) == Held(TENANT, 1, kept)


def test_heads_of_another_key_or_with_anothers_signature_are_none() -> None:
    stranger = new_signers()
    for heads in (
        [*HEADS[:1], signed(HEADS[1].head, stranger), *HEADS[2:]],
        [*HEADS[:1], replace(HEADS[1], signature=HEADS[2].signature), *HEADS[2:]],
        [*HEADS[:1], replace(HEADS[1], head=replace(HEADS[1].head, signed_at=AT + timedelta(1))), *HEADS[2:]],
    ):
        assert broken_at(verified(ROWS, heads)) == HEADS[1].head.seq
    assert broken_at(verified(ROWS, [*HEADS[:1], OTHER_HEADS[1]])) == OTHER_HEADS[1].head.seq
    both = PublicKeys({**SIGNERS.public.raw, **stranger.public.raw})
    assert verified(ROWS, [signed(HEADS[1].head, stranger), *HEADS], keys=both) == Held(TENANT, 1, LENGTH)


def test_rows_of_another_tenant_do_not_hold_under_this_one() -> None:
    assert broken_at(verified([*ROWS[:4], *OTHERS[4:]], HEADS)) == 5
    assert broken_at(verified(OTHERS, HEADS)) == 1


def test_a_pruned_chain_holds_from_its_checkpoint_and_from_no_other() -> None:
    def begun(checkpoint: Checkpoint, rows: Sequence[Row], signers: Signers = SIGNERS) -> Break | Held:
        verifier = Verifier(TENANT, SIGNERS.public)
        signature = signers.sign(chain.canonical_document(checkpoint.document())).signature
        broken = verifier.begin(checkpoint, signature) or verifier.expect(HEADS)
        for row in rows:
            broken = broken or verifier.take(row)
        return broken or verifier.finish()

    checkpoint = Checkpoint(TENANT, 6, ROWS[5].hash, AT, SIGNERS.key_id)
    assert begun(checkpoint, ROWS[6:]) == Held(TENANT, 7, LENGTH)
    assert broken_at(begun(checkpoint, ROWS[7:])) == 7
    assert broken_at(begun(replace(checkpoint, hash=ROWS[4].hash), ROWS[6:])) == 7
    assert broken_at(begun(checkpoint, ROWS[6:], new_signers())) == 6
    assert broken_at(begun(replace(checkpoint, tenant_id=OTHER), ROWS[6:])) == 6


# Files


def lines(rows: Sequence[Row], heads: Sequence[Signed], first: dict[str, Any] | None = None) -> list[bytes]:
    """As an export holds them: each head after its last row."""
    found = [(0, 0, first)] if first else []
    found += [(row.seq, 0, document(row)) for row in rows]
    found += [(each.head.seq, 1, {"head": chain.signed_document(each.head, each.signature)}) for each in heads]
    return [chain.canonical_document(each) + b"\n" for _, _, each in sorted(found, key=lambda each: each[:2])]


def document(row: Row) -> dict[str, Any]:
    return {"seq": row.seq, "event_id": str(row.event_id), "body": row.body, "hash": row.hash.hex()}


def exported(
    found: Sequence[bytes], *, heads: Sequence[Signed] = (), is_part: bool = False, keys: PublicKeys = SIGNERS.public
) -> Break | Held:
    return verify_export(found, keys=keys, heads={TENANT: heads}, is_part=is_part)


def test_an_export_holds_as_a_whole_and_in_parts() -> None:
    assert exported(lines(ROWS, HEADS)) == Held(TENANT, 1, LENGTH)
    assert exported(lines(ROWS, HEADS), heads=HEADS) == Held(TENANT, 1, LENGTH)
    after = {"after": {"seq": 6, "hash": ROWS[5].hash.hex()}}
    assert exported(lines(ROWS[6:], HEADS[1:], after)) == Held(TENANT, 7, LENGTH)
    part = lines(ROWS[:8], HEADS[:2])
    assert exported(part, heads=HEADS, is_part=True) == Held(TENANT, 1, 8)
    assert broken_at(exported(part, heads=HEADS)) == 9


def test_an_export_from_another_row_than_it_says_does_not_hold() -> None:
    after = {"after": {"seq": 6, "hash": ROWS[4].hash.hex()}}
    assert broken_at(exported(lines(ROWS[6:], HEADS[1:], after))) == 7
    assert broken_at(exported(lines(ROWS[6:], HEADS[1:]))) == 1
    assert broken_at(exported(lines(ROWS[8:], [], {"after": {"seq": 8, "hash": ROWS[7].hash.hex()}}))) == 9


@given(st.integers(0, LENGTH + len(HEADS) - 1), st.data())
def test_no_bit_of_an_export_can_be_turned(number: int, data: st.DataObject) -> None:
    found = lines(ROWS, HEADS)
    line = bytearray(found[number])
    line[data.draw(st.integers(0, len(line) - 2))] ^= 1 << data.draw(st.integers(0, 6))
    told = told_of([*found[:number], bytes(line), *found[number + 1 :]])
    assert f"Line {number + 1} " in told if isinstance(told, str) else isinstance(told, Break)


def told_of(found: Sequence[bytes]) -> Break | Held | str:
    try:
        return exported(found)
    except Unreadable as error:
        return str(error)


@pytest.mark.parametrize("body", ["[]", "null", "1", "[" * 100_000, "{"])
def test_a_row_that_is_no_event_is_a_break_whatever_it_is(body: str) -> None:
    """Its maker has hashed it, too."""
    hashed = chain.link(TENANT, 3, previous=ROWS[1].hash, body_digest=chain.digest(body))
    assert broken_at(verified([*ROWS[:2], replace(ROWS[2], body=body, hash=hashed)], [])) == 3


def test_files_of_heads_are_read_and_a_torn_last_line_is_none() -> None:
    found = [chain.canonical_document(chain.signed_document(each.head, each.signature)) + b"\n" for each in HEADS]
    assert [each.head for each in read_heads(found, source="f")[TENANT]] == [each.head for each in HEADS]
    assert len(read_heads([*found[:2], found[2][:-9]], source="f")[TENANT]) == 2
    twice = [each for line in found for each in (line, line)]
    assert [each.head for each in read_heads(twice, source="f")[TENANT]] == [each.head for each in HEADS]
    assert len(read_heads(found, source="f", tenant=TENANT)[TENANT]) == len(HEADS)
    assert not read_heads(found, source="f", tenant=OTHER)
    with pytest.raises(Unreadable, match="Line 2 of f"):
        read_heads([found[0], found[1][:-9] + b"\n", found[2]], source="f")
