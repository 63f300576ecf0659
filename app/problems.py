"""Errors as callers see them: `application/problem+json` (RFC 9457), and nothing of how we are built."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from http import HTTPStatus
from typing import Any, Final

import structlog
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel
from slowapi.errors import RateLimitExceeded
from sqlalchemy.exc import DBAPIError
from sqlalchemy.exc import TimeoutError as PoolTimeout
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.responses import JSONResponse, Response

from app.errors import AppError, Fault, Invalid, NotFound, TooLarge, Unavailable

_log = structlog.get_logger()
_DOCS: Final = "docs/errors.md#"
_REFERENCE: Final = "#/components/schemas/{model}"
# Closes what we do not use, on every answer: the edge adds them, but to what its own server says of a crash.
SECURITY_HEADERS: Final = {
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-store",
    "Content-Security-Policy": "default-src 'none'; frame-ancestors 'none'",
}


class FaultOut(BaseModel):
    """One fault: a JSON pointer into the request and what is wrong there."""

    path: str
    message: str


class Problem(BaseModel):
    """RFC 9457. `code` is stable; `type` points to its explanation in docs/errors.md. `changes` are of tools."""

    type: str
    title: str
    status: int
    detail: str
    code: str
    request_id: str | None = None
    run_id: str | None = None
    errors: list[FaultOut] | None = None
    changes: list[dict[str, Any]] | None = None


def responses(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """The error responses of a route, for OpenAPI."""
    content = {"application/problem+json": {"schema": {"$ref": _REFERENCE.format(model=Problem.__name__)}}}
    return {status: {"description": HTTPStatus(status).phrase, "content": content} for status in statuses}


def _described(description: dict[str, Any]) -> dict[str, Any]:
    """OpenAPI with the schema that `responses` refers to, which FastAPI would only add as plain JSON."""
    schema = Problem.model_json_schema(ref_template=_REFERENCE)
    description["components"]["schemas"] |= schema.pop("$defs") | {Problem.__name__: schema}
    return description


def install(app: FastAPI, *, failed: Callable[[Request, AppError, Exception], None]) -> None:
    """Map every exception that leaves a route to a problem, and describe problems in OpenAPI.

    `failed` is told what a caller hears as 500 or 503, and of which exception.
    """
    describe = app.openapi
    app.openapi = lambda: _described(describe())  # type: ignore[method-assign]  # FastAPI's documented way

    @app.exception_handler(AppError)
    async def _app_error(request: Request, error: AppError) -> JSONResponse:
        if error.status >= 500:
            _log.warning("request.failed", code=error.code, detail=error.detail)
        if error.status in (500, 503):
            failed(request, error, error)
        return render(request, error)

    @app.exception_handler(RequestValidationError)
    async def _validation(request: Request, error: RequestValidationError) -> JSONResponse:
        if not request.state.rate_headers:  # of a body that is no JSON FastAPI tells before anybody has counted
            try:
                request.state.rate_headers = await request.app.state.gate.count(request.state.address)
            except RateLimitExceeded as refused:
                return rate_limited(request, refused)
        return render(request, Invalid(faults=[_fault(item) for item in error.errors()]))

    @app.exception_handler(HTTPException)
    async def _http(request: Request, error: HTTPException) -> JSONResponse:
        return render(request, _from_http(error))

    @app.exception_handler(ClientDisconnect)
    async def _gone(_request: Request, _error: ClientDisconnect) -> Response:
        return Response(status_code=400)  # to nobody: the client went while it sent its body

    @app.exception_handler(RateLimitExceeded)
    async def _rate(request: Request, error: RateLimitExceeded) -> JSONResponse:
        return rate_limited(request, error)

    _install_failures(app, failed)


def _install_failures(app: FastAPI, failed: Callable[[Request, AppError, Exception], None]) -> None:
    """What no part of ours has made an error of its own."""

    @app.exception_handler(DBAPIError)
    @app.exception_handler(PoolTimeout)
    @app.exception_handler(ConnectionError)
    @app.exception_handler(FileNotFoundError)  # the socket of a Postgres that is down
    @app.exception_handler(TimeoutError)
    async def _database(request: Request, error: Exception) -> JSONResponse:
        _log.error("database.failed", error=type(error).__name__)
        problem = Unavailable("The database is not available now.")
        failed(request, problem, error)
        return render(request, problem)

    @app.exception_handler(Exception)
    async def _unexpected(request: Request, error: Exception) -> JSONResponse:
        _log.error("request.crashed", error=type(error).__name__, exc_info=error)
        problem = AppError()
        failed(request, problem, error)
        answer = render(request, problem)
        answer.headers.update(SECURITY_HEADERS | {"X-Request-Id": request.state.request_id})
        return answer


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


def rate_limited(request: Request, error: RateLimitExceeded) -> JSONResponse:
    """The problem of a refusal by a rate. The refusal stays with the request, for whoever remembers it."""
    request.state.refusal = error
    return render(request, _RateLimited(error))


def _from_http(error: HTTPException) -> AppError:
    match error.status_code:
        case 400:  # FastAPI's word for a body that is no text or is nested too deeply; the other faults are 422
            return Invalid("The body cannot be read as JSON.")
        case 404:
            return NotFound()
        case 413:
            return TooLarge()
    code = "method_not_allowed" if error.status_code == 405 else "invalid_request"
    return _Http(error.status_code, code, error.headers)


def _fault(item: Mapping[str, Any]) -> Fault:
    """The place and the message, never the value: it may be a secret put in the wrong field."""
    if item["type"] == "json_invalid":
        return Fault("/body", f"is not JSON: the fault is at character {item['loc'][-1]}")
    if item["type"] == "model_attributes_type" and tuple(item["loc"]) == ("body",):
        return Fault("/body", "must be a JSON object, sent with Content-Type: application/json")
    return Fault("/" + "/".join(str(part) for part in item["loc"]), str(item["msg"]))


def render(request: Request, error: AppError) -> JSONResponse:
    """The problem of an error. Its code stays with the request, for whoever counts how requests end."""
    request.state.problem = error.code
    problem = Problem(
        type=_DOCS + error.code,
        title=HTTPStatus(error.status).phrase,
        status=error.status,
        detail=error.detail,
        code=error.code,
        request_id=getattr(request.state, "request_id", None),
        run_id=error.extra.get("run_id"),
        changes=error.extra.get("changes"),
        errors=[FaultOut(path=fault.path, message=fault.message) for fault in error.faults] or None,
    )
    return JSONResponse(
        problem.model_dump(exclude_none=True),
        status_code=error.status,
        headers=error.headers,
        media_type="application/problem+json",
    )
