"""An MCP server that reads one database. Untrusted like any other: it imports nothing of `app`.

    PGHOST= PGPORT= PGDATABASE= PGUSER= PGPASSWORD= python -I /srv/server.py --schema public --block users ...

What it may read is for the database to say: before it lists its tools, and again every minute, it compares what its
role may do with the policy (privileges.sql, beside it) and refuses to serve where that is more. What it does beyond
that is a second line: each call has a connection of its own, one statement, a transaction that only reads and is never
committed, and bounds on time, rows and bytes. Each call leaves a line of JSON on stderr, the server's own journal:
{"seq", "tool", "outcome"}, with "reason" where the outcome is "refused". What was asked and what was read is left out,
so that of an error of the database's own, whose words hold either, only its code is there.
"""

from __future__ import annotations

import argparse
import json
import math
import ssl
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Final

import anyio
import asyncpg
from asyncpg.prepared_stmt import PreparedStatement
from mcp import types
from mcp.server.lowlevel import Server
from mcp.server.stdio import stdio_server
from mcp.shared.exceptions import McpError

# The code by which Bulkhead knows that it is told why (app/servers/live.py).
REFUSED: Final = -32050
# Below the 20 seconds of a start and the 30 of a call, with what closing takes: a server that is late is ended, and
# every call that it has at the time with it.
START_S: Final = 15
CALL_S: Final = 26
RECHECK_S: Final = 60
OLDEST: Final = 150_000
SHOWN: Final = 60_000
SHOWN_OF_VALUE: Final = 2_000
SHOWN_OF_LIST: Final = 100
SHOWN_OF_ERROR: Final = 500
SHOWN_FINDINGS: Final = 100
LONGEST_SQL: Final = 20_000
BUSY_S: Final = 0.3
CLOSE_S: Final = 1
FAULTS: Final = (asyncpg.PostgresError, asyncpg.InterfaceError, asyncpg.InternalClientError)
# Why is for an admin, to whom host and role may be named.
NO_WAY: Final = "the database cannot be reached, or lets nobody in"
PRIVILEGES: Final = Path(__file__).with_name("privileges.sql")

TABLES: Final = """
select n.nspname as schema, c.relname as name,
  case c.relkind when 'v' then 'view' when 'm' then 'materialized view' when 'f' then 'foreign table' else 'table' end
    as kind, nullif(c.reltuples, -1)::bigint as about_rows, obj_description(c.oid, 'pg_class') as comment
from pg_class c join pg_namespace n on n.oid = c.relnamespace
where n.nspname = any ($1::text[]) and c.relkind in ('r', 'p', 'v', 'm', 'f') and not c.relispartition
  and (has_table_privilege(c.oid, 'SELECT') or has_any_column_privilege(c.oid, 'SELECT'))
order by 1, 2"""
COLUMNS: Final = """
select a.attname as name, format_type(a.atttypid, a.atttypmod) as type, not a.attnotnull as is_nullable,
  exists (select from pg_index i where i.indrelid = c.oid and i.indisprimary and a.attnum = any (i.indkey)) as is_key,
  col_description(c.oid, a.attnum) as comment
from pg_class c join pg_namespace n on n.oid = c.relnamespace join pg_attribute a on a.attrelid = c.oid
where n.nspname = any ($1::text[]) and n.nspname = $2 and c.relname = $3 and a.attnum > 0 and not a.attisdropped
  and c.relkind in ('r', 'p', 'v', 'm', 'f') and has_column_privilege(c.oid, a.attnum, 'SELECT')
order by a.attnum"""


class Refusal(Exception):
    """A call that comes to nothing, with the reason for the model, and the one for the journal where that differs."""

    def __init__(self, reason: str, noted: str = "") -> None:
        super().__init__(reason)
        self.noted = noted or reason


class Unfit(Exception):
    """Why nothing is served, for an admin."""


@dataclass(frozen=True, slots=True)
class Policy:
    """What the role may do, and how much of the database one call may take; times in seconds."""

    schemas: list[str]
    blocked: list[str]
    connections: int
    connect_s: int
    statement_s: int
    rows: int


