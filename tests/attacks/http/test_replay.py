"""Whatever one tenant has that another could send: in a path, a parameter, a header or a body, it is what nobody has.

tests/test_isolation.py replays ids in paths; here is the rest, and the answers are compared to the last header.
"""

from __future__ import annotations

import json
import secrets
import uuid
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

import httpx
import pytest
from sqlalchemy import make_url

from app.db import DatabaseUrls
from app.embedded.postgres import EmbeddedPostgres
from tests.openapi import crashing
from tests.service import POLICY, Client, Databases, Service, Tenant, running_service
from tests.test_isolation import World, new_world, unknown

SPEC: Final[dict[str, Any]] = json.loads((Path(__file__).parents[2] / "openapi.json").read_text())
# What differs with every request, or says how many were sent.
OWN_HEADERS: Final = {
    *("date", "x-request-id", "traceparent", "location", "content-length"),
    *("ratelimit-remaining", "x-ratelimit-remaining", "ratelimit-reset", "x-ratelimit-reset"),
}


@dataclass(frozen=True, slots=True)
class Replay:
    """A request with a place for something of a tenant's."""

    method: str
    path: str
    what: str  # of the world's ids
    params: Mapping[str, str] | None = None
    body: Any = None
    headers: Mapping[str, str] | None = None

    def __str__(self) -> str:
        place = "params" if self.params else "body" if self.body else "headers" if self.headers else "path"
        return f"{self.method} {self.path} {place} {self.what}"

    async def send(self, client: Client, ids: Mapping[str, str]) -> httpx.Response:
        """With the id in its place: `{}` anywhere."""
        filled = json.loads(json.dumps([self.params, self.body, self.headers]).replace("{}", ids[self.what]))
        path = self.path.replace("{}", ids[self.what])
        return await client.request(self.method, path, params=filled[0], json=filled[1], headers=filled[2])


REPLAYS: Final = [
    Replay("GET", "/v1/approvals", "waiting_run", params={"run_id": "{}"}),
    Replay("GET", "/v1/audit/events", "run_id", params={"run_id": "{}"}),
    Replay("GET", "/v1/audit/events", "asker", params={"actor_id": "{}"}),
    Replay("GET", "/v1/audit/events", "tool", params={"tool": "{}"}),
    Replay("GET", "/v1/runs", "asked", params={"conversation": "{}"}),
    Replay("GET", "/v1/runs", "asker", params={"user": "{}"}),
    Replay("DELETE", "/v1/workspaces/docs", "user_id", params={"user_id": "{}"}),
    Replay("GET", "/v1/policies/1/explain", "user_id", params={"user_id": "{}"}),
    Replay("GET", "/v1/policies/1/explain", "tool", params={"tool": "{}"}),
    Replay("GET", "/v1/policies/1/diff", "version", params={"against": "{}"}),
    Replay("POST", "/v1/policies/1/dry-run", "user_id", body={"as": {"user_id": "{}"}, "query": "hello"}),
    Replay("POST", "/v1/keys", "user_id", body={"user_id": "{}", "name": "stolen"}),
    Replay("POST", "/query", "conversation_id", body={"query": "What was said?", "conversation": "{}"}),
    Replay("POST", "/v1/runs", "conversation_id", body={"query": "What was said?", "conversation": "{}"}),
    Replay("GET", "/v1/runs/{}/events", "run_id", headers={"Last-Event-ID": "1", "Accept": "text/event-stream"}),
    Replay("GET", "/v1/runs/{}/events", "run_id", params={"after": "1"}),
    Replay("PATCH", "/v1/users/{}", "user_id", body={"role": "user"}, headers={"If-Match": "*"}),
    Replay("DELETE", "/v1/secrets/{}", "name", headers={"If-Match": "*"}),
    Replay("DELETE", "/v1/issuers/{}", "issuer_id", headers={"If-Match": "*"}),
    Replay("POST", "/v1/users/{}/erase", "user_id", headers={"If-Match": "*"}),
    Replay("POST", "/v1/policies/rollback", "version", body={"to": "{}"}),
    Replay("GET", "/v1/workspaces/{}/files", "name", params={"limit": "1"}),
]


