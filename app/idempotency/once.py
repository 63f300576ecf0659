"""An Idempotency-Key: a request that arrives twice happens once and is answered alike both times.

Key and answer are written in the transaction of the change itself, so that neither is ever there without the other.
What fails writes nothing, and its key is free again. Where the answer comes only later, as that of a run does, what
has begun is written instead of it: its own record has the answer.
"""

from __future__ import annotations

import hmac
import json
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final, TypeVar
from uuid import UUID

from pydantic import BaseModel
from sqlalchemy import ColumnElement, and_, delete, func, select, text, update
from sqlalchemy.dialects.postgresql import insert as upsert
from sqlalchemy.ext.asyncio import AsyncSession

from app.errors import Invalid
from app.idempotency.models import IdempotencyKey
from app.keyring import Keyring, SecretKey
from app.tenants.service import open_tenant_key

Made = TypeVar("Made", bound=BaseModel)
_KEPT: Final = text("interval '24 hours'")


class IdempotencyMismatch(Invalid):
    """This Idempotency-Key was sent with another request before."""

    code = "idempotency_mismatch"


class Replayed(Exception):
    """The request was answered before, and this is what it was told; the transaction under way changes nothing."""

    def __init__(self, status: int, headers: Mapping[str, str], body: str) -> None:
        self.status = status
        self.headers = dict(headers)
        self.body = body
        super().__init__(status)


class Taken(Exception):
    """The request was made before and has begun `subject`; the transaction under way changes nothing."""

    def __init__(self, subject: UUID) -> None:
        self.subject = subject
        super().__init__(subject)


@dataclass(frozen=True, slots=True)
class Once:
    """A request as its key knows it; `key` is None where the caller sent none.

    `headers` are those that the answer will have, `request` is what must be the same when it comes again.
    """

    keyring: Keyring = field(repr=False)
    user_id: UUID
    route: str
    key: str | None
    request: bytes = field(repr=False)
    headers: Mapping[str, str]

    async def make(
        self, session: AsyncSession, tenant_id: UUID, make: Callable[[], Awaitable[Made]], *, status: int = 201
    ) -> Made:
        """Let `make` make it in this transaction. Raise Replayed where that has been done, IdempotencyMismatch.

        To be called before anything else in the transaction: a twin waits here until it is over.
        """
        if self.key is None:
            return await make()
        tenant_key = await open_tenant_key(session, self.keyring, tenant_id)
        if not await self._claim(session, tenant_id, tenant_key, answer=None):
            await self._replay(session, tenant_id, tenant_key)
        made = await make()
        answer = {"status": status, "headers": dict(self.headers), "body": made.model_dump_json()}
        sealed = self._seal(tenant_id, tenant_key, answer)
        await session.execute(update(IdempotencyKey).where(self._is_it(tenant_id)).values(answer=sealed))
        return made

    async def claim(self, session: AsyncSession, tenant_id: UUID, subject: UUID) -> None:
        """Note that the request begins `subject` in this transaction; raise Taken where it has begun another before,
        or IdempotencyMismatch. To be called before anything else in the transaction, as `make` is.
        """
        if self.key is None:
            return
        tenant_key = await open_tenant_key(session, self.keyring, tenant_id)
        begun = self._seal(tenant_id, tenant_key, {"subject": str(subject)})
        if not await self._claim(session, tenant_id, tenant_key, answer=begun):
            await self._replay(session, tenant_id, tenant_key)

    async def replay(self, session: AsyncSession, tenant_id: UUID) -> None:
        """The same before long work that needs no transaction: raise Replayed, Taken or IdempotencyMismatch, or do
        nothing.
        """
        if self.key is not None:
            await self._replay(session, tenant_id, await open_tenant_key(session, self.keyring, tenant_id))

    async def tell(self, session: AsyncSession, tenant_id: UUID, words: str) -> str:
        """What was told of the subject the first time, which are these words where nothing was: its record has none."""
        if self.key is None:
            return words
        query = select(IdempotencyKey.answer).where(self._is_it(tenant_id)).with_for_update()
        sealed = await session.scalar(query)
        if sealed is None:  # gone with its user, or by now too old
            return words
        tenant_key = await open_tenant_key(session, self.keyring, tenant_id)
        answer = {"words": words} | json.loads(tenant_key.unseal(sealed, aad=self._aad(tenant_id)))
        kept = self._seal(tenant_id, tenant_key, answer)
        await session.execute(update(IdempotencyKey).where(self._is_it(tenant_id)).values(answer=kept))
        return str(answer["words"])

    async def _claim(
        self, session: AsyncSession, tenant_id: UUID, tenant_key: SecretKey, *, answer: bytes | None
    ) -> bool:
        """Write the key, or take over one that has expired; waits for a twin's transaction."""
        fresh = {"digest": self._digest(tenant_key), "answer": answer, "created_at": func.now()}
        place = {"tenant_id": tenant_id, "user_id": self.user_id, "route": self.route, "key": self.key}
        statement = upsert(IdempotencyKey).values(**place, **fresh)
        statement = statement.on_conflict_do_update(index_elements=list(place), set_=fresh, where=_has_expired())
        return (await session.execute(statement.returning(IdempotencyKey.key))).first() is not None

    async def _replay(self, session: AsyncSession, tenant_id: UUID, tenant_key: SecretKey) -> None:
        query = select(IdempotencyKey.digest, IdempotencyKey.answer)
        row = (await session.execute(query.where(self._is_it(tenant_id), ~_has_expired()))).one_or_none()
        if row is None:
            return
        if not hmac.compare_digest(row.digest, self._digest(tenant_key)):
            raise IdempotencyMismatch
        answer = json.loads(tenant_key.unseal(row.answer, aad=self._aad(tenant_id)))
        raise Taken(UUID(answer["subject"])) if "subject" in answer else Replayed(**answer)

    def _seal(self, tenant_id: UUID, tenant_key: SecretKey, answer: Mapping[str, Any]) -> bytes:
        return tenant_key.seal(json.dumps(answer).encode(), aad=self._aad(tenant_id))

    def _digest(self, tenant_key: SecretKey) -> bytes:
        return tenant_key.mac("idempotency", self.request)

    def _aad(self, tenant_id: UUID) -> bytes:
        return f"idempotency:{tenant_id}:{self.user_id}:{self.route}:{self.key}".encode()

    def _is_it(self, tenant_id: UUID) -> ColumnElement[bool]:
        row = IdempotencyKey
        is_callers = and_(row.tenant_id == tenant_id, row.user_id == self.user_id)
        return and_(is_callers, row.route == self.route, row.key == self.key)


def _has_expired() -> ColumnElement[bool]:
    return IdempotencyKey.created_at < func.now() - _KEPT


async def forget_expired(session: AsyncSession) -> None:
    """Platform role: keys count for 24 hours."""
    await session.execute(delete(IdempotencyKey).where(_has_expired()))
