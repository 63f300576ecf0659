"""The section of a server of the template `browser`."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from app.policies.sections import Hosts
from app.policies.servers.declared import Server


class BrowserServer(Server):
    """A browser that reaches `allowed_domains` (`name` or `name:port`) and nothing else; `timeout_s` is of one call."""

    template: Literal["browser"]
    """A headless Chromium, driven by @playwright/mcp, for pages of the domains named, over https."""
    allowed_domains: Hosts
    """Whole host names in lower case, with a port where it is not 443: all that is connected to."""
    block_private_ips: bool = True
    """False: it may also reach the private networks that the operator allows this template; there must be some."""
    javascript: bool = True
    """Whether pages run scripts; without, the tool that evaluates JavaScript is not there either."""
    timeout_s: int = Field(default=30, ge=1, le=60)
    """Of one call, in seconds; the platform's bound on a call holds as well."""
    isolation: Literal["run"] = "run"
    """Each run has a browser of its own, and so no cookie of another."""
    stateful: Literal[True] = True
    """Only true: its pages are gone with it."""
