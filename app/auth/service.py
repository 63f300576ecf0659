"""Turns a credential into a Caller, and makes, rotates and revokes API keys."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from enum import StrEnum
from typing import Any, Final, NamedTuple
from uuid import UUID

import orjson
import structlog
from sqlalchemy.exc import IntegrityError, SQLAlchemyError
from sqlalchemy.ext.asyncio import AsyncSession

from app.audit import repository as audit
from app.audit.aggregate import MinuteCounts
from app.audit.events import Event, EventType
from app.auth import jwks, keys, repository, tokens
from app.auth.models import Issuer
from app.auth.repository import Holder
from app.caller import PLATFORM_TENANT, Caller
from app.db import Database, new_id
from app.errors import Conflict, Fault, Unauthenticated
from app.keyring import Keyring
from app.platform_db import PlatformDatabase
from app.scopes import SCOPES_OF, Role
from app.telemetry import security
from app.telemetry.security import Violation
from app.tenants import repository as users
from app.tenants import service as tenants

_MAX_KEY_SETS: Final = 1_000
_MAX_USES: Final = 100_000
# At the end of the process, for what is counted and not recorded yet.
_FINISH_S: Final = 5
_AGAIN_S: Final = 0.2
_log = structlog.get_logger()


class Refusal(StrEnum):
    """Why a credential was refused: for the record, never for the caller."""

    MALFORMED = "malformed"
    UNKNOWN_KEY = "unknown_key"
    KEY_NOT_VALID = "key_not_valid"
    NOT_ACTIVE = "not_active"
    UNKNOWN_ISSUER = "unknown_issuer"
    REJECTED = "rejected"


@dataclass(frozen=True, slots=True)
class _Refused:
    reason: str
    tenant_id: UUID = PLATFORM_TENANT
    actor_id: UUID | None = None


class _Use(NamedTuple):
    """Whose credential was taken, and from where; without a key it was a token."""

    tenant_id: UUID
    user_id: UUID
    key_id: UUID | None
    role: Role
    address: str

    def event(self, *, count: int) -> Event:
        data = {"key_id": self.key_id, "role": self.role, "address": self.address, "count": count}
        return Event(EventType.AUTH_SUCCEEDED, actor_id=self.user_id, data=data)


@dataclass(frozen=True, slots=True)
class NewKey:
    """A key as its owner sees it, once."""

    id: UUID
    text: str = field(repr=False)
    expires_at: datetime | None = None


class Authenticator:
    """Checks credentials against the database as it is now: a revoked key or a disabled user ends at once."""

    def __init__(
        self, *, database: Database, platform: PlatformDatabase, keyring: Keyring, remote_keys: jwks.JwksCache
    ) -> None:
        self._database = database
        self._platform = platform
        self._keyring = keyring
        self._remote_keys = remote_keys
        self._inline_keys: dict[UUID, tokens.KeySet] = {}
        # Keys that were used since this was last noted, each with its tenant and when.
        self._used: dict[UUID, tuple[UUID, datetime]] = {}
        self._failures: MinuteCounts[tuple[UUID, str, str]] = MinuteCounts()
        self._uses: MinuteCounts[_Use] = MinuteCounts(minutes=60, most=_MAX_USES)

    async def authenticate(self, credential: str, *, address: str) -> Caller:
        """Give the caller, or record the refusal and raise Unauthenticated, the same for every reason."""
        key = keys.parse(credential)
        found = await (self._by_key(key) if key else self._by_token(credential))
        if isinstance(found, Caller):
            await self._record_use(found, address)
            return found
        security.refuse(Violation.UNAUTHENTICATED, reason=found.reason, address=address)
        await self._record(found, address)
        raise Unauthenticated

    async def refuse(self, reason: str, *, address: str, caller: Caller | None = None) -> None:
        """Count and record what was refused before or after a credential: none was sent, or it lacks a scope."""
        holder = (caller.tenant_id, caller.user_id) if caller else (PLATFORM_TENANT, None)
        await self._record(_Refused(reason, *holder), address)

    async def _by_key(self, key: keys.PlainKey) -> Caller | _Refused:
        stored = await repository.find_key(self._platform, key.lookup)
        if stored is None or not keys.matches(self._keyring, key, stored=stored.mac):
            return _Refused(Refusal.UNKNOWN_KEY)
        holder = stored.holder
        if not stored.is_valid:
            return _Refused(Refusal.KEY_NOT_VALID, holder.tenant_id, holder.user_id)
        if not holder.is_active:
            return _Refused(Refusal.NOT_ACTIVE, holder.tenant_id, holder.user_id)
        if stored.unnoted_use_at is not None:
            self._used[stored.id] = holder.tenant_id, stored.unnoted_use_at
        return _caller(holder, key_id=stored.id, key_rate=stored.rate)

    async def _by_token(self, token: str) -> Caller | _Refused:
        try:
            unverified = tokens.peek(token)
            async with self._platform.transaction() as session:
                issuer = await repository.find_issuer(session, unverified.issuer, unverified.audiences)
            if issuer is None:
                return _Refused(Refusal.UNKNOWN_ISSUER)
            key_set = await self._key_set(issuer, unverified.kid)
            trusted = tokens.TrustedIssuer(issuer.issuer, issuer.audience, key_set)
            claims = tokens.verify(token, trusted, now=datetime.now(UTC))
        except tokens.TokenRefused as refused:
            return _Refused(f"{Refusal.REJECTED}:{refused.reason}")
        holder = await self._holder(issuer, claims)
        if holder is None or not holder.is_active:
            return _Refused(Refusal.NOT_ACTIVE, issuer.tenant_id, holder.user_id if holder else None)
        return _caller(holder, role=_claimed_role(issuer, claims.claims))

    async def _key_set(self, issuer: Issuer, kid: str) -> tokens.KeySet:
        if issuer.jwks_uri is not None:
            return await self._remote_keys.key_set(issuer.jwks_uri, kid=kid)
        if issuer.id not in self._inline_keys:
            if len(self._inline_keys) >= _MAX_KEY_SETS:
                self._inline_keys.clear()
            self._inline_keys[issuer.id] = jwks.parse_jwks(issuer.jwks or {})
        return self._inline_keys[issuer.id]

    async def _holder(self, issuer: Issuer, claims: tokens.Claims) -> Holder | None:
        """The subject's user, made on first sight with the lowest role; None in a disabled tenant."""
        named = issuer.tenant_id, claims.issuer, claims.subject
        holder = await repository.find_subject(self._platform, *named)
        if holder is not None:
            return holder
        async with self._platform.transaction() as session:
            if not await repository.is_tenant_active(session, issuer.tenant_id):
                return None
        try:
            async with self._database.transaction(issuer.tenant_id) as app_session:
                await tenants.add_user(
                    app_session,
                    self._keyring,
                    issuer.tenant_id,
                    name=f"{claims.subject}@{claims.issuer}",
                    role=Role.USER,
                    actor_id=None,
                    issuer=claims.issuer,
                    subject=claims.subject,
                )
        except IntegrityError:
            pass  # another request of the same subject was first
        return await repository.find_subject(self._platform, *named)

    async def _record(self, refused: _Refused, address: str) -> None:
        """The first of a minute's equal refusals at once; the others are counted (see flush_failures)."""
        with self._failures.first((refused.tenant_id, refused.reason, address)) as is_first:
            if is_first:
                event = _failed(refused.actor_id, refused.reason, address, count=1)
                await self._append(refused.tenant_id, event)

    async def _record_use(self, caller: Caller, address: str) -> None:
        """The first from an address in an hour, before the caller may do anything; the others are counted."""
        use = _Use(caller.tenant_id, caller.user_id, caller.key_id, caller.role, address)
        with self._uses.first(use) as is_first:
            if is_first:
                await self._append(use.tenant_id, use.event(count=1))

    async def _append(self, tenant_id: UUID, event: Event) -> None:
        async with self._platform.transaction() as session:
            await audit.append(session, tenant_id, event)

    async def note_uses(self) -> None:
        """Keep when keys were last used; to be called every few seconds. What fails, or is held, is tried again."""
        used, self._used = self._used, {}
        if not used:
            return
        try:
            async with self._platform.transaction() as session:
                held = await repository.note_uses(session, used)
        except BaseException:  # cancelled as well
            self._used = used | self._used
            raise
        self._used = {key_id: used[key_id] for key_id in held} | self._used

    async def _note_all_uses(self) -> None:
        await self.note_uses()
        while self._used:  # somebody holds these
            await asyncio.sleep(_AGAIN_S)
            await self.note_uses()

    async def finish(self) -> None:
        """Record all that is counted, since the process ends; the log tells how many the database does not take."""
        try:
            async with asyncio.timeout(_FINISH_S):
                await self.flush_failures(at_end=True)
                await self.flush_uses(at_end=True)
                await self._note_all_uses()
        except (SQLAlchemyError, OSError, TimeoutError) as error:
            lost = {"failures": self._failures.untold, "uses": self._uses.untold, "keys": len(self._used)}
            _log.error("audit.counts_lost", error=type(error).__name__, **lost)

    async def flush_uses(self, *, at_end: bool = False) -> None:
        """Record the counts of the hours that are over; to be called every few seconds."""
        while True:
            with self._uses.finished(at_end=at_end) as uses:
                if not uses:
                    return
                async with self._platform.transaction() as session:
                    for use, count in uses:
                        await audit.append(session, use.tenant_id, use.event(count=count))

    async def flush_failures(self, *, at_end: bool = False) -> None:
        """Record the counts of the minutes that are over; to be called every few seconds."""
        while True:
            with self._failures.finished(at_end=at_end) as failures:
                if not failures:
                    return
                async with self._platform.transaction() as session:
                    for (tenant_id, reason, address), count in failures:
                        await audit.append(session, tenant_id, _failed(None, reason, address, count=count))


