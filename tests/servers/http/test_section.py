"""The section of a remote server: what is read, and that every fault is told at its place."""

from __future__ import annotations

import pytest

from app.policies.document import parse
from app.policies.servers.http import HttpServer
from tests.policies.test_document import faults


def far(keys: str) -> str:
    return f"schema: bulkhead/1\nservers: {{far: {{template: http, {keys}}}}}\n"


def read(keys: str) -> HttpServer:
    server = parse(far(keys)).servers["far"]
    assert isinstance(server, HttpServer)
    return server


def headers(text: str) -> str:
    return f"url: https://a.example/mcp, headers: {{{text}}}"


def test_every_key_is_read() -> None:
    written = 'headers: {Authorization: "Bearer secret:a", X-Team: blue}, timeout_s: 5, identity: true, isolation: run'
    server = read(f"url: 'https://a.example:8443/x/mcp', {written}")
    assert (server.host, server.path, server.origin) == (("a.example", 8443), "/x/mcp", "https://a.example:8443")
    assert server.headers == {"Authorization": "Bearer secret:a", "X-Team": "blue"}
    assert (server.timeout_s, server.identity, server.isolation) == (5, True, "run")


def test_defaults() -> None:
    server = read("url: https://a.example/")
    assert (server.headers, server.timeout_s, server.identity, server.isolation) == ({}, 25, False, "tenant")
    assert server.origin == "https://a.example"


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("http://a.example/mcp", "must begin with https://"),
        ("https://a.example", "The URL must have a path, / at least, and no empty query."),
        ("https://127.0.0.1/mcp", "must be a host name, not an IP address or a number"),
        ("https://[::1]/mcp", "must be a host name, not an IP address"),
        ("https://0x7f.1/mcp", "must be a host name, not an IP address or a number"),
        ("https://someone@a.example/mcp", "must be a host name, without user information"),
        ("https://A.example/mcp", "must be in lower case"),
        ("https://a.example:443/mcp", "Only https://a.example, spelled so."),
        ("https://a.example/mcp?key=1", "must have no query: what the server needs to know goes into headers"),
        ("https://a.example/mcp#x", "The URL must have no fragment."),
        ("https://a.example/../mcp", "The URL has an empty or dotted part."),
        ("https://a.example/m cp", "The URL holds a character that must be percent-encoded."),
    ],
)
def test_a_url_has_one_spelling(url: str, message: str) -> None:
    assert faults(far(f"url: '{url}'")) == {"/servers/far/url": message}


@pytest.mark.parametrize(
    ("text", "path"),
    [
        ("Host: x", "/Host"),
        ("content_length: '5'", "/content_length"),
        ("Transfer-Encoding: chunked", "/Transfer-Encoding"),
        ("Mcp-Session-Id: x", "/Mcp-Session-Id"),
        ("Accept-Encoding: gzip", "/Accept-Encoding"),
        ("Bulkhead_Identity: x", "/Bulkhead_Identity"),
        ("'X Team': x", "/X Team"),
        ('"X-Team\\r\\nHost": x', "/X-Team\r\nHost"),
        ('X-Team: "a\\r\\nHost: b"', "/X-Team"),
        ("X-Team: ' a'", "/X-Team"),
        ("X-Team: ''", "/X-Team"),
        ("X-Team: grün", "/X-Team"),
        ("X-Team: 7", "/X-Team"),
        ("X-Team: 'secret:A'", "/X-Team"),
        ("X-Team: 'secret:'", "/X-Team"),
        ("X-Team: ' secret:a'", "/X-Team"),
        ("X-Team: 'a b secret:x'", "/X-Team"),
        ("X-Team: 'secret:a secret:b'", "/X-Team"),
        ("X-Team: 'secret:a, more'", "/X-Team"),
        ("X-Team: a, x_team: b", ""),
        ("Authorization: Bearer abc", ""),
        ("cookie: a=b", ""),
        (", ".join(f"X-{number}: a" for number in range(17)), ""),
    ],
)
def test_a_header_that_could_do_harm_is_refused_at_its_place(text: str, path: str) -> None:
    assert list(faults(far(headers(text)))) == [f"/servers/far/headers{path}"]


@pytest.mark.parametrize("keys", ["timeout_s: 0", "timeout_s: 61", "timeout_s: '5'", "identity: 1"])
def test_a_wrong_value_is_refused(keys: str) -> None:
    assert list(faults(far(f"url: https://a.example/mcp, {keys}"))) == [f"/servers/far/{keys.partition(':')[0]}"]
