"""What every template's section of a policy has."""

from __future__ import annotations

from typing import Literal

from app.policies.sections import Section


class Server(Section):
    """`isolation` is what a live server, and what it may write to, are shared by."""

    isolation: Literal["tenant", "user", "run"] = "tenant"
    """Who shares a live server and what it writes: all of the tenant, one user, or one run."""
