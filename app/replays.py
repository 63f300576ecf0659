"""Sends once more what a request with the same Idempotency-Key was told."""

from __future__ import annotations

from fastapi import FastAPI, Request, Response

from app.idempotency.once import Replayed


def install(app: FastAPI) -> None:
    """Answer where a route finds that it has answered before."""

    @app.exception_handler(Replayed)
    async def _again(_request: Request, found: Replayed) -> Response:
        headers = found.headers | {"Idempotency-Replayed": "true"}
        return Response(found.body, status_code=found.status, headers=headers, media_type="application/json")
