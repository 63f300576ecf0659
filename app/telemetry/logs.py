"""Structured logs: JSON on stderr, or a readable form in a terminal. No query text and no secret goes in."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Final
from uuid import UUID

import structlog
from structlog.stdlib import ProcessorFormatter

# mcp writes into its warnings what a server has said, which may be megabytes.
_LONGEST: Final = 10_000
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
    "azure",
    "boto3",
    "botocore",
    "msal",
    "urllib3",
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
        ProcessorFormatter(
            foreign_pre_chain=[*shared, _shortened],
            processors=[ProcessorFormatter.remove_processors_meta, renderer],
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


def _shortened(_logger: Any, _method: str, event: structlog.typing.EventDict) -> structlog.typing.EventDict:
    return {name: value[:_LONGEST] if isinstance(value, str) else value for name, value in event.items()}


@contextmanager
def redacting(redact: Callable[[UUID, str], str]) -> Iterator[None]:
    """Inside the block a line that names a tenant goes out without what `redact` takes out of that tenant's texts.

    A line of a library, too: what is logged for a caller names the tenant, whoever logs it.
    """

    def clean(_logger: Any, _method: str, event: structlog.typing.EventDict) -> structlog.typing.EventDict:
        tenant_id = event.get("tenant_id")
        if tenant_id is None:
            return event
        of = UUID(str(tenant_id))
        return {name: redact(of, value) if isinstance(value, str) else value for name, value in event.items()}

    *before, renderer = structlog.get_config()["processors"]
    structlog.configure(processors=[*before, clean, renderer])
    formatters = [handler.formatter for handler in logging.getLogger().handlers]
    of_libraries = [formatter for formatter in formatters if isinstance(formatter, ProcessorFormatter)]
    for formatter in of_libraries:
        formatter.processors = (*formatter.processors[:-1], clean, formatter.processors[-1])
    try:
        yield
    finally:
        remaining = [processor for processor in structlog.get_config()["processors"] if processor is not clean]
        structlog.configure(processors=remaining)
        for formatter in of_libraries:
            formatter.processors = tuple(each for each in formatter.processors if each is not clean)
