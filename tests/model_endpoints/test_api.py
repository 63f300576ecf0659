"""The platform's model endpoints: on every process within a second, and never with their credentials."""

from __future__ import annotations

import asyncio
import re
import secrets
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from typing import Any

import pytest

from app.model_endpoints.following import StoredModels
from app.outbound.catalogue import ModelCatalogue, base_url_fault
from tests.runs.faults import completion, response
from tests.service import POLICY, Client, Service, Tenant


@dataclass(slots=True)
class Model:
    """A model endpoint that keeps the credentials that it is shown and repeats the one it was shown first."""

    port: int = 0
    seen: list[str] = field(default_factory=list)

    async def serve(self, reading: asyncio.StreamReader, writing: asyncio.StreamWriter) -> None:
        """One request."""
        head = (await reading.readuntil(b"\r\n\r\n")).decode()
        await reading.readexactly(int(re.findall(r"(?i)content-length: (\d+)", head)[0]))
        self.seen += re.findall(r"(?i)authorization: Bearer (\S+)", head)
        writing.write(response(completion(f"My credential is {self.seen[0]}.")))
        writing.close()

    def body(self, **changes: Any) -> dict[str, Any]:
        """What adds it to the catalogue."""
        return {
            "name": f"m-{secrets.token_hex(6)}",
            "base_url": f"http://127.0.0.1:{self.port}/v1",
            "models": ["small", "large"],
            "credential": f"sk-{secrets.token_hex(12)}",
        } | changes


@pytest.fixture
async def listen() -> AsyncIterator[Callable[[], Any]]:
    servers: list[asyncio.Server] = []

    async def new() -> Model:
        model = Model()
        servers.append(await asyncio.start_server(model.serve, "127.0.0.1", 0))
        model.port = servers[-1].sockets[0].getsockname()[1]
        return model

    yield new
    for server in servers:
        server.close()


async def names(client: Client) -> set[str]:
    return {item["name"] for item in (await client.get("/v1/models")).json()["items"]}


async def until(holds: Callable[[], Any]) -> None:
    """A second at most."""
    async with asyncio.timeout(1.0):
        while not await holds():  # noqa: ASYNC110  what another process has taken up tells nobody
            await asyncio.sleep(0.02)


async def added(service: Service, body: dict[str, Any]) -> str:
    entry: str = (await service.platform.make("/v1/platform/models", json=body))["id"]

    async def is_there() -> bool:
        return body["name"] in await names(service.platform)

    await until(is_there)
    return f"/v1/platform/models/{entry}"


async def using(service: Service, name: str, *, model: str = "small") -> Tenant:
    use = f"{{use: {name}, name: {model}}}"
    return await service.new_tenant(policy=POLICY.replace("{use: rehearsal}", use), files={"a.md": "a"})


async def test_an_endpoint_answers_and_is_changed_and_removed_without_a_restart(service: Service, listen: Any) -> None:
    first, second = await listen(), await listen()
    body = first.body()
    path = await added(service, body)
    tenant = await using(service, body["name"])
    asked = await tenant.user.ask("Who are you?")
    assert asked.json()["answer"] == "My credential is [redacted]."
    assert first.seen == [body["credential"]]

    change = {"base_url": f"http://127.0.0.1:{second.port}/v1", "credential": f"sk-{secrets.token_hex(12)}"}
    assert (await service.platform.patch(path, json=change)).status_code == 200

    async def is_asked() -> bool:
        return (await tenant.user.ask("And now?")).is_success and bool(second.seen)

    await until(is_asked)
    assert second.seen[0] == change["credential"]

    assert (await service.platform.patch(path, json={"is_enabled": False})).json()["is_enabled"] is False

    async def is_gone() -> bool:
        return body["name"] not in await names(tenant.admin)

    await until(is_gone)
    asked = await tenant.user.ask("Are you there?")
    assert (asked.status_code, asked.json()["code"]) == (502, "model_failed")
    refused = await tenant.admin.post("/v1/policies/1/publish")
    assert [fault["path"] for fault in refused.json()["errors"]] == ["/model/use"]
    assert (await service.platform.delete(path)).status_code == 204
    assert (await service.platform.get(path)).status_code == 404