def _failed(actor_id: UUID | None, reason: str, address: str, *, count: int) -> Event:
    data = {"reason": reason, "address": address, "count": count}
    return Event(EventType.AUTH_FAILED, actor_id=actor_id, data=data)


def _caller(
    holder: Holder, *, key_id: UUID | None = None, key_rate: str | None = None, role: Role | None = None
) -> Caller:
    role = role or Role(holder.role)
    return Caller(
        holder.tenant_id,
        holder.user_id,
        role,
        SCOPES_OF[role],
        generation=holder.generation,
        key_id=key_id,
        key_rate=key_rate,
    )


def _claimed_role(issuer: Issuer, claims: Mapping[str, Any]) -> Role | None:
    """The role that the configured claim names, if it is a tenant's; never the platform's."""
    claimed = claims.get(issuer.role_claim) if issuer.role_claim else None
    tenant_roles = {Role.TENANT_ADMIN.value, Role.AUDITOR.value, Role.USER.value}
    return Role(claimed) if isinstance(claimed, str) and claimed in tenant_roles else None


async def create_key(
    session: AsyncSession,
    keyring: Keyring,
    tenant_id: UUID,
    *,
    user_id: UUID,
    name: str,
    expires_at: datetime | None,
    rate: str | None,
    actor_id: UUID | None,
) -> NewKey:
    """Mint a key for a user of the session's tenant; raise NotFound for another's, Erased.

    `rate` bounds the queries with it, besides what the policy allows its user.
    """
    tenants.refuse_erased(await users.get_user(session, user_id))
    key_id, key = new_id(), keys.mint()
    mac = keys.fingerprint(keyring, key)
    await repository.insert_key(
        session,
        tenant_id,
        key_id,
        user_id=user_id,
        name=name,
        lookup=key.lookup,
        mac_key_id=mac.key_id,
        mac=mac.digest,
        expires_at=expires_at,
        rate=rate,
    )
    data = {"key_id": key_id, "user_id": user_id, "expires_at": expires_at, "rate": rate}
    await audit.append(session, tenant_id, Event(EventType.KEY_CREATED, actor_id=actor_id, data=data))
    return NewKey(key_id, key.text, expires_at)


