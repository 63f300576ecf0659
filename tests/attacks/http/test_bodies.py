"""Bodies that are not what they say, or too much of it; and policies that would cost whoever reads them."""

from __future__ import annotations

import asyncio
import gzip
import json
import secrets
import time
import zlib
from typing import Any, Final

import httpx
import pytest

from tests.service import POLICY, Service, Tenant

JSON: Final = {"Content-Type": "application/json"}
DEEP: Final = 100_000
# What each answer may take at most, on a busy machine.
SOON_S: Final = 5.0


@pytest.fixture(scope="module")
async def tenant(service: Service) -> Tenant:
    return await service.new_tenant(files={"note.md": "hello"})


def query(value: bytes) -> bytes:
    return b'{"query": ' + value + b"}"


BOMB: Final = gzip.compress(query(b'"' + b"a" * 50_000_000 + b'"'))
BODIES: Final[dict[str, tuple[bytes, dict[str, str], set[int]]]] = {
    "lists in lists": (b"[" * DEEP + b"]" * DEEP, {}, {422}),
    "lists without an end": (b"[" * DEEP, {}, {422}),
    "objects in objects": (b'{"a":' * DEEP + b"1" + b"}" * DEEP, {}, {422}),
    "depth that no kind tells": (b"[" * DEEP, {"Content-Type": "text/plain"}, {422}),
    "a number of 900,000 digits": (query(b"9" * 900_000), {}, {422}),
    "an exponent": (query(b"1e999999999"), {}, {422}),
    "a float that is a list's length": (b'{"query": "a", "conversation": 1e400}', {}, {422}),
    "NaN": (query(b"NaN"), {}, {422}),
    "Infinity": (query(b"-Infinity"), {}, {422}),
    "a lone surrogate": (query(b'"\\ud800"'), {}, {422}),
    "a surrogate by its bytes": (query(b'"\xed\xa0\x80"'), {}, {400, 422}),
    "a NUL": (query(b'"a\\u0000b"'), {}, {422}),
    "a raw NUL": (query(b'"a\x00b"'), {}, {422}),
    "overlong UTF-8": (query(b'"\xc0\xaf"'), {}, {400, 422}),
    "Latin-1": (query('"é"'.encode("latin-1")), {"Content-Type": "application/json; charset=latin-1"}, {400, 422}),
    "UTF-16": (json.dumps({"query": "a\0"}).encode("utf-16"), {}, {400, 422}),
    "UTF-7": (query(b'"+AAA-"}x'), {"Content-Type": "application/json; charset=utf-7"}, {422}),
    "two documents": (query(b'"a"') * 2, {}, {422}),
    "ten megabytes": (query(b'"' + b"a" * 10_000_000 + b'"'), {}, {413}),
    "a query above its limit": (query(b'"' + b"a" * 100_001 + b'"'), {}, {422}),
    "many members": (json.dumps({f"a{number}": 1 for number in range(50_000)}).encode(), {}, {422}),
    "members that hash alike": (
        b"{" + b",".join(b'"%d":1' % (n * (2**61 - 1)) for n in range(20_000)) + b"}",
        {},
        {422},
    ),
    "a gzip bomb": (BOMB, {"Content-Encoding": "gzip"}, {400, 422}),
    "a deflate bomb": (zlib.compress(b"a" * 50_000_000), {"Content-Encoding": "deflate"}, {400, 422}),
    "a form": (b"query=a", {"Content-Type": "application/x-www-form-urlencoded"}, {422}),
    "a part of many": (
        b'--b\r\nContent-Disposition: form-data; name="query"\r\n\r\na\r\n--b--\r\n',
        {"Content-Type": "multipart/form-data; boundary=b"},
        {422},
    ),
    "no kind": (query(b'"a"'), {"Content-Type": ""}, {422}),
    "nothing": (b"", {}, {422}),
    "null": (b"null", {}, {422}),
}


