"""Verifies a tenant's chain, row by row, against signed heads and public keys alone. Pure.

What it is given may come from a database or from an exported file; what it trusts are the keys, and the heads that
were exported before.
"""

from __future__ import annotations

import json
from bisect import insort
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Final
from uuid import UUID

from app.audit import chain
from app.audit.chain import Checkpoint, Head
from app.audit.signing import PublicKeys

# What an event's other columns repeat of its text.
_REPEATED: Final = ("id", "tenant_id", "at", "type", "actor_id", "run_id")


@dataclass(frozen=True, slots=True)
class Row:
    """A link with its event. `body` is None where the event is not there.

    `body_digest` and `columns` (what the event's columns say, as in its text) are None where only a file is at hand.
    """

    seq: int
    event_id: UUID
    body: str | None
    hash: bytes
    body_digest: bytes | None = None
    columns: Mapping[str, str | None] | None = None


@dataclass(frozen=True, slots=True)
class Signed:
    """A head with its signature, and where it was found."""

    head: Head
    signature: bytes
    source: str = "the database"


@dataclass(frozen=True, slots=True)
class _Place:
    """What the hash of a row was when we signed it, and what says so."""

    seq: int
    hash: bytes
    what: str


@dataclass(frozen=True, slots=True)
class Break:
    """The first place where a chain does not hold."""

    tenant_id: UUID | None
    seq: int | None
    reason: str

    def __str__(self) -> str:
        whose = "" if self.tenant_id is None else f"tenant {self.tenant_id}, "
        return f"{whose}{'' if self.seq is None else f'row {self.seq}: '}{self.reason}"


@dataclass(frozen=True, slots=True)
class Held:
    """All rows from `first` to `last` hold; there is none where `last` is less."""

    tenant_id: UUID
    first: int
    last: int

    def __str__(self) -> str:
        rows = f"rows {self.first} to {self.last} hold" if self.last >= self.first else "there is no row"
        return f"tenant {self.tenant_id}: {rows}"


