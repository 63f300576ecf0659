"""The guide's security events in the log, each under a name that stays; docs/observability.md lists them.

They name users, tools and rules by our ids and names. The guide logs the first hundred characters of a query; here a
text of a caller is never in the log, and its length stands there instead.
"""

from __future__ import annotations

import logging
from enum import StrEnum
from typing import Final

import structlog

from app.telemetry.metrics import VIOLATIONS

_log = structlog.get_logger()


class SecurityEvent(StrEnum):
    """What whoever watches the log looks for. `security.violation` says in `type` which."""

    AGENT_STARTED = "agent.started"
    AGENT_FINISHED = "agent.finished"
    TOOL_USED = "tool.used"
    VIOLATION = "security.violation"
    ERROR = "agent.error"


class Violation(StrEnum):
    """The kinds of refusals: the label of mcp_security_violations_total, and `type` in the log."""

    INVALID_QUERY = "invalid_query"
    RATE_LIMIT = "rate_limit"
    UNAUTHENTICATED = "unauthenticated"
    FORBIDDEN = "forbidden"
    TOOL_DENIED = "tool_denied"


_LEVELS: Final = {SecurityEvent.VIOLATION: logging.WARNING, SecurityEvent.ERROR: logging.ERROR}


def tell(event: SecurityEvent, **details: str | float | None) -> None:
    """Write it to the log, with the user, tenant, request and run that are bound. Ids and names of ours only."""
    _log.log(_LEVELS.get(event, logging.INFO), event.value, **details)


def refuse(kind: Violation, **details: str | float | None) -> None:
    """Count a refusal and write it to the log."""
    VIOLATIONS.labels(kind.value).inc()
    tell(SecurityEvent.VIOLATION, type=kind.value, **details)
