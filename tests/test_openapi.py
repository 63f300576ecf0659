"""What the API says of itself: as agreed, with every error declared. `python -m tests.openapi` writes it anew."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from fastapi import FastAPI

from tests.openapi import SNAPSHOT, Documented, crashing, described, unconnected_app
from tests.routes import METRICS, PUBLIC, ROLES, Operation
from tests.service import Service


@pytest.fixture(scope="module")
def app() -> FastAPI:
    return unconnected_app()


def declared(app: FastAPI) -> Iterator[tuple[Operation, dict[str, Any]]]:
    for path, methods in app.openapi()["paths"].items():
        for method, operation in methods.items():
            yield Operation(method.upper(), path.replace("{path}", "{path:path}")), operation


def test_the_description_is_the_one_that_is_checked_in(app: FastAPI) -> None:
    assert described(app) == SNAPSHOT.read_text(), "if this change is meant: python -m tests.openapi"


def test_every_route_is_described(app: FastAPI) -> None:
    hidden = {Operation("POST", "/query"), Operation("GET", "/openapi.json")}
    hidden |= {each for each in PUBLIC if each.path.startswith("/docs") or each.method == "HEAD"}
    assert {operation for operation, _ in declared(app)} == (set(ROLES) | PUBLIC | {METRICS}) - hidden


def test_every_error_is_a_problem(app: FastAPI) -> None:
    for operation, described_as in declared(app):
        for status, answer in described_as["responses"].items():
            if int(status) >= 400 and (operation.path, status) != ("/readyz", "503"):
                assert set(answer["content"]) == {"application/problem+json"}, (operation, status)


def test_every_route_with_a_credential_declares_how_that_fails(app: FastAPI) -> None:
    for operation, described_as in declared(app):
        statuses = set(described_as["responses"])
        assert "503" in statuses, operation
        if operation not in ROLES:
            continue
        assert described_as["security"], operation
        assert "401" in statuses, operation
        assert "403" in statuses or operation.path == "/v1/me", operation
        assert "413" in statuses or "requestBody" not in described_as, operation


def test_no_route_declares_that_it_crashes(app: FastAPI) -> None:
    assert [operation for operation, described_as in declared(app) if "500" in described_as["responses"]] == []


async def test_a_served_description_holds_nothing_of_this_host(service: Service) -> None:
    async with httpx.AsyncClient(base_url=service.url, trust_env=False) as stranger:
        response = await stranger.get("/openapi.json")
    assert response.json() == service.app.openapi()
    assert str(service.data_dir) not in response.text


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/v1/me", 404),
        ("GET", "/v1/me", 500),
        ("POST", "/query", 418),
        ("GET", "/v1/workspaces/docs/files/a/b.md", 402),
    ],
)
async def test_an_answer_that_is_not_documented_is_noticed(app: FastAPI, method: str, path: str, status: int) -> None:
    check = Documented(app)
    request = httpx.Request(method, f"http://localhost{path}")
    await check(httpx.Response(200, request=request))
    with pytest.raises(AssertionError, match="not documented"):
        await check(httpx.Response(status, request=request))


async def test_a_crash_that_a_test_has_made_is_allowed_and_nothing_else(app: FastAPI) -> None:
    check, request = Documented(app), httpx.Request("GET", "http://localhost/v1/me")
    with crashing():
        await check(httpx.Response(500, request=request))
        with pytest.raises(AssertionError, match="not documented"):
            await check(httpx.Response(502, request=request))
    with pytest.raises(AssertionError, match="not documented"):
        await check(httpx.Response(500, request=request))