@dataclass(frozen=True, slots=True)
class Answer:
    columns: list[str]
    rows: list[list[Any]]
    is_cut: bool

    def told(self) -> str:
        """JSON, a row a line."""
        lines = [f'{{"columns": {written(self.columns)},', '"rows": [']
        lines.append(",\n".join(map(written, self.rows)))
        return "\n".join([*lines, f'], "is_cut": {json.dumps(self.is_cut)}}}'])


def written(row: Sequence[Any]) -> str:
    return json.dumps(row, ensure_ascii=False)


def plain(value: object) -> object:
    """As JSON can say it; what is long is shown in part."""
    if value is None or isinstance(value, bool | int) or (isinstance(value, float) and math.isfinite(value)):
        return value
    if isinstance(value, list | tuple):
        return [plain(item) for item in value[:SHOWN_OF_LIST]]
    text = f"\\x{value[:SHOWN_OF_VALUE].hex()}" if isinstance(value, bytes) else str(value)
    return text if len(text) <= SHOWN_OF_VALUE else f"{text[:SHOWN_OF_VALUE]}... ({len(text)} characters)"


class Source:
    """The database. Nothing of one call, no setting and no connection, is there for the next."""

    def __init__(self, policy: Policy, tls: ssl.SSLContext | None) -> None:
        self._policy = policy
        self._tls = tls
        self._room = anyio.Semaphore(policy.connections)
        self._checked_at = -float("inf")

    async def check(self) -> None:
        """Raise Unfit where the role may do more than the policy says, or where that cannot be known."""
        try:
            with anyio.fail_after(START_S):
                async with self._connected() as connection:
                    await self._compare(connection)
        except Refusal as refused:
            raise Unfit(refused.noted) from None
        except TimeoutError:
            raise Unfit("the database does not answer in time") from None
        except (*FAULTS, OSError) as error:
            raise Unfit(f"what its role may do cannot be known: {short(error)}") from None

    async def read(self, sql: str, *arguments: object, most: int | None = None) -> Answer:
        """Raise Refusal where the database does, or where it takes too long."""
        try:
            with anyio.fail_after(CALL_S):
                async with self._connected() as connection:
                    if time.monotonic() - self._checked_at > RECHECK_S:
                        await self._compare(connection)
                    async with self._reading(connection):
                        statement = await connection.prepare(sql)
                        return await self._rows(statement, arguments, min(most or self._policy.rows, self._policy.rows))
        except TimeoutError:
            raise Refusal("the database does not answer in time") from None
        except Unfit:
            raise Refusal("the database's role may do more than the policy says; an admin must see to it") from None
        except (*FAULTS, OSError) as error:
            raise Refusal(f"the database refuses: {short(error)}", f"the database refuses: {code(error)}") from None
        except MemoryError:
            raise Refusal("there is a value that is too long to be read") from None
        except (ValueError, OverflowError):
            raise Refusal("there is a value that cannot be shown: cast it to text") from None

    @asynccontextmanager
    async def _connected(self) -> AsyncIterator[asyncpg.Connection[asyncpg.Record]]:
        async with self._room:
            connection = await self._connect()
            try:
                yield connection
            finally:
                with anyio.move_on_after(CLOSE_S, shield=True), suppress(*FAULTS, OSError):
                    await connection.close()

    async def _connect(self) -> asyncpg.Connection[asyncpg.Record]:
        """Wait while others have all the connections of the role, but no longer than connecting may take."""
        try:
            with anyio.fail_after(self._policy.connect_s):
                while True:
                    try:
                        return await asyncpg.connect(ssl=self._tls or False, statement_cache_size=0)
                    except asyncpg.TooManyConnectionsError:
                        await anyio.sleep(BUSY_S)
        except TimeoutError:
            raise Refusal("the database cannot be reached in time, or all connections of its role are taken") from None
        except ssl.SSLError as error:
            raise Refusal(NO_WAY, f"the database's certificate is not trusted: {short(error)}") from None
        except FAULTS as error:
            raise Refusal(NO_WAY, f"the database lets nobody in: {short(error)}") from None
        except OSError as error:
            noted = f"the database cannot be reached, see the egress relay's record: {short(error)}"
            raise Refusal(NO_WAY, noted) from None

    @asynccontextmanager
    async def _reading(self, connection: asyncpg.Connection[asyncpg.Record]) -> AsyncIterator[None]:
        """A transaction that reads. It ends with its connection, so that not even a message to listeners is sent."""
        limit = 1000 * self._policy.statement_s
        # The select takes a snapshot, and after that a transaction that reads cannot become one that writes.
        await connection.execute(
            f"begin read only; set local statement_timeout = {limit}; set local lock_timeout = {limit};"
            " set local client_connection_check_interval = 1000; set local application_name = 'bulkhead'; select 1"
        )
        yield

    async def _rows(self, statement: PreparedStatement[Any], arguments: Sequence[object], most: int) -> Answer:
        columns = [column.name for column in statement.get_attributes()]
        if not columns:
            raise Refusal("only a statement that gives rows is run")
        rows: list[list[Any]] = []
        size = len(written(columns))
        # All by one message: its statement may change the time limit, but only for a second one.
        async for record in statement.cursor(*arguments, prefetch=most + 1):
            rows.append([plain(value) for value in record.values()])
            size += len(written(rows[-1]))
            if size > SHOWN and len(rows) == 1:
                raise Refusal("its first row is too long to be shown: ask for fewer columns")
            if size > SHOWN or len(rows) > most:
                return Answer(columns, rows[:-1], is_cut=True)
        if size > SHOWN:
            raise Refusal("its columns have too long names to be shown: ask for fewer")
        return Answer(columns, rows, is_cut=False)

    async def _compare(self, connection: asyncpg.Connection[asyncpg.Record]) -> None:
        await connection.execute(f"set search_path = pg_catalog; set statement_timeout = {1000 * START_S}")
        ((version, user, role),) = await connection.fetch(
            "select current_setting('server_version_num')::int, session_user::text, current_user::text"
        )
        if version < OLDEST or user != role:
            raise Unfit("only Postgres 15 or later is known, and only as the role that has logged in")
        policy = self._policy
        found = await connection.fetch(PRIVILEGES.read_text(), user, policy.schemas, policy.blocked, policy.connections)
        if found:
            raise Unfit(told(user, [(row["fact"], row["remedy"]) for row in found]))
        await connection.execute("reset all")
        self._checked_at = time.monotonic()