@pytest.mark.parametrize("name", BODIES)
async def test_a_body_is_refused_soon_and_nobody_else_waits(service: Service, tenant: Tenant, name: str) -> None:
    body, headers, statuses = BODIES[name]
    began = time.monotonic()
    async with asyncio.TaskGroup() as group:
        told = group.create_task(tenant.user.post("/query", content=body, headers=JSON | headers))
        quick = group.create_task(service.platform.get("/v1/me"))
    response = told.result()
    assert time.monotonic() - began < SOON_S
    assert quick.result().is_success
    assert response.status_code in statuses, (response.status_code, response.text[:500])
    assert response.headers["content-type"] == "application/problem+json"
    assert len(response.content) < 20_000, "an answer is no echo, and no list of everything that is wrong"


async def test_the_same_is_taken_where_it_is_what_it_says(tenant: Tenant) -> None:
    """The control: the place, the credential and the policy refuse nothing."""
    for body in (query(b'"a"'), b' \n{"query":"\\u00e9\\ud83d\\ude00"}', query(b'"' + b"a" * 900 + b'"')):
        response = await tenant.user.post("/query", content=body, headers=JSON)
        assert response.status_code == 200, response.text


METHODS: Final = (
    "TRACE",
    "TRACK",
    "PROPFIND",
    "LOCK",
    "SEARCH",
    "M-SEARCH",
    "PURGE",
    "DEBUG",
    "LINK",
    "OPTIONS",
    "HEAD",
)


@pytest.mark.parametrize("method", METHODS)
async def test_a_method_that_is_none_of_ours_does_nothing(tenant: Tenant, method: str) -> None:
    for path in ("/v1/me", "/query", "/docs/start.js", f"/v1/users/{tenant.user_id}"):
        answer = await tenant.admin.request(method, path)
        assert answer.status_code in {400, 405}, (path, answer.text)
        assert tenant.admin.headers["Authorization"] not in answer.text


async def test_405_names_all_methods_of_a_path(tenant: Tenant) -> None:
    """Found by Schemathesis: the framework names those of the first route alone."""
    for path, allowed in {
        "/v1/users": "GET, POST",
        f"/v1/users/{tenant.user_id}": "GET, PATCH",
        "/v1/secrets/a": "DELETE, GET, PUT",
        "/query": "POST",
    }.items():
        assert (await tenant.admin.request("TRACE", path)).headers["Allow"] == allowed


NUMBERS: Final = (
    "/v1/runs?since=0.5",
    "/v1/runs?until=1e3",
    "/v1/audit/events?to=0",
    "/v1/usage?from=0",
    "/v1/usage?to=9.5",
)


async def test_a_number_is_no_moment(tenant: Tenant) -> None:
    """Found by Schemathesis: a year that was meant came to be seconds since 1970."""
    for path in NUMBERS:
        assert (await tenant.admin.get(path)).status_code == 422, path
    answer = await tenant.admin.post("/v1/keys", json={"user_id": tenant.user_id, "name": "a", "expires_at": 4e9})
    assert answer.status_code == 422
    for path in ("/v1/runs?since=2026-01-01T00:00:00Z", "/v1/usage?to=2026-11-01&from=2026-11-01"):
        assert (await tenant.admin.get(path)).status_code == 200, "the control"


async def test_many_parameters_and_twins_cost_little_and_answer_as_one_does(tenant: Tenant) -> None:
    many = "&".join(f"a{number}=1" for number in range(1_000))
    for path in (
        f"/v1/runs?{many}",
        "/v1/runs?limit=1&limit=2",
        "/v1/users?cursor=" + "a" * 6_000,
        "/v1/runs?limit=9e9",
    ):
        began = time.monotonic()
        answer = await tenant.admin.get(path)
        assert answer.status_code in {200, 422}, answer.text[:300]
        assert time.monotonic() - began < SOON_S
        assert len(answer.content) < 20_000


# Policies


def aliases(depth: int) -> str:
    lines = ["a0: &a0 [x, x]"] + [f"a{n}: &a{n} [*a{n - 1}, *a{n - 1}]" for n in range(1, depth)]
    return "\n".join(lines)


