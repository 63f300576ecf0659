"""The tenant's side of the database: one tenant, one transaction, under row-level security."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import AbstractContextManager, asynccontextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from sys import maxsize
from typing import Any, Final
from uuid import UUID
from weakref import WeakValueDictionary

import uuid_utils.compat
from sqlalchemy import ColumnElement, DateTime, MetaData, Table, event, make_url, text
from sqlalchemy.engine import ExceptionContext
from sqlalchemy.engine.interfaces import DBAPIConnection, Dialect
from sqlalchemy.exc import ArgumentError, DBAPIError, DisconnectionError, OperationalError
from sqlalchemy.exc import TimeoutError as PoolTimeout
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession, create_async_engine
from sqlalchemy.orm import DeclarativeBase, InstrumentedAttribute
from sqlalchemy.pool import QueuePool

from app.errors import ConfigurationError
from app.settings import Settings
from app.telemetry import traces
from app.telemetry.traces import Span
from app.writes import session_of

_PORT: Final = 5432
# So long a transaction waits for a connection.
_PATIENCE_S: Final = 10
# Somebody has held for too long what was to be locked.
_HELD: Final = "55P03"
# As Postgres ends and as it begins, where it has no connection to give, and where a connection has failed.
_AWAY: Final = ("57P01", "57P02", "57P03", "53300", _HELD, "08")
# We have stalled in a transaction, and it has ended that.
_STALLED: Final = "25P03"
# It takes no writes: it was the primary before another became that.
_READ_ONLY: Final = "25006"
# A process that stalls in the middle loses its locks, which others wait for, as soon as a statement would.
_SET_TENANT = text(
    "select set_config('app.tenant_id', :tenant_id, true),"
    " set_config('idle_in_transaction_session_timeout', '30s', true)"
)
# Advisory, since these are given in the order in which they are asked for. Of a row that many share somebody always
# has a part, and whoever wants it alone may wait for ever.
# All of them wait for whoever is alone, who may have stalled: for less long than others wait for a connection.
_SET_TENANT_AMONG = text(
    f"{_SET_TENANT.text}, set_config('lock_timeout', '5s', true),"
    " pg_advisory_xact_lock_shared(hashtextextended(:among, 0)), set_config('lock_timeout', '0', true)"
)
_ALONE = text("select pg_advisory_xact_lock(hashtextextended(:among, 0))")


@dataclass(frozen=True, slots=True)
class DatabaseUrls:
    """The same database as four roles see it; only migrations need the owner."""

    owner: str | None = field(repr=False)
    app: str = field(repr=False)
    platform: str = field(repr=False)
    sealer: str = field(repr=False)

    @property
    def app_role(self) -> str:
        """The role that row-level security binds to one tenant."""
        return make_url(self.app).username or ""

    @property
    def platform_role(self) -> str:
        """The role with policies of its own on named tables."""
        return make_url(self.platform).username or ""

    @property
    def sealer_role(self) -> str:
        """The role that chains audit events, and is given nothing else."""
        return make_url(self.sealer).username or ""

    def places(self) -> list[tuple[str, int]]:
        """Every host and port that some role connects to. Raise ConfigurationError for a URL that names none.

        A unix socket is no such place: no tool server sees one.
        """
        urls = filter(None, (self.owner, self.app, self.platform, self.sealer))
        return list(dict.fromkeys(place for url in urls for place in _places(url)))


def _places(url: str) -> list[tuple[str, int]]:
    """As the driver is told them, for a URL has many ways to say it."""
    with suppress(ArgumentError, ValueError):
        parsed = make_url(url)
        told = parsed.get_dialect()().create_connect_args(parsed)[1]
        hosts, ports = _listed(told.get("host")), _listed(told.get("port"))
        # Without a host, or by these, the driver looks elsewhere for where to connect.
        if all(hosts) and not told.keys() & {"dsn", "service"}:
            pairs = zip(hosts, ports * len(hosts) if len(ports) == 1 else ports, strict=True)
            return [(host, int(port or _PORT)) for host, port in pairs if not host.startswith("/")]
    raise ConfigurationError("A database's URL must name its host, or the folder of its socket.")


def _listed(told: Any) -> list[Any]:
    return list(told) if isinstance(told, list | tuple) else [told]


def database_urls(settings: Settings) -> DatabaseUrls | None:
    """The configured URLs, or None where the embedded Postgres is to be used."""
    owner = settings.database_owner_url
    app, platform, sealer = (
        settings.database_app_url,
        settings.database_platform_url,
        settings.database_sealer_url,
    )
    if app is None or platform is None or sealer is None:
        return None
    return DatabaseUrls(
        owner.get_secret_value() if owner else None,
        app.get_secret_value(),
        platform.get_secret_value(),
        sealer.get_secret_value(),
    )


class Base(DeclarativeBase):
    """Names constraints, so that migrations can speak of them."""

    metadata = MetaData(
        naming_convention={
            "ix": "ix_%(table_name)s_%(column_0_N_name)s",
            "uq": "uq_%(table_name)s_%(column_0_N_name)s",
            "ck": "ck_%(table_name)s_%(constraint_name)s",
            "fk": "fk_%(table_name)s_%(column_0_N_name)s_%(referred_table_name)s",
            "pk": "pk_%(table_name)s",
        }
    )
    type_annotation_map = {datetime: DateTime(timezone=True)}  # noqa: RUF012  SQLAlchemy reads it as a plain dict

    @classmethod
    def table(cls) -> Table:
        """The plain table: an insert into it that is made once costs a third of one into the class made each time."""
        return cls.metadata.tables[cls.__tablename__]


def new_id() -> UUID:
    """A UUIDv7: unique, and in the order of its making."""
    return uuid_utils.compat.uuid7()


def first_id_at(at: datetime) -> UUID:
    """The least UUIDv7 of that moment: its first 48 bits are milliseconds."""
    since_1970 = at - datetime(1970, 1, 1, tzinfo=UTC)
    return UUID(int=max(0, since_1970 // timedelta(milliseconds=1)) << 80)


def made_within(
    at: InstrumentedAttribute[datetime],
    id_: InstrumentedAttribute[UUID],
    *,
    since: datetime | None,
    until: datetime | None,
    slack: timedelta,
) -> Iterator[ColumnElement[bool]]:
    """By a column of times, `since` in and `until` out; and by ids no further from them than `slack`: the key finds
    these.
    """
    if since is not None:
        yield at >= since
        yield id_ >= first_id_at(since - slack)
    if until is not None:
        yield at < until
        yield id_ < first_id_at(until + slack)


def create_engine(url: str, *, pool_size: int, statement_s: float = 30) -> AsyncEngine:
    """An engine whose statements never wait for ever, but for `statement_s`; `url` is of one role only."""
    engine = create_async_engine(
        url,
        pool_size=pool_size,
        max_overflow=0,
        pool_timeout=_PATIENCE_S,
        pool_pre_ping=False,
        connect_args={"timeout": 10, "command_timeout": statement_s},
        hide_parameters=True,
    )
    event.listen(engine.sync_engine, "do_connect", _connected)
    event.listen(engine.sync_engine, "checkout", _open)
    event.listen(engine.sync_engine, "handle_error", _failed)
    return engine


class Unreachable(OperationalError):
    """Nobody answers where the database should be, or nobody any more.

    The driver says so by an OSError, of which a TimeoutError is one; SQLAlchemy leaves it as it is, and nobody could
    tell it from that of a file or a tool.
    """

    def __init__(self, error: OSError) -> None:
        super().__init__(None, None, error, connection_invalidated=True)


def _connected(
    dialect: Dialect, _record: object, arguments: Sequence[Any], options: dict[str, Any]
) -> DBAPIConnection | None:
    try:
        return dialect.connect(*arguments, **options)
    except OSError as error:
        raise Unreachable(error) from error


def _open(connection: Any, _record: object, _proxy: object) -> None:
    """Of one that was closed in the pool, or came back so, the pool makes a new one: the driver has read that the
    database ended it, or was told to close it, and SQLAlchemy would find out only by the next transaction that fails.
    """
    if connection.driver_connection.is_closed():
        raise DisconnectionError


def _failed(context: ExceptionContext) -> Unreachable | None:
    """Over a connection that leads to where nothing is written any more nobody asks again; nor, where it does not
    answer, over those that are as old.
    """
    error = context.original_exception
    if isinstance(error, OSError):
        context.is_disconnect = context.invalidate_pool_on_disconnect = True
        return Unreachable(error)
    if _state(error) == _READ_ONLY:
        context.is_disconnect = True
    return None


def _state(error: BaseException | None) -> str:
    return str(getattr(error, "sqlstate", None) or "")


def is_away(error: BaseException) -> bool:
    """Whether the database could not be reached, did not answer in time, takes no writes, a connection to it was lost,
    or somebody held a lock for too long: whatever it was to do is not to blame, and may succeed later.
    """
    if isinstance(error, DBAPIError):
        state = _state(error.orig)
        return (error.connection_invalidated and state != _STALLED) or state.startswith(_AWAY)
    return isinstance(error, PoolTimeout)


def is_held(error: BaseException) -> bool:
    """Whether it is that alone: somebody held a lock for longer than the transaction was to wait for it."""
    return isinstance(error, DBAPIError) and _state(error.orig) == _HELD


def connections(engine: AsyncEngine) -> tuple[int, int]:
    """How many are in use, and how many there may be."""
    pool = engine.pool
    return (pool.checkedout(), pool.size()) if isinstance(pool, QueuePool) else (0, 0)


def in_trace(role: str) -> AbstractContextManager[Span]:
    """The span of a transaction as `role`, from the wait for a connection to the commit; no statement is in it."""
    return traces.span(
        f"{role} transaction", {"db.system.name": "postgresql", "db.operation.name": "transaction"}, kind="client"
    )


async def alone(session: AsyncSession, tenant_id: UUID, among: str) -> None:
    """Wait until no transaction of the tenant is `among` these any more, and let none begin before this one is over.

    Before this one locks anything that they may wait for.
    """
    await session.execute(_ALONE, {"among": _lock_of(tenant_id, among)})


def _lock_of(tenant_id: UUID, among: str) -> str:
    return f"{among} {tenant_id}"


class _Shares:
    """Lets each tenant have so many at once. Who waits for too long fares as if there were no connection."""

    def __init__(self, most: int) -> None:
        self._most = max(1, most)
        self._of: WeakValueDictionary[UUID, asyncio.Semaphore] = WeakValueDictionary()

    @asynccontextmanager
    async def one_of(self, tenant_id: UUID) -> AsyncIterator[None]:
        share = self._of.setdefault(tenant_id, asyncio.Semaphore(self._most))
        try:
            async with asyncio.timeout(_PATIENCE_S if share.locked() else None):
                await share.acquire()
        except TimeoutError as error:
            raise PoolTimeout("The tenant has as many transactions under way as it may.") from error
        try:
            yield
        finally:
            share.release()


class Database:
    """Transactions of the app role, each of which sees one tenant and nothing else.

    Where it `is_shared`, no tenant has more than three quarters of the connections at a time, nor more than one quarter
    for transactions `among` others: all of these may wait for what a stalled process has locked of that tenant. Some of
    its three quarters are for what stops something, which is not to wait behind them.
    """

    def __init__(self, engine: AsyncEngine, *, is_shared: bool = False) -> None:
        self._engine = engine
        size = connections(engine)[1]
        most, kept = size - size // 4, max(1, size // 8) if size >= 4 else 0
        self._all = _Shares(most if is_shared else maxsize)
        self._usual = _Shares(most - kept if is_shared else maxsize)
        self._among = _Shares(size // 4 if is_shared else maxsize)

    @asynccontextmanager
    async def transaction(
        self, tenant_id: UUID, *, among: str | None = None, is_stop: bool = False
    ) -> AsyncIterator[AsyncSession]:
        """Commit at the end of the block, roll back where it raises. `among` names those of the tenant that `alone`
        waits for; one that `is_stop` ends what others may do, and does not wait for the tenant's usual share.
        """
        with in_trace("app"):
            async with (
                nullcontext() if among is None else self._among.one_of(tenant_id),
                nullcontext() if is_stop else self._usual.one_of(tenant_id),
                self._all.one_of(tenant_id),
                session_of(self._engine) as session,
                session.begin(),
            ):
                if among is None:
                    await session.execute(_SET_TENANT, {"tenant_id": str(tenant_id)})
                else:
                    lock = _lock_of(tenant_id, among)
                    await session.execute(_SET_TENANT_AMONG, {"tenant_id": str(tenant_id), "among": lock})
                yield session

    @property
    def connections(self) -> tuple[int, int]:
        """How many are in use, and how many there may be."""
        return connections(self._engine)

    async def ping(self) -> None:
        """Raise what the driver raises where the database does not answer."""
        async with self._engine.connect() as connection:
            await connection.execute(text("select 1"))

    async def dispose(self) -> None:
        """Close every pooled connection."""
        await self._engine.dispose()