def told(role: str, findings: list[tuple[str, str]]) -> str:
    """The statements that make it fit, each after what it is for."""
    lines = [f"its role {printable(role)} may do more than the policy says. An admin of the database runs:"]
    for fact, remedy in findings[:SHOWN_FINDINGS]:
        lines += ["", f"-- {printable(fact)}", f"{remedy};"]
    if len(findings) > SHOWN_FINDINGS:
        lines += ["", f"-- and {len(findings) - SHOWN_FINDINGS} more"]
    return "\n".join(lines)


def printable(text: str) -> str:
    """In one line: whoever made an object has chosen its name."""
    return "".join(letter if letter.isprintable() else "?" for letter in text)


def short(error: BaseException) -> str:
    return printable(str(error) or type(error).__name__)[:SHOWN_OF_ERROR]


def code(error: BaseException) -> str:
    """Postgres' own, such as 42501, and else the kind of error."""
    return str(getattr(error, "sqlstate", None) or type(error).__name__)


def text_argument(arguments: Mapping[str, Any], name: str, longest: int) -> str:
    text = arguments.get(name)
    if not isinstance(text, str) or not 0 < len(text) <= longest or "\0" in text:
        raise Refusal(f"'{name}' must be a text of at most {longest} characters")
    return text


def tools(policy: Policy) -> list[types.Tool]:
    schema = {"type": "string", "enum": policy.schemas}
    name = {"type": "string", "minLength": 1, "maxLength": 63}
    sql = {"type": "string", "minLength": 1, "maxLength": LONGEST_SQL, "description": "One statement that gives rows."}
    rows = {"type": "integer", "minimum": 1, "maximum": policy.rows, "default": policy.rows}
    listed: list[tuple[str, str, dict[str, Any], list[str]]] = [
        ("list_tables", "List the tables and views that can be read.", {}, []),
        (
            "describe_table",
            "Give the columns of a table or view.",
            {"schema": schema, "table": name},
            ["schema", "table"],
        ),
        ("query", "Read from the database by SQL, as Postgres has it.", {"sql": sql, "max_rows": rows}, ["sql"]),
    ]
    return [
        types.Tool(
            name=tool,
            description=description,
            inputSchema={
                "type": "object",
                "properties": properties,
                "required": required,
                "additionalProperties": False,
            },
            annotations=types.ToolAnnotations(readOnlyHint=True, openWorldHint=False),
        )
        for tool, description, properties, required in listed
    ]