class Verifier:
    """Takes one tenant's rows in their order, and its signed heads before the row that follows theirs.

    Each step tells the first break.
    """

    def __init__(self, tenant_id: UUID, keys: PublicKeys) -> None:
        self._tenant_id = tenant_id
        self._keys = keys
        self._places: list[_Place] = []
        self._hash = chain.GENESIS
        self._begin = 0
        self._is_pruned = False
        self._signed = 0
        self.seq = 0

    def begin(self, checkpoint: Checkpoint, signature: bytes) -> Break | None:
        """The rows up to the checkpoint's were pruned."""
        wrong = self._forged(checkpoint, signature)
        self._is_pruned = True
        self.follow(checkpoint.seq, checkpoint.hash)
        return wrong

    def pass_by(self, checkpoints: Iterable[tuple[Checkpoint, bytes]]) -> Break | None:
        """Checkpoints with their signatures whose rows are still to come: they must agree with them."""
        for checkpoint, signature in checkpoints:
            if wrong := self._forged(checkpoint, signature):
                return wrong
            what = f"the checkpoint made at {chain.timestamp(checkpoint.pruned_at)}"
            self._expect(_Place(checkpoint.seq, checkpoint.hash, what))
        return None

    def _forged(self, checkpoint: Checkpoint, signature: bytes) -> Break | None:
        document = chain.canonical_document(checkpoint.document())
        if checkpoint.tenant_id != self._tenant_id:
            return self._break(checkpoint.seq, "the checkpoint is another tenant's")
        if not self._keys.verify(document, key_id=checkpoint.key_id, signature=signature):
            return self._break(checkpoint.seq, self._unsigned("checkpoint", checkpoint.key_id))
        return None

    def follow(self, seq: int, hash_: bytes) -> None:
        """The first row is the one after this. A head over the rows to come vouches for it, and nothing else."""
        self.seq = self._begin = self._signed = seq
        self._hash = hash_

    def expect(self, heads: Iterable[Signed]) -> Break | None:
        """Heads that the last row and those to come must agree with."""
        for signed in heads:
            head = signed.head
            document = chain.canonical_document(head.document())
            if head.tenant_id != self._tenant_id:
                return self._break(head.seq, f"a head in {signed.source} is another tenant's")
            if not self._keys.verify(document, key_id=head.key_id, signature=signed.signature):
                return self._break(head.seq, f"{self._unsigned('head', head.key_id)}, in {signed.source}")
            what = f"the head signed at {chain.timestamp(head.signed_at)} in {signed.source}"
            if self._begin < head.seq < self.seq:
                return self._break(head.seq, f"{what} comes too late")
            self._expect(_Place(head.seq, head.hash, what))
        return self._settle()

    def _expect(self, place: _Place) -> None:
        insort(self._places, place, key=lambda each: each.seq)

    def take(self, row: Row) -> Break | None:
        """The next row."""
        wrong = self._wrong(row)
        if wrong:
            return self._break(self.seq + 1, wrong)
        self.seq, self._hash = row.seq, row.hash
        return self._settle()

    def _settle(self) -> Break | None:
        """What was signed up to the last row; before the first there is nothing to compare with."""
        while self._places and self._places[0].seq <= self.seq:
            place = self._places.pop(0)
            if place.seq == self.seq and place.hash != self._hash:
                return self._rechained(place)
            self._signed = self.seq
        return None

    def finish(self, *, is_part: bool = False) -> Break | Held:
        """After the last row: no head may say that there were more, unless this is a part, and no row be without."""
        if self._places and not is_part:
            place = self._places[-1]
            ends = f"the chain ends at row {self.seq}" if self.seq else "there is no chain"
            return self._break(self.seq + 1, f"{ends}, and {place.what} says {place.seq}")
        if self._is_pruned and self.seq == self._begin and not is_part:
            return self._break(self.seq + 1, "no row comes after the checkpoint, and the last ones are never pruned")
        if self._signed != self.seq:
            return self._break(self._signed + 1, f"no head was signed for the rows from here to {self.seq}")
        return Held(self._tenant_id, self._begin + 1, self.seq)

    def _wrong(self, row: Row) -> str | None:
        if row.seq == self.seq > self._begin:
            return f"row {row.seq}, or its event, is there twice"
        if row.seq != self.seq + 1:
            return f"the row is missing, there is row {row.seq} instead"
        if row.body is None:
            return f"the event {row.event_id} is missing, or is not where it was"
        digest = chain.digest(row.body)
        if row.body_digest is not None and row.body_digest != digest:
            return f"the event {row.event_id} has another text than was chained"
        if row.hash != chain.link(self._tenant_id, row.seq, previous=self._hash, body_digest=digest):
            return f"the hash does not follow from the row before and the event {row.event_id}"
        return _unlike(row, self._tenant_id)

    def _rechained(self, place: _Place) -> Break:
        first = min(self._signed + 1, self.seq)
        rows = f"the rows {first} to {self.seq} are" if first < self.seq else "the row is"
        return self._break(first, f"{rows} not what was sealed: {place.what} has another hash")

    def _unsigned(self, what: str, key_id: str) -> str:
        if key_id in self._keys:
            return f"the signature of the {what} is not its key's"
        return f"the {what} is signed by an unknown key, {key_id}"

    def _break(self, seq: int, reason: str) -> Break:
        return Break(self._tenant_id, seq, reason)


def _unlike(row: Row, tenant_id: UUID) -> str | None:
    """How the text of an event differs from what it stands under; its hash is right by now."""
    try:
        body: Any = json.loads(row.body or "")
    except (ValueError, RecursionError):
        body = None
    if not isinstance(body, dict):
        return f"the text of {row.event_id} is no event"
    if (body.get("id"), body.get("tenant_id")) != (str(row.event_id), str(tenant_id)):
        return f"the text under {row.event_id} is that of another event"
    for name in _REPEATED if row.columns is not None else ():
        if row.columns is not None and row.columns[name] != body.get(name):
            return f"the column {name} of the event {row.event_id} is not as its text says"
    return None
