"""Structured logs: JSON on stderr, or a readable form in a terminal. No query text and no secret goes in."""

from __future__ import annotations

import logging
import sys
from typing import Final

import structlog

# Libraries that would write queries, tool arguments or connection strings.
_TAMED: Final = (
    "mcp_use",
    "mcp",
    "httpx",
    "httpcore",
    "openai",
    "langchain",
    "langsmith",
    "asyncio",
    "alembic",
)


def configure(level: str) -> None:
    """Send our own and the libraries' logs through one renderer, libraries from warnings on."""
    threshold = logging.getLevelNamesMapping()[level.upper()]
    shared: list[structlog.typing.Processor] = [
        structlog.contextvars.merge_contextvars,
        structlog.processors.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
    ]
    # As text, never with the local variables of its frames, which is where the secrets are.
    shared.append(structlog.processors.format_exc_info)
    renderer = structlog.dev.ConsoleRenderer() if sys.stderr.isatty() else structlog.processors.JSONRenderer()
    structlog.configure(
        processors=[*shared, renderer],
        wrapper_class=structlog.make_filtering_bound_logger(threshold),
        logger_factory=structlog.PrintLoggerFactory(sys.stderr),
        cache_logger_on_first_use=False,
    )
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=shared,
            processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, renderer],
        )
    )
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(max(threshold, logging.INFO))
    for name in _TAMED:
        logger = logging.getLogger(name)
        logger.handlers.clear()
        logger.propagate = True
        logger.setLevel(logging.WARNING)
