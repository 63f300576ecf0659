"""What can go wrong with a tool server, as its callers see it."""

from __future__ import annotations

from app.errors import Conflict, Unavailable


class ServerUnavailable(Unavailable):
    """The tool server does not start."""

    code = "server_unavailable"


class ServerFailed(ServerUnavailable):
    """The tool server does not start."""  # by its own doing: what fails so again and again has to wait


class ServerRefused(ServerFailed):
    """The tool server does not serve, and says why; that is for an admin of the tenant, who has to mend it."""

    def for_callers(self, server: str) -> str:
        """What anyone may know."""
        return f"The tool server {server!r} does not start. An admin is told why by checking the policy."


class PublishUnderWay(Conflict):
    """The tenant is publishing a policy already."""

    code = "publish_under_way"


class ToolTimedOut(Exception):
    """The tool server did not answer in time; it is replaced."""


class ServerLost(Exception):
    """The tool server ended during the call; it is replaced."""
