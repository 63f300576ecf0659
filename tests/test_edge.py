"""What reaches the service before anybody is known: sizes, encodings, methods; and what every answer carries."""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Final
from uuid import UUID

import httpx
import pytest
from fastapi import FastAPI

from app import problems
from app.auth.keys import mint
from app.edge import Edge
from tests.openapi import unconnected_app
from tests.service import Service, Tenant, new_client

JSON: Final = {"Content-Type": "application/json"}
LIMIT: Final = 1_000_000
ERRORS: Final = Path(__file__).resolve().parent.parent / "docs" / "errors.md"
EXPLAINED: Final = re.findall(r"^## `?(\w+)`?$", ERRORS.read_text(), re.MULTILINE)
CLOSED: Final = {
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
    "referrer-policy": "no-referrer",
    "cache-control": "no-store",
    "content-security-policy": "default-src 'none'; frame-ancestors 'none'",
    "cross-origin-resource-policy": "same-origin",
    "cross-origin-opener-policy": "same-origin",
}
LEAK: Final = re.compile(r"Traceback|site-packages|/app/|\.py\b|asyncpg|sqlalchemy|postgres|sql", re.IGNORECASE)


@pytest.fixture(scope="module")
async def tenant(service: Service) -> Tenant:
    return await service.new_tenant()


def assert_problem(response: httpx.Response, status: int, code: str) -> None:
    """One shape for all errors, a code that the docs explain, and nothing of how we are built."""
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/problem+json"
    problem = response.json()
    assert (problem["status"], problem["code"], problem["type"]) == (status, code, f"docs/errors.md#{code}")
    assert problem["request_id"] == response.headers["x-request-id"]
    assert not LEAK.search(response.text.replace("docs/errors.md", ""))
    assert code in EXPLAINED
    assert_closed(response)


def assert_closed(response: httpx.Response) -> None:
    assert UUID(response.headers["x-request-id"]).version == 7
    assert {name: response.headers[name] for name in CLOSED} == CLOSED


