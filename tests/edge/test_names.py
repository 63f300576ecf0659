"""By which names requests come, what proxies say of them, and how deep their JSON is."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from ipaddress import ip_network
from typing import Any, Final

import httpx
import pytest
from fastapi import FastAPI, Request
from pydantic import ValidationError

from app import problems
from app.auth.jwks import DevelopmentIssuer
from app.edge import Edge, bounds, depth, trusted_hosts
from app.settings import Settings
from tests.service import Service, Tenant
from tests.test_edge import assert_problem

NAMES: Final = {"api.example.com", "[2001:db8::1]"}
OURS: Final = ["api.example.com", "api.example.com:443", "API.Example.COM", "[2001:db8::1]", "[2001:DB8::1]:8000"]
FOREIGN: Final = [
    *("evil.example", "api.example.com.evil.example", "xapi.example.com", "evil.api.example.com", "api.example.com."),
    *("api.example.com:x", "api.example.com:80:80", "api.example.com/", "user@api.example.com", "", "localhost"),
    *("api.example.com, evil.example", "2001:db8::1", "[2001:db8::1", "[::1]", "127.0.0.1"),
]
FORGED: Final = {
    "X-Forwarded-Host": "api.example.com",
    "X-Forwarded-Proto": "https",
    "X-Forwarded-Prefix": "/evil",
    "X-Original-URL": "/admin",
    "X-Rewrite-URL": "/admin",
    "X-HTTP-Method-Override": "DELETE",
    "X-Real-IP": "203.0.113.9",
    "True-Client-IP": "203.0.113.9",
    "Forwarded": "for=203.0.113.9;host=api.example.com;proto=https",
    "X-Forwarded-For": "203.0.113.9",
}


class NoLimit:
    """Of those who may be refused before anybody has looked at a credential."""

    async def count(self, _address: str) -> Mapping[str, str]:
        return {}


def small_app() -> FastAPI:
    app = FastAPI()
    app.state.gate = NoLimit()
    problems.install(app, failed=lambda *_: None)

    async def tell(request: Request) -> dict[str, Any]:
        return {
            "url": str(request.url),
            "method": request.method,
            "client": request.client.host if request.client else "",
            "address": request.state.address,
        }

    async def take(body: dict[str, Any]) -> int:
        return len(body)

    for path in ("/where", "/healthz", "/readyz", "/metrics"):
        app.add_api_route(path, tell)
    app.add_api_route("/json", take, methods=["POST"])
    return app


@asynccontextmanager
async def caller(*, client: str = "198.51.100.1", **edge: Any) -> AsyncIterator[httpx.AsyncClient]:
    """Of a small application behind an edge."""
    app = small_app()
    app.add_middleware(Edge, max_body_bytes=1_000, **edge)
    transport = httpx.ASGITransport(app, client=(client, 1))
    async with httpx.AsyncClient(transport=transport, base_url="http://api.example.com") as made:
        yield made


# Names


@pytest.mark.parametrize("host", OURS)
async def test_a_request_by_a_name_of_ours_is_answered(host: str) -> None:
    async with caller(hosts=NAMES) as client:
        assert (await client.get("/where", headers={"Host": host})).status_code == 200


@pytest.mark.parametrize("host", FOREIGN)
async def test_a_request_by_another_name_is_refused(host: str) -> None:
    async with caller(hosts=NAMES) as client:
        assert_problem(await client.get("/where", headers={"Host": host}), 400, "host_not_trusted")
    async with caller() as client:
        assert (await client.get("/where", headers={"Host": host})).status_code == 200, "the control"


@pytest.mark.parametrize("hosts", [[], ["api.example.com"] * 2, ["api.example.com", "evil.example"]])
async def test_a_request_has_one_name(hosts: list[str]) -> None:
    async with caller(hosts=NAMES) as client:
        request = client.build_request("GET", "/where")
        del request.headers["host"]
        request.headers = httpx.Headers([*request.headers.multi_items(), *(("host", host) for host in hosts)])
        assert_problem(await client.send(request), 400, "host_not_trusted")


@pytest.mark.parametrize("path", ["/healthz", "/readyz", "/metrics"])
async def test_machines_that_know_only_an_address_are_answered(path: str) -> None:
    async with caller(hosts=NAMES) as client:
        assert (await client.get(path, headers={"Host": "10.2.3.4:8000"})).status_code == 200


async def test_the_service_itself_answers_on_loopback_names_alone(service: Service, tenant: Tenant) -> None:
    for host in ("localhost", "127.0.0.1:1", "[::1]:8000"):
        assert (await tenant.user.get("/v1/me", headers={"Host": host})).status_code == 200
    for path in ("/v1/me", "/openapi.json", "/docs", "/nowhere"):
        assert_problem(await tenant.user.get(path, headers={"Host": "rebound.example"}), 400, "host_not_trusted")


@pytest.mark.parametrize(
    ("said", "names"),
    [
        ({}, {"localhost", "127.0.0.1", "[::1]"}),
        ({"public_url": "https://api.example.com:8443/x"}, {"localhost", "127.0.0.1", "[::1]", "api.example.com"}),
        ({"trusted_hosts": "a.example, [2001:db8::1]"}, {"a.example", "[2001:db8::1]"}),
    ],
    ids=["nothing", "a public URL", "names"],
)
def test_the_names_are_those_of_the_settings(said: Mapping[str, Any], names: set[str]) -> None:
    assert trusted_hosts(Settings(_env_file=None, **said)) == names


@pytest.mark.parametrize("name", ["*", "*.example.com", "https://a.example", "a.example:80", "A.example", ".a", "a b"])
def test_what_is_no_name_stops_the_start(name: str) -> None:
    with pytest.raises(ValidationError):
        Settings(_env_file=None, trusted_hosts=name)


@pytest.fixture(scope="module")
async def tenant(service: Service) -> Tenant:
    return await service.new_tenant()


# Proxies


async def test_what_a_stranger_says_of_itself_is_nobodys_word() -> None:
    async with caller(hosts=NAMES) as client:
        plain, forged = await client.get("/where"), await client.get("/where", headers=FORGED)
        assert plain.json() == forged.json()
        assert forged.json()["address"] == "198.51.100.1"
        foreign = FORGED | {"Host": "evil.example"}
        assert_problem(await client.get("/where", headers=foreign), 400, "host_not_trusted")


async def test_of_a_trusted_proxy_its_x_forwarded_for_alone_is_believed() -> None:
    proxies = (ip_network("198.51.100.0/24"),)
    async with caller(hosts=NAMES, trusted_proxies=proxies) as client:
        told = (await client.get("/where", headers=FORGED)).json()
        assert told == {
            "url": "http://api.example.com/where",
            "method": "GET",
            "client": "198.51.100.1",
            "address": "203.0.113.9",
        }
        foreign = FORGED | {"Host": "evil.example"}
        assert_problem(await client.get("/where", headers=foreign), 400, "host_not_trusted")


async def test_only_with_tls_in_front_are_browsers_told_to_come_by_it_alone() -> None:
    for has_tls in (True, False):
        async with caller(has_tls=has_tls) as client:
            answer = await client.get("/where", headers={"X-Forwarded-Proto": "https"})
        assert ("strict-transport-security" in answer.headers) == has_tls
        assert (
            "Strict-Transport-Security" in bounds(Settings(_env_file=None, tls_in_front=has_tls)).closing
        ) == has_tls


def test_connections_are_counted_by_address_but_for_trusted_proxies() -> None:
    settings = Settings(_env_file=None, trusted_proxies=(ip_network("10.0.0.0/8"), ip_network("2001:db8::/32")))
    counted_as = bounds(settings).counted_as
    assert counted_as("10.1.2.3") is None
    assert counted_as("::ffff:10.1.2.3") is None
    assert counted_as("2001:db8::5") is None
    assert counted_as("192.0.2.1") == "192.0.2.1"
    assert counted_as("2a00:1:2:3::5") == counted_as("2a00:1:2:3::6")
    assert counted_as("") is not None


# Depth


def nested(levels: int) -> Any:
    value: Any = ']}[{"\\'
    for _ in range(levels):
        value = {"a[": value} if isinstance(value, list) else [value]
    return value


@pytest.mark.parametrize("levels", [1, 63, 64, 65, 66, 400])
def test_depth_is_how_many_levels_are_within_each_other(levels: int) -> None:
    body = json.dumps([nested(levels - 1), *(nested(1) for _ in range(100))], indent=1).encode()
    assert depth(body, enough=3) == max(levels, 2)


def test_depth_is_cheap_whatever_is_sent() -> None:
    """Of a million bytes, which nobody has vouched for; each pattern of texts was made to be looked at again."""
    for evil in (b"[]" * 70 + b'"' + b'\\"' * 450_000, b"[" * 1_000_000, b"[]" * 70 + b'"' * 900_000 + b"\\"):
        assert depth(evil, enough=64) in {1, 1_000_000}


@pytest.mark.parametrize("kind", ["application/json", "application/problem+json", "Application/JSON; charset=utf-8"])
async def test_depth_is_bounded_whatever_json_is_called_and_in_whatever_pieces_it_comes(kind: str) -> None:
    text = json.dumps({"a": nested(100)}).encode()

    async def pieces() -> AsyncIterator[bytes]:
        for place in range(0, len(text), 7):
            yield text[place : place + 7]

    for bound, status in ((64, 422), (200, 200)):
        async with caller(max_json_depth=bound) as client:
            for content in (text, pieces()):
                answer = await client.post("/json", content=content, headers={"Content-Type": kind})
                assert answer.status_code == status


async def test_json_that_is_nested_too_deeply_is_refused(service: Service, tenant: Tenant) -> None:
    """Below the bound the same document is taken, and kept."""
    issuer = DevelopmentIssuer(service.data_dir / "nested.pem", issuer="https://nested.example")
    for levels, status in ((80, 422), (40, 201)):
        jwks = issuer.public_jwks() | {"more": nested(levels)}
        response = await tenant.admin.post("/v1/issuers", json={"issuer": issuer.issuer, "jwks": jwks})
        assert response.status_code == status, response.text
        if status == 422:
            assert_problem(response, 422, "invalid_request")
            assert "64 levels" in response.json()["detail"]
