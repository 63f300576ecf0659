"""What the commands work on: the settings, and the database as the sealer, whether or not a service runs on it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import typer

from app.db import DatabaseUrls, database_urls
from app.embedded.machine import Machine
from app.errors import ConfigurationError
from app.settings import Settings


def read_settings(context: typer.Context) -> Settings:
    """Those of the command, with what `bulkhead up` made for itself where it did."""
    settings: Settings = context.obj()
    machine = Machine(settings)
    return machine.settings(settings) if machine.is_made() else settings


@contextmanager
def reached(settings: Settings) -> Iterator[DatabaseUrls]:
    """The URLs of the configured database, or of the embedded Postgres, which is started where it does not run."""
    configured, machine = database_urls(settings), Machine(settings)
    if configured is not None:
        yield configured
    elif not machine.is_made():
        raise ConfigurationError("Set BULKHEAD_DATABASE_APP_URL, _PLATFORM_URL and _SEALER_URL, or name an --export.")
    elif machine.holder() is not None:
        yield machine.running_urls()
    else:
        with machine.held(), machine.database(settings) as urls:
            yield urls
