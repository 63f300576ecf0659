"""What the commands work on: the settings, and the database as the sealer, whether or not a service runs on it."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

import typer
from pydantic import ValidationError

from app.db import DatabaseUrls, database_urls
from app.embedded.demo import read_env
from app.embedded.machine import Machine
from app.errors import ConfigurationError
from app.settings import Settings, SettingsError, lost_line, unknown_names

# What SQLAlchemy and the drivers put before the words of the database.
_OF_LIBRARIES: Final = re.compile(r"(\([\w.]+\) )?(<class '[\w.]+'>: )?")


def unusable(error: Exception) -> ConfigurationError:
    """What an operator has to mend at the database, in the first line of its own words."""
    said = _OF_LIBRARIES.sub("", str(error), count=1).partition("\n")[0]
    return ConfigurationError(f"The database cannot be used: {said}")


def load_settings() -> Settings:
    """Those of the environment and of .env; raise ConfigurationError, which names what is wrong and not its value."""
    if (line := lost_line(Path(".env"))) is not None:
        raise ConfigurationError(f"Line {line} of .env is not NAME=value.")  # its text may be a secret
    if unknown := unknown_names(read_env(Path(".env"))):
        raise ConfigurationError(f"There is no setting {', '.join(sorted(unknown))}: .env or the environment names it.")
    try:
        return Settings()
    except ValidationError as error:
        faults = "; ".join(
            ": ".join(
                [*(f"BULKHEAD_{name}".upper() for name in fault["loc"][:1]), fault["msg"].removeprefix("Value error, ")]
            )
            for fault in error.errors()
        )
        raise ConfigurationError(f"The settings are not valid: {faults}.") from None
    except SettingsError as error:  # where a field takes JSON and the text is none; its message has the field's name
        name = str(error).partition('"')[2].partition('"')[0]
        raise ConfigurationError(f"The settings are not valid: BULKHEAD_{name.upper()}: is not JSON.") from None


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
