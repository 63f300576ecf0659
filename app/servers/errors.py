"""What can go wrong with a tool server, as its callers see it."""

from __future__ import annotations

from app.errors import Unavailable


class ServerUnavailable(Unavailable):
    """The tool server does not start."""

    code = "server_unavailable"


class ToolTimedOut(Exception):
    """The tool server did not answer in time; it is replaced."""


class ServerLost(Exception):
    """The tool server ended during the call; it is replaced."""
