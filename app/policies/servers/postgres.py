"""The section of a server of the template `postgres`."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import AfterValidator, Field, StringConstraints, WithJsonSchema

from app.policies.sections import SecretReference
from app.policies.servers.declared import Server

# For editors; what a start compiles counts no further, since all letters of the world 63 times over take it 50 ms.
_NAME = r"[^\W\d][\w$]{0,62}"
_LONGEST = 63
_LETTERS = r"[^\W\d][\w$]*"


def _some(schemas: tuple[str, ...]) -> tuple[str, ...]:
    if not schemas:
        raise ValueError("must name at least one schema")
    for schema in schemas:
        if schema.startswith("pg_") or schema == "information_schema":
            raise ValueError(f"{schema} is Postgres' own")
    return schemas


def _short(name: str) -> str:
    if max(map(len, name.split("."))) > _LONGEST:
        raise ValueError(f"has a name of more than {_LONGEST} characters")
    return name


SchemaName = Annotated[
    str,
    StringConstraints(pattern=rf"^{_LETTERS}$"),
    AfterValidator(_short),
    WithJsonSchema({"type": "string", "pattern": rf"^{_NAME}$"}),
]
SchemaNames = Annotated[tuple[SchemaName, ...], AfterValidator(_some), Field(max_length=20)]
TableName = Annotated[
    str,
    StringConstraints(pattern=rf"^({_LETTERS}\.)?{_LETTERS}$"),
    AfterValidator(_short),
    WithJsonSchema({"type": "string", "pattern": rf"^({_NAME}\.)?{_NAME}$"}),
]


class PostgresServer(Server):
    """One database, read as a role that can do no more than is said here.

    `blocked_tables` are `name` or `schema.name`, in any case; `connect_timeout_s` and `statement_timeout_s` are
    seconds; `max_connections` is the role's limit as well; `max_rows` are those of one answer.
    """

    only_reading: ClassVar[frozenset[str]] = frozenset({"list_tables", "describe_table", "query"})
    template: Literal["postgres"]
    """One database, read as a role that can do no more than the policy says."""
    dsn: SecretReference
    """The secret that holds the address of the database and its role."""
    readonly: Literal[True] = True
    """Only true: nothing is written."""
    allowed_schemas: SchemaNames
    """The schemas that may be read."""
    blocked_tables: Annotated[tuple[TableName, ...], Field(max_length=200)] = ()
    """Tables that may not be read: `name` in any schema, or `schema.name`; capitals make no difference."""
    connect_timeout_s: int = Field(default=30, ge=1, le=30)
    """Seconds until a connection must stand, at most."""
    statement_timeout_s: int = Field(default=15, ge=1, le=25)
    """Seconds of one statement."""
    max_connections: int = Field(default=5, ge=1, le=20)
    """Connections at once; the role's own limit must be no higher."""
    max_rows: int = Field(default=200, ge=1, le=1000)
    """Rows of one answer."""
