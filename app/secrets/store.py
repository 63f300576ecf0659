"""The tenants' secrets as this process holds them: read when they are needed, current or not given."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Any, Final
from uuid import UUID

import structlog
from pydantic import ValidationError
from sqlalchemy.exc import SQLAlchemyError

from app.audit import repository as audit
from app.audit.aggregate import MinuteCounts
from app.audit.events import Event, EventType
from app.db import Database
from app.keyring import Keyring, Sealed, Unsealable
from app.platform_db import PlatformDatabase
from app.secrets import locators, repository, sealing
from app.secrets.contract import Secrets, SecretUnavailable
from app.secrets.known import KnownTexts
from app.secrets.providers.reading import Outcome, Provider, Unreadable
from app.secrets.repository import Source
from app.tenants.service import open_tenant_key

_log = structlog.get_logger()
_EVERY_S: Final = 0.3
_READ_S: Final = 15
# A provider that has just failed is not asked again for so long, however many ask us.
_RETRY_S: Final = 10
# What a tenant's admin is told; more is in the log, for the operator.
_TOLD: Final = {
    Outcome.MISSING: "is not there where the platform's admin has bound it to",
    Outcome.DENIED: "is refused by its provider",
    Outcome.UNUSABLE: "is there, but cannot be used as a text",
    Outcome.UNAVAILABLE: "cannot be read now, since its provider does not answer",
    Outcome.NOT_CONFIGURED: "is bound to a provider that this service is not set up for",
}
_Place = tuple[UUID, str]


@dataclass(slots=True, eq=False)
class _Held:
    """A text as it was read at some time, by the monotonic clock."""

    source: Source
    text: str = field(repr=False)
    read_at: float
    asked_at: float = field(default_factory=time.monotonic)


@dataclass(frozen=True, slots=True)
class _Failure:
    source_id: UUID
    at: float
    error: Unreadable


class TenantSecrets:
    """A text is read again `ttl_s` seconds after it was read, for as long as somebody holds it.

    Where its provider does not answer, the old text goes on for `ttl_s` more; where the provider says no, or the
    secret has been changed or removed here, it ends at once.
    """

    def __init__(
        self,
        *,
        database: Database,
        platform: PlatformDatabase,
        keyring: Keyring,
        providers: Mapping[str, Provider[Any]],
        ttl_s: float,
    ) -> None:
        self._database = database
        self._platform = platform
        self._keyring = keyring
        self._providers = providers
        self._ttl_s = ttl_s
        self._known = KnownTexts()
        self._held: dict[_Place, _Held] = {}
        self._failed: dict[_Place, _Failure] = {}
        self._reading: dict[tuple[_Place, UUID], asyncio.Task[_Held]] = {}
        self._failures: MinuteCounts[tuple[_Place, UUID, Outcome]] = MinuteCounts()

    def __repr__(self) -> str:
        return f"TenantSecrets({len(self._held)} held)"

    def redact(self, tenant_id: UUID, text: str) -> str:
        """The text without any that this process has resolved for the tenant, as it is or in a common encoding."""
        return self._known.redact(tenant_id, text)

    def open_from(self, tenant_id: UUID, text: str) -> int:
        """Where in a text that goes on one of these may begin that is not whole yet; its length where none does."""
        return self._known.open_from(tenant_id, text)

    def tenants(self) -> list[UUID]:
        """Whose texts are here."""
        return self._known.tenants()

    def forget(self, tenant_id: UUID) -> None:
        """Let a tenant's texts go, also those that nobody holds any more."""
        for place in [place for place in self._held if place[0] == tenant_id]:
            del self._held[place]
        self._known.forget(tenant_id)

    async def resolve(self, tenant_id: UUID, names: frozenset[str]) -> Secrets:
        """The tenant's secrets of these names; raise SecretUnavailable, which names the first that is missing."""
        if not names:
            return Secrets()
        sources = await self._sources(tenant_id, names)
        held = {name: await self._get(tenant_id, name, sources.get(name)) for name in sorted(names)}
        texts = {name: found.text for name, found in held.items()}
        return Secrets(texts, is_current=lambda: all(self._is_current(tenant_id, found) for found in held.values()))

    async def _sources(self, tenant_id: UUID, names: Collection[str]) -> Mapping[str, Source]:
        async with self._database.transaction(tenant_id) as session:
            return await repository.find_sources(session, names)

    async def _get(self, tenant_id: UUID, name: str, source: Source | None) -> _Held:
        if source is None:
            raise SecretUnavailable(f"There is no secret {name!r}.")
        held = self._held.get((tenant_id, name))
        if held is not None and held.source.id != source.id:
            held = None
        if held is not None and self._age(held) < self._ttl_s:
            return held
        try:
            return await self._read(tenant_id, source)
        except Unreadable as error:
            if held is not None and error.may_pass and self._is_current(tenant_id, held):
                return held
            raise SecretUnavailable(f"The secret {name!r} {_TOLD[error.outcome]}.") from None

    def _is_current(self, tenant_id: UUID, held: _Held) -> bool:
        held.asked_at = time.monotonic()
        return self._held.get((tenant_id, held.source.name)) is held and self._age(held) < 2 * self._ttl_s

    def _age(self, held: _Held) -> float:
        return time.monotonic() - held.read_at

    # Reading

    async def _read(self, tenant_id: UUID, source: Source) -> _Held:
        """Once for all who ask at the same time, and to its end, whoever of them goes."""
        key = ((tenant_id, source.name), source.id)
        task = self._reading.get(key)
        if task is None:
            self._reading[key] = task = asyncio.create_task(self._open(tenant_id, source), name="read a secret")
            task.add_done_callback(lambda done: self._has_read(key, done))
        return await asyncio.shield(task)

    def _has_read(self, key: tuple[_Place, UUID], done: asyncio.Task[_Held]) -> None:
        del self._reading[key]
        if not done.cancelled():
            done.exception()  # seen, whether or not somebody still waits for it

    async def _open(self, tenant_id: UUID, source: Source) -> _Held:
        place = (tenant_id, source.name)
        self._refuse_again(place, source)
        try:
            text = await self._text(tenant_id, source)
        except Unreadable as error:
            await self._has_failed(place, source, error)
            raise
        if source.sealed is None:  # until it is recorded: a database that is down has no provider asked again and again
            self._failed[place] = _Failure(source.id, time.monotonic(), Unreadable(Outcome.UNAVAILABLE))
        await self._record(tenant_id, source, Outcome.READ)  # before it is given to anybody
        self._known.add(tenant_id, text)
        return self._keep(place, source, text)

    def _refuse_again(self, place: _Place, source: Source) -> None:
        failure = self._failed.pop(place, None)
        if failure is not None and failure.source_id == source.id and time.monotonic() - failure.at < _RETRY_S:
            self._failed[place] = failure
            raise Unreadable(failure.error.outcome)

    async def _text(self, tenant_id: UUID, source: Source) -> str:
        try:
            async with asyncio.timeout(_READ_S):
                text = await self._provided(tenant_id, source)
        except TimeoutError:
            raise Unreadable(Outcome.UNAVAILABLE, "it took too long") from None
        if not 0 < len(text.encode(errors="surrogatepass")) <= sealing.MAX_BYTES or not _is_plain(text):
            raise Unreadable(Outcome.UNUSABLE, f"it is empty, holds a NUL or has more than {sealing.MAX_BYTES} bytes")
        return text

    async def _provided(self, tenant_id: UUID, source: Source) -> str:
        if source.sealed is not None:
            return await self._unsealed(tenant_id, source, source.sealed)
        provider = self._providers.get(source.provider)
        if provider is None:
            raise Unreadable(Outcome.NOT_CONFIGURED)
        try:
            locator = locators.parse(source.provider, source.locator)
        except ValidationError:
            raise Unreadable(Outcome.UNUSABLE, "its locator is not one of ours") from None
        try:
            return await provider.read(locator)
        except (Unreadable, TimeoutError):
            raise
        except Exception as error:  # noqa: BLE001  a library may raise anything, and say in it what nobody shall read
            raise Unreadable(Outcome.UNAVAILABLE, type(error).__name__) from None

    async def _unsealed(self, tenant_id: UUID, source: Source, sealed: Sealed) -> str:
        try:
            async with self._database.transaction(tenant_id) as session:
                key = await open_tenant_key(session, self._keyring, tenant_id)
            return sealing.unseal(key, sealed, tenant_id=tenant_id, name=source.name, version=source.version)
        except Unsealable:
            raise Unreadable(Outcome.UNUSABLE, "it cannot be unsealed") from None

    def _keep(self, place: _Place, source: Source, text: str) -> _Held:
        """The same text stays the same, so that what was started with it goes on."""
        self._failed.pop(place, None)
        held = self._held.get(place)
        now = time.monotonic()
        if held is not None and held.source.id == source.id and held.text == text:
            held.read_at = now
            return held
        self._held[place] = held = _Held(source, text, now)
        return held

    async def _has_failed(self, place: _Place, source: Source, error: Unreadable) -> None:
        self._failed[place] = _Failure(source.id, time.monotonic(), error)
        held = self._held.get(place)
        if held is not None and held.source.id == source.id and not error.may_pass:
            del self._held[place]
        _log.warning(
            "secret.unreadable",
            tenant_id=str(place[0]),
            name=source.name,
            provider=source.provider,
            outcome=error.outcome,
            detail=error.detail,
        )
        with self._failures.first((place, source.id, error.outcome)) as is_first:
            if is_first:
                await self._record(place[0], source, error.outcome)

    async def _record(self, tenant_id: UUID, source: Source, outcome: Outcome) -> None:
        data = {"name": source.name, "version": source.version, "provider": source.provider, "outcome": outcome.value}
        async with self._database.transaction(tenant_id) as session:
            await audit.append(session, tenant_id, Event(EventType.SECRET_ACCESSED, data=data))

    # Keeping up

    async def keep(self) -> None:
        """Until cancelled: let go what has been changed, on whatever process, and read again what grows old."""
        while True:
            for chore in (self.end_changed, self._refresh):
                await _attempt(chore)
            await asyncio.sleep(_EVERY_S)

    async def close(self) -> None:
        """Stop reading."""
        reading = set(self._reading.values())
        for task in reading:
            task.cancel()
        if reading:
            await asyncio.wait(reading, timeout=10)

    async def end_changed(self) -> None:
        """Let go every text whose secret is another one now, or none."""
        tenants = {tenant_id for tenant_id, _ in self._held}
        if not tenants:
            return
        held = dict(self._held)  # as of before the question, since what is read meanwhile may be newer
        async with self._platform.transaction() as session:
            ids = await repository.current_ids(session, tenants)
        for place, found in held.items():
            if ids.get(place) != found.source.id and self._held.get(place) is found:
                del self._held[place]

    async def _refresh(self) -> None:
        """What nobody has asked for in a while is forgotten instead."""
        with self._failures.finished():
            pass  # how many followed a first is of no interest
        now = time.monotonic()
        for place, held in list(self._held.items()):
            if self._age(held) < self._ttl_s:
                continue
            if now - held.asked_at > max(self._ttl_s, 60) or self._age(held) > 2 * self._ttl_s:
                del self._held[place]
            elif place not in self._failed or now - self._failed[place].at >= _RETRY_S:
                # Not awaited: one slow provider must not hold up the others, nor what has been changed.
                self._begin(place[0], held.source)
        self._failed = {place: failed for place, failed in self._failed.items() if now - failed.at < _RETRY_S}

    def _begin(self, tenant_id: UUID, source: Source) -> None:
        key = ((tenant_id, source.name), source.id)
        if key not in self._reading:
            self._reading[key] = task = asyncio.create_task(self._open(tenant_id, source), name="refresh a secret")
            task.add_done_callback(lambda done: self._has_read(key, done))


async def _attempt(chore: Callable[[], Awaitable[None]]) -> None:
    try:
        await chore()
    except (SQLAlchemyError, OSError, TimeoutError) as error:
        _log.warning("secrets.database_unavailable", error=type(error).__name__)


def _is_plain(text: str) -> bool:
    """What environments, headers and Postgres can all hold."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return "\0" not in text