async def rotate_key(
    session: AsyncSession, keyring: Keyring, caller: Caller, key_id: UUID, *, old_ends_at: datetime
) -> NewKey:
    """Mint a successor; the old key goes on until `old_ends_at`. Raise NotFound or Conflict."""
    old = await repository.get_key(session, key_id, for_update=True)
    if old.revoked_at is not None:
        raise Conflict("A revoked key has no successor.")
    new = await create_key(
        session,
        keyring,
        caller.tenant_id,
        user_id=old.user_id,
        name=old.name,
        expires_at=old.expires_at,
        rate=old.rate,
        actor_id=caller.user_id,
    )
    await repository.expire_key(session, key_id, old_ends_at)
    data = {"key_id": key_id, "successor_id": new.id, "ends_at": old_ends_at}
    await audit.append(session, caller.tenant_id, Event(EventType.KEY_ROTATED, actor_id=caller.user_id, data=data))
    return new


async def revoke_key(session: AsyncSession, caller: Caller, key_id: UUID) -> None:
    """End a key at once, its runs in flight included. Raise NotFound."""
    key = await repository.get_key(session, key_id, for_update=True)
    data = {"key_id": key_id, "user_id": key.user_id, "before": {"revoked": key.revoked_at is not None}}
    await repository.revoke_key(session, key_id)
    await audit.append(session, caller.tenant_id, Event(EventType.KEY_REVOKED, actor_id=caller.user_id, data=data))