async def test_another_process_takes_it_up_by_itself(service: Service, listen: Any) -> None:
    state, catalogue = service.app.state, ModelCatalogue({})
    learnt: list[str] = []
    stored = StoredModels(platform=state.platform, keyring=state.keyring, catalogue=catalogue, conceal=learnt.extend)
    keeping = asyncio.create_task(stored.keep())
    body = (await listen()).body()
    path = await added(service, body)

    async def is_there() -> bool:
        return body["name"] in catalogue.endpoints

    await until(is_there)
    assert catalogue.endpoints[body["name"]].api_key == body["credential"]
    assert body["credential"] in learnt
    assert (await service.platform.delete(path)).status_code == 204

    async def is_gone() -> bool:
        return body["name"] not in catalogue.endpoints

    await until(is_gone)
    keeping.cancel()


async def test_a_credential_is_told_to_nobody(service: Service, listen: Any) -> None:
    body = (await listen()).body()
    tenant = await service.new_tenant(policy=None)
    path = await added(service, body)
    answers = [
        await service.platform.get(path),
        await service.platform.get("/v1/platform/models"),
        await service.platform.patch(path, json={"credential": body["credential"]}),
        await service.platform.get("/v1/models"),
        await tenant.admin.get("/v1/models"),
        await service.platform.get("/readyz"),
    ]
    assert all(answer.is_success for answer in answers)
    events = await service.platform.events()
    assert body["name"] in str(events)
    assert body["credential"] not in f"{[answer.text for answer in answers]}{events}"
    assert "base_url" not in answers[4].text
    rows = await service.sql("select credential from model_endpoints", role="platform")
    assert not any(body["credential"].encode() in row.credential for row in rows)


async def test_the_record_has_an_endpoint_as_it_was_and_as_it_became(service: Service, listen: Any) -> None:
    cheap = {"from": "2020-01-01", "input": "0.1", "output": "2"}
    dear = {"from": "2021-01-01", "input": "9", "output": "2"}
    body = (await listen()).body(prices={"small": [cheap], "large": [dear]})
    path = await added(service, body)
    switched = {"models": ["small"], "is_enabled": False}
    for change in ({"prices": {"small": [cheap, dear]}}, switched, {"credential": body["credential"]}):
        assert (await service.platform.patch(path, json=change)).is_success
    assert (await service.platform.delete(path)).is_success

    told = [event for event in await service.platform.events() if event["data"].get("name") == body["name"]]
    first, second = "2020-01-01: 0.1, 2", "2021-01-01: 9, 2"
    same = {"base_url": body["base_url"]}
    before = same | {"models": ["small", "large"], "is_enabled": True}
    was, became = {"prices of small": [first], "prices of large": [second]}, {"prices of small": [first, second]}
    assert [(event["type"], event["data"].get("before"), event["data"].get("after")) for event in told] == [
        ("model_endpoint.added", None, before | was),
        ("model_endpoint.changed", was, became),
        ("model_endpoint.changed", {"models": ["small", "large"], "is_enabled": True}, switched),
        ("model_endpoint.changed", {}, {}),
        ("model_endpoint.removed", same | switched | became, None),
    ]
    changed = [event["data"]["changed"] for event in told[1:4]]
    assert changed == [["prices"], ["is_enabled", "models"], ["credential"]]


async def test_a_price_of_a_model_with_a_name_beyond_measure_is_recorded(service: Service, listen: Any) -> None:
    """Nothing that the catalogue takes may be too long for the record: then the change would fail."""
    many = [{"from": f"{year}-01-01", "input": "0.1", "output": "2"} for year in range(2000, 2100)]
    body = (await listen()).body(prices={"m" * 2_000: many})
    path = await added(service, body)
    assert (await service.platform.delete(path)).is_success
    (event, _) = [event for event in await service.platform.events() if event["data"].get("name") == body["name"]]
    (lines,) = [told for name, told in event["data"]["after"].items() if name.startswith("prices of mmm")]
    assert len(lines) == len(many)


