"""A query whose tool is a remote server's: through the policy, the bridge and the relay."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from datetime import UTC, datetime
from typing import Any

import pytest

from app.auth import tokens
from app.auth.jwks import parse_jwks
from app.auth.tokens import TrustedIssuer
from tests.runs.faults import ScriptedModel
from tests.servers.http.lab import SECRET, Good, serving_good
from tests.servers.http.villain import Villain, serving_villain
from tests.servers.site import LOCAL, make_trust
from tests.service import DEFAULT_MODEL_POLICY, Databases, Service, Tenant, running_service

PUBLIC_URL = "https://agents.example.com"


@pytest.fixture(scope="module")
async def ground(
    scripted: ScriptedModel, databases: Databases, tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[tuple[Service, Good, Villain]]:
    """A service whose bridges may reach loopback, where a good remote server is, and a bad one."""
    folder = tmp_path_factory.mktemp("http")
    trust = make_trust(folder)
    trust.ca_file.chmod(0o644)
    settings: dict[str, Any] = {
        "server_ca_file": trust.ca_file,
        "egress_private_networks": {"http": ("127.0.0.0/8", "::1/128")},
        "public_url": PUBLIC_URL,
    }
    async with AsyncExitStack() as stack:
        good = await stack.enter_async_context(serving_good(trust.server))
        villain = await stack.enter_async_context(serving_villain(trust.server))
        running = running_service(databases, folder / "data", model=scripted.endpoint, **settings)
        yield await stack.enter_async_context(running), good, villain


def policy(port: int, keys: str = "") -> str:
    headers = '{Authorization: "Bearer secret:remote"}'
    declared = f"far: {{template: http, url: 'https://{LOCAL}:{port}/mcp', headers: {headers}{keys}}}"
    text = DEFAULT_MODEL_POLICY.replace("docs: {template: filesystem, root: docs}", declared)
    return text.replace('"docs__*"', '"far__*"')


async def tenant_with_secret(service: Service) -> Tenant:
    tenant = await service.new_tenant(policy=None)
    stored = await tenant.admin.put("/v1/secrets/remote", json={"value": SECRET})
    assert stored.is_success, stored.text
    return tenant


async def told(tenant: Tenant, model: ScriptedModel, tool: str, **arguments: Any) -> str:
    """What the model was told of a call."""
    model.calls(tool, **arguments)
    model.says("done")
    answer = await tenant.user.ask("Ask the remote server.")
    assert answer.status_code == 200, answer.text
    text: str = model.bodies[-1]["messages"][-1]["content"]
    return text


async def test_a_call_reaches_the_remote_server_with_the_secret_and_with_whom_it_is_for(
    ground: tuple[Service, Good, Villain], model: ScriptedModel
) -> None:
    service, good, _ = ground
    tenant = await tenant_with_secret(service)
    await tenant.admin.publish(policy(good.port, ", identity: true"))
    good.requests.clear()
    assert await told(tenant, model, "far__add", a=2, b=3) == "5"
    assert await told(tenant, model, "far__told") == "[redacted]"
    assert set(good.headers("authorization")) == {f"Bearer {SECRET}"}
    events = await tenant.admin.events()
    opened = [event["data"] for event in events if event["type"] == "egress.opened"]
    assert {(data["server"], data["host"], data["port"]) for data in opened} == {("far", LOCAL, good.port)}
    assert len(opened) >= len(good.requests)
    runs = [event["run_id"] for event in events if event["type"] == "run.started"]
    seen = [token for token in good.headers("bulkhead-identity") if token is not None]
    keys = parse_jwks(json.dumps((await tenant.user.get("/.well-known/jwks.json")).json()).encode())
    issuer = TrustedIssuer(PUBLIC_URL, f"https://{LOCAL}:{good.port}", keys)
    claims = [tokens.verify(token, issuer, now=datetime.now(UTC)).claims for token in seen]
    assert [(each["run_id"], each["tool"]) for each in claims] == list(zip(runs, ["add", "told"], strict=True))
    assert {(each["sub"], each["tenant"], each["role"]) for each in claims} == {(tenant.user_id, tenant.id, "user")}
    nowhere = [json.dumps(events), json.dumps(model.bodies), "\n".join(service.server_journal(tenant, "far"))]
    for text in nowhere:
        assert SECRET not in text
        assert not any(token in text for token in seen)


async def test_a_remote_server_that_echoes_the_secret_shows_it_to_no_model(
    ground: tuple[Service, Good, Villain], model: ScriptedModel
) -> None:
    service, _, villain = ground
    tenant = await tenant_with_secret(service)
    await tenant.admin.publish(policy(villain.port))
    text = await told(tenant, model, "far__act", what="echo")
    assert "POST /mcp" in text
    assert SECRET not in text
    assert "[redacted]" in text


async def test_why_a_policy_cannot_be_published_is_told_without_the_secret(
    ground: tuple[Service, Good, Villain],
) -> None:
    service, _, villain = ground
    tenant = await tenant_with_secret(service)
    villain.greeting = "unauthorized"
    created = await tenant.admin.make("/v1/policies", content=policy(villain.port).encode())
    refused = await tenant.admin.post(f"/v1/policies/{created['version']}/publish", json={})
    villain.greeting = "good"
    assert (refused.status_code, refused.json()["code"]) == (503, "server_unavailable")
    assert "answers 401" in refused.json()["detail"]
    assert SECRET not in refused.text
    published = await tenant.admin.post(f"/v1/policies/{created['version']}/publish", json={})
    assert published.is_success, published.text  # the control
