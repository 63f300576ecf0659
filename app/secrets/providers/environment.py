"""Secrets from the environment of the service, as it was when it started."""

from __future__ import annotations

from collections.abc import Mapping

from app.secrets.locators import EnvironmentLocator
from app.secrets.providers.reading import Outcome, Unreadable


class Environment:
    """`variables` are those that the operator has put there for tenants, and no others."""

    def __init__(self, variables: Mapping[str, str]) -> None:
        self._variables = dict(variables)

    async def read(self, locator: EnvironmentLocator) -> str:
        """The text as it is; raise Unreadable."""
        try:
            return self._variables[locator.variable]
        except KeyError:
            raise Unreadable(Outcome.MISSING) from None
