"""The texts of runs, sealed with their user's key and bound to their place."""

from __future__ import annotations

from enum import StrEnum
from typing import Final
from uuid import UUID

from sqlalchemy import insert, select
from sqlalchemy.ext.asyncio import AsyncSession

from app.keyring import SecretKey
from app.runs.context import RunContext
from app.runs.models import Content

_INSERT: Final = insert(Content.table())


class Kind(StrEnum):
    """What a text is to its run."""

    QUERY = "query"
    ARGUMENTS = "arguments"
    RESULT = "result"
    ANSWER = "answer"


async def add(session: AsyncSession, run: RunContext, kind: Kind, text: str, *, sequence: int = 0) -> None:
    """Seal and insert a text of a run in flight."""
    sealed = run.content_key.seal(text.encode(), aad=_place(run.run_id, kind, sequence))
    values = {
        "tenant_id": run.caller.tenant_id,
        "run_id": run.run_id,
        "kind": kind.value,
        "sequence": sequence,
        "sealed": sealed,
    }
    await session.execute(_INSERT, values)


async def read(session: AsyncSession, key: SecretKey, run_id: UUID, kind: Kind, *, sequence: int = 0) -> str | None:
    """A text, or None where there is none; raise Unsealable for a row that was put in another's place."""
    sealed = await session.scalar(
        select(Content.sealed).where(Content.run_id == run_id, Content.kind == kind.value, Content.sequence == sequence)
    )
    return None if sealed is None else opened(key, sealed, run_id, kind, sequence=sequence)


def opened(key: SecretKey, sealed: bytes, run_id: UUID, kind: Kind, *, sequence: int = 0) -> str:
    """The text of a row that was read otherwise; raise Unsealable for one that was put in another's place."""
    return key.unseal(sealed, aad=_place(run_id, kind, sequence)).decode()


def _place(run_id: UUID, kind: Kind, sequence: int) -> bytes:
    return b"content:" + run_id.bytes + f":{kind.value}:{sequence}".encode()
