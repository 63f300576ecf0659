"""Errors as callers see them: `application/problem+json` (RFC 9457), and nothing of how we are built."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from http import HTTPStatus
from typing import Any, Final

import structlog
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.routing import iter_route_contexts
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
# Of a request that is not valid: so many faults are told, and so much of the name of each member.
_FAULTS: Final = 50
_NAME: Final = 100
_REFERENCE: Final = "#/components/schemas/{model}"


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
        return await _counted(request, Invalid(faults=_faults(error.errors())))

    @app.exception_handler(HTTPException)
    async def _http(request: Request, error: HTTPException) -> JSONResponse:
        return await _counted(request, _from_http(request, error))

    @app.exception_handler(ClientDisconnect)
    async def _gone(_request: Request, _error: ClientDisconnect) -> Response:
        return Response(status_code=400)  # to nobody: the client went while it sent its body

    @app.exception_handler(RateLimitExceeded)
    async def _rate(request: Request, error: RateLimitExceeded) -> JSONResponse:
        return rate_limited(request, error)

    _install_failures(app, failed)


async def _counted(request: Request, problem: AppError) -> JSONResponse:
    """A refusal of the framework's, which may come before anybody has counted: then it is one of its address's."""
    if not request.state.rate_headers:
        try:
            request.state.rate_headers = await request.app.state.gate.count(request.state.address)
        except RateLimitExceeded as refused:
            return rate_limited(request, refused)
    return render(request, problem)


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
        # It is made outside of the edge, which adds them to all others.
        answer.headers.update({**request.state.closing, "X-Request-Id": request.state.request_id})
        return answer


class _RateLimited(AppError):
    """You have sent more requests than your policy allows."""

    status = 429
    code = "rate_limited"

    def __init__(self, error: RateLimitExceeded) -> None:
        super().__init__(f"Rate limit exceeded: {error.detail}", headers=dict(getattr(error, "headers", None) or {}))


class _Http(AppError):
    def __init__(self, status: int, headers: Mapping[str, str] | None) -> None:
        super().__init__(HTTPStatus(status).description or HTTPStatus(status).phrase, headers=headers)
        self.status, self.code = status, "invalid_request"


class _MethodNotAllowed(AppError):
    status = 405
    code = "method_not_allowed"

    def __init__(self, allowed: str) -> None:
        super().__init__(f"This path takes {allowed}.", headers={"Allow": allowed})


def rate_limited(request: Request, error: RateLimitExceeded) -> JSONResponse:
    """The problem of a refusal by a rate. The refusal stays with the request, for whoever remembers it."""
    request.state.refusal = error
    return render(request, _RateLimited(error))


def _from_http(request: Request, error: HTTPException) -> AppError:
    match error.status_code:
        case 400:  # FastAPI's word for a body that is no text or is nested too deeply; the other faults are 422
            return Invalid("The body cannot be read as JSON.")
        case 404:
            return NotFound()
        case 413:
            return TooLarge()
        case 422:
            return Invalid(error.detail)
        case 405:
            return _MethodNotAllowed(_allowed(request))
    return _Http(error.status_code, error.headers)


def _allowed(request: Request) -> str:
    """All methods of a path: the framework names those of the first of its routes."""
    routes = [
        (route.path, route.methods or set())
        for route in iter_route_contexts(request.app.routes)
        if (pattern := getattr(route, "path_regex", None)) and pattern.match(request.url.path)
    ]
    return ", ".join(sorted({method for path, methods in routes if path == routes[0][0] for method in methods}))


def _faults(items: Sequence[Mapping[str, Any]]) -> list[Fault]:
    """The first of them: a body may have a fault in every few bytes, and its answer must not be larger than it is."""
    faults = [_fault(item) for item in items[:_FAULTS]]
    return faults + [Fault("", f"and {len(items) - _FAULTS} more")] * (len(items) > _FAULTS)


def _fault(item: Mapping[str, Any]) -> Fault:
    """The place and the message, never the value: it may be a secret put in the wrong field."""
    if item["type"] == "json_invalid":
        return Fault("/body", f"is not JSON: the fault is at character {item['loc'][-1]}")
    if item["type"] == "model_attributes_type" and tuple(item["loc"]) == ("body",):
        return Fault("/body", "must be a JSON object, sent with Content-Type: application/json")
    return Fault("/" + "/".join(str(part)[:_NAME] for part in item["loc"]), _message(item))


def _message(item: Mapping[str, Any]) -> str:
    match item["type"]:
        case "extra_forbidden":
            return "is not a known member"
        case "value_error":
            return str(item["ctx"]["error"])
    return str(item["msg"])


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
