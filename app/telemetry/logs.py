"""Structured logs: JSON on stdout or in a file, a readable form in a terminal. No text of a caller or a tool goes in.

What callers, models and tool servers say reaches a log only through an exception's message or through a library's
line. So of an exception its type and its frames are kept, and of a library that might repeat such a text only where
it spoke.
"""

from __future__ import annotations

import atexit
import logging
import os
import re
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from itertools import islice
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Literal
from uuid import UUID

import structlog
from structlog.stdlib import ProcessorFormatter
from structlog.typing import EventDict, Processor

from app.telemetry import traces
from app.telemetry.lines import Descriptor, Lines, LogFile

# Whose lines are repeated, up to where they show a value: a bracket or a second line. All others only say where.
_TELLING: Final = re.compile(r"(app|alembic|asyncio|sqlalchemy|uvicorn)(\.|$)")
_VALUES: Final = re.compile(r"[\n(<\[{]")
_LONGEST: Final = 300
# They set levels and add handlers of their own when they are imported: mcp_use writes queries to stdout.
_TAMED: Final = (
    "mcp_use",
    "mcp",
    "httpx",
    "httpcore",
    "openai",
    "langchain",
    "langchain_core",
    "langchain_openai",
    "langgraph",
    "langsmith",
    "asyncio",
    "alembic",
    "azure",
    "boto3",
    "botocore",
    "hvac",
    "msal",
    "opentelemetry",
    "sqlalchemy",
    "urllib3",
    "uvicorn",
    "uvicorn.access",
)
_MOST_CAUSES: Final = 10
_MOST_FRAMES: Final = 1_000
_ExcInfo = tuple[type[BaseException], BaseException, TracebackType | None]


class _TamedLogger(logging.Logger):
    """A library's logger: it writes through ours alone and speaks from warnings on, whatever the library sets."""

    def setLevel(self, level: int | str) -> None:  # noqa: N802  logging's name
        number = logging.getLevelNamesMapping()[level] if isinstance(level, str) else level
        super().setLevel(max(number, logging.WARNING))

    def addHandler(self, hdlr: logging.Handler) -> None:  # noqa: N802  logging's name
        pass


class _Writer:
    """What structlog calls with a rendered line, whatever its level."""

    def __init__(self, lines: Lines) -> None:
        self._put = lines.put

    def __getattr__(self, _level: str) -> Callable[[str], None]:
        return self._put


class _Handler(logging.Handler):
    """Takes what libraries log: from warnings on, and never raises."""

    def __init__(self, lines: Lines) -> None:
        super().__init__()
        self._lines = lines
        self.addFilter(lambda record: record.levelno >= logging.WARNING or record.name.startswith("app."))

    def emit(self, record: logging.LogRecord) -> None:
        try:
            self._lines.put(self.format(record))
        except Exception:  # noqa: BLE001  a line that cannot be made must not end what it is about
            self._lines.put(f'{{"event": "logs.unreadable", "level": "error", "logger": "{type(record).__name__}"}}')


def configure(level: str, *, file: Path | None = None, stream: Literal["stdout", "stderr"] = "stdout") -> Lines:
    """Send our own and the libraries' lines to the file, or else to the stream, through one renderer.

    Raise OSError where the file cannot be opened.
    """
    threshold = logging.getLevelNamesMapping()[level.upper()]
    number = {"stdout": 1, "stderr": 2}[stream]
    is_read = file is None and os.isatty(number)
    renderer: Processor = structlog.dev.ConsoleRenderer() if is_read else structlog.processors.JSONRenderer()
    lines = Lines(LogFile(file) if file else Descriptor(number), lambda lost: _lost(renderer, lost))
    atexit.register(lines.flush)
    shared: list[Processor] = [
        structlog.contextvars.merge_contextvars,
        _traced,
        structlog.processors.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
        _without_messages,
        _readable,
    ]
    structlog.configure(
        processors=[*shared, renderer],
        wrapper_class=structlog.make_filtering_bound_logger(threshold),
        logger_factory=lambda *_names: _Writer(lines),
        cache_logger_on_first_use=False,
    )
    handler = _Handler(lines)
    handler.setFormatter(
        ProcessorFormatter(
            foreign_pre_chain=[_without_text, *shared],
            processors=[ProcessorFormatter.remove_processors_meta, renderer],
        )
    )
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(max(threshold, logging.INFO))
    _tame()
    return lines


