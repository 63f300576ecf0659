"""Traces, as the rest of the service sees them: spans that follow a request through its tasks. Nothing of the SDK.

A span belongs to the one that is current where it begins, and without a current one there is none: what nobody's
request asks for, and a request that is not sampled, cost a look into a context variable.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Final, Literal, Protocol

from app.errors import ConfigurationError

Value = str | int | float | bool
Attributes = Mapping[str, Value]
Kind = Literal["internal", "client", "server"]


class Span(Protocol):
    """A piece of work that is timed and described. `has_content` says whether texts of callers and tools may go in."""

    @property
    def is_open(self) -> bool:
        """True until it has ended; never for a span that is not recorded."""

    @property
    def has_content(self) -> bool: ...

    @property
    def trace_id(self) -> str: ...

    @property
    def span_id(self) -> str: ...

    @property
    def traceparent(self) -> str:
        """The W3C header by which another service continues the trace; empty for one that is not recorded."""

    def child(self, name: str, attributes: Attributes, *, kind: Kind) -> Span:
        """Begin a part of it."""

    def follower(self, name: str, attributes: Attributes) -> Span:
        """Begin a trace of its own that refers to this span: work that it has caused, and does not own."""

    def note(self, attributes: Attributes) -> None: ...

    def rename(self, name: str) -> None: ...

    def link(self, other: Span) -> None:
        """Refer to a span of another trace."""

    def fail(self, why: str) -> None:
        """Mark it as failed, with a type or a code and never with a message; the first one stays."""

    def end(self) -> None: ...


class Tracer(Protocol):
    """Begins traces."""

    def request(self, name: str, attributes: Attributes, *, traceparent: str | None) -> Span:
        """Begin the span of a request, or give one that is not recorded where it is not sampled."""

    async def aclose(self) -> None:
        """Send what is left, for a few seconds at most."""


class _Nothing:
    """A span that is not recorded."""

    is_open = has_content = False
    trace_id = span_id = traceparent = ""

    def child(self, _name: str, _attributes: Attributes, *, kind: Kind) -> Span:
        return self

    def follower(self, _name: str, _attributes: Attributes) -> Span:
        return self

    def note(self, attributes: Attributes) -> None:
        pass

    def rename(self, name: str) -> None:
        pass

    def link(self, other: Span) -> None:
        pass

    def fail(self, why: str) -> None:
        pass

    def end(self) -> None:
        pass


NOTHING: Final[Span] = _Nothing()
_HEADER_NAME: Final = re.compile(r"[A-Za-z0-9!#$%&'*+.^_|~-]+")
_CURRENT: Final[ContextVar[Span]] = ContextVar("span", default=NOTHING)


class Off:
    """No traces: what a service has without an endpoint to send them to."""

    def request(self, _name: str, _attributes: Attributes, *, traceparent: str | None) -> Span:
        """See Tracer."""
        return NOTHING

    async def aclose(self) -> None:
        """See Tracer."""


def headers(text: str) -> Mapping[str, str]:
    """Read `name=value,...`; raise ConfigurationError, which does not repeat it."""
    pairs = [pair.partition("=") for pair in text.split(",") if pair.strip()]
    read = {name.strip(): value.strip() for name, _, value in pairs}
    if not all(_HEADER_NAME.fullmatch(name) and value.isprintable() and value for name, value in read.items()):
        raise ConfigurationError("BULKHEAD_OTLP_HEADERS must be name=value, and so on after commas.")
    return read


def current() -> Span:
    """The span that what happens here belongs to; not one that has ended, which a task may have outlived."""
    span = _CURRENT.get()
    return span if span.is_open else NOTHING


@contextmanager
def span(name: str, attributes: Attributes | None = None, *, kind: Kind = "internal") -> Iterator[Span]:
    """A part of the current span for the block; an exception that leaves the block marks it as failed."""
    parent = current()
    if parent is NOTHING:
        yield NOTHING
        return
    with entered(parent.child(name, attributes or {}, kind=kind)) as part:
        yield part


@contextmanager
def entered(span: Span) -> Iterator[Span]:
    """Make a span current for the block and end it there."""
    before = _CURRENT.get()
    _CURRENT.set(span)
    try:
        yield span
    except BaseException as error:
        span.fail(type(error).__name__)
        raise
    finally:
        _CURRENT.set(before)
        span.end()
