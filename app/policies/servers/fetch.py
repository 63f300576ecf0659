"""The section of a server of the template `fetch`."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from app.policies.sections import MB, Hosts, Size
from app.policies.servers.declared import Server


class FetchServer(Server):
    """Pages of the hosts named, over https; `max_response_size` in bytes, `allowed_hosts` as `name` or `name:port`."""

    template: Literal["fetch"]
    """Pages of the hosts named, as text, over https; it has no files."""
    allowed_hosts: Hosts
    """Whole host names in lower case, with a port where it is not 443."""
    max_response_size: Annotated[Size, Field(le=10 * MB)] = MB
    """How much of a page is read, in KB or MB, up to 10MB."""
