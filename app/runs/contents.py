"""The texts of runs, sealed with their user's key and bound to their place."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import Final
from uuid import UUID

from sqlalchemy import select
from sqlalchemy.dialects.postgresql import insert as upsert
from sqlalchemy.ext.asyncio import AsyncSession

from app.keyring import SecretKey
from app.runs.context import RunContext
from app.runs.models import Content
from app.writes import insert_into, later

_ADD: Final = insert_into(Content.table())
_ADD_ONCE: Final = insert_into(Content.table(), ending="on conflict do nothing")
_INSERT_ONCE: Final = upsert(Content.table()).on_conflict_do_nothing()


class Kind(StrEnum):
    """What a text is to its run."""

    QUERY = "query"
    ARGUMENTS = "arguments"
    RESULT = "result"
    ANSWER = "answer"
    TURN = "turn"
    EDITED_ARGUMENTS = "edited_arguments"
    REASON = "reason"


@dataclass(frozen=True, slots=True)
class Place:
    """Where a text belongs; it is sealed for there and nowhere else."""

    tenant_id: UUID
    run_id: UUID
    kind: Kind
    sequence: int


def add(session: AsyncSession, run: RunContext, kind: Kind, text: str, *, sequence: int = 0) -> None:
    """Seal and insert a text of a run in flight."""
    later(session, _ADD, _row(run, kind, text, sequence=sequence))


def add_once(session: AsyncSession, run: RunContext, kind: Kind, text: str, *, sequence: int) -> None:
    """The same for a text that another transaction of the run may write as well: it waits for that one's end."""
    later(session, _ADD_ONCE, _row(run, kind, text, sequence=sequence))


async def add_at(session: AsyncSession, key: SecretKey, place: Place, text: str) -> bool:
    """The same for a text of a run that nobody executes; False where there is one already."""
    added = await session.execute(_INSERT_ONCE.returning(Content.sequence), _sealed(key, place, text))
    return added.first() is not None


async def read(session: AsyncSession, key: SecretKey, run_id: UUID, kind: Kind, *, sequence: int = 0) -> str | None:
    """A text, or None where there is none; raise Unsealable for a row that was put in another's place."""
    sealed = await session.scalar(
        select(Content.sealed).where(Content.run_id == run_id, Content.kind == kind.value, Content.sequence == sequence)
    )
    return None if sealed is None else opened(key, sealed, run_id, kind, sequence=sequence)


def _row(run: RunContext, kind: Kind, text: str, *, sequence: int) -> dict[str, object]:
    return _sealed(run.content_key, Place(run.caller.tenant_id, run.run_id, kind, sequence), text)


def _sealed(key: SecretKey, place: Place, text: str) -> dict[str, object]:
    return {
        "tenant_id": place.tenant_id,
        "run_id": place.run_id,
        "kind": place.kind.value,
        "sequence": place.sequence,
        "sealed": key.seal(text.encode(), aad=_place(place.run_id, place.kind, place.sequence)),
    }


def opened(key: SecretKey, sealed: bytes, run_id: UUID, kind: Kind, *, sequence: int = 0) -> str:
    """The text of a row that was read otherwise; raise Unsealable for one that was put in another's place."""
    return key.unseal(sealed, aad=_place(run_id, kind, sequence)).decode()


def _place(run_id: UUID, kind: Kind, sequence: int) -> bytes:
    return b"content:" + run_id.bytes + f":{kind.value}:{sequence}".encode()
