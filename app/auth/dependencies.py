"""How a route learns who calls: a route without one of these is public."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Annotated
from uuid import UUID

import structlog
from fastapi import Depends, Request
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer

from app.auth.service import Authenticator
from app.caller import Caller
from app.cursors import Cursors
from app.db import Database
from app.errors import Forbidden, Unauthenticated
from app.keyring import Keyring
from app.scopes import Scope
from app.telemetry.metrics import VIOLATIONS

_bearer = HTTPBearer(auto_error=False, description="An API key (bh_...) or a token of a registered issuer.")


async def authenticated(
    request: Request, credentials: Annotated[HTTPAuthorizationCredentials | None, Depends(_bearer)]
) -> Caller:
    """The caller, whatever its scopes; raise Unauthenticated."""
    if credentials is None:
        raise Unauthenticated
    authenticator: Authenticator = request.app.state.authenticator
    address = request.client.host if request.client else "unknown"
    caller = await authenticator.authenticate(credentials.credentials, address=address)
    structlog.contextvars.bind_contextvars(tenant_id=str(caller.tenant_id), user_id=str(caller.user_id))
    return caller


AnyCaller = Annotated[Caller, Depends(authenticated)]


def requires(scope: Scope) -> Callable[[Caller], Awaitable[Caller]]:
    """A dependency that gives the caller if it holds the scope; raise Forbidden otherwise."""

    async def with_scope(caller: AnyCaller) -> Caller:
        if scope not in caller.scopes:
            VIOLATIONS.labels("forbidden").inc()
            raise Forbidden
        return caller

    return with_scope


async def _database(request: Request) -> Database:
    database: Database = request.app.state.database
    return database


async def _keyring(request: Request) -> Keyring:
    keyring: Keyring = request.app.state.keyring
    return keyring


async def _cursors(request: Request) -> Cursors:
    cursors: Cursors = request.app.state.cursors
    return cursors


TheDatabase = Annotated[Database, Depends(_database)]
TheKeyring = Annotated[Keyring, Depends(_keyring)]
TheCursors = Annotated[Cursors, Depends(_cursors)]


class Paging:
    """`limit` and `cursor` of a list, and the cursor of the page after."""

    def __init__(self, caller: Caller, cursors: Cursors, listing: str, cursor: str | None) -> None:
        self._caller, self._cursors, self._listing = caller, cursors, listing
        self._position = (
            cursors.read(cursor, listing=listing, tenant_id=caller.tenant_id) if cursor is not None else None
        )

    @property
    def position(self) -> str | None:
        """Where the page before ended."""
        return self._position

    @property
    def id(self) -> UUID | None:
        """The same, in lists that are ordered by id."""
        return UUID(self._position) if self._position is not None else None

    def next(self, position: object, *, is_full: bool) -> str | None:
        """The cursor of the next page, or None after a page that was not full."""
        if not is_full:
            return None
        return self._cursors.write(str(position), listing=self._listing, tenant_id=self._caller.tenant_id)