class IssuerTaken(Conflict):
    """This issuer and audience are registered already."""

    code = "issuer_taken"


async def register_issuer(
    session: AsyncSession,
    caller: Caller,
    *,
    issuer: str,
    jwks_document: Mapping[str, Any] | None,
    jwks_uri: str | None,
    role_claim: str | None,
) -> UUID:
    """Trust an issuer for the audience `bulkhead:<tenant id>`, so that a squatter reaches only itself.

    Raise InvalidKeySet for a document that cannot be used and IssuerTaken.
    """
    if jwks_document is not None:
        document = orjson.dumps(jwks_document)
        jwks.parse_jwks(document)
        if b"\\u0000" in document:  # Postgres cannot keep one
            raise jwks.InvalidKeySet(faults=[Fault("/jwks", "holds a NUL")])
    issuer_id, audience = new_id(), f"bulkhead:{caller.tenant_id}"
    try:
        async with session.begin_nested():
            await repository.insert_issuer(
                session,
                caller.tenant_id,
                issuer_id,
                issuer=issuer,
                audience=audience,
                jwks=jwks_document,
                jwks_uri=jwks_uri,
                role_claim=role_claim,
            )
    except IntegrityError:
        raise IssuerTaken from None
    data = {"issuer_id": issuer_id, "issuer": issuer, "audience": audience, "role_claim": role_claim}
    event = Event(EventType.ISSUER_REGISTERED, actor_id=caller.user_id, data=data)
    await audit.append(session, caller.tenant_id, event)
    return issuer_id


async def remove_issuer(session: AsyncSession, caller: Caller, issuer_id: UUID) -> None:
    """Trust an issuer no longer, from the next request on. Raise NotFound."""
    issuer = await repository.delete_issuer(session, issuer_id)
    data = {
        "issuer_id": issuer_id,
        "issuer": issuer.issuer,
        "audience": issuer.audience,
        "role_claim": issuer.role_claim,
    }
    await audit.append(session, caller.tenant_id, Event(EventType.ISSUER_REMOVED, actor_id=caller.user_id, data=data))
