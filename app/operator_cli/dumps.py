"""`bulkhead db dump|restore`: the embedded Postgres' database as a file, and back."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from app.audit_cli.ground import read_settings
from app.db import database_urls
from app.embedded import dumps
from app.embedded.machine import Machine
from app.errors import ConfigurationError
from app.settings import Settings

Server = Annotated[
    Path | None, typer.Option(help="The folder with the program `postgres` that made the data, if it is not ours.")
]


def dump(context: typer.Context, file: Path, server: Server = None) -> None:
    """Write the embedded Postgres' database to a new file, whether or not a service runs on it."""
    settings = read_settings(context)
    dumps.dump(_machine(settings), file, server=server)
    typer.echo(f"{file} holds the database. The root keys, the workspaces and the exported heads are not in it.")


def restore(context: typer.Context, file: Path) -> None:
    """Make the embedded Postgres from such a file, on a machine that has none."""
    settings = read_settings(context)
    machine = _machine(settings)
    if not machine.is_made():
        raise ConfigurationError(
            f"Put machine.env of the machine that was backed up into {machine.directory} first: without its root keys"
            " nothing that is sealed in the file opens."
        )
    dumps.restore(machine, file)
    typer.echo(f"The database of {file} is in {machine.directory}.")


def _machine(settings: Settings) -> Machine:
    if database_urls(settings) is not None:
        raise ConfigurationError("This is for the embedded Postgres; for a database of your own use its own pg_dump.")
    return Machine(settings)