def shape(response: httpx.Response, sent: str) -> Any:
    """All of an answer that may not differ, without what was sent."""
    try:
        body = {
            name: value for name, value in response.json().items() if name not in {"request_id", "run_id", "created_at"}
        }
    except ValueError:
        body = {"text": response.text}
    headers = {name: value for name, value in response.headers.items() if name not in OWN_HEADERS}
    return response.status_code, json.dumps([body, headers], sort_keys=True).replace(
        sent, "{}" if len(sent) > 8 else sent
    )


@pytest.fixture(scope="module")
async def world(service: Service) -> World:
    return await complete(await new_world(service))


async def complete(world: World) -> World:
    approval = await world.tenant.admin.get(f"/v1/approvals/{world.ids['approval_id']}")
    world.ids |= {
        "waiting_run": approval.json()["run_id"],
        "asker": world.tenant.user_id,
        "asked": world.conversation,
        "tool": f"{world.nonce()}__read_file",
    }
    return world


def nobodys(ids: dict[str, str]) -> dict[str, str]:
    more = {name: str(uuid.uuid4()) for name in ("waiting_run", "asker", "asked")}
    return unknown(ids) | {"tool": "nowhere__read_file"} | more


@pytest.fixture(scope="module")
async def other(service: Service) -> Tenant:
    return await service.new_tenant(policy=POLICY, files={"note.md": "nothing of interest"})


def test_every_parameter_that_takes_an_id_is_replayed() -> None:
    """Of the description: a new parameter, or a member of a body, needs a row here or above."""
    found = {
        (f"{method.upper()} {path}", parameter["name"])
        for path, methods in SPEC["paths"].items()
        for method, operation in methods.items()
        for parameter in operation.get("parameters", ())
        if parameter["in"] == "query" and ("uuid" in json.dumps(parameter) or parameter["name"].endswith("_id"))
    }
    replayed = {(f"{row.method} {_template(row.path)}", name) for row in REPLAYS if row.params for name in row.params}
    of_the_platform = {row for row in found if "/v1/tenants/" in row[0]}
    assert found - replayed - of_the_platform == set()


def _template(path: str) -> str:
    known = {"/v1/workspaces/docs": "/v1/workspaces/{name}", "/v1/policies/1/explain": "/v1/policies/{version}/explain"}
    return known.get(path, path)


@pytest.mark.parametrize("row", REPLAYS, ids=str)
async def test_anothers_is_nobodys(world: World, other: Tenant, row: Replay) -> None:
    missing = nobodys(world.ids)
    for client in (other.admin, other.user):
        theirs, none = await row.send(client, world.ids), await row.send(client, missing)
        sent = world.ids[row.what]
        assert shape(theirs, sent) == shape(none, missing[row.what])
        assert world.found_in(theirs, supplied=sent) == []
    if row.method == "GET" and row.what not in {"version", "tool"}:
        none, own = [await row.send(world.tenant.admin, ids) for ids in (missing, world.ids)]
        assert shape(own, world.ids[row.what]) != shape(none, missing[row.what]), "the row asks for nothing"


TAGGED: Final = ("/v1/users/{user_id}", "/v1/issuers/{issuer_id}", "/v1/secrets/{name}", "/v1/policies/published")


async def test_an_etag_of_another_tenant_opens_nothing(world: World, other: Tenant) -> None:
    tags = [(await world.tenant.admin.get(path.format_map(world.ids))).headers["ETag"] for path in TAGGED]
    assert len(set(tags)) == len(TAGGED)
    user = await other.admin.make("/v1/users", json={"name": "x", "role": "user"})
    await other.admin.put("/v1/secrets/own", json={"value": "v"})
    for tag in tags:
        for method, path, body in (
            ("PATCH", f"/v1/users/{user['id']}", {"role": "auditor"}),
            ("POST", "/v1/policies/1/publish", {}),
            ("DELETE", "/v1/secrets/own", None),
        ):
            answer = await other.admin.request(method, path, json=body, headers={"If-Match": tag})
            assert (answer.status_code, answer.json()["code"]) == (412, "precondition_failed"), (path, answer.text)
            assert world.found_in(answer) == []
    own = (await other.admin.get("/v1/secrets/own")).headers["ETag"]
    answer = await other.admin.delete("/v1/secrets/own", headers={"If-Match": own})
    assert answer.status_code == 204, "the control"


