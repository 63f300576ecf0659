"""How a route learns who calls: a route without one of these is public."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, TypeVar
from uuid import UUID

import structlog
from fastapi import Depends, Header, Query, Request, Response
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer

from app import parameters
from app.auth import keys
from app.auth.gate import Admission, Attempt, Gate
from app.auth.service import Authenticator
from app.caller import Caller
from app.cursors import Cursors
from app.db import Database
from app.errors import Forbidden, Invalid, Unauthenticated
from app.etags import IfMatch, read_if_match
from app.idempotency.once import Once
from app.keyring import Keyring
from app.platform_db import PlatformDatabase
from app.scopes import Scope
from app.telemetry import security
from app.telemetry.security import Violation
from app.tenants import service as tenants
from app.tenants.service import AccessibleTenantID

Row = TypeVar("Row")
_bearer = HTTPBearer(auto_error=False, description="An API key (bh_...) or a token of a registered issuer.")


async def authenticated(
    request: Request, credentials: Annotated[HTTPAuthorizationCredentials | None, Depends(_bearer)]
) -> Caller:
    """The caller, whatever its scopes; raise Unauthenticated, slowapi's RateLimitExceeded, or as `parameters.check`."""
    authenticator: Authenticator = request.app.state.authenticator
    gate: Gate = request.app.state.gate
    if credentials is None:
        request.state.rate_headers = await gate.count(_address(request))
        security.refuse(Violation.UNAUTHENTICATED, reason="no_credential", address=_address(request))
        await authenticator.refuse("no_credential", address=_address(request))
        raise Unauthenticated
    caller = await _looked_at(request, authenticator, gate, credentials.credentials)
    request.state.user_id = str(caller.user_id)
    request.state.tenant_id = caller.tenant_id
    structlog.contextvars.bind_contextvars(tenant_id=str(caller.tenant_id), user_id=str(caller.user_id))
    admission: Admission = request.app.state.admission
    request.state.rate_headers = await admission.general(caller, f"{request.method} {request.url.path}")
    parameters.check(request, request.app.state.parameters)
    return caller


async def _looked_at(request: Request, authenticator: Authenticator, gate: Gate, credential: str) -> Caller:
    key, address = keys.parse(credential), _address(request)
    async with gate.looking(Attempt(credential, key.lookup if key else "", address)) as told:
        request.state.rate_headers = told
        return await authenticator.authenticate(credential, address=address)


async def counted_by_address(request: Request) -> None:
    """For routes that ask for no credential; raises slowapi's RateLimitExceeded."""
    gate: Gate = request.app.state.gate
    request.state.rate_headers = await gate.count(_address(request))


def _address(request: Request) -> str:
    """Of the client, as the edge has found it."""
    address: str = request.state.address
    return address


AnyCaller = Annotated[Caller, Depends(authenticated)]


def requires(scope: Scope) -> Callable[..., Awaitable[Caller]]:
    """A dependency that gives the caller if it holds the scope; raise Forbidden otherwise."""

    async def with_scope(request: Request, caller: AnyCaller) -> Caller:
        if scope not in caller.scopes:
            security.refuse(Violation.FORBIDDEN, reason=f"lacks_scope:{scope}")
            authenticator: Authenticator = request.app.state.authenticator
            await authenticator.refuse(f"lacks_scope:{scope}", address=_address(request), caller=caller)
            raise Forbidden
        return caller

    return with_scope


def of_app(name: str) -> Callable[[Request], Awaitable[Any]]:
    """A dependency that gives the part of the application that has this name."""

    async def part(request: Request) -> Any:
        return getattr(request.app.state, name)

    return part


ThePlatform = Annotated[PlatformDatabase, Depends(of_app("platform"))]
TheDatabase = Annotated[Database, Depends(of_app("database"))]
TheKeyring = Annotated[Keyring, Depends(of_app("keyring"))]
TheCursors = Annotated[Cursors, Depends(of_app("cursors"))]
_Key = Annotated[str | None, Header(min_length=1, max_length=255, pattern=r"^[\x21-\x7e]+$")]
_Tags = Annotated[str | None, Header(max_length=2000)]


async def _once(
    request: Request, response: Response, caller: AnyCaller, keyring: TheKeyring, idempotency_key: _Key = None
) -> Once:
    if len(request.headers.getlist("idempotency-key")) > 1:
        raise Invalid("Send one Idempotency-Key: of several, others on the way may read another one.")
    same = f"{request.url.query}\n".encode() + (await request.body() if idempotency_key is not None else b"")
    route = f"{request.method} {request.url.path}"
    return Once(keyring, caller.user_id, route, idempotency_key, request=same, headers=response.headers)


async def _if_match(if_match: _Tags = None) -> IfMatch:
    return read_if_match(if_match)


OnlyOnce = Annotated[Once, Depends(_once)]
TheIfMatch = Annotated[IfMatch, Depends(_if_match)]


def acting(action: str) -> Callable[..., Awaitable[AccessibleTenantID]]:
    """A dependency that lets an admin of the platform act for the tenant in the path, on the record."""

    async def for_tenant(
        tenant_id: UUID, caller: Annotated[Caller, Depends(requires(Scope.TENANTS_WRITE))], platform: ThePlatform
    ) -> AccessibleTenantID:
        return await tenants.accessible(platform, tenant_id, actor_id=caller.user_id, action=action)

    return for_tenant


@dataclass(frozen=True, slots=True)
class Paging:
    """A page that a caller asks for: at most `limit` rows after `position`, which None leaves at the start."""

    limit: int
    position: str | None
    _listing: str
    _tenant_id: UUID
    _cursors: Cursors

    @property
    def id(self) -> UUID | None:
        """The position in lists that are ordered by id."""
        return UUID(self.position) if self.position is not None else None

    def next_cursor(self, rows: Sequence[Row], position: Callable[[Row], object]) -> str | None:
        """The cursor of the page after these rows, or None where they did not fill theirs."""
        return self.cursor_at(position(rows[-1])) if len(rows) == self.limit else None

    def cursor_at(self, position: object) -> str:
        """The cursor that continues after a position."""
        return self._cursors.write(str(position), listing=self._listing, tenant_id=self._tenant_id)


def paging(listing: str) -> Callable[..., Awaitable[Paging]]:
    """A dependency that reads `limit` and `cursor`; raises InvalidCursor for another list's or tenant's."""

    async def read(
        caller: AnyCaller,
        cursors: TheCursors,
        limit: Annotated[int, Query(ge=1, le=200)] = 50,
        cursor: Annotated[str | None, Query(max_length=2000)] = None,
    ) -> Paging:
        tenant_id = caller.tenant_id
        position = cursors.read(cursor, listing=listing, tenant_id=tenant_id) if cursor is not None else None
        return Paging(limit, position, listing, tenant_id, cursors)

    return read