def with_rules(text: str) -> str:
    return POLICY + "rules: |\n" + "".join(f"  {line}\n" for line in text.splitlines())


POLICIES: Final[dict[str, str]] = {
    "a bomb of aliases": aliases(40),
    "an alias to itself": "a: &a [*a]",
    "a merge": POLICY + "x: &x {a: 1}\ny: {<<: *x}",
    "an object of Python's": POLICY + "instructions: !!python/object/apply:os.system ['true']",
    "a tag": POLICY + "instructions: !!binary aGk=",
    "lists in lists": "a: " + "[" * 50_000,
    "indentation": "\n".join(" " * n + "a:" for n in range(1_000)),
    "a flow without an end": POLICY + "tools2: {" * 20_000,
    "two documents": POLICY + "---\n" + POLICY,
    "a key twice": POLICY + "limits: {requests: 999999/minute}",
    "an expression of a million": POLICY + "input: {block: ['" + "a" * 900_000 + "']}",
    "nested groups": POLICY + "input: {block: ['" + "(" * 40_000 + ")" * 40_000 + "']}",
    "a count of counts": POLICY + "input: {block: ['((a{1000}){1000}){1000}']}",
    "many expressions": POLICY + "input: {block: [" + ",".join(f"'a{n}'" for n in range(80_000)) + "]}",
    "a name that looks like another": POLICY.replace("docs:", "d\u043ecs:"),
    "a name turned around": POLICY.replace("docs:", "do\u202ecs:"),
    "a wide name": POLICY.replace("docs:", "\uff44ocs:"),
    "a surrogate": POLICY + 'instructions: "\\ud800"',
    "many servers": POLICY + "".join(f"  s{n}: {{template: filesystem, root: docs}}\n" for n in range(20_000)),
    "a number of digits": POLICY.replace("20}", "9" * 200_000 + "}"),
    "sexagesimal": POLICY.replace("20}", "1:" * 50_000 + "1}"),
    "Cedar that is deep": with_rules("permit(principal, action, resource) when { " + "(" * 50_000 + "true };"),
    "Cedar that is huge": with_rules("permit(principal, action, resource);\n" * 20_000),
    "Cedar of negations": with_rules("permit(principal, action, resource) when { " + "!" * 100_000 + "true };"),
    "Cedar of likes": with_rules(
        'permit(principal, action, resource) when { context.a like "' + "*a" * 200_000 + '" };'
    ),
    "bytes": "\x7fELF" + "\x01" * 1_000,
    "too large": "#" * 1_200_000,
}


@pytest.mark.parametrize("name", POLICIES)
async def test_a_hostile_policy_is_refused_clearly_and_soon(service: Service, tenant: Tenant, name: str) -> None:
    content = POLICIES[name].encode("utf-8", "surrogatepass")
    for path in ("/v1/policies/validate", "/v1/policies"):
        began = time.monotonic()
        async with asyncio.TaskGroup() as group:
            told = group.create_task(tenant.admin.post(path, content=content))
            quick = group.create_task(service.platform.get("/v1/me"))
        response = told.result()
        assert time.monotonic() - began < SOON_S, name
        assert quick.result().is_success
        check_refused(response)


def check_refused(response: httpx.Response) -> None:
    body: dict[str, Any] = response.json()
    if response.status_code == 200:  # of `validate`, which says it in its answer
        assert body.get("errors") or body.get("is_valid") is False, body
        return
    assert response.status_code in {413, 422}, (response.status_code, response.text[:400])
    assert body["code"] in {"policy_invalid", "invalid_request", "too_large"}, body
    assert len(response.content) < 20_000
    assert "Traceback" not in response.text


async def test_a_policy_that_is_none_of_that_is_taken(tenant: Tenant) -> None:
    """The control."""
    for text in (POLICY, POLICY + f"instructions: {secrets.token_hex(400)}\n", POLICY + "input: {block: ['a{10}']}\n"):
        assert (await tenant.admin.post("/v1/policies", content=text.encode())).status_code == 201
