"""Texts of callers that mean something to whoever reads them later: headers, lines of the log, cells, labels."""

from __future__ import annotations

import asyncio
import csv
import io
import json
import logging
import secrets
from typing import Any, Final
from urllib.parse import quote, unquote
from uuid import UUID, uuid4

import httpx
import pytest
import structlog
from sqlalchemy import text

from app.limits import endpoints
from app.listening import bound, listening, url_of
from tests.attacks.hijacked import POLICY, Call, HijackedModel
from tests.service import Client, Service, Tenant
from tests.telemetry.test_logs import configured, said

# What ends a line somewhere, moves a cursor, turns text around, or closes what it stands in.
MEANINGFUL: Final = {
    "crlf": "a\r\nX-Injected: {n}\r\n\r\n<html>",
    "lf": "a\nX-Injected: {n}",
    "cr": "a\rX-Injected: {n}",
    "nel": "a\x85X-Injected: {n}",
    "line separator": "a\u2028X-Injected: {n}",
    "ansi": "\x1b[2J\x1b]0;{n}\x07",
    "c1": "\x9b2J{n}",
    "bidi": "\u202e{n}\u2066",
    "json": '","level":"critical","event":"forged","n":"{n}',
    "json line": '"}}\n{{"level":"critical","event":"{n}"}}',
    "label": '"}} 1\nforged_total{{n="{n}',
    "format": "%s%n{{0}}{{n.__class__}}${{jndi:ldap://127.0.0.1/{n}}}",
}


@pytest.fixture(scope="module")
async def tenant(attacked: Service) -> Tenant:
    return await attacked.new_tenant(policy=POLICY, files={"own.txt": "own"})


def evil(kind: str, nonce: str) -> str:
    return MEANINGFUL[kind].format(n=nonce)


# Headers


