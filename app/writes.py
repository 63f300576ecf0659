"""Writes that nobody waits for an answer to: they gather in their transaction, and go to the database as one statement.

A round trip costs more than most of what is written. Whatever else the transaction executes sends first what waits, so
that it finds it done, as SQLAlchemy's own autoflush does; what is left goes with the commit. Parts of one statement see
nothing of each other, but foreign keys are checked at its end: a row and what refers to it may go together.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import count
from typing import Any, Final, Protocol

from sqlalchemy import CursorResult, Table, event
from sqlalchemy.dialects import postgresql
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession
from sqlalchemy.orm import ORMExecuteState, Session, SessionTransaction

Row = Mapping[str, Any]
_DIALECT: Final = postgresql.dialect()  # type: ignore[no-untyped-call]  # as SQLAlchemy declares it


class Then(Protocol):
    """Told whether the transaction is known to be committed."""

    def __call__(self, *, is_committed: bool) -> None: ...


@dataclass(frozen=True, slots=True, eq=False)
class Insert:
    """Puts rows into a table. A row `r` has these columns of it and `more` parts, by SQL type, for `computed` ones.

    `failed` is told where a statement with such rows has failed.
    """

    table: Table
    columns: Sequence[str]
    more: Mapping[str, str]
    computed: Mapping[str, str]
    ending: str
    failed: Callable[[], object] | None

    @property
    def parts(self) -> tuple[str, ...]:
        """The names of what is in a row."""
        return (*self.columns, *self.more)

    def types(self) -> list[str]:
        """Of the parts, once all tables are there: that of a key is what it refers to."""
        own = [self.table.columns[name].type.compile(_DIALECT) for name in self.columns]
        return [*own, *self.more.values()]


@dataclass(frozen=True, slots=True, eq=False)
class Statement:
    """A statement that has rows as tables, each with its columns' SQL types; it begins with parts of a `with`."""

    text: str
    tables: Mapping[str, Mapping[str, str]]


def insert_into(
    table: Table,
    *columns: str,
    more: Mapping[str, str] | None = None,
    computed: Mapping[str, str] | None = None,
    ending: str = "",
    failed: Callable[[], object] | None = None,
) -> Insert:
    """Into these columns, or all of them; a row may have `more` parts, of which further columns are `computed`."""
    names = columns or tuple(table.columns.keys())
    return Insert(table, names, more or {}, computed or {}, ending, failed)


class Gathering(Session):
    """What a transaction of ours is made of beneath AsyncSession: it keeps the writes that wait."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.waiting: dict[Insert, list[Row]] = {}
        self.then: list[Then] = []
        self.is_committed = False

    def begin_nested(self) -> SessionTransaction:
        """What was written before a savepoint outlives it."""
        self.send()
        return super().begin_nested()

    def send(self) -> None:
        """All that waits."""
        if self.waiting:
            self.send_with(None, {})

    def send_with(self, last: Statement | None, tables: Mapping[str, Sequence[Row]]) -> CursorResult[Any]:
        """All that waits, and a statement that sees nothing of it, in one round trip; give the statement's result."""
        sent, self.waiting = self.waiting, {}
        values = [_arrays(insert.parts, rows) for insert, rows in sent.items()]
        if last is not None:
            values += [_arrays(types, tables[name]) for name, types in last.tables.items()]
        parameters = tuple(array for arrays in values for array in arrays)
        try:
            return self.connection().exec_driver_sql(_joined(tuple(sent), last), parameters)
        except Exception:
            for insert in sent:
                if insert.failed is not None:
                    insert.failed()
            raise


def _first(state: ORMExecuteState) -> None:
    state.session.send()  # type: ignore[attr-defined]  # it listens to no other


def _last(session: Gathering) -> None:
    session.send()


def _undone(session: Gathering, _transaction: SessionTransaction) -> None:
    session.waiting.clear()


def _committed(session: Gathering) -> None:
    session.is_committed = session.is_committed or not session.in_nested_transaction()


def _over(session: Gathering, transaction: SessionTransaction) -> None:
    if transaction.parent is None:
        for then in session.then:
            then(is_committed=session.is_committed)


_HEARD: Final[Mapping[str, Callable[..., None]]] = {
    "do_orm_execute": _first,
    "before_commit": _last,
    "after_soft_rollback": _undone,
    "after_commit": _committed,
    "after_transaction_end": _over,
}
for _name, _hear in _HEARD.items():
    event.listen(Gathering, _name, _hear)


def session_of(engine: AsyncEngine) -> AsyncSession:
    """One whose writes may wait."""
    return AsyncSession(engine, sync_session_class=Gathering, expire_on_commit=False, autoflush=False)


def later(session: AsyncSession, insert: Insert, *rows: Row) -> None:
    """Insert the rows with the next statement of the transaction, or with its commit."""
    gathering = _gathering(session)
    if rows:
        gathering.waiting.setdefault(insert, []).extend(rows)


def at_end(session: AsyncSession, then: Then) -> None:
    """Call once the transaction has ended, whichever way. A session of ours has but one."""
    _gathering(session).then.append(then)


async def send(session: AsyncSession) -> None:
    """Send what waits, for whoever is about to go on together with something that must see it."""
    gathering = _gathering(session)
    await session.run_sync(lambda _: gathering.send())


async def together(
    session: AsyncSession, statement: Statement, tables: Mapping[str, Sequence[Row]]
) -> CursorResult[Any]:
    """Execute it in one round trip with what waits, of which it sees nothing."""
    gathering = _gathering(session)
    return await session.run_sync(lambda _: gathering.send_with(statement, tables))


def _gathering(session: AsyncSession) -> Gathering:
    """Nothing waits in another session, where it would be lost."""
    gathering = session.sync_session
    if not isinstance(gathering, Gathering):
        raise TypeError(gathering)
    return gathering


def _arrays(parts: Iterable[str], rows: Sequence[Row]) -> list[list[Any]]:
    return [[row[name] for row in rows] for name in parts]


@lru_cache(maxsize=512)
def _joined(inserts: tuple[Insert, ...], last: Statement | None) -> str:
    """By their shape alone, so that the driver has it prepared."""
    numbers = count(1)
    parts = [_inserting(insert, numbers) for insert in inserts]
    if last is None and len(parts) == 1:
        return parts[0]
    named = [f"w{number} as ({part})" for number, part in enumerate(parts)]
    if last is None:
        return f"with {', '.join(named)} select"
    for name, types in last.tables.items():
        rows = _rows(types.values(), numbers)
        named.append(f"{name} ({', '.join(types)}) as (select * from {rows})")  # noqa: S608  our own names, as below
    return f"with {', '.join([*named, last.text])}"


def _inserting(insert: Insert, numbers: count[int]) -> str:
    into = ", ".join([*insert.columns, *insert.computed])
    made = ", ".join([*(f"r.{name}" for name in insert.columns), *insert.computed.values()])
    rows = f"{_rows(insert.types(), numbers)} as r ({', '.join(insert.parts)})"
    return f"insert into {insert.table.name} ({into}) select {made} from {rows} {insert.ending}"  # noqa: S608  our own names


def _rows(types: Iterable[str], numbers: count[int]) -> str:
    return f"unnest({', '.join(f'cast(${next(numbers)} as {type_}[])' for type_ in types)})"
