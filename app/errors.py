"""The one tree of errors. An error's docstring is its message; `main` renders it as RFC 9457."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Fault:
    """One fault in a caller's document: a JSON pointer to it and what is wrong there."""

    path: str
    message: str


class AppError(Exception):
    """Something went wrong on our side."""

    status: int = 500
    code: str = "internal"

    def __init__(
        self,
        detail: str | None = None,
        *,
        faults: Sequence[Fault] = (),
        headers: Mapping[str, str] | None = None,
        extra: Mapping[str, Any] | None = None,
    ) -> None:
        """Take what the caller may see: a detail, faults, response headers, extra problem members."""
        self.detail = detail or inspect.getdoc(type(self)) or ""
        self.faults = tuple(faults)
        self.headers = dict(headers or {})
        self.extra = dict(extra or {})
        super().__init__(self.detail)


class NotFound(AppError):
    """There is nothing here for you by that name."""

    status = 404
    code = "not_found"


class Unauthenticated(AppError):
    """The request carries no valid credential."""

    status = 401
    code = "unauthenticated"

    def __init__(self, detail: str | None = None) -> None:
        super().__init__(detail, headers={"WWW-Authenticate": 'Bearer realm="bulkhead"'})


class Forbidden(AppError):
    """Your credential does not carry the scope that this needs."""

    status = 403
    code = "forbidden"


class Invalid(AppError):
    """The request is not valid."""

    status = 422
    code = "invalid_request"


class Conflict(AppError):
    """The resource is not in a state that allows this."""

    status = 409
    code = "conflict"


class HostNotTrusted(AppError):
    """This service does not answer under the name that the request has in its header Host."""

    status = 400
    code = "host_not_trusted"


class TooLarge(AppError):
    """The body is larger than this route takes."""

    status = 413
    code = "too_large"


class Unavailable(AppError):
    """A part that this request needs is not available now."""

    status = 503
    code = "unavailable"


class ConfigurationError(AppError):
    """The service cannot start as it is configured."""

    code = "configuration"