async def test_a_tenant_sees_names_and_nothing_else_of_the_catalogue(service: Service) -> None:
    tenant = await service.new_tenant(policy=None)
    (entry,) = [item for item in (await tenant.admin.get("/v1/models")).json()["items"] if item["name"] == "rehearsal"]
    assert entry.keys() == {"name", "models", "default"}
    for method, path in (("GET", "/v1/platform/models"), ("POST", "/v1/platform/models")):
        assert (await tenant.admin.request(method, path, json={})).status_code == 403


async def test_a_stored_entry_hides_none_of_the_settings(service: Service, listen: Any) -> None:
    body = (await listen()).body()
    answer = await service.platform.post("/v1/platform/models", json=body | {"name": "rehearsal"})
    assert (answer.status_code, answer.json()["code"]) == (409, "name_taken")
    await added(service, body)
    answer = await service.platform.post("/v1/platform/models", json=body)
    assert (answer.status_code, answer.json()["code"]) == (409, "name_taken")


@pytest.mark.parametrize("credential", ["sk-\\ud800aaaa", "sk-\u00e9-aaaa", "sk-aaaa\\n", "sk aaaa"])
async def test_what_no_header_carries_is_no_credential(service: Service, credential: str) -> None:
    path = "/v1/platform/models"
    body = b'{"name": "n", "base_url": "https://api.example.com", "models": ["a"], "credential": "%s"}'
    headers = {"Content-Type": "application/json"}
    answer = await service.platform.post(path, content=body % credential.encode(), headers=headers)
    assert (answer.status_code, answer.json()["errors"][0]["path"]) == (422, "/body/credential")
    assert credential[-4:] not in answer.text


async def test_readiness_names_no_stored_model_to_the_public(service: Service, listen: Any) -> None:
    body = (await listen()).body()
    await added(service, body)
    models = (await service.platform.get("/readyz")).json()["models"]
    assert "rehearsal" in models
    assert body["name"] not in models


async def test_a_change_needs_the_tag_of_what_is_there(service: Service, listen: Any) -> None:
    path = await added(service, (await listen()).body())
    seen = {"If-Match": (await service.platform.get(path)).headers["etag"]}
    assert (await service.platform.patch(path, json={"models": ["a"]}, headers=seen)).status_code == 200
    assert (await service.platform.patch(path, json={"models": ["b"]}, headers=seen)).status_code == 412
    assert (await service.platform.delete(path, headers=seen)).status_code == 412
    assert (await service.platform.patch(path, json={})).status_code == 422


FORBIDDEN = [
    "",
    "api.example.com",
    "ftp://api.example.com",
    "http://api.example.com",
    "https://",
    "https://user:secret@api.example.com",
    "https://api.example.com/?key=1",
    "https://api.example.com/#x",
    "https://10.0.0.1/v1",
    "https://169.254.169.254/latest",
    "https://[::ffff:10.0.0.1]/v1",
    "https://[fd00:ec2::254]/v1",
    "https://xn--/v1",
    "https://api.example.com/\ud800",
]
LOCAL = ["http://127.0.0.1:1/v1", "https://localhost/v1", "http://[::1]/v1"]


@pytest.mark.parametrize("url", [*FORBIDDEN, *LOCAL])
def test_an_address_that_models_may_not_have_is_refused(url: str) -> None:
    assert base_url_fault(url, allow_loopback=False) is not None
    assert (base_url_fault(url, allow_loopback=True) is None) == (url in LOCAL)


def test_a_public_address_is_taken() -> None:
    assert base_url_fault("https://api.example.com/v1", allow_loopback=False) is None


async def test_the_route_refuses_such_an_address_and_says_where(service: Service, listen: Any) -> None:
    body = (await listen()).body(base_url="https://10.0.0.1/v1")
    answer = await service.platform.post("/v1/platform/models", json=body)
    assert answer.status_code == 422
    assert answer.json()["errors"][0]["path"] == "/body/base_url"
