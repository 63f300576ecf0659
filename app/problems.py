"""Errors as callers see them: `application/problem+json` (RFC 9457), and nothing of how we are built."""

from __future__ import annotations

from collections.abc import Mapping
from http import HTTPStatus
from typing import Any, Final

import structlog
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel
from slowapi.errors import RateLimitExceeded
from sqlalchemy.exc import SQLAlchemyError
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse

from app.errors import AppError, Fault, Invalid, Unavailable

_log = structlog.get_logger()
_DOCS: Final = "docs/errors.md#"


class FaultOut(BaseModel):
    """One fault: a JSON pointer into the request and what is wrong there."""

    path: str
    message: str


class Problem(BaseModel):
    """RFC 9457. `code` is stable; `type` points to its explanation in docs/errors.md."""

    type: str
    title: str
    status: int
    detail: str
    code: str
    request_id: str | None = None
    run_id: str | None = None
    errors: list[FaultOut] | None = None


def responses(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """The error responses of a route, for OpenAPI."""
    content = {"application/problem+json": {"schema": Problem.model_json_schema()}}
    return {status: {"description": HTTPStatus(status).phrase, "content": content} for status in statuses}


def install(app: FastAPI) -> None:
    """Map every exception that leaves a route to a problem."""

    @app.exception_handler(AppError)
    async def _app_error(request: Request, error: AppError) -> JSONResponse:
        if error.status >= 500:
            _log.warning("request.failed", code=error.code, detail=error.detail)
        return render(request, error)

    @app.exception_handler(RequestValidationError)
    async def _validation(request: Request, error: RequestValidationError) -> JSONResponse:
        return render(request, Invalid(faults=[_fault(item) for item in error.errors()]))

    @app.exception_handler(HTTPException)
    async def _http(request: Request, error: HTTPException) -> JSONResponse:
        return render(request, _from_http(error))

    @app.exception_handler(RateLimitExceeded)
    async def _rate(request: Request, error: RateLimitExceeded) -> JSONResponse:
        return render(request, _RateLimited(error))

    @app.exception_handler(SQLAlchemyError)
    @app.exception_handler(ConnectionError)
    async def _database(request: Request, error: Exception) -> JSONResponse:
        _log.error("database.failed", error=type(error).__name__)
        return render(request, Unavailable("The database is not available now."))

    @app.exception_handler(Exception)
    async def _unexpected(request: Request, error: Exception) -> JSONResponse:
        _log.error("request.crashed", error=type(error).__name__, exc_info=error)
        return render(request, AppError())


class _RateLimited(AppError):
    """You have sent more requests than your policy allows."""

    status = 429
    code = "rate_limited"

    def __init__(self, error: RateLimitExceeded) -> None:
        super().__init__(f"Rate limit exceeded: {error.detail}", headers=dict(getattr(error, "headers", None) or {}))


class _Http(AppError):
    def __init__(self, status: int, code: str, headers: Mapping[str, str] | None) -> None:
        super().__init__(HTTPStatus(status).description or HTTPStatus(status).phrase, headers=headers)
        self.status, self.code = status, code


def _from_http(error: HTTPException) -> AppError:
    codes = {404: "not_found", 405: "method_not_allowed", 413: "too_large", 415: "unsupported_media_type"}
    return _Http(error.status_code, codes.get(error.status_code, "invalid_request"), error.headers)


def _fault(item: Mapping[str, Any]) -> Fault:
    """The place and the message, never the value: it may be a secret put in the wrong field."""
    return Fault("/" + "/".join(str(part) for part in item["loc"]), str(item["msg"]))


def render(request: Request, error: AppError) -> JSONResponse:
    """The problem of an error."""
    problem = Problem(
        type=_DOCS + error.code,
        title=HTTPStatus(error.status).phrase,
        status=error.status,
        detail=error.detail,
        code=error.code,
        request_id=getattr(request.state, "request_id", None),
        run_id=error.extra.get("run_id"),
        errors=[FaultOut(path=fault.path, message=fault.message) for fault in error.faults] or None,
    )
    return JSONResponse(
        problem.model_dump(exclude_none=True),
        status_code=error.status,
        headers=error.headers,
        media_type="application/problem+json",
    )