async def chunks(total: int) -> AsyncIterator[bytes]:
    """A body that does not say how long it is."""
    for _ in range(total // 50_000 + 1):
        yield b" " * 50_000


# Size


@pytest.mark.parametrize("path", ["/query", "/v1/query", "/v1/policies", "/v1/keys", "/v1/issuers"])
async def test_a_body_past_the_limit_is_refused_by_its_declared_length(tenant: Tenant, path: str) -> None:
    assert_problem(await tenant.admin.post(path, content=b" " * (LIMIT + 1), headers=JSON), 413, "too_large")


@pytest.mark.parametrize("path", ["/query", "/v1/policies", "/v1/switches"])
async def test_a_body_that_does_not_declare_its_length_is_counted(tenant: Tenant, path: str) -> None:
    assert_problem(await tenant.admin.post(path, content=chunks(LIMIT), headers=JSON), 413, "too_large")


async def test_a_declared_length_is_refused_before_a_byte_of_it_is_sent(service: Service, tenant: Tenant) -> None:
    url = httpx.URL(service.url)
    reader, writer = await asyncio.open_connection(url.host, url.port)
    head = f"POST /query HTTP/1.1\r\nHost: {url.host}\r\nAuthorization: Bearer {tenant.user_key}\r\n"
    head += "Content-Length: 9999999999\r\n"
    writer.write(f"{head}Content-Type: application/json\r\n\r\n".encode())
    assert b"413" in await asyncio.wait_for(reader.readline(), 5)
    writer.close()


async def test_a_body_within_the_limit_is_read(tenant: Tenant) -> None:
    """The control of the three above: it is the size that was refused."""
    padded = b'{"query": "hello"}' + b" " * (LIMIT - 18)
    assert (await tenant.user.post("/query", content=padded, headers=JSON)).status_code == 200


async def test_a_file_has_a_limit_of_its_own(service: Service, tenant: Tenant) -> None:
    path = "/v1/workspaces/docs/files/large.txt"
    assert (await tenant.admin.put(path, content=b"x" * (LIMIT + 1))).status_code == 200
    most = service.app.state.settings.workspace_max_file_bytes
    assert_problem(await tenant.admin.put(path, content=b"x" * (most + 1)), 413, "too_large")
    assert_problem(await tenant.admin.put(path, content=chunks(most)), 413, "too_large")


# Content


@pytest.mark.parametrize(
    "body",
    [
        pytest.param(b"", id="nothing"),
        pytest.param(b"{", id="cut off"),
        pytest.param(b"[" * 100_000, id="deeply nested"),
        pytest.param(b'{"query": ' + b'{"a":' * 50_000 + b"1" + b"}" * 50_001, id="deeply nested and whole"),
        pytest.param(b'{"query": "\xff\xfe"}', id="not UTF-8"),
        pytest.param(b'{"query": "\\ud800"}', id="half a surrogate pair"),
        pytest.param(b'{"query": NaN}', id="NaN"),
        pytest.param(b'{"query": 1}', id="not text"),
        pytest.param(b'{"query": ""}', id="empty"),
        pytest.param(b'{"query": "a", "tenant_id": "b"}', id="unknown member"),
        pytest.param(b'{"query": "a", "conversation": "b"}', id="no UUID"),
        pytest.param(b'[{"query": "a"}]', id="a list"),
        pytest.param(b'"query"', id="a text"),
    ],
)
async def test_a_body_that_is_no_query_is_refused_with_its_faults(tenant: Tenant, body: bytes) -> None:
    assert_problem(await tenant.user.post("/query", content=body, headers=JSON), 422, "invalid_request")


@pytest.mark.parametrize(
    "kind", ["text/plain", "application/x-www-form-urlencoded", "multipart/form-data", "a/b/c", ""]
)
async def test_json_under_another_name_is_not_read(tenant: Tenant, kind: str) -> None:
    response = await tenant.user.post("/query", content=b'{"query": "hello"}', headers={"Content-Type": kind})
    assert_problem(response, 422, "invalid_request")


async def test_a_fault_names_its_place_and_never_its_value(tenant: Tenant) -> None:
    secret = "hunter2-in-the-wrong-field"
    response = await tenant.user.post("/query", json={"query": 1, "conversation": secret})
    assert_problem(response, 422, "invalid_request")
    assert {fault["path"] for fault in response.json()["errors"]} == {"/body/query", "/body/conversation"}
    assert secret not in response.text


@pytest.mark.parametrize("text", ["a\0b", "\0"])
async def test_a_nul_is_refused_wherever_text_is_kept(service: Service, tenant: Tenant, text: str) -> None:
    bodies = {
        "/v1/keys": {"user_id": tenant.user_id, "name": text},
        "/v1/users": {"name": text, "role": "user"},
        "/v1/switches": {"scope": "tenant", "reason": text},
        "/v1/issuers": {"issuer": text, "jwks": {"keys": []}},
    }
    for path, body in bodies.items():
        assert_problem(await tenant.admin.post(path, json=body), 422, "invalid_request")
    assert_problem(await tenant.admin.post("/v1/policies", content=text.encode()), 422, "policy_invalid")
    assert_problem(await service.platform.post("/v1/tenants", json={"slug": text}), 422, "invalid_request")
    assert_problem(await tenant.admin.get("/v1/workspaces/docs/files/a%00b.md"), 422, "invalid_request")


# Paths and methods


@pytest.mark.parametrize("bad", ["1", "not-a-uuid", "%00", "..", "0198c0de-0000-7000-8000-00000000000g", "é", "'--"])
async def test_what_is_no_id_is_refused(tenant: Tenant, bad: str) -> None:
    for path in (f"/v1/runs/{bad}", f"/v1/users/{bad}"):
        response = await tenant.admin.get(path)
        assert response.status_code in {404, 422}
        assert_problem(response, response.status_code, response.json()["code"])


@pytest.mark.parametrize("version", ["0", "-1", "2147483648", "9" * 40, "1.5", "one"])
async def test_what_is_no_version_is_refused(tenant: Tenant, version: str) -> None:
    assert_problem(await tenant.admin.get(f"/v1/policies/{version}"), 422, "invalid_request")


@pytest.mark.parametrize("cursor", ["", "é", "AAAA", "x" * 400, "%00", "=" * 10])
async def test_a_cursor_that_was_not_given_is_refused(tenant: Tenant, cursor: str) -> None:
    for path in ("/v1/runs", "/v1/audit/events", "/v1/policies", "/v1/workspaces/docs/files"):
        assert_problem(await tenant.admin.get(path, params={"cursor": cursor}), 422, "invalid_cursor")


@pytest.mark.parametrize("limit", ["0", "201", "-1", "1e3", "many"])
async def test_a_page_has_between_1_and_200_lines(tenant: Tenant, limit: str) -> None:
    assert_problem(await tenant.admin.get("/v1/runs", params={"limit": limit}), 422, "invalid_request")


async def test_a_parameter_is_given_once_where_the_route_takes_one(tenant: Tenant) -> None:
    twice = await tenant.admin.get("/v1/runs", params={"limit": [1, 2]})
    assert_problem(twice, 422, "invalid_request")
    assert twice.json()["errors"] == [{"path": "/query/limit", "message": "is given more than once"}]
    assert (await tenant.admin.get("/v1/runs", params={"state": ["queued", "running"], "limit": 1})).is_success


@pytest.mark.parametrize(
    "path", ["/", "/v1", "/v1/me/", "/v1/runs/", "/docs/", "/v1//me", "/admin", "/v1/policies/1/x"]
)
async def test_what_is_not_there_is_a_problem_and_no_redirect(tenant: Tenant, path: str) -> None:
    assert_problem(await tenant.admin.get(path), 404, "not_found")


@pytest.mark.parametrize("method", ["HEAD", "OPTIONS", "TRACE", "PUT", "PATCH", "DELETE", "GET", "BREW"])
async def test_a_method_that_a_route_does_not_have_is_refused(tenant: Tenant, method: str) -> None:
    response = await tenant.user.request(method, "/v1/query")
    if method == "BREW":  # the HTTP parser's own answer: not a method at all
        assert response.status_code == 400
        return
    assert response.status_code == 405
    assert response.headers["allow"] == "POST"
    if method != "HEAD":
        assert_problem(response, 405, "method_not_allowed")
        assert response.json()["detail"] == "This path takes POST."


async def test_an_uptime_probe_may_ask_with_head(service: Service) -> None:
    async with new_client(service.url, "nobody") as stranger:
        for path in ("/healthz", "/readyz"):
            answer = await stranger.head(path)
            assert (answer.status_code, answer.content) == (200, b"")
            assert answer.headers["content-length"] == (await stranger.get(path)).headers["content-length"]


async def test_no_other_origin_is_let_in(tenant: Tenant) -> None:
    asking = {"Origin": "https://evil.example", "Access-Control-Request-Method": "POST"}
    for response in (
        await tenant.user.options("/query", headers=asking),
        await tenant.user.get("/v1/me", headers=asking),
    ):
        assert not [name for name in response.headers if name.startswith("access-control")]


# Every answer


async def test_every_answer_has_an_id_of_its_own_and_closing_headers(service: Service, tenant: Tenant) -> None:
    run_id = (await tenant.user.ask("hello")).json()["run_id"]
    async with new_client(service.url, "nobody") as stranger:
        answers = [
            await tenant.user.get("/v1/me", headers={"X-Request-Id": "chosen-by-the-caller"}),
            await tenant.user.ask("hello"),
            await tenant.admin.delete(f"/v1/keys/{tenant.user_key_id}"),
            await tenant.user.get("/v1/me"),
            await stranger.get("/healthz"),
            await stranger.get("/openapi.json"),
            await stranger.get("/nowhere"),
            await stranger.get("/metrics"),
            await stranger.get("/metrics", headers={"Authorization": f"Bearer {service.metrics_token}"}),
            await stranger.put("/healthz"),
            await tenant.admin.get(f"/v1/runs/{run_id}/events", headers={"Accept": "text/event-stream"}),
        ]
    assert [answer.status_code for answer in answers] == [200, 200, 204, 401, 200, 200, 404, 401, 200, 405, 200]
    assert answers[-1].headers["content-type"].startswith("text/event-stream")
    for answer in answers:
        assert_closed(answer)
        assert "server" not in answer.headers
        assert "strict-transport-security" not in answer.headers
    assert len({answer.headers["x-request-id"] for answer in answers}) == len(answers)


async def test_a_file_comes_as_a_download_that_no_browser_runs(tenant: Tenant) -> None:
    await tenant.admin.put_file("page.html", "<script>alert(1)</script>")
    response = await tenant.admin.get("/v1/workspaces/docs/files/page.html")
    assert_closed(response)
    assert response.headers["content-disposition"] == "attachment"
    assert response.headers["content-type"] == "application/octet-stream"


def crashing_app() -> FastAPI:
    app = FastAPI()
    app.add_middleware(Edge, max_body_bytes=1_000)
    problems.install(app, failed=lambda *_: None)

    @app.get("/crash")
    async def crash() -> None:
        raise ZeroDivisionError("a secret and /a/host/path.py")

    return app


async def test_a_crash_says_nothing_and_is_an_answer_like_any_other() -> None:
    transport = httpx.ASGITransport(crashing_app(), raise_app_exceptions=False)
    async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
        response = await client.get("/crash")
    assert_problem(response, 500, "internal")
    assert "secret" not in response.text


async def test_without_a_database_nobody_is_let_in_and_nobody_is_told_why() -> None:
    transport = httpx.ASGITransport(unconnected_app(), raise_app_exceptions=False)
    async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
        for credential in (mint().text, "no credential at all"):
            response = await client.get("/v1/me", headers={"Authorization": f"Bearer {credential}"})
            assert_problem(response, 503, "unavailable")
        assert (await client.get("/readyz")).status_code == 503
        assert (await client.get("/healthz")).status_code == 200
