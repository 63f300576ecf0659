"""The SQL that makes a role which fits a policy, for an admin of the database to run with psql."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from app.errors import ConfigurationError

_PRIVILEGES: Final = Path(__file__).with_name("privileges.sql")
_QUOTE: Final = "$bulkhead$"

_SCRIPT: Final = """\
-- Makes the role {identifier} one that reads {schemas} and nothing else.
-- Run it with psql in the database that it is for, as a superuser, as often as you like: again after tables change.
-- It tells every statement that it runs. What it takes from PUBLIC it takes from other roles, too: give it back to
-- those that need it. To see all that without doing it, end with ROLLBACK instead of COMMIT.
\\set ON_ERROR_STOP on
BEGIN;
SET LOCAL search_path = pg_catalog;
SET LOCAL client_min_messages = notice;
DO {quote}
DECLARE
  statement text;
BEGIN
  IF {name} IN (current_user, session_user) THEN
    RAISE EXCEPTION 'this takes away what the role can do: it is not for your own';
  END IF;
  IF NOT EXISTS (SELECT FROM pg_roles WHERE rolname = {name}) THEN
    CREATE ROLE {identifier} LOGIN;
  END IF;
  FOR statement IN
    SELECT format('ALTER ROLE %I LOGIN', {name})
    -- Not bounds: a session may change them.
    UNION ALL SELECT format('ALTER ROLE %I SET default_transaction_read_only = on', {name})
    UNION ALL SELECT format('ALTER ROLE %I SET statement_timeout = ''60s''', {name})
    UNION ALL SELECT format('GRANT CONNECT ON DATABASE %I TO %I', current_database(), {name})
    UNION ALL SELECT format('GRANT USAGE ON SCHEMA %I TO %I', nspname, {name})
      FROM pg_namespace WHERE nspname = ANY ({schema_list})
    UNION ALL SELECT format('GRANT SELECT ON ALL TABLES IN SCHEMA %I TO %I', nspname, {name})
      FROM pg_namespace WHERE nspname = ANY ({schema_list})
  LOOP
    RAISE NOTICE '%', statement;
    EXECUTE statement;
  END LOOP;
  -- And now what is too much, in the words that a server of this policy would refuse the role with.
  FOR statement IN
    SELECT remedy FROM ({privileges}) AS findings
  LOOP
    RAISE NOTICE '%', statement;
    EXECUTE statement;
  END LOOP;
END
{quote};
-- What is left to do by hand: no row, if all is well.
{privileges};
COMMIT;
-- And then its password, which psql asks for: \\password {identifier}
"""


def script(name: str, *, schemas: Sequence[str], blocked: Sequence[str], connections: int) -> str:
    """For psql. Tables are `name` or `schema.name`. ConfigurationError for what can be no name."""
    values = {
        "$1": f"{_literal(name)}",
        "$2": f"{_array(schemas)}",
        "$3": f"{_array(blocked)}",
        "$4": str(connections),
    }
    privileges = re.sub(r"\$[1-4]", lambda found: values[found[0]], _statement())
    return _SCRIPT.format(
        name=_literal(name),
        identifier=_identifier(name),
        schemas=", ".join(map(_identifier, schemas)),
        schema_list=_array(schemas),
        privileges=privileges.strip(),
        quote=_QUOTE,
    )


def _statement() -> str:
    """Without its comments, which speak of parameters."""
    lines = _PRIVILEGES.read_text().splitlines()
    return "\n".join(line for line in lines if not line.lstrip().startswith("--"))


def _array(names: Sequence[str]) -> str:
    return f"ARRAY[{', '.join(map(_literal, names))}]::text[]"


def _literal(text: str) -> str:
    quoted = _checked(text, longest=2 * 63 + 1).replace("'", "''")
    return f"'{quoted}'"


def _identifier(text: str) -> str:
    quoted = _checked(text, longest=63).replace('"', '""')
    return f'"{quoted}"'


def _checked(name: str, *, longest: int) -> str:
    # A backslash would be psql's or an escape, where a server still takes those in plain literals.
    if not name or not name.isprintable() or "\\" in name or _QUOTE in name or len(name.encode()) > longest:
        raise ConfigurationError(f"{name!r} is not a name for a role, a schema or a table.")
    return name