async def test_things_that_are_alike_have_tags_of_their_own(service: Service) -> None:
    """A tag that a tenant could compute would tell whether another's thing is like it."""
    made = [await service.new_tenant(policy=POLICY) for _ in range(2)]
    for tenant in made:
        await tenant.admin.put("/v1/secrets/same", json={"value": "same"})
    for path in ("/v1/secrets/same", "/v1/policies/published"):
        first, second = [(await tenant.admin.get(path)).headers["ETag"] for tenant in made]
        assert first != second, path


KEYED: Final[list[tuple[str, Callable[[Tenant], Any]]]] = [
    ("/v1/users", lambda _: {"name": "same", "role": "user"}),
    ("/v1/conversations", lambda _: None),
    ("/v1/switches", lambda _: {"scope": "server", "target": "same", "reason": "same"}),
    ("/query", lambda _: {"query": "List the files"}),
    ("/v1/runs", lambda _: {"query": "List the files"}),
]


@pytest.mark.parametrize(("path", "body"), KEYED, ids=[path for path, _ in KEYED])
async def test_an_idempotency_key_of_another_tenant_is_a_new_one(
    service: Service, world: World, other: Tenant, path: str, body: Callable[[Tenant], Any]
) -> None:
    key = {"Idempotency-Key": f"k{secrets.token_hex(8)}"}
    first, second = [await tenant.admin.post(path, json=body(tenant), headers=key) for tenant in (world.tenant, other)]
    assert first.is_success, first.text
    assert second.is_success, second.text
    assert "idempotency-replayed" not in second.headers
    ids = [answer.json().get("run_id") or answer.json()["id"] for answer in (first, second)]
    assert ids[0] != ids[1]
    assert ids[0] not in second.text + str(second.headers)
    again = await world.tenant.admin.post(path, json=body(world.tenant), headers=key)
    assert ids[0] in again.text, "the control: its own key gives it again"


CURSORED: Final = sorted(
    path
    for path, methods in SPEC["paths"].items()
    if any(parameter["name"] == "cursor" for parameter in methods.get("get", {}).get("parameters", ()))
)


async def test_no_cursor_of_another_tenant_or_list_continues_anything(world: World, other: Tenant) -> None:
    ids, taken = world.ids, {}
    for path in CURSORED:
        if not path.startswith(("/v1/tenants", "/v1/platform")):
            answer = await world.tenant.admin.get(path.format_map(ids), params={"limit": 1})
            assert answer.is_success, (path, answer.text)
            taken[path] = answer.json()["next_cursor"]
    taken = {path: cursor for path, cursor in taken.items() if cursor}
    assert len(taken) >= 5
    for path in taken:
        if "{" in path:
            continue
        for cursor in taken.values():
            answer = await other.admin.get(path, params={"cursor": cursor})
            assert (answer.status_code, answer.json()["code"]) == (422, "invalid_cursor"), path
            assert world.found_in(answer) == []
        foreign = next(cursor for of, cursor in taken.items() if of != path)
        assert (await world.tenant.admin.get(path, params={"cursor": foreign})).status_code == 422
        assert (await world.tenant.admin.get(path, params={"cursor": taken[path]})).status_code == 200, "the control"


@pytest.fixture
async def unbound(databases: Databases, postgres: EmbeddedPostgres, tmp_path: Path) -> AsyncIterator[Service]:
    def without_row_security() -> DatabaseUrls:
        urls = databases()
        return replace(urls, app=postgres.url("postgres", make_url(urls.app).database or ""))

    async with running_service(without_row_security, tmp_path) as service:
        yield service


@pytest.mark.long  # tests/test_isolation.py shows the same of ids in paths
async def test_without_row_level_security_the_same_rows_find_the_first_tenant(unbound: Service) -> None:
    """The control of all rows: what reaches another tenant then is what row-level security holds."""
    world, thief = await complete(await new_world(unbound)), await unbound.new_tenant(policy=None)
    missing, reached = nobodys(world.ids), set()
    for row in REPLAYS:
        with crashing():  # a run without its user's key
            theirs, none = await row.send(thief.admin, world.ids), await row.send(thief.admin, missing)
        if shape(theirs, world.ids[row.what]) != shape(none, missing[row.what]):
            reached.add(str(row))
    assert {"GET /v1/audit/events params run_id", "GET /v1/runs params asker"} <= reached
    assert len(reached) > 8, reached