def _tame() -> None:
    for name in _TAMED:
        logger = logging.getLogger(name)
        logger.__class__ = _TamedLogger  # which later calls of logging.getLogger give, too
        logger.handlers.clear()
        logger.propagate = True
        logger.setLevel(logging.WARNING)


def _lost(renderer: Processor, lost: int) -> str:
    told = {
        "event": "logs.lost",
        "lines": lost,
        "level": "error",
        "timestamp": datetime.now(UTC).isoformat().replace("+00:00", "Z"),
    }
    return str(renderer(None, "error", told))


def _traced(_logger: Any, _method: str, event: EventDict) -> EventDict:
    """The ids by which a trace is found, while a span is recorded."""
    span = traces.current()
    if span.is_open:
        event["trace_id"], event["span_id"] = span.trace_id, span.span_id
    return event


def _without_text(_logger: Any, _method: str, event: EventDict) -> EventDict:
    """Of a library's line its beginning, where the library repeats nobody, else only where it spoke."""
    record: logging.LogRecord = event["_record"]
    event["logger"] = record.name
    if _TELLING.match(record.name):
        event["event"] = _VALUES.split(str(event["event"]), maxsplit=1)[0].strip()[:_LONGEST]
    else:
        event["event"] = "library.spoke"
    event["at"] = f"{record.module}:{record.lineno}"
    event.pop("positional_args", None)
    return event


def _without_messages(_logger: Any, _method: str, event: EventDict) -> EventDict:
    """An exception as the types and frames of it and its causes: its message may be anybody's text."""
    given = event.pop("exc_info", None)
    error = _exception(given)
    if error is not None:
        event["exception"] = "".join(islice(_frames(error, depth=0), _MOST_FRAMES)).rstrip()
    return event


def _readable(_logger: Any, _method: str, event: EventDict) -> EventDict:
    """When and what come first, for whoever reads down a file."""
    return {"timestamp": event.pop("timestamp"), "event": event.pop("event"), **event}


def _exception(given: Any) -> BaseException | None:
    match given:
        case BaseException():
            return given
        case (_, BaseException() as error, _):
            return error
        case True:
            return sys.exception()
    return None


def _frames(error: BaseException, *, depth: int) -> Iterator[str]:
    if depth > _MOST_CAUSES:
        return
    cause = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
    if cause is not None:
        yield from _frames(cause, depth=depth + 1)
        yield "\nwhich led to\n\n"
    yield from traceback.extract_tb(error.__traceback__).format()
    yield f"{type(error).__module__}.{type(error).__qualname__}\n"
    if isinstance(error, BaseExceptionGroup):
        for each in error.exceptions[:_MOST_CAUSES]:
            yield from _frames(each, depth=depth + 1)


@contextmanager
def without(event: str) -> Iterator[None]:
    """Inside the block no line of ours of that event goes out, whoever logs it."""

    def drop(_logger: Any, _method: str, told: EventDict) -> EventDict:
        if told["event"] == event:
            raise structlog.DropEvent
        return told

    structlog.configure(processors=[drop, *structlog.get_config()["processors"]])
    try:
        yield
    finally:
        remaining = [processor for processor in structlog.get_config()["processors"] if processor is not drop]
        structlog.configure(processors=remaining)


@contextmanager
def redacting(redact: Callable[[UUID, str], str]) -> Iterator[None]:
    """Inside the block a line that names a tenant goes out without what `redact` takes out of that tenant's texts.

    A line of a library, too: what is logged for a caller names the tenant, whoever logs it.
    """

    def clean(_logger: Any, _method: str, event: EventDict) -> EventDict:
        tenant_id = event.get("tenant_id")
        if tenant_id is None:
            return event
        of = UUID(str(tenant_id))
        together = "\0".join(value for value in event.values() if isinstance(value, str))  # no secret holds a NUL
        if redact(of, together) == together:
            return event
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