class Desk:
    """Takes calls: checks the arguments, does the work, keeps the journal."""

    def __init__(self, policy: Policy, source: Source) -> None:
        self._policy = policy
        self._source = source
        self._calls = 0
        self._work: dict[str, Callable[[Mapping[str, Any]], Awaitable[Answer]]] = {
            "list_tables": self._list_tables,
            "describe_table": self._describe_table,
            "query": self._query,
        }

    async def list_tools(self, _: types.ListToolsRequest) -> types.ServerResult:
        try:
            await self._source.check()
        except Unfit as reason:
            raise McpError(types.ErrorData(code=REFUSED, message=str(reason))) from None
        return types.ServerResult(types.ListToolsResult(tools=tools(self._policy)))

    async def call_tool(self, request: types.CallToolRequest) -> types.ServerResult:
        name, refused = request.params.name, None
        try:
            text = (await self._work.get(name, self._unknown)(request.params.arguments or {})).told()
        except Refusal as reason:
            text, refused = str(reason), reason.noted
        self._journal(name, refused)
        content: list[types.ContentBlock] = [types.TextContent(type="text", text=text)]
        return types.ServerResult(types.CallToolResult(content=content, isError=refused is not None))

    async def _unknown(self, _: Mapping[str, Any]) -> Answer:
        raise Refusal("there is no such tool")

    async def _list_tables(self, _: Mapping[str, Any]) -> Answer:
        return await self._source.read(TABLES, self._policy.schemas)

    async def _describe_table(self, arguments: Mapping[str, Any]) -> Answer:
        schema, table = (text_argument(arguments, name, 63) for name in ("schema", "table"))
        answer = await self._source.read(COLUMNS, self._policy.schemas, schema, table)
        if not answer.rows:
            raise Refusal("there is no such table that can be read")
        return answer

    async def _query(self, arguments: Mapping[str, Any]) -> Answer:
        most = arguments.get("max_rows", self._policy.rows)
        if type(most) is not int or most < 1:
            raise Refusal("'max_rows' must be a positive number")
        return await self._source.read(text_argument(arguments, "sql", LONGEST_SQL), most=most)

    def _journal(self, name: str, refused: str | None) -> None:
        self._calls += 1
        line: dict[str, object] = {"seq": self._calls, "tool": name[:63]}
        line |= {"outcome": "ok"} if refused is None else {"outcome": "refused", "reason": refused}
        sys.stderr.write(json.dumps(line) + "\n")
        sys.stderr.flush()


async def serve(desk: Desk) -> None:
    server: Server[object] = Server("postgres", version="1")
    # Registered without the decorators: they check arguments before us, and a call must not miss the journal.
    server.request_handlers[types.ListToolsRequest] = desk.list_tools
    server.request_handlers[types.CallToolRequest] = desk.call_tool
    async with stdio_server() as (incoming, outgoing):
        await server.run(incoming, outgoing, server.create_initialization_options())


def trusted(ca_file: Path | None) -> ssl.SSLContext:
    if ca_file is not None:
        return ssl.create_default_context(cafile=ca_file)
    from httpx import create_ssl_context  # noqa: PLC0415  the public authorities lie among the packages, if they count

    return create_ssl_context()


def main() -> None:
    parser = argparse.ArgumentParser(allow_abbrev=False)
    parser.add_argument("--schema", action="append", required=True)
    parser.add_argument("--block", action="append", default=[])
    for name in ("connections", "connect-timeout", "statement-timeout", "rows"):
        parser.add_argument(f"--{name}", type=int, required=True)
    parser.add_argument("--plain", action="store_true", help="without TLS")
    parser.add_argument("--ca-file", type=Path)
    given = parser.parse_args()
    policy = Policy(
        given.schema,
        given.block,
        given.connections,
        connect_s=given.connect_timeout,
        statement_s=given.statement_timeout,
        rows=given.rows,
    )
    desk = Desk(policy, Source(policy, None if given.plain else trusted(given.ca_file)))
    anyio.run(partial(serve, desk))


if __name__ == "__main__":
    main()