async def raw(url: str, sent: bytes) -> bytes:
    """The whole answer to bytes that no client would send."""
    host, port = url.removeprefix("http://").split(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    try:
        writer.write(sent)
        await writer.drain()
        return await asyncio.wait_for(reader.read(1_000_000), 20)
    finally:
        writer.close()


def key_of(client: Client) -> str:
    return client.headers["Authorization"]


# Each place of a request, as bytes with {} for the text.
PLACES: Final = {
    "request id": "GET /v1/me HTTP/1.1\r\nX-Request-Id: {}\r\n",
    "traceparent": "GET /v1/me HTTP/1.1\r\ntraceparent: {}\r\n",
    "idempotency key": "POST /v1/conversations HTTP/1.1\r\nIdempotency-Key: {}\r\nContent-Length: 0\r\n",
    "if-match": "DELETE /v1/secrets/none HTTP/1.1\r\nIf-Match: {}\r\n",
    "last event": "GET /v1/runs/none/events HTTP/1.1\r\nLast-Event-ID: {}\r\n",
    "origin": "GET /v1/me HTTP/1.1\r\nOrigin: {}\r\n",
    "preflight": "OPTIONS /v1/me HTTP/1.1\r\nAccess-Control-Request-Headers: {}\r\n",
    "language": "GET /v1/me HTTP/1.1\r\nAccept-Language: {}\r\n",
    "path": "GET /v1/users/{} HTTP/1.1\r\n",
    "slash": "GET /{}/ HTTP/1.1\r\n",
    "file": "GET /v1/workspaces/docs/files/{} HTTP/1.1\r\n",
    "cursor": "GET /v1/users?cursor={} HTTP/1.1\r\n",
    "parameter": "GET /v1/runs?state={}&{}=1 HTTP/1.1\r\n",
}
IN_URL: Final = {"path", "slash", "file", "cursor", "parameter"}


@pytest.mark.parametrize("place", PLACES)
async def test_no_header_of_an_answer_and_no_word_of_it_is_the_callers(
    attacked: Service, tenant: Tenant, place: str
) -> None:
    for kind in MEANINGFUL:
        nonce = f"n{secrets.token_hex(8)}"
        plain = evil(kind, nonce)
        for sent in {once := quote(plain, safe=""), quote(once, safe=""), once if place in IN_URL else plain}:
            head = PLACES[place].format(*[sent] * 2) + "Host: 127.0.0.1\r\nConnection: close\r\n"
            head += f"Authorization: {key_of(tenant.admin)}\r\n\r\n"
            answer = (await raw(attacked.url, head.encode())).decode()
            # Where the text ends the head, what follows is no request: the connection is closed, answered or not.
            assert answer.startswith("HTTP/1.1 ") or (not answer and "\r\n\r\n" in sent), (kind, answer)
            assert nonce not in answer, (kind, answer)
            assert answer.count("HTTP/1.1 ") <= 1, (kind, answer)


@pytest.mark.parametrize(("kind", "is_told"), [("crlf", False), ("bidi", True), ("label", True)])
async def test_a_service_that_repeats_what_it_is_told_is_found_out(kind: str, *, is_told: bool) -> None:
    """The control. Of a line's end in a header the listener is a second wall: it sends no such answer."""

    async def careless(scope: Any, receive: Any, send: Any) -> None:
        told = unquote(scope["query_string"].decode()).replace("\n", "\r\n" if kind == "crlf" else "").encode()
        await send({"type": "http.response.start", "status": 307, "headers": [(b"location", b"/" + told)]})
        await send({"type": "http.response.body", "body": told})

    with bound("127.0.0.1", 0) as listener:
        async with listening(careless, listener):
            head = f"GET /?{quote(evil(kind, 'told'))} HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: close\r\n\r\n"
            answer = await raw(url_of(listener), head.encode())
    assert (b"told" in answer) is is_told


FORWARDED: Final = {
    "X-Forwarded-Host": "{n}.example",
    "X-Forwarded-Proto": "https",
    "X-Forwarded-Port": "444",
    "X-Forwarded-Prefix": "/{n}",
    "X-Forwarded-Server": "{n}.example",
    "X-Host": "{n}.example",
    "X-Original-URL": "/{n}",
    "X-Rewrite-URL": "/{n}",
    "X-Real-IP": "203.0.113.77",
    "X-Forwarded-For": "203.0.113.77",
    "Forwarded": 'for=203.0.113.77;host="{n}.example"',
    "X-HTTP-Method-Override": "DELETE",
    "X-Method-Override": "DELETE",
    "Referer": "https://{n}.example/",
    "Origin": "https://{n}.example",
}
REDIRECTING: Final = (
    *("//{n}.example/%2e%2e", "/v1/users//{n}.example/", "/%5c{n}.example/", "/docs/..//{n}.example", "/v1/users/"),
    *("/docs?next=https://{n}.example", "/docs/?url=https://{n}.example", "/openapi.json/", "/?u=//{n}.example"),
)


async def test_no_header_changes_what_is_answered_nor_leads_anybody_elsewhere(service: Service) -> None:
    """A cache before us may keep only what is the same for everybody: so no header may change it."""
    own = await service.new_tenant(policy=None)
    for path in ("/v1/me", "/openapi.json", "/docs", "/v1/nowhere", "/.well-known/jwks.json", *REDIRECTING):
        nonce = f"n{secrets.token_hex(8)}"
        url = service.url + path.format(n=nonce)
        honest = await own.user.get(url)
        for name, value in FORWARDED.items():
            forged = await own.user.get(url, headers={name: value.format(n=nonce)})
            assert shape(forged) == shape(honest), (path, name)
        assert honest.status_code not in range(300, 400), path
        assert nonce not in honest.text + str(honest.headers)


def shape(response: httpx.Response) -> Any:
    """What of an answer may not differ."""
    own = {"date", "x-request-id", "traceparent"}
    body = response.json() if "json" in response.headers.get("content-type", "") else response.text
    if isinstance(body, dict):
        body = {name: value for name, value in body.items() if name not in {"request_id", "rates"}}
    limits = ("ratelimit-", "x-ratelimit-")
    headers = {name: value for name, value in response.headers.items() if not name.startswith(limits)}
    return response.status_code, {name: headers[name] for name in headers.keys() - own}, body


async def test_what_is_for_one_caller_is_kept_by_no_cache(service: Service) -> None:
    own = await service.new_tenant(policy=None)
    for path in ("/v1/me", "/v1/runs", "/v1/users", f"/v1/runs/{uuid4()}", "/v1/me?x=/a.css", "/v1/me/a.css"):
        answer = await own.admin.get(path)
        assert "no-store" in answer.headers["Cache-Control"], path


# The log


async def test_a_line_of_the_log_is_one_line_whatever_it_is_told(
    attacked: Service, tenant: Tenant, capfd: pytest.CaptureFixture[str]
) -> None:
    capfd.readouterr()
    nonces = []
    with configured() as lines:
        for kind in MEANINGFUL:
            nonces.append(nonce := f"n{secrets.token_hex(8)}")
            await _say_everywhere(attacked, tenant, evil(kind, nonce))
        found = said(lines, capfd)  # each line is JSON
        assert len(found) > 100
        whole = json.dumps(found, ensure_ascii=False)
        assert [nonce for nonce in nonces if nonce in whole] == []
        assert {line["level"] for line in found} <= {"info", "warning"}
        for kind in MEANINGFUL:
            structlog.get_logger().warning("control", text=evil(kind, "control"), **{evil(kind, "k"): 1})
            logging.getLogger("uvicorn.error").warning(evil(kind, "control"))
        assert lines.flush(10)
        raw_lines = capfd.readouterr().out
    controls = [json.loads(line) for line in raw_lines.splitlines()]
    assert len(controls) == raw_lines.count("\n") == 2 * len(MEANINGFUL)
    assert {line["level"] for line in controls} == {"warning"}, "what is logged on purpose forges nothing, too"
    assert not set(raw_lines) & set("\x1b\x9b\x07\r\x85\u2028\u202e\u2066")


async def _say_everywhere(service: Service, tenant: Tenant, said: str) -> None:
    admin, user, inside = tenant.admin, tenant.user, quote(said, safe="")
    await user.ask(f"play {said}")
    await user.post("/query", json={"query": "a", said: 1})
    await user.get("/v1/runs", params={"cursor": said, "state": said, said: said})
    await user.get(f"/v1/runs/{inside}")
    await admin.get(f"/v1/workspaces/docs/files/{inside}")
    await admin.put(f"/v1/workspaces/docs/files/{inside}", content=b"x")
    await admin.put(f"/v1/workspaces/{inside}/files/a.txt", content=b"x")
    await admin.post("/v1/policies", content=f"schema: {json.dumps(said)}".encode())
    await admin.post("/v1/users", json={"name": said, "role": "user"})
    await admin.post("/v1/keys", json={"user_id": tenant.user_id, "name": said[:100]})
    await admin.post("/v1/switches", json={"scope": "server", "target": said, "reason": said})
    await admin.post("/v1/issuers", json={"issuer": f"https://{inside}.example", "jwks": {said: said}})
    await service.platform.post("/v1/tenants", json={"slug": said})
    await user.get(f"/{inside}")
    await user.request("FOO", "/v1/me", headers={"X-A": inside})
    await user.get("/v1/me", headers={"Authorization": f"Bearer {inside}", "User-Agent": inside})
    await user.get("/v1/me", headers={"X-Request-Id": inside, "X-Forwarded-For": inside, "traceparent": inside})


# Names of tools that a model makes up: they reach the log, the record, usage and metrics

STARTS: Final = ("=", "+", "-", "@", "\t", "\r", "\n", "\uff1d", "\uff0b", "\uff0d", "\uff20")
FORMULAS: Final = ("=1+1", "+1", "-1", "@SUM(A1)", "\t=1+1", "\r=1+1", "\uff1d1+1", '";=1+1', "a\n=1+1", "a,=1+1")


def names(nonce: str) -> list[str]:
    return [f"{start}{nonce}" for start in FORMULAS] + [evil(kind, nonce) for kind in MEANINGFUL]


async def test_names_that_a_model_makes_up_forge_no_metric_no_cell_and_no_event(
    attacked: Service, model: HijackedModel, capfd: pytest.CaptureFixture[str]
) -> None:
    own, nonce = await attacked.new_tenant(policy=POLICY, files={"own.txt": "own"}), f"n{secrets.token_hex(8)}"
    capfd.readouterr()
    with configured() as lines:
        for name in names(nonce):
            played = await model.play(own, [Call(name)], "done")
            assert played.response.status_code in {200, 502}, played.response.text
        assert len([line for line in said(lines, capfd) if line["event"] == "tool.used"]) == len(names(nonce))
    metrics = await attacked.platform.get("/metrics", headers={"Authorization": f"Bearer {attacked.metrics_token}"})
    assert nonce not in metrics.text
    assert "\nforged_total" not in metrics.text
    await _check_export(own)


@pytest.mark.parametrize("is_off", [False, True], ids=["held", "control"])
async def test_no_cell_of_the_usage_is_a_formula(
    attacked: Service, monkeypatch: pytest.MonkeyPatch, *, is_off: bool
) -> None:
    """Names that no catalogue and no server would have, past all that checks them."""
    own = await attacked.new_tenant(policy=None)
    statement = (
        "insert into usage_tools (tenant_id, day, user_id, tool, allowed, denied, failed, duration_ms)"
        " values (:tenant, current_date, :user, :tool, 1, 1, 0, 5)"
    )
    async with attacked.app.state.database.transaction(UUID(own.id)) as session:
        for name in names("x"):
            await session.execute(text(statement), {"tenant": own.id, "user": own.user_id, "tool": name})
    if is_off:
        monkeypatch.setattr(endpoints, "_FORMULA", ())
    answer = await own.admin.get("/v1/usage", params={"group_by": "tool", "format": "csv"})
    rows = list(csv.reader(io.StringIO(answer.text, newline="")))
    assert [len(row) for row in rows] == [5] * (1 + len(names("x")))
    assert any(cell.startswith(STARTS) for row in rows for cell in row) is is_off


async def _check_export(tenant: Tenant) -> None:
    answer = await tenant.admin.get("/v1/audit/export")
    assert answer.is_success, answer.text
    found = [json.loads(line) for line in answer.content.decode().split("\n") if line]
    assert len(found) > len(MEANINGFUL)
    assert not set(answer.text) & set("\x1b\x9b\x07\r\x85\u2028\u202e")
